"""Numbered blocks: a Ray Data pipeline whose block n is what an actor makes of the number n, in that order.

A run has tens of thousands of tasks, and nothing about a task but its number. `from_items` puts an object into the
object store for each (0.8 ms and 40 kB a task: 16 s and 0.8 GB for 20,000); here all tasks share one empty input block,
and an actor learns the number from Ray Data itself, which counts an operator's tasks in the order of their inputs and
gives an attempt the number of the first. 20,000 tasks weigh less than a megabyte. This module holds all that the stream
needs of Ray's private API (2.60): the constructor of a dataset from blocks, the number of a task, and the turns of its loop.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions, ExecutionResources
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import BlockEntry, PhysicalOperator, RefBundle
from ray.data._internal.execution.interfaces.task_context import TaskContext
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import InputData
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockAccessor
from ray.util.annotations import RayDeprecationWarning

__all__ = ["Maker", "numbered_blocks"]

CALLS_PER_ACTOR = 2
"""Tasks at once in an actor: one waits for its first bytes while the other decodes."""

TASKS_PER_ACTOR = 2
"""Tasks given to an actor before it has done one: more would keep the first blocks waiting for one another at the start,
and Ray Data's loop, which turns ten times a second, brings the next while one of two is still under way."""

PAUSE_S = 0.05
"""Rest of the loop after a turn in which it neither waited nor did anything."""

TOGETHER_S = 0.5
"""Longest that an actor which is up waits for those that are not before it gets a second task."""


class Maker(Protocol):
    """What an actor makes blocks with; asked by several threads at a time."""

    def block(self, number: int) -> pa.Table: ...


class _Worker:
    """A Ray Data actor's callable: the block of each task, by the task's number."""

    def __init__(self, make: Callable[[], Maker]):
        self.maker = make()

    def __call__(self, _: Any) -> Iterator[pa.Table]:
        yield self.maker.block(TaskContext.get_current().task_idx)


class Rest(ExecutionCallback):
    """Lets Ray Data's loop rest while nothing is to be done.

    The loop waits 0.1 s for its tasks unless all of them are ready. Where slow consumers hold the finished ones back, all
    are: it would turn without a pause, half a core of the node for as long as the trainer is slower than the decoders.
    """

    def __init__(self) -> None:
        self.ended, self.done = time.monotonic(), 0

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        done = sum(
            op.metrics.num_tasks_submitted + op.metrics.num_task_outputs_generated + op.metrics.num_outputs_taken
            for op in executor._topology
        )
        if done == self.done and time.monotonic() - self.ended < PAUSE_S:
            time.sleep(PAUSE_S)
        self.ended, self.done = time.monotonic(), done


class Spread(BackpressurePolicy):
    """Deals the first tasks to all actors: they come up one after another, and the first would get the others' too.

    The very first task goes out at once all the same, for Ray Data holds nothing back while nothing is under way.
    """

    up_since: float | None = None
    """When the first actor was up."""

    def can_add_input(self, op: PhysicalOperator) -> bool:
        pools = op.get_autoscaling_actor_pools()
        if not any(pool.num_pending_actors() for pool in pools) or not any(pool.num_running_actors() for pool in pools):
            return True
        self.up_since = self.up_since or time.monotonic()
        return time.monotonic() - self.up_since > TOGETHER_S


def numbered_blocks(
    count: int,
    make: Callable[[], Maker],
    *,
    num_actors: int,
    retries: int,
    store_bytes: int,
    placement: Mapping[str, Any],
) -> Dataset:
    """A dataset of `count` blocks in the order of their numbers, made by actors of one CPU. Needs a running Ray.

    `placement` says where they go (`cxr_dist.placement`); empty: wherever there is room.

    Each actor calls `make` once. A task whose actor dies is tried again `retries` times, by the actor that takes its place.
    No task is begun while blocks of `store_bytes`, estimated generously, are made or wait for their consumers.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a task's output stays one block, however large
    context.memory_usage_poll_interval_s = None  # Ray would read each actor's memory map every second
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Rest]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Spread])
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        # Ray's own limit is half of the object stores: gigabytes of blocks ahead of a slow consumer
        resource_limits=ExecutionResources.for_limits(object_store_memory=store_bytes),
    )
    with warnings.catch_warnings():
        # Ray 2.60 calls these two arguments deprecated and has no other name for them
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return _same_inputs(count, context).map_batches(
            _Worker,
            fn_constructor_kwargs={"make": make},
            batch_size=1,
            compute=ActorPoolStrategy(
                size=num_actors,
                max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
                max_tasks_in_flight_per_actor=TASKS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
            **placement,
            max_restarts=-1,
            max_task_retries=retries,
        )


def _same_inputs(count: int, context: DataContext) -> Dataset:
    """A dataset of `count` blocks that are all one object of one row."""
    block = pa.table({"nothing": [0]})
    entry = BlockEntry(ray.put(block), BlockAccessor.for_block(block).get_metadata())
    bundle = RefBundle((entry,), owns_blocks=False, schema=block.schema)
    stats = DatasetStats(metadata={"tasks": []}, parent=None)
    return Dataset(LogicalPlan(InputData([bundle] * count), context), context, stats)
