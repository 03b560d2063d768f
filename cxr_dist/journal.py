"""The metrics that a run's writers log, through a journal of their own.

Metrics are local first: every record is in a file before anyone tries to send it, so no server can stop training; nor can
a full disk, which only costs that copy. The file is JSON lines: a header (`format`, `run_id`), then one record a line
(`step`, `timestamp` in milliseconds, `metrics`). One background thread sends what the server has not confirmed; what it
already has of a (key, step) is asked of the server, so records may be sent again, after a crash or from another process,
and each (key, step) is still logged once.
"""

import errno
import io
import itertools
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from cxr_dist.errors import DataError
from cxr_dist.scrub import scrub

__all__ = [
    "MetricJournal",
    "dump",
    "load",
    "num_missing",
    "send_records",
    "send_unsent",
]

FORMAT = "cxr-dist-metrics/1"
RECORDS_PER_SEND = 200
METRICS_PER_REQUEST = 1000
LONGEST_WAIT_S = 10.0
ATTEMPTS_WHILE_CLOSING = 3
MOST_CARRIED = 10_000
"""Records that a checkpoint carries at most, some megabytes."""

log = logging.getLogger(__name__)


class MetricJournal:
    """The metrics of one writer (rank 0, or the driver) of one MLflow run.

    `log` writes a line to the file and returns; it never waits for the server and never raises because of it. A
    (key, step) that the file already has is dropped: a step replayed after a restart is logged once. Opening an
    existing file of the same run goes on where it stopped; another run's file is a `DataError`.
    """

    def __init__(self, path: str | Path, tracking_uri: str, run_id: str, *, retry_s: float = 1.0) -> None:
        self.path, self.run_id = Path(path), run_id
        self._tracking_uri = tracking_uri
        self._retry_s = retry_s
        self._seen: set[tuple[str, int]] = set()
        self._waiting: deque[dict[str, Any]] = deque()
        """What the server has not confirmed to this writer, in order."""
        self._changed = threading.Condition()
        self._closing = False
        self._file = _File(self.path, run_id)
        for record in self._file.records():
            self._waiting.append(record)
            self._seen.update((key, record["step"]) for key in record["metrics"])
        self._thread = threading.Thread(target=self._send_all, name="metric-journal", daemon=True)
        self._thread.start()

    @property
    def unsent(self) -> int:
        """Number of records that the server has not confirmed to this writer."""
        with self._changed:
            return len(self._waiting)

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: float | None = None) -> None:
        """Record metrics at a step (NaN and infinities allowed); `epoch` is one more metric, named `epoch`."""
        values = {key: float(value) for key, value in metrics.items()}
        if epoch is not None:
            values["epoch"] = float(epoch)
        for key in values:
            if not re.fullmatch(r"[\w\-. :/]{1,250}", key):
                raise ValueError(f"metric {key!r}: expected up to 250 letters, digits and _-. :/")
        with self._changed:
            if self._closing:
                raise ValueError(f"{self.path}: the journal is closed, metrics of step {step} cannot be added")
            self._append(int(step), time.time_ns() // 1_000_000, values)

    def unsent_records(self, most: int = MOST_CARRIED) -> list[dict[str, Any]]:
        """The latest records, `most` of them, that the server has not confirmed: what a checkpoint carries."""
        with self._changed:
            return list(itertools.islice(self._waiting, max(0, len(self._waiting) - most), None))

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in records of another journal of this run, as `unsent_records` gave them."""
        with self._changed:
            for record in records:
                self._append(record["step"], record["timestamp"], record["metrics"])

    def _append(self, step: int, timestamp: int, metrics: Mapping[str, float]) -> None:
        fresh = {key: value for key, value in metrics.items() if (key, step) not in self._seen}
        if not fresh:
            return
        record = {"step": step, "timestamp": timestamp, "metrics": fresh}
        self._file.append(record)
        self._seen.update((key, step) for key in fresh)
        self._waiting.append(record)
        self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> int:
        """Wait until the server has everything, at most `timeout_s` seconds; returns the number of unsent records."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)
            return len(self._waiting)

    def close(self, timeout_s: float = 10.0) -> int:
        """Send what can be sent in three attempts or `timeout_s` seconds; returns the number of unsent records.

        Never raises because of the server and never waits longer; `send_unsent` can send the rest later.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._file.close()
        unsent = self.unsent
        if unsent:
            log.warning("%d metric records of run %s are unsent, kept in %s", unsent, self.run_id, self.path)
        return unsent

    def _send_all(self) -> None:
        """Thread body: send until closed and empty, or closed and failing thrice."""
        failures_while_closing = 0
        sender: _Sender | None = None
        wait_s = self._retry_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting)
                batch = list(itertools.islice(self._waiting, RECORDS_PER_SEND))
                closing = self._closing
            if not batch:
                return
            try:
                sender = sender or _Sender(self._tracking_uri, self.run_id)
                sender.send(batch)
            except Exception as error:  # noqa: BLE001 - whatever tracking does, training goes on; the record is on disk
                if wait_s == self._retry_s:
                    reason = scrub(" ".join(str(error).split()))[:300]
                    log.warning("MLflow does not take metrics, they wait in %s: %s", self.path, reason)
                failures_while_closing += closing
                if failures_while_closing == ATTEMPTS_WHILE_CLOSING:
                    return
                with self._changed:
                    pause_s = self._retry_s if closing else wait_s
                    self._changed.wait_for(lambda: self._closing is not closing, timeout=pause_s)  # noqa: B023
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            wait_s = self._retry_s
            with self._changed:
                for _ in batch:
                    self._waiting.popleft()
                self._changed.notify_all()


def send_unsent(journal_path: str | Path, tracking_uri: str, run_id: str) -> int:
    """Send what the server lacks of a closed journal; returns the number of metric values sent.

    May be called again at any time: what the server has is not sent twice. Errors of the server are raised.
    """
    path = Path(journal_path)
    return send_records(load(path.read_bytes(), str(path), run_id), tracking_uri, run_id)


def send_records(records: Iterable[Mapping[str, Any]], tracking_uri: str, run_id: str) -> int:
    """Send what the server lacks of records that `unsent_records` gave; as `send_unsent` otherwise."""
    sender, rest = _Sender(tracking_uri, run_id), iter(records)
    sent = 0
    while batch := list(itertools.islice(rest, RECORDS_PER_SEND)):
        sent += sender.send(batch)
    return sent


def dump(run_id: str, records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as the content of a journal file."""
    lines = [{"format": FORMAT, "run_id": run_id}, *records]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def load(content: bytes, name: str, run_id: str | None = None) -> list[dict[str, Any]]:
    """The records of a journal file, in order; a last line without its end is left out.

    Raises DataError, with the file's name, if it is no journal, or not that of the run that is asked for.
    """
    lines = content.splitlines(keepends=True)
    try:
        header = json.loads(lines[0]) if lines else {}
    except json.JSONDecodeError:
        header = {}
    if header.get("format") != FORMAT:
        raise DataError(f"{name}: found format {header.get('format')!r}, expected {FORMAT}; give another path")
    if run_id not in (None, header["run_id"]):
        raise DataError(
            f"{name}: journal of run {header['run_id']}, expected run {run_id}; give each run a path of its own"
        )
    records = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: line {number} is not a metrics record; restore the file or remove it") from error
    return records


def num_missing(records: Iterable[Mapping[str, Any]], tracking_uri: str, run_id: str) -> int:
    """How many metric values of the records the server lacks; nothing is sent."""
    return len(_Sender(tracking_uri, run_id).fresh(records))


class _Sender:
    """Sends records to one run, leaving out every (key, step) that the server has."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._client = MlflowClient(tracking_uri)
        self._run_id = run_id
        self._on_server: dict[str, set[int]] = {}

    def fresh(self, records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Metric]:
        """The metric values that the server lacks, by key and step."""
        fresh: dict[tuple[str, int], Metric] = {}
        for record in records:
            step = record["step"]
            for key, value in record["metrics"].items():
                if key not in self._on_server:
                    history = self._client.get_metric_history(self._run_id, key)
                    self._on_server[key] = {point.step for point in history}
                if step not in self._on_server[key]:
                    fresh.setdefault((key, step), Metric(key, value, record["timestamp"], step))
        return fresh

    def send(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Send the records; returns the number of metric values that were new to the server."""
        fresh = self.fresh(records)
        metrics = list(fresh.values())
        try:
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])
        except BaseException:
            # The server may have taken a request whose answer was lost: ask it again before the next attempt.
            self._on_server.clear()
            raise
        for key, step in fresh:
            self._on_server[key].add(step)
        return len(metrics)


class _File:
    """The journal's file, whole lines only; a disk that takes no more is told once and stops nobody."""

    def __init__(self, path: Path, run_id: str):
        self.path, self.run_id = path, run_id
        self.size, self.failed = 0, False
        self.file: io.FileIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = io.FileIO(path, "a+", opener=lambda name, flags: os.open(name, flags, 0o600))
            self.file.seek(0)
            self.size = self.file.readall().rfind(b"\n") + 1  # the half line that a killed writer left is cut off
            self.file.truncate(self.size)
            if not self.size:
                self._write(dump(run_id, []))
        except OSError as error:
            self._complain(error)

    def records(self) -> list[dict[str, Any]]:
        """What was in it before."""
        return load(self.path.read_bytes(), str(self.path), self.run_id) if self.size else []

    def append(self, record: Mapping[str, Any]) -> None:
        try:
            self._write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, line: bytes) -> None:
        if self.file is None:
            return
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self.file.truncate(self.size)
            raise
        self.size += len(line)

    def _complain(self, error: OSError) -> None:
        if not self.failed:
            log.warning("metrics are sent, but not all of them kept on this disk: %s", error)
        self.failed = True
