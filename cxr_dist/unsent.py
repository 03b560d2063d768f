"""What the server did not take while its writer lived: kept with the run in storage, sent when the server is back."""

import logging
import tempfile
import uuid
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from cxr_dist import storage, writes
from cxr_dist.errors import InputError
from cxr_dist.journal import MetricJournal, dump, load, send_records
from cxr_dist.writes import Write

__all__ = ["close", "keep", "metrics", "send", "waits"]

log = logging.getLogger(__name__)

FOLDER = "unsent"
"""Of a run's folder: a journal file for each writer of metrics, a folder for each driver's other writes."""


def close(journal: MetricJournal, folder: str, timeout_s: float = 10.0) -> int:
    """Close a journal; if the server lacks some of it, keep it under the run's folder. Returns the number of unsent records.

    Never raises because of the server or the storage: the local file is there in any case.
    """
    unsent = journal.close(timeout_s)
    if unsent and folder:
        where = storage.join(folder, FOLDER, f"{journal.path.stem}-{uuid.uuid4().hex[:8]}.jsonl")
        try:
            storage.put_atomic(where, dump(journal.run_id, journal.unsent_records(unsent)))
        except (InputError, OSError) as error:
            log.warning("unsent metrics stay in %s: %s", journal.path, " ".join(str(error).split()))
    return unsent


def keep(missed: list[Write], folder: str) -> None:
    """Keep writes under the run's folder, with their files. Never raises because of the storage."""
    if not missed or not folder:
        return
    try:
        writes.keep(missed, storage.join(folder, FOLDER, uuid.uuid4().hex[:8]))
    except (InputError, OSError) as error:
        what = ", ".join(write.what for write in missed)
        log.warning("cannot be kept for another day (%s): %s", " ".join(str(error).split()), what)


def waits(folder: str) -> bool:
    """Whether something is kept under a run's folder."""
    return bool(storage.list_files(storage.join(folder, FOLDER)))


def metrics(folder: str) -> list[dict[str, Any]]:
    """The metric records that are kept under a run's folder; nothing is sent."""
    records = []
    for name, _ in storage.list_files(storage.join(folder, FOLDER)):
        if name.endswith(".jsonl") and "/" not in name:
            where = storage.join(folder, FOLDER, name)
            records += load(storage.read_bytes(where), storage.shown(where))
    return records


def send(folder: str, tracking_uri: str, run_id: str) -> int:
    """Send what is kept under a run's folder and forget it; returns the number of metric values that were new.

    May be called again at any time. Errors of the server are raised, and what was not sent stays.
    """
    sent = 0
    names = [name for name, _ in storage.list_files(storage.join(folder, FOLDER))]
    for name in names:
        where = storage.join(folder, FOLDER, name)
        if name.endswith("/writes.json"):
            _send_writes(where.removesuffix("/writes.json"), MlflowClient(tracking_uri), run_id)
        elif name.endswith(".jsonl") and "/" not in name:
            try:
                records = load(storage.read_bytes(where), storage.shown(where))
            except FileNotFoundError:  # someone else has sent it
                continue
            sent += send_records(records, tracking_uri, run_id)
            storage.delete(where)
    return sent


def _send_writes(where: str, client: MlflowClient, run_id: str) -> None:
    with tempfile.TemporaryDirectory() as local:
        try:
            missed = writes.kept(where, Path(local))
        except FileNotFoundError:
            return
        for write in missed:
            write.do(client, run_id)
    storage.delete_dir(where)
