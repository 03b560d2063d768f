"""The plan carried out: each thing is looked at once more where nobody else can change it, then removed.

A run is removed by its owner, who takes its lease as a driver does, so one that starts meanwhile is refused. In this
order, so that no half run looks whole at any moment and the same command goes on with what was cut off:

1. run.json is overwritten with a format that says so; from now on no driver goes on with the run.
2. The checkpoints' indexes, the earliest owner's first: nothing reads a checkpoint that no index names.
3. All else but the lease; run.json last.
4. The lease. A driver that has waited for it finds no run, and begins one.

A set of features is set aside, which says to every run that it must not be begun with; then its index goes, then its
shards, the mark last. MLflow is not written to: its entry of a run stays.

Not every store can delete only what it has seen, so a process that was stopped in the very moment between its look at the
lease and its request may delete a file late; paths hold the owner's number or a random token, except run.json,
initial.pt, scores/ and ray/, and until then another must have ended the removal and begun a new run of that name.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cxr_dist import storage
from cxr_dist.data import features
from cxr_dist.errors import InputError, RunError
from cxr_dist.housekeeping.facts import (
    CLAIM,
    OWNER,
    Cache,
    Facts,
    File,
    Run,
    files_of,
    look_at_run,
    look_up,
)
from cxr_dist.housekeeping.plan import Item, follows, judge_cache, judge_checkpoints, judge_run
from cxr_dist.housekeeping.tracked import Tracking
from cxr_dist.train import identity
from cxr_dist.train.lease import Lease

__all__ = ["Remover"]

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Remover:
    """Removes what the plan of `facts` says may go."""

    storage_path: str
    facts: Facts
    tracking: Tracking
    older_s: float
    lease: dict[str, Any] = field(default_factory=dict)
    """How long a driver is watched and how often signs of life are left, see `Lease.take`."""
    emptied: list[str] = field(default_factory=list)
    """Folders that nothing is left in."""

    def remove(self, items: list[Item]) -> dict[str, str]:
        """Remove the items that go; those that stay after all, by kind and name, with the reason."""
        stayed = {}
        by_kind: dict[str, Callable[[Item], None]] = {
            "run": self._run,
            "checkpoints": self._checkpoints,
            "features": self._cache,
        }
        for item in items:
            if not item.goes:
                continue
            try:
                by_kind[item.kind](item)
            except (InputError, RunError, OSError) as error:
                stayed[f"{item.kind} {item.name}"] = " ".join(str(error).split())
                log.warning("%s %s stays: %s", item.kind, item.name, error)
        # late, for drivers that waited for a lease have begun by now, and their folder is left to them
        for folder in self.emptied:
            storage.delete_empty(folder)
        return stayed

    def _run(self, item: Item) -> None:
        run = next(run for run in self.facts.runs if run.name == item.name)
        with self._take(run) as lease:
            now = self._again(run)
            seen = judge_run(now, self._facts(), older_s=self.older_s, others=self._others(run))
            self._still(seen)
            if not now.is_remains:
                if not now.removing:
                    self._same(_kept(run.files), _kept(now.files))
                    _entomb(now, lease)
                for path in _in_order(now):
                    lease.check()
                    storage.delete(storage.join(run.folder, path))
                for name in storage.list_folders(run.folder):
                    if name != "lease":
                        lease.check()
                        storage.delete_dir(storage.join(run.folder, name))
                lease.check()
                storage.delete(storage.join(run.folder, identity.FILE))
            lease.bury()
        self.emptied.append(run.folder)

    def _checkpoints(self, item: Item) -> None:
        run = next(run for run in self.facts.runs if run.name == item.name)
        with self._take(run) as lease:
            now = self._again(run)
            facts = replace(self._facts(), runs=(now, *self._others(run)))
            for path in sorted({path for seen in judge_checkpoints(now, facts) if seen.goes for path in seen.paths}):
                if path in item.paths:
                    lease.check()
                    storage.delete(storage.join(run.folder, path))
            for folder in sorted({path.rpartition("/")[0] for path in item.paths}):
                if re.fullmatch(r"checkpoints/\d{6}", folder):
                    lease.check()
                    storage.delete_empty(storage.join(run.folder, folder))

    def _cache(self, item: Item) -> None:
        cache = next(cache for cache in self.facts.caches if cache.name == item.name)
        mark = storage.join(cache.folder, features.ASIDE)
        before = storage.read_bytes(mark) if cache.aside is not None else None
        content = {"reason": cache.aside or "it was not used for long", "removing_unused_since": cache.used}
        if not cache.removing:
            storage.put_atomic(mark, json.dumps(content).encode())
        try:
            files = files_of(cache.folder)
            if not cache.removing:
                self._same(_unmarked(cache.files), _unmarked(files))
            facts = replace(self._facts(), caches=self._siblings(cache))
            self._still(judge_cache(cache, facts, older_s=self.older_s, others=self._others(None)))
        except BaseException:
            if before is not None:
                storage.put_atomic(mark, before)
            elif not cache.removing:
                storage.delete(mark)
            raise
        for path in sorted((file.path for file in _unmarked(files)), key=lambda path: (path != features.INDEX, path)):
            storage.delete(storage.join(cache.folder, path))
        if not any(follows(later, cache) for later in self._siblings(cache)):
            storage.delete(mark)
            self.emptied.append(cache.folder)

    def _siblings(self, cache: Cache) -> tuple[Cache, ...]:
        """The other sets that are there now, by name alone."""
        names = storage.list_folders(self.facts.features_uri)
        return tuple(Cache(name=name, folder="") for name in names if name != cache.name)

    def _take(self, run: Run) -> Lease:
        return Lease.take(run.folder, owner=OWNER, on_loss=lambda: None, **self.lease)

    def _again(self, run: Run) -> Run:
        """The run as it is now that it is ours."""
        now = look_up(look_at_run(run.folder, run.name, None), self.tracking, metrics=True)
        return replace(now, vanished=run.vanished)

    def _others(self, run: Run | None) -> list[Run]:
        """All other runs that are there now, as they were, or, where they have come since, as they are."""
        known = {one.name: one for one in self.facts.runs if one.folder not in self.emptied}
        return [
            known.get(name) or look_at_run(storage.join(self.storage_path, name), name, None)
            for name in storage.list_folders(self.storage_path)
            if (run is None or name != run.name) and storage.join(self.storage_path, name) != self.facts.features_uri
        ]

    def _facts(self) -> Facts:
        return replace(self.facts, pointers=self.tracking.pointers())

    def _still(self, seen: Item) -> None:
        if not seen.goes:
            raise RunError(f"{seen.name}: {seen.why}, which was not so a moment ago; list again")

    def _same(self, before: tuple[File, ...], now: tuple[File, ...]) -> None:
        if before != now:
            changed = sorted(set(before) ^ set(now))[0].path
            raise RunError(f"found {changed} changed since it was looked at; list again")


def _kept(files: tuple[File, ...]) -> tuple[File, ...]:
    return tuple(file for file in files if not CLAIM.fullmatch(file.path))


def _unmarked(files: tuple[File, ...]) -> tuple[File, ...]:
    return tuple(file for file in files if file.path != features.ASIDE)


def _entomb(run: Run, lease: Lease) -> None:
    """Say in run.json that the run is no longer whole."""
    where = storage.join(run.folder, identity.FILE)
    lease.check()
    content = {"format": identity.BEING_REMOVED, "run": dict(run.record)}
    storage.put_atomic(where, json.dumps(content, indent=1).encode())
    try:
        lease.check()
    except RunError:
        # this process was stopped in between and taken for dead: the run is another's, and as whole as it was
        storage.put_atomic(where, run.text.encode())
        raise


def _in_order(run: Run) -> list[str]:
    """A run's files but run.json and its lease, in the order in which they go."""
    paths = [file.path for file in _kept(run.files) if file.path != identity.FILE]
    return sorted(paths, key=lambda path: (re.fullmatch(r"checkpoints/\d{6}/index\.json", path) is None, path))
