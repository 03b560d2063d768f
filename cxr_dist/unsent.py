"""Metrics that the server did not take while their writer lived: kept with the run in storage, sent when it is back."""

import logging
import tempfile
import uuid
from pathlib import Path

from cxr_dist import storage
from cxr_dist.errors import InputError
from cxr_dist.journal import MetricJournal, send_unsent

__all__ = ["close", "send"]

log = logging.getLogger(__name__)

FOLDER = "unsent"
"""Of a run's folder: a journal file each."""


def close(journal: MetricJournal, folder: str, timeout_s: float = 10.0) -> int:
    """Close a journal; if the server lacks some of it, keep it under the run's folder. Returns the number of unsent records.

    Never raises because of the server or the storage: the local file is there in any case.
    """
    unsent = journal.close(timeout_s)
    if unsent and folder:
        where = storage.join(folder, FOLDER, f"{journal.path.stem}-{uuid.uuid4().hex[:8]}.jsonl")
        try:
            storage.upload_atomic(journal.path, where)
        except (InputError, OSError) as error:
            log.warning("unsent metrics stay in %s: %s", journal.path, " ".join(str(error).split()))
    return unsent


def send(folder: str, tracking_uri: str, run_id: str) -> int:
    """Send what is kept under a run's folder and forget it; returns the number of metric values that were new.

    May be called again at any time. Errors of the server are raised, and what was not sent stays.
    """
    sent = 0
    for name, _ in storage.list_files(storage.join(folder, FOLDER)):
        where = storage.join(folder, FOLDER, name)
        with tempfile.TemporaryDirectory() as local:
            path = Path(local, "metrics.jsonl")
            try:
                path.write_bytes(storage.read_bytes(where))
            except FileNotFoundError:  # someone else has sent it
                continue
            sent += send_unsent(path, tracking_uri, run_id)
        storage.delete(where)
    return sent
