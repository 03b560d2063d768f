"""The plan as a stream: one Ray Data pipeline for the whole job, dealt to the ranks, checked at the consumer.

Ray's splitter gives the next block to the rank that has received the fewest rows, ties to the lowest rank. With blocks
in a kept order, and those of one round of all ranks of one size, that is a round robin, so ordering the tasks round by
round and rank by rank is enough to deliver the plan. Nothing rests on it silently: every row carries its step and rank,
and the first that is not the one expected is an error.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.train

from cxr_dist.data.decode import BlockFacts, Decoder, StreamSpec
from cxr_dist.data.numbered import Maker, numbered_blocks
from cxr_dist.data.plan import Plan, Step
from cxr_dist.data.ranges import ReadCounters
from cxr_dist.data.rows import CORRUPT, OK, fixed_rows
from cxr_dist.data.sizing import first_pieces, row_seconds
from cxr_dist.errors import RunError
from cxr_dist.placement import ACTOR_RETRIES, decoding

__all__ = ["Batch", "PlanDataConfig", "Stream", "build_splits"]

BLOCKS_PER_ACTOR, BLOCKS_PER_RANK = 8, 4
"""Blocks that may be in memory at once. Ray counts two for each of an actor's two tasks while they run, and keeps a
quarter of the whole for finished ones."""

LEAST_STORE_BYTES = 256 << 20
"""Object store that the stream may use in any case."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's share of one step. B rows, K findings, S pixels a side; arrays are read-only views of the block."""

    step: Step
    """With this rank's row groups."""
    images_BSS: npt.NDArray[np.uint8]
    """Grey pixels; of no rows where the batch brings features."""
    labels_BK: npt.NDArray[np.uint8]
    draws_B6: npt.NDArray[np.float32]
    rows_B: npt.NDArray[np.int64]
    """Row of the split that each image is; -1 for padding."""
    valid_B: npt.NDArray[np.bool_]
    """False for padding and for unreadable images."""
    image_ids: list[str]
    corrupt: dict[str, str]
    """Unreadable images of this share: id to reason."""
    features: Any = None
    """Stored features of the rows: bytes [B, feature_bytes], or a tensor on the device; None where there are pixels."""


def build_splits(
    spec: StreamSpec,
    *,
    num_actors: int,
    decoder: Callable[[StreamSpec], Maker] = Decoder,
    retries: int = ACTOR_RETRIES,
) -> list[Any]:
    """One DataIterator a rank over the run's remaining steps. Needs a running Ray.

    Decoders go to ingest nodes, if there are any, and elsewhere where those have no room.
    """
    if not spec.pieces:
        spec = dataclasses.replace(spec, pieces=_pieces(spec, num_actors))
    blocks = numbered_blocks(
        spec.num_tasks,
        functools.partial(decoder, spec),
        num_actors=num_actors,
        retries=retries,
        store_bytes=max(
            LEAST_STORE_BYTES, spec.block_bytes * (BLOCKS_PER_ACTOR * num_actors + BLOCKS_PER_RANK * spec.world_size)
        ),
        placement=decoding(),
    )
    return blocks.streaming_split(spec.world_size, equal=False)


def _pieces(spec: StreamSpec, num_actors: int) -> int:
    row_group = spec.plan.train.row_group
    return first_pieces(
        row_s=row_seconds(spec.train, encoding=spec.encoding, row_group=row_group, row_bytes=spec.row_bytes),
        row_group=row_group,
        groups=spec.groups_per_share,
        decoders=num_actors // spec.world_size,
    )


class PlanDataConfig(ray.train.DataConfig):
    """Builds the stream each time a worker group starts, from its world size and the latest checkpoint's position."""

    def __init__(self, make_spec: Callable[[int], StreamSpec], num_actors: Callable[[int], int]):
        """Both are asked with the world size, in a process of the cluster."""
        super().__init__(datasets_to_split="all")
        self.make_spec = make_spec
        self.num_actors = num_actors

    def configure(
        self, datasets: dict, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict]:
        spec = self.make_spec(world_size)
        if spec.num_tasks == 0:
            return [{name: EmptyShard() for name in datasets} for _ in range(world_size)]
        splits = build_splits(spec, num_actors=self.num_actors(world_size))
        return [{name: splits[rank] for name in datasets} for rank in range(world_size)]


class EmptyShard:
    """The shard of a run that has no step left."""

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return iter(())


@dataclass
class Stream:
    """A rank's batches, in the plan's order, each checked against it. Counts what it waits for and what is unreadable.

    Iterating raises RunError at the first row that is not the one the plan has there, and at an end that comes early.
    """

    shard: Any
    plan: Plan
    rank: int
    world_size: int
    size: int
    """Side of an image; 0 where the rows are features."""
    wait_s: float = 0.0
    """Seconds spent waiting for data, all batches together."""
    head_of_line_s: float = 0.0
    """The part of `wait_s` in which the awaited block, or the one after it, was already decoded: what order and delivery
    cost. Told one block late; the clocks of the nodes have to agree."""
    reads: ReadCounters = field(default_factory=ReadCounters)
    """What the decoders read from storage for the blocks that came to this rank, as they told it."""
    delivered: int = 0
    """Images delivered, unreadable ones included."""
    corrupt: dict[str, str] = field(default_factory=dict)
    """Unreadable images met so far: id to reason."""
    start: int | None = None
    """First step delivered; None before the first batch, or if no step is left."""
    _begun: "_Begun | None" = field(default=None, init=False, repr=False)

    def begin(self) -> None:
        """Have the first batch decoded while the rank gets ready for it, and not only when it is asked for."""
        self._begun = _Begun(self._blocks())

    def __iter__(self) -> Generator[Batch, None, None]:
        blocks, self._begun = self._begun or self._blocks(), None
        try:
            yield from self._batches(blocks)
        finally:
            # left to the garbage collector, an iterator that was not exhausted keeps the pipeline decoding
            if hasattr(blocks, "close"):
                blocks.close()

    def _blocks(self) -> Iterator[pa.Table]:
        # Nothing is gained by prefetching: Ray fetches one block ahead anyway, and would give none before as many
        # more are decoded.
        return iter(self.shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    def _batches(self, blocks: Iterator[pa.Table]) -> Iterator[Batch]:
        share = self.plan.rank_batch(self.world_size)
        expected, pieces = None, []
        for block, facts in self._timed(blocks):
            if expected is None:
                expected = self.start = facts.start
            self.reads = _sum(self.reads, facts.reads)
            pieces.append(block)
            if sum(map(len, pieces)) < share:
                continue
            rows = pa.concat_tables(pieces)
            pieces.clear()
            for offset in range(0, len(rows), share):
                yield self._checked(rows.slice(offset, share), expected)
                expected += 1
        if expected is None and not isinstance(self.shard, EmptyShard):
            expected = 0
        if expected is not None and expected != self.plan.num_steps:
            raise RunError(
                f"stream of rank {self.rank} ended before step {expected} of {self.plan.num_steps}; "
                "a decoding task was lost, run the job again to go on from the last checkpoint"
            )

    def _timed(self, blocks: Iterator[pa.Table]) -> Iterator[tuple[pa.Table, BlockFacts]]:
        """The blocks; counts the time until each comes."""
        since = until = ready = 0.0  # the last wait, and when the block that it was for had been decoded
        while True:
            began = time.time()
            block = next(blocks, None)
            came = time.time()
            self.wait_s += came - began
            facts = None if block is None else BlockFacts.of(block)
            self.head_of_line_s += max(0.0, until - max(since, min(ready, facts.ended if facts else ready)))
            if block is None or facts is None:
                return
            since, until, ready = began, came, facts.ended
            yield block, facts

    def _checked(self, table: pa.Table, index: int) -> Batch:
        self._expect("step", table["index"].to_numpy(), np.full(len(table), index), index)
        self._expect("rank", table["rank"].to_numpy(), np.full(len(table), self.rank), index)
        step = self.plan.share(index, self.rank, self.world_size)
        rows = self.plan.split_of(step).rows(step.groups)
        self._expect("row", table["row"].to_numpy(), rows, index)
        state = table["state"].to_numpy()
        ids = table["image_id"].to_pylist()
        corrupt = {ids[row]: table["reason"][row].as_py() for row in np.flatnonzero(state == CORRUPT).tolist()}
        self.corrupt.update(corrupt)
        self.delivered += int((rows >= 0).sum())
        content = fixed_rows(table["image"], np.uint8)
        return Batch(
            step=step,
            images_BSS=content.reshape(-1, self.size, self.size) if self.size else content[:0].reshape(0, 0, 0),
            features=None if self.size else content,
            labels_BK=fixed_rows(table["labels"], np.uint8),
            draws_B6=fixed_rows(table["draws"], np.dtype("<f4")),
            rows_B=rows,
            valid_B=state == OK,
            image_ids=ids,
            corrupt=corrupt,
        )

    def _expect(self, name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], index: int) -> None:
        if not np.array_equal(found, expected):
            raise RunError(
                f"stream of rank {self.rank} out of order: found {name} {found[:4].tolist()}…, expected "
                f"{expected[:4].tolist()}… at step {index}; this is a fault of the stream, please report it"
            )


class _Begun(Iterator[pa.Table]):
    """Blocks, the first of which a thread asks for at once."""

    def __init__(self, blocks: Iterator[pa.Table]):
        self.blocks = blocks
        self.first: Future[pa.Table | None] | None = Future()
        threading.Thread(target=self._ask, args=(self.first,), name="first block", daemon=True).start()

    def _ask(self, first: "Future[pa.Table | None]") -> None:
        try:
            first.set_result(next(self.blocks, None))
        except BaseException as error:  # noqa: BLE001  raised where the block is asked for
            first.set_exception(error)

    def __next__(self) -> pa.Table:
        first, self.first = self.first, None
        block = first.result() if first else next(self.blocks, None)
        if block is None:
            raise StopIteration
        return block

    def close(self) -> None:
        if self.first:
            self.first.exception()  # a generator cannot be closed while it runs
        if hasattr(self.blocks, "close"):
            self.blocks.close()


def _sum(one: ReadCounters, other: ReadCounters) -> ReadCounters:
    return ReadCounters(**{name: value + getattr(other, name) for name, value in dataclasses.asdict(one).items()})
