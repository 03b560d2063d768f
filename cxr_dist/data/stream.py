"""The plan as a stream: one Ray Data pipeline for the whole job, dealt to the ranks, checked at the consumer.

Ray's splitter gives the next block to the rank that has received the fewest rows, ties to the lowest rank. With
blocks of one size in a kept order that is a round robin, so ordering the tasks run by run and rank by rank is enough
to deliver the plan. Nothing rests on it silently: every row carries its step and rank, and the first that is not the
one expected is an error.
"""

import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.train
from ray.util.annotations import RayDeprecationWarning

from cxr_dist.data.decode import Decoder, StreamSpec
from cxr_dist.data.plan import Plan, Step
from cxr_dist.data.rows import CORRUPT, OK, fixed_rows
from cxr_dist.errors import RunError

__all__ = ["Batch", "PlanDataConfig", "Stream", "build_splits"]

TASK_RETRIES = 8
"""Attempts after the first at a decoding task whose process died; Ray's default is to try for ever."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's share of one step. B rows, K findings, S pixels a side; arrays are read-only views of the block."""

    step: Step
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
    decoder: Callable[..., Any] = Decoder,
    label_selector: dict[str, str] | None = None,
    retries: int = TASK_RETRIES,
) -> list[Any]:
    """One DataIterator a rank over the run's remaining steps. Needs a running Ray."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    tasks = ray.data.from_items(list(range(spec.num_tasks)), override_num_blocks=spec.num_tasks)
    with warnings.catch_warnings():
        # Ray 2.60 calls these two arguments deprecated and has no other name for them
        warnings.simplefilter("ignore", RayDeprecationWarning)
        blocks = tasks.map_batches(
            decoder,
            fn_constructor_kwargs={"spec": spec},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=1,
            label_selector=label_selector,
            max_restarts=-1,
            max_task_retries=retries,
        )
    blocks.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    blocks.context.target_max_block_size = None  # a task's output stays one block, however large
    return blocks.streaming_split(spec.world_size, equal=False)


class PlanDataConfig(ray.train.DataConfig):
    """Builds the stream each time a worker group starts, from its world size and the latest checkpoint's position."""

    def __init__(self, make_spec: Callable[[int], StreamSpec], num_actors: int):
        super().__init__(datasets_to_split="all")
        self.make_spec = make_spec
        self.num_actors = num_actors

    def configure(
        self, datasets: dict, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict]:
        spec = self.make_spec(world_size)
        if spec.num_tasks == 0:
            return [{name: EmptyShard() for name in datasets} for _ in range(world_size)]
        splits = build_splits(spec, num_actors=self.num_actors)
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
    delivered: int = 0
    """Images delivered, unreadable ones included."""
    corrupt: dict[str, str] = field(default_factory=dict)
    """Unreadable images met so far: id to reason."""
    start: int | None = None
    """First step delivered; None before the first batch, or if no step is left."""

    def __iter__(self) -> Generator[Batch, None, None]:
        blocks = iter(self.shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        try:
            yield from self._batches(blocks)
        finally:
            # left to the garbage collector, an iterator that was not exhausted keeps the pipeline decoding
            if hasattr(blocks, "close"):
                blocks.close()

    def _batches(self, blocks: Iterator[pa.Table]) -> Iterator[Batch]:
        share = self.plan.rank_batch(self.world_size)
        expected = None
        while True:
            waited = time.perf_counter()
            block = next(blocks, None)
            self.wait_s += time.perf_counter() - waited
            if block is None:
                break
            for offset in range(0, len(block), share):
                rows = block.slice(offset, share)
                if expected is None:
                    expected = self.start = rows["start"][0].as_py()
                if expected == self.plan.num_steps and rows["index"][0].as_py() >= expected:
                    continue
                yield self._checked(rows, expected)
                expected += 1
        if expected is None and not isinstance(self.shard, EmptyShard):
            expected = 0
        if expected is not None and expected != self.plan.num_steps:
            raise RunError(
                f"stream of rank {self.rank} ended before step {expected} of {self.plan.num_steps}; "
                "a decoding task was lost, run the job again to go on from the last checkpoint"
            )

    def _checked(self, table: pa.Table, index: int) -> Batch:
        self._expect("step", table["index"].to_numpy(), np.full(len(table), index), index)
        self._expect("rank", table["rank"].to_numpy(), np.full(len(table), self.rank), index)
        step = self.plan.step(index)
        rows = self.plan.split_of(step).rows(step.of_rank(self.rank, self.world_size))
        self._expect("row", table["row"].to_numpy(), rows, index)
        state = table["state"].to_numpy()
        ids = table["image_id"].to_pylist()
        reasons = table["reason"].to_pylist()
        corrupt = {ids[row]: reasons[row] for row in np.flatnonzero(state == CORRUPT)}
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
