"""Features that stay in memory for the whole run: on the device, or in the node's object store, shared by its ranks.

Ranks draw their batches from them by the same plan that the stream follows; there is nothing to decode and, after the
start, nothing to read.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.train

from cxr_dist.data.features import FeatureSet
from cxr_dist.data.plan import NUM_DRAWS, Int64, Plan, view_of
from cxr_dist.data.rows import CORRUPT, OK, PADDING, findings_of, fixed_rows
from cxr_dist.data.stream import Batch
from cxr_dist.errors import DataError, RunError

__all__ = [
    "DamagedFeatures",
    "HostRows",
    "Name",
    "ResidentDataConfig",
    "ResidentFeed",
    "ResidentSet",
    "ResidentShard",
    "read_all",
]


Name = tuple[str, int]
"""A set of features: split and view."""


@dataclass(frozen=True, kw_only=True)
class ResidentShard:
    """A rank's dataset shard where features are resident: what they are, where they are, and the step to start from."""

    sets: dict[Name, FeatureSet]
    refs: dict[Name, list[Any]] | None
    """The shards in Ray's object store; None where a rank reads them itself, straight into its device."""
    start: int = 0

    def tables(self, name: Name) -> Iterator[pa.Table]:
        """The shards of a set in order, one at a time."""
        if self.refs is not None:
            yield from (ray.get(ref) for ref in self.refs[name])
        else:
            found = self.sets[name]
            yield from (found.read_shard(number) for number in range(len(found.shards)))


class DamagedFeatures(DataError):  # noqa: N818  it names what was found
    """A set of features that is not what its index says."""

    def __init__(self, found: FeatureSet, reason: str):
        super().__init__(reason)
        self.set, self.reason = found, reason


def read_all(sets: dict[Name, FeatureSet], *, keep: bool) -> dict[Name, list[Any]] | None:
    """Read every shard once, on all nodes, and check it; DamagedFeatures if one is not what its index says.

    With `keep` the shards stay in Ray's object store, and references to them are given: the driver owns them for the
    run, the ranks of a node share one copy, and a lost one is read again.
    """
    load = ray.remote(num_cpus=1, num_returns=2, max_retries=3)(_load)
    loading = {
        name: [load.remote(found, number, keep) for number in range(len(found.shards))] for name, found in sets.items()
    }
    for name, refs in loading.items():
        for _, reason in refs:
            if (found := ray.get(reason)) is not None:
                raise DamagedFeatures(sets[name], found)
    return {name: [table for table, _ in refs] for name, refs in loading.items()} if keep else None


def _load(found: FeatureSet, number: int, keep: bool) -> tuple[pa.Table | None, str | None]:
    """A shard, or why there is none."""
    try:
        table = found.read_shard(number)
    except DataError as error:
        return None, str(error)
    return table if keep else None, None


class ResidentDataConfig(ray.train.DataConfig):
    """Gives each worker group the features, and the position of the latest checkpoint."""

    def __init__(self, shard: ResidentShard, start: Callable[[], int]):
        super().__init__(datasets_to_split="all")
        self.shard = shard
        self.start = start

    def configure(
        self, datasets: dict, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict]:
        shard = dataclasses.replace(self.shard, start=self.start())
        return [{name: shard for name in datasets} for _ in range(world_size)]


class HostRows:
    """Stored features of a set in the host's memory, a matrix a shard."""

    def __init__(self, found: FeatureSet):
        self.row_bytes, self.row_group = found.row_bytes, found.row_group
        self.rows_per_shard = found.groups_per_shard * found.row_group
        self.shards: list[npt.NDArray[np.uint8]] = []

    def add(self, shard: npt.NDArray[np.uint8]) -> None:
        """Keep the next shard, [rows, row_bytes]; no copy."""
        self.shards.append(shard)

    def take(self, rows_B: Int64) -> npt.NDArray[np.uint8]:
        """Rows in whole row groups, [B, row_bytes]; zeros for padding (-1)."""
        found = np.zeros((len(rows_B), self.row_bytes), np.uint8)
        shards, places = np.divmod(rows_B, self.rows_per_shard)
        for at in range(0, len(rows_B), self.row_group):  # a row group lies together
            count = int((rows_B[at : at + self.row_group] >= 0).sum())
            if count:
                found[at : at + count] = self.shards[shards[at]][places[at] : places[at] + count]
        return found


class ResidentSet:
    """One view of one split in memory: ids, labels and states of all rows, and their features."""

    def __init__(self, found: FeatureSet, tables: Iterable[pa.Table], columns: tuple[int, ...], features: Any):
        """`tables` are the set's shards in order, `columns` the run's findings; `features` keeps them (`HostRows`)."""
        ids, states, findings = [], [], []
        for table in tables:
            ids.append(table["image_id"].to_numpy(zero_copy_only=False))
            states.append(table["state"].to_numpy())
            findings.append(findings_of(table)[:, list(columns)])
            features.add(fixed_rows(table["image"], np.uint8))
        self.ids, self.state, self.labels_NK = np.concatenate(ids), np.concatenate(states), np.concatenate(findings)
        if len(self.ids) != found.num_rows:
            raise RunError(f"{found.folder}: found {len(self.ids)} rows of features, expected {found.num_rows}")
        self.corrupt = found.corrupt
        self.features = features


@dataclass
class ResidentFeed:
    """A rank's batches from resident features, in the plan's order: what `data.stream.Stream` is to streamed images."""

    sets: dict[tuple[str, int], ResidentSet]
    plan: Plan
    rank: int
    world_size: int
    start: int
    views: int
    augment: bool
    wait_s: float = 0.0
    """Seconds spent gathering batches."""
    delivered: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Generator[Batch, None, None]:
        for index in range(self.start, self.plan.num_steps):
            began = time.perf_counter()
            batch = self.batch(index)
            self.wait_s += time.perf_counter() - began
            yield batch

    def batch(self, index: int) -> Batch:
        """This rank's share of one step."""
        step = self.plan.share(index, self.rank, self.world_size)
        view = view_of(step.epoch, views=self.views, augment=self.augment) if step.kind == "train" else 0
        found = self.sets[step.kind, view]
        rows = self.plan.split_of(step).rows(step.groups)
        real = rows >= 0
        state = np.where(real, found.state[rows], PADDING)
        ids = np.where(real, found.ids[rows], "").tolist()
        corrupt = {ids[at]: found.corrupt[ids[at]] for at in np.flatnonzero(state == CORRUPT)}
        self.corrupt.update(corrupt)
        self.delivered += int(real.sum())
        return Batch(
            step=step,
            images_BSS=np.zeros((0, 0, 0), np.uint8),
            features=found.features.take(rows),
            labels_BK=np.where(real[:, None], found.labels_NK[rows], 0).astype(np.uint8),
            draws_B6=np.zeros((len(rows), NUM_DRAWS), np.float32),
            rows_B=rows,
            valid_B=state == OK,
            image_ids=ids,
            corrupt=corrupt,
        )
