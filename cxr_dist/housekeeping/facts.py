"""What lies under a prefix of runs and one of features, and what points at it. Nothing is changed here.

Facts are plain values, so that the plan (`housekeeping.plan`) is a pure function of them. What cannot be understood is a
fact too (`problem`); a store or a tracking server that does not answer is an InputError.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cxr_dist import storage
from cxr_dist.data import features
from cxr_dist.errors import InputError
from cxr_dist.housekeeping.tracked import Pointer, Tracking, one_line
from cxr_dist.sweep.record import SWEEPS
from cxr_dist.train import identity
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.lease import Claim, living_owner
from cxr_dist.train.sync import UNFINISHED, carried

__all__ = [
    "CLAIM",
    "OWNER",
    "Cache",
    "Facts",
    "File",
    "Run",
    "files_of",
    "gather",
    "look_at_cache",
    "look_at_run",
    "look_up",
]

CLAIM = re.compile(r"lease/\d{9}-\w+\.json(\.\w+\.tmp)?|lease/\.\d{9}-\w+\.json\.\w+\.tmp")
"""Files of a run's lease, and what is left of one whose writing was cut off."""

OWNER = "housekeeping"
"""Owner of a lease that is taken in order to remove something."""

Watch = Callable[[str], tuple[Claim | None, list[Claim]]]


class File(NamedTuple):
    """A file below a folder."""

    path: str
    bytes: int
    time: float
    """When it was last written, seconds since 1970; 0 where the store does not say."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder under the prefix of runs."""

    name: str
    folder: str
    files: tuple[File, ...] = ()
    places: tuple[str, ...] = ()
    """Bucket and key, or path, of the folder; of a folder on disk also where its links lead."""
    problem: str = ""
    """What about it cannot be understood; such a folder is not touched."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Content of run.json; empty where there is none that can be read."""
    text: str = ""
    """The bytes of run.json as text, also where they cannot be understood."""
    removing: bool = False
    """Whether its removal has begun."""
    driver: str = ""
    """The driver that has shown a sign of life."""
    vanished: float = 0.0
    """Last sign of life of a driver that did not give the run back, by its own clock; a removal is none."""
    owner: int = -1
    """Whose checkpoints count; -1: nobody's."""
    named: frozenset[str] = frozenset()
    """Files below checkpoints/ that the index names."""
    finished: bool = False
    """Whether the last checkpoint is that of a finished training."""
    status: str = ""
    """Of its MLflow run; empty where MLflow knows none."""
    lacking: int = 0
    """Metric values, or files of them, that MLflow lacks."""

    @property
    def run_id(self) -> str:
        return str(self.record.get("run_id") or "")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def ended(self) -> float:
        """When it was last written to, by whoever trained it, seconds since 1970; 0 where that is not known."""
        times = [file.time for file in self.files if not CLAIM.fullmatch(file.path)]
        return max([*times, self.vanished], default=0.0) if all(times) else 0.0

    @property
    def is_remains(self) -> bool:
        """Whether nothing is left of it but claims to it."""
        return all(CLAIM.fullmatch(file.path) for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder under the prefix of features."""

    name: str
    folder: str
    files: tuple[File, ...] = ()
    problem: str = ""
    aside: str | None = None
    """Why the set is never to be used again; None where it may be."""
    removing: bool = False
    """Whether its removal has begun."""
    inputs: Mapping[str, Any] | None = None
    """All that decides its values; None where it has no index yet."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def used(self) -> float:
        """When it was last built or begun to be used, seconds since 1970; 0 where that is not known."""
        times = [file.time for file in self.files]
        return max(times, default=0.0) if all(times) else 0.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the plan is made from."""

    runs: tuple[Run, ...]
    caches: tuple[Cache, ...]
    pointers: tuple[Pointer, ...]
    features_uri: str
    now: float


def gather(
    storage_path: str, features_uri: str, tracking: Tracking, *, older_s: float, watch: Watch | None = None
) -> Facts:
    """The facts now. Drivers that may live are watched for a sign of life, all at once, for half a minute at most.

    Whether MLflow has all metrics is asked for runs that ended more than `older_s` seconds ago. InputError if the store
    or MLflow does not answer.
    """
    now, pointers = time.time(), tracking.pointers()
    others = (features_uri, storage.join(storage_path, SWEEPS))
    names = [name for name in storage.list_folders(storage_path) if storage.join(storage_path, name) not in others]
    with ThreadPoolExecutor(16) as pool:
        runs = list(
            pool.map(lambda name: look_at_run(storage.join(storage_path, name), name, watch or living_owner), names)
        )
        folders = storage.list_folders(features_uri)
        caches = list(pool.map(lambda name: look_at_cache(storage.join(features_uri, name), name), folders))
    return Facts(
        runs=tuple(look_up(run, tracking, metrics=now - run.ended >= older_s) for run in runs),
        caches=tuple(caches),
        pointers=pointers,
        features_uri=features_uri,
        now=now,
    )


def look_at_run(folder: str, name: str, watch: Watch | None) -> Run:
    """What the folder of a run holds; `watch` says whether its driver lives, None: nobody's does."""
    path = storage.resolve(folder)[1]
    places = {path, os.path.realpath(path)} if storage.is_local(folder) else {path}
    run = Run(name=name, folder=folder, files=files_of(folder), places=tuple(sorted(places)))
    try:
        run = replace(run, text=storage.read_bytes(storage.join(folder, identity.FILE)).decode())
    except FileNotFoundError:
        if not run.is_remains:
            return replace(run, problem=f"found no {identity.FILE}, expected one in the folder of a run")
    except UnicodeDecodeError:
        return replace(run, problem=f"{identity.FILE}: found no text")
    try:
        if not run.is_remains:
            run = understood(run)
        alive, claims = watch(folder) if watch else (None, [])
        checkpoints = Checkpoints(folder)
        owner, entries = checkpoints.latest()
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        return replace(run, problem=one_line(error) or type(error).__name__)
    return replace(
        run,
        driver=alive.owner if alive else "",
        vanished=max((claim.time for claim in claims if not (claim.released or is_ours(claim))), default=0.0),
        owner=owner,
        named=frozenset(file for entry in entries for file in (entry.file, entry.scores) if file),
        finished=bool(entries) and entries[-1].finished,
    )


def is_ours(claim: Claim) -> bool:
    return claim.owner.startswith(f"{OWNER}@")


def understood(run: Run) -> Run:
    """The run with the content of its run.json; InputError, or another error, if it is of another kind."""
    record = json.loads(run.text)
    removing = record.get("format") == identity.BEING_REMOVED
    record = record["run"] if removing else record
    if record.get("format") != identity.FORMAT:
        raise InputError(f"{identity.FILE}: found format {record.get('format')!r}, expected {identity.FORMAT}")
    if not isinstance(record["run_id"], str) or not isinstance(record["config"], dict):
        raise InputError(f"{identity.FILE}: found no run id or config in it")
    return replace(run, record=record, removing=removing)


def look_up(run: Run, tracking: Tracking, *, metrics: bool) -> Run:
    """The run with what MLflow knows of it; with `metrics` also what it lacks of them."""
    if run.problem or not run.run_id:
        return run
    run = replace(run, status=tracking.status(run.run_id))
    lacking = sum(file.path.startswith("unsent/") for file in run.files)
    if metrics and not lacking and run.status not in ("", *UNFINISHED) and not (run.driver or run.removing):
        try:
            records = carried(run.folder)
        except (InputError, KeyError) as error:
            return replace(run, problem=f"its last checkpoint cannot be understood ({one_line(error)})")
        lacking = tracking.num_missing(records, run.run_id)
    return replace(run, lacking=lacking)


def look_at_cache(folder: str, name: str) -> Cache:
    """What the folder of a set of features holds."""
    cache = Cache(name=name, folder=folder, files=files_of(folder))
    known = rf"\.?(\d{{5}}\.parquet(\.json)?|{features.INDEX}|{features.ASIDE}|{features.USED})(\.\w+\.tmp)?"
    foreign = [file.path for file in cache.files if not re.fullmatch(known, file.path)]
    if foreign or not re.fullmatch(r"[0-9a-f]{32}(\.\d+)?", name):
        return replace(cache, problem=f"found {foreign[0] if foreign else 'another name'}, expected a set of features")
    paths = {file.path for file in cache.files}
    try:
        if features.ASIDE in paths:
            mark = json.loads(storage.read_bytes(storage.join(folder, features.ASIDE)))
            newest = max((file.time for file in cache.files if file.path != features.ASIDE), default=0.0)
            # a sign of use that is later than the plan: a run had begun with it before the mark was there
            begun = "removing_unused_since" in mark and newest <= mark["removing_unused_since"]
            cache = replace(cache, aside=str(mark["reason"]), removing=begun)
        if features.INDEX in paths:
            index = json.loads(storage.read_bytes(storage.join(folder, features.INDEX)))
            if index["format"] != features.FORMAT:
                raise InputError(f"{features.INDEX}: found format {index['format']!r}, expected {features.FORMAT}")
            cache = replace(cache, inputs=dict(index["inputs"]))
    except FileNotFoundError:
        return replace(cache, problem="it changes while one looks")
    except (InputError, ValueError, TypeError, KeyError) as error:
        if cache.aside is None:
            return replace(cache, problem=one_line(error))
    return cache


def files_of(folder: str) -> tuple[File, ...]:
    return tuple(File(*found) for found in storage.scan(folder))
