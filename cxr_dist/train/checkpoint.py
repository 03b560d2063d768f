"""A run's folder in storage: what it started from, its checkpoints, and an index that says which are whole.

    RUN/run.json             what the run is: MLflow run id, manifest hash, plan hash, config
    RUN/initial.pt           the whole model's starting weights (the frozen prefix for good)
    RUN/checkpoints/index.json   the checkpoints that are whole, oldest first, with size and SHA-256
    RUN/checkpoints/000000123.pt   tail, optimizer, scheduler, scaler and position: state before step 123
    RUN/scores/…             validation scores of the best checkpoint, test scores

A checkpoint counts once the index names it, and the index is one atomic put, so nothing half-written is ever read.
"""

import hashlib
import io
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

from cxr_dist import storage
from cxr_dist.errors import InputError, RunError

__all__ = ["FORMAT", "Checkpoints", "Entry", "load_checkpoint", "run_folder"]

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A whole checkpoint: the state before step `index` of the run."""

    index: int
    epoch: int
    file: str
    bytes: int
    sha256: str
    score: float | None
    """Validation mean AUROC at the end of that epoch."""
    finished: bool
    """Whether the run has no step left: its last epoch is done, or it stopped early."""


def run_folder(storage_path: str, name: str) -> str:
    """URI of a run's folder."""
    return storage.join(storage_path, name)


class Checkpoints:
    """The checkpoints of one run. Only rank 0 saves; anyone reads."""

    def __init__(self, folder: str):
        self.folder = storage.join(folder, "checkpoints")

    def entries(self) -> list[Entry]:
        """Whole checkpoints, oldest first."""
        try:
            found = json.loads(storage.read_bytes(storage.join(self.folder, "index.json")))
        except (FileNotFoundError, NotADirectoryError):
            return []
        if found.get("format") != FORMAT:
            raise InputError(
                f"{self.folder}/index.json: found format {found.get('format')!r}, expected {FORMAT}; "
                "use the version that wrote it"
            )
        return [Entry(**entry) for entry in found["checkpoints"]]

    def uri(self, entry: Entry) -> str:
        return storage.join(self.folder, entry.file)

    def save(self, state: dict[str, Any], *, index: int, epoch: int, score: float | None, finished: bool) -> Entry:
        """Store a state and make it count; keep the best, the last and the one before it."""
        import torch  # here, since the processes that only look for the latest position must start quickly

        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        data = buffer.getvalue()
        entry = Entry(
            index=index,
            epoch=epoch,
            file=f"{index:09d}.pt",
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            score=score,
            finished=finished,
        )
        before = [old for old in self.entries() if old.index < index]
        storage.put_atomic(self.uri(entry), data)
        entries = [*before, entry]
        best = best_of(entries)
        kept = [old for old in entries if old in entries[-2:] or old == best]
        listing = {"format": FORMAT, "checkpoints": [asdict(old) for old in kept]}
        storage.put_atomic(storage.join(self.folder, "index.json"), json.dumps(listing, indent=1).encode())
        for old in before:
            if old not in kept:
                storage.delete(self.uri(old))
        return entry

    def load(self, entry: Entry) -> dict[str, Any]:
        """The state of a checkpoint; RunError if its bytes are not those that were saved."""
        from cxr_dist.model.weights import read_tensors

        return read_tensors(self.read(entry), self.uri(entry))

    def read(self, entry: Entry) -> bytes:
        """The bytes of a checkpoint, checked; RunError if they are not those that were saved."""
        uri = self.uri(entry)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            raise RunError(f"{storage.shown(uri)}: not found, expected {entry.bytes} bytes") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise RunError(f"{storage.shown(uri)}: found other bytes than were saved, expected SHA-256 {entry.sha256}")
        return data

    def latest_whole(self) -> Entry | None:
        """The newest checkpoint whose bytes are what was saved; a damaged one is named and passed over."""
        for entry in reversed(self.entries()):
            try:
                self.read(entry)
            except RunError as error:
                log.warning("checkpoint passed over: %s", error)
            else:
                return entry
        return None

    def at(self, index: int) -> Entry:
        """The checkpoint before step `index`."""
        for entry in self.entries():
            if entry.index == index:
                return entry
        raise RunError(f"{self.folder}: found no checkpoint of step {index}, which the stream starts from")

    def best(self) -> Entry | None:
        """The checkpoint with the highest validation score, the earlier of equals."""
        return best_of(self.entries())


def load_checkpoint(uri: str) -> dict[str, Any]:
    """The state of a checkpoint, by its own URI or by its run's folder (then the best one), with its `uri` and `folder`.

    InputError if there is none there.
    """
    folder, separator, file = uri.rpartition("/checkpoints/")
    if not separator:
        folder = uri.rstrip("/")
    checkpoints = Checkpoints(folder)
    entries = checkpoints.entries()
    if separator:
        entries = [entry for entry in entries if entry.file == file]
    entry = best_of(entries) or (entries[-1] if entries else None)
    if entry is None:
        raise InputError(
            f"checkpoint {storage.shown(uri)}: found none there, expected RUN/checkpoints/STEP.pt or a run's folder"
        )
    return {**checkpoints.load(entry), "uri": checkpoints.uri(entry), "folder": folder}


def best_of(entries: list[Entry]) -> Entry | None:
    scored = [entry for entry in entries if entry.score is not None]
    return max(scored, key=lambda entry: (entry.score, -entry.index)) if scored else None
