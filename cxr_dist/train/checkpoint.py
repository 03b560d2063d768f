"""A run's folder in storage: what it started from, its checkpoints, and an index that says which are whole.

    RUN/run.json             what the run is: MLflow run id, manifest hash, plan hash, config
    RUN/lease/…              which driver may write (`train.lease`)
    RUN/initial.pt           the whole model's starting weights (the frozen prefix for good)
    RUN/checkpoints/000002/  those of the run's second owner:
        index.json           the checkpoints that are whole, oldest first, with size and SHA-256
        000000123.pt         tail, optimizer, scheduler, scaler and position: state before step 123
        000000123.parquet    validation scores, if it is the end of an epoch
    RUN/scores/…             validation scores of the best checkpoint, test scores, when the run is done

A checkpoint counts once the index names it, and the index is one atomic put, so nothing half-written is ever read.
What counts is the index of the run's latest owner, who begins with copies of what the one before had: whatever that one
still writes or deletes, asleep until now and not knowing that it was taken for dead, is in a folder that nobody reads.
"""

import hashlib
import io
import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from cxr_dist import storage
from cxr_dist.errors import InputError, RunError

__all__ = ["FORMAT", "Checkpoints", "Entry", "find_checkpoint", "load_checkpoint", "run_folder"]

log = logging.getLogger(__name__)

FORMAT = 2

_FILE = r"\d{6}/\d{9}\.(pt|parquet)"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A whole checkpoint: the state before step `index` of the run."""

    index: int
    epoch: int
    file: str
    """Below RUN/checkpoints."""
    bytes: int
    sha256: str
    score: float | None
    """Validation mean AUROC at the end of that epoch; None in the middle of one."""
    finished: bool
    """Whether the run has no step left: its last epoch is done, or it stopped early."""
    scores: str | None = None
    """File of the validation scores; None within an epoch."""
    scores_sha256: str | None = None


def run_folder(storage_path: str, name: str) -> str:
    """URI of a run's folder."""
    return storage.join(storage_path, name)


class Checkpoints:
    """The checkpoints of one run: the best, the last, and `more` before it are kept. Anyone reads.

    Only rank 0 and the driver write, as owner number `owner` of the run, the number of its lease.
    """

    def __init__(self, folder: str, *, owner: int = 0, more: int = 1):
        self.folder = storage.join(folder, "checkpoints")
        self.owner, self.more = owner, more

    def entries(self) -> list[Entry]:
        """Whole checkpoints, oldest first."""
        return self.latest()[1]

    def latest(self) -> tuple[int, list[Entry]]:
        """The latest owner (-1: none) and its checkpoints."""
        while True:
            owner = max((int(name[:6]) for name in self._names() if name.endswith("/index.json")), default=-1)
            try:
                return owner, [] if owner < 0 else self._listed(owner)
            except FileNotFoundError:  # there is a later one since
                continue

    def uri(self, entry: Entry) -> str:
        return storage.join(self.folder, entry.file)

    def adopt(self) -> None:
        """Make copies of what earlier owners of the run left that is whole, and be the one whose index counts.

        A finished run stays as it is, for its checkpoints may have been published by their URIs.
        """
        entries = self.entries()
        if entries and entries[-1].finished:
            return
        kept = []
        for entry in entries:
            try:
                data = self.read(entry)
                scores = None if entry.scores is None else self.read_scores(entry)
            except RunError as error:
                log.warning("checkpoint passed over: %s", error)
                continue
            kept.append(self._put(entry, data, scores))
        self._list(kept)
        for owner in sorted({int(name[:6]) for name in self._names() if int(name[:6]) < self.owner}):
            storage.delete_dir(storage.join(self.folder, _name(owner)))

    def save(
        self,
        state: dict[str, Any],
        *,
        index: int,
        epoch: int,
        score: float | None,
        finished: bool,
        scores: bytes | None = None,
    ) -> Entry:
        """Store a state, and the Parquet file of its validation's scores, and make it count; what is no longer kept is
        deleted then. RunError if the run has another owner."""
        import torch  # here, since the processes that only look for the latest position must start quickly

        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        owner, entries = self.latest()
        if owner > self.owner:
            raise RunError(f"{storage.shown(self.folder)}: another driver has taken this run over; this one ends")
        before = [old for old in entries if old.index < index]
        entry = Entry(index=index, epoch=epoch, file="", bytes=0, sha256="", score=score, finished=finished)
        entry = self._put(entry, buffer.getvalue(), scores)
        entries = [*before, entry]
        best = best_of(entries)
        kept = [old for old in entries if old in entries[-1 - self.more :] or old == best]
        self._list(kept)
        for old in before:
            if old not in kept:
                storage.delete(self.uri(old))
                if old.scores is not None:
                    storage.delete(storage.join(self.folder, old.scores))
        return entry

    def load(self, entry: Entry) -> dict[str, Any]:
        """The state of a checkpoint; RunError if its bytes are not those that were saved."""
        from cxr_dist.model.initial import read_tensors

        return read_tensors(self.read(entry), self.uri(entry))

    def read(self, entry: Entry) -> bytes:
        """The bytes of a checkpoint, checked; RunError if they are not those that were saved."""
        return self._checked(entry.file, entry.sha256)

    def read_scores(self, entry: Entry) -> bytes:
        """The Parquet file of a checkpoint's validation scores, checked; RunError if there is none, or another."""
        if entry.scores is None:
            raise RunError(f"{storage.shown(self.uri(entry))}: found no validation scores with it")
        return self._checked(entry.scores, str(entry.scores_sha256))

    def _checked(self, file: str, sha256: str) -> bytes:
        uri = storage.join(self.folder, file)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            raise RunError(f"{storage.shown(uri)}: not found, expected a file with SHA-256 {sha256}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(f"{storage.shown(uri)}: found other bytes than were saved, expected SHA-256 {sha256}")
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

    def _put(self, entry: Entry, data: bytes, scores: bytes | None) -> Entry:
        """Store the files of a checkpoint under this owner's names; the entry with these and their checksums."""
        name = f"{_name(self.owner)}/{entry.index:09d}"
        entry = replace(entry, file=f"{name}.pt", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        storage.put_atomic(self.uri(entry), data)
        if scores is not None:
            entry = replace(entry, scores=f"{name}.parquet", scores_sha256=hashlib.sha256(scores).hexdigest())
            storage.put_atomic(storage.join(self.folder, str(entry.scores)), scores)
        return entry

    def _names(self) -> list[str]:
        """Files below RUN/checkpoints, OWNER/NAME each; InputError for those of a version without owners."""
        names = [name for name, _ in storage.list_files(self.folder)]
        if "index.json" in names:
            raise InputError(
                f"{storage.shown(self.folder)}/index.json: found format 1, expected {FORMAT}; use the version that wrote it"
            )
        return [name for name in names if re.match(r"\d{6}/", name)]

    def _listed(self, owner: int) -> list[Entry]:
        where = storage.join(self.folder, _name(owner), "index.json")
        found = json.loads(storage.read_bytes(where))
        if found.get("format") != FORMAT:
            raise InputError(
                f"{where}: found format {found.get('format')!r}, expected {FORMAT}; use the version that wrote it"
            )
        entries = [Entry(**entry) for entry in found["checkpoints"]]
        for file in (file for entry in entries for file in (entry.file, entry.scores) if file is not None):
            if not re.fullmatch(_FILE, file):  # it is read, and one day deleted
                raise InputError(f"{where}: found the file name {file!r}, expected OWNER/STEP.pt; use another run")
        return entries

    def _list(self, entries: list[Entry]) -> None:
        listing = {"format": FORMAT, "checkpoints": [asdict(entry) for entry in entries]}
        where = storage.join(self.folder, _name(self.owner), "index.json")
        storage.put_atomic(where, json.dumps(listing, indent=1).encode())


def _name(owner: int) -> str:
    return f"{owner:06d}"


def load_checkpoint(uri: str) -> dict[str, Any]:
    """The state of a checkpoint, by its own URI or by its run's folder (then the best one), with its `uri` and `folder`.

    InputError if there is none there.
    """
    folder, checkpoints, entry = find_checkpoint(uri)
    return {**checkpoints.load(entry), "uri": checkpoints.uri(entry), "folder": folder}


def find_checkpoint(uri: str) -> tuple[str, Checkpoints, Entry]:
    """The run's folder, its checkpoints, and the one that `load_checkpoint` loads; InputError if there is none there."""
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
            f"checkpoint {storage.shown(uri)}: found none there, expected RUN/checkpoints/OWNER/STEP.pt or a run's folder"
        )
    return folder, checkpoints, entry


def best_of(entries: list[Entry]) -> Entry | None:
    scored = [entry for entry in entries if entry.score is not None]
    return max(scored, key=lambda entry: (entry.score, -entry.index)) if scored else None
