"""What workers log: metrics through a journal, and the use of their node.

Metrics are local first: every record is in a file before anyone tries to send it, so no server can stop training. The
file is the queue. It is JSON lines: a header (`format`, `run_id`), then one record a line (`step`, `timestamp` in
milliseconds, `metrics`). One background thread sends what follows the last confirmed record; what the server already
has of a (key, step) is asked of the server, so records may be sent again, after a crash or from another process, and
each (key, step) is still logged once.
"""

import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from cxr_dist.errors import DataError
from cxr_dist.scrub import scrub

__all__ = ["MetricJournal", "SystemMetrics", "num_missing", "send_records", "send_unsent", "start_system_metrics"]

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
        self.path = Path(path)
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._retry_s = retry_s
        self._seen: set[tuple[str, int]] = set()
        self._records = 0
        self._sent = 0
        self._changed = threading.Condition()
        self._closing = False
        _open(self.path, run_id)
        for record in _read(self.path, run_id):
            self._records += 1
            self._seen.update((key, record["step"]) for key in record["metrics"])
        self._file = self.path.open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._send_all, name="metric-journal", daemon=True)
        self._thread.start()

    @property
    def unsent(self) -> int:
        """Records in the file that the server has not confirmed to this writer."""
        with self._changed:
            return self._records - self._sent

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: int | None = None) -> None:
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
        """The latest records in the file, `most` of them, that the server has not confirmed: what a checkpoint carries."""
        with self._changed:
            sent, unsent = self._sent, self._records - self._sent
        skipped = sent + max(0, unsent - most)
        return list(itertools.islice(_read(self.path, self._run_id), skipped, sent + unsent)) if unsent else []

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in records of another journal of this run, as `unsent_records` gave them."""
        with self._changed:
            for record in records:
                self._append(record["step"], record["timestamp"], record["metrics"])

    def _append(self, step: int, timestamp: int, metrics: Mapping[str, float]) -> None:
        fresh = {key: value for key, value in metrics.items() if (key, step) not in self._seen}
        if not fresh:
            return
        self._file.write(json.dumps({"step": step, "timestamp": timestamp, "metrics": fresh}) + "\n")
        self._file.flush()
        self._seen.update((key, step) for key in fresh)
        self._records += 1
        self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> int:
        """Wait until the server has everything, at most `timeout_s` seconds; returns the number of unsent records."""
        with self._changed:
            self._changed.wait_for(lambda: self._records == self._sent, timeout_s)
            return self._records - self._sent

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
            log.warning("%d metric records of run %s are unsent, kept in %s", unsent, self._run_id, self.path)
        return unsent

    def _send_all(self) -> None:
        """Thread body: send from the file until closed and empty, or closed and failing thrice."""
        failures_while_closing = 0
        sender: _Sender | None = None
        records = _read(self.path, self._run_id)
        batch: list[dict[str, Any]] = []
        wait_s = self._retry_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._records > self._sent)
                ready = min(self._records - self._sent, RECORDS_PER_SEND)
                closing = self._closing
            if not ready:
                return
            batch = batch or [next(records) for _ in range(ready)]
            try:
                sender = sender or _Sender(self._tracking_uri, self._run_id)
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
                self._sent += len(batch)
                self._changed.notify_all()
            batch = []


def send_unsent(journal_path: str | Path, tracking_uri: str, run_id: str) -> int:
    """Send what the server lacks of a closed journal; returns the number of metric values sent.

    May be called again at any time: what the server has is not sent twice. Errors of the server are raised.
    """
    sender = _Sender(tracking_uri, run_id)
    sent = 0
    batch: list[dict[str, Any]] = []
    for record in _read(Path(journal_path), run_id):
        batch.append(record)
        if len(batch) == RECORDS_PER_SEND:
            sent += sender.send(batch)
            batch = []
    return sent + sender.send(batch)


def send_records(records: Iterable[Mapping[str, Any]], tracking_uri: str, run_id: str) -> int:
    """Send what the server lacks of records that `unsent_records` gave; as `send_unsent` otherwise."""
    return _Sender(tracking_uri, run_id).send(records)


def num_missing(records: Iterable[Mapping[str, Any]], tracking_uri: str, run_id: str) -> int:
    """How many metric values of the records the server lacks; nothing is sent."""
    return len(_Sender(tracking_uri, run_id).fresh(records))


class SystemMetrics:
    """CPU, memory, disk, network and GPU use of this node, written to a run as system/<node>/… until stopped.

    MLflow's monitor ends by itself when the server is gone or the run is no longer RUNNING.
    """

    def __init__(self, monitor: SystemMetricsMonitor) -> None:
        self._monitor = monitor

    @property
    def alive(self) -> bool:
        """Whether samples are still taken."""
        thread = self._monitor._process
        return thread is not None and thread.is_alive()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop and send the last samples; never raises, never waits longer than `timeout_s` seconds."""
        stopping = threading.Thread(target=self._monitor.finish, daemon=True)
        stopping.start()
        stopping.join(timeout_s)


def start_system_metrics(tracking_uri: str, run_id: str, node_id: str, *, interval_s: float = 10.0) -> SystemMetrics:
    """Sample this node every `interval_s` seconds; one call a node, from its first rank."""
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=interval_s, resume_logging=True, node_id=node_id, tracking_uri=tracking_uri
    )
    monitor.start()
    return SystemMetrics(monitor)


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


def _open(path: Path, run_id: str) -> None:
    """Make the journal file, or cut off the half line that a killed writer left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rpartition(b"\n")[0]
        if whole:
            file.truncate(len(whole) + 1)
        else:
            file.truncate(0)
            file.write(json.dumps({"format": FORMAT, "run_id": run_id}).encode() + b"\n")


def _read(path: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Records of a journal in order; a last line without its end is left out."""
    with path.open(encoding="utf-8") as file:
        header = json.loads(file.readline() or "{}")
        if header.get("format") != FORMAT:
            raise DataError(f"{path}: found format {header.get('format')!r}, expected {FORMAT}; give another path")
        if header["run_id"] != run_id:
            raise DataError(
                f"{path}: journal of run {header['run_id']}, expected run {run_id}; give each run a path of its own"
            )
        number = 1
        while (line := file.readline()).endswith("\n"):
            number += 1
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}: line {number} is not a metrics record; restore the file or remove it"
                ) from error
