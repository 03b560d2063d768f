"""What a run will read, hold, take and cost: arithmetic on its plan, its dataset's byte ranges, and measured rates.

What the plan decides (steps, bytes) is exact. Times come from rates that were measured, as a span where one figure is not known
better; without a rate there is no time. Start-up, waiting for nodes and the report are in none of them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_dist.config import Config
from cxr_dist.cost import NodeTime, bill
from cxr_dist.data.plan import Plan
from cxr_dist.data.stream import BLOCKS_PER_ACTOR, BLOCKS_PER_RANK, LEAST_STORE_BYTES
from cxr_dist.measured import MeasuredNode, Measurements
from cxr_dist.prices import Kind, Prices
from cxr_dist.train.footprint import Footprint
from cxr_dist.train.job import TrainJob
from cxr_dist.train.survey import START_S

__all__ = [
    "Cluster",
    "Left",
    "Span",
    "cluster_of",
    "epoch_bytes",
    "left",
    "lengths",
    "memory",
    "read_bytes",
    "seen",
    "split_bytes",
    "times",
    "written",
]


@dataclass(frozen=True, kw_only=True)
class Left:
    """Steps of a run that are still to be done."""

    train: int
    validation: int
    epochs: int
    """Epochs that are begun or whole."""


def left(plan: Plan, start: int) -> Left:
    """What is left from step `start` on."""
    epoch, offset = divmod(start, plan.steps_per_epoch)
    if epoch >= plan.epochs:
        return Left(train=0, validation=0, epochs=0)
    whole = plan.epochs - epoch - 1
    train = max(0, plan.train_steps - offset)
    validation = plan.validation_steps - max(0, offset - plan.train_steps)
    return Left(
        train=whole * plan.train_steps + train,
        validation=whole * plan.validation_steps + validation,
        epochs=whole + 1,
    )


def epoch_bytes(job: TrainJob, epoch: int) -> tuple[int, int]:
    """Bytes of row groups that the training and the validation steps of an epoch read."""
    plan = job.plan
    full = lengths(job.train)[: plan.train.num_full_groups]
    if plan.max_steps is None:
        train = int(full.sum()) - int(full[plan.epoch_groups(epoch, plan.train_steps)].sum())
    else:
        train = int(full[plan.epoch_groups(epoch, 0, plan.train_steps)].sum())
    validated = min(plan.validation.num_groups, plan.validation_steps * plan.groups_per_step)
    return train, int(lengths(job.validation)[:validated].sum())


def read_bytes(job: TrainJob, start: int) -> int:
    """Bytes of row groups that the run reads from step `start` on, where it reads images and nothing is cached."""
    plan = job.plan
    first, offset = divmod(start, plan.steps_per_epoch)
    total = 0
    for epoch in range(first, plan.epochs):
        train, validation = epoch_bytes(job, epoch)
        if epoch == first and offset:
            done = min(offset, plan.train_steps)
            train = int(lengths(job.train)[plan.epoch_groups(epoch, done, plan.train_steps)].sum())
            groups = max(0, offset - plan.train_steps) * plan.groups_per_step
            validation -= int(lengths(job.validation)[:groups].sum())
        total += train + validation
    return total


def split_bytes(reader: Any) -> int:
    """Bytes of all row groups of a split."""
    return int(lengths(reader).sum())


def lengths(reader: Any) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Bytes of each row group of a split."""
    return reader.ranges.length


def memory(job: TrainJob, size: Footprint, workers: int) -> dict[str, Any]:
    """Bytes that a worker holds in tensors, and what the stream and kept features take of the nodes' object stores."""
    spec = job.stream_spec(workers, 0)
    decoders = job.config.data.decode_workers or 1
    each, ranks = BLOCKS_PER_ACTOR * spec.block_bytes, BLOCKS_PER_RANK * spec.block_bytes * workers
    return {
        "of": "GPU" if job.use_gpu else "host",
        "weights_bytes": size.weights_bytes,
        "step_bytes": size.step_peak_bytes,
        "prefix_call_bytes": size.prefix_peak_bytes,
        "peak_bytes": size.peak_bytes,
        "object_store_bytes": max(LEAST_STORE_BYTES, ranks + each * decoders),
        "object_store_bytes_per_more_decoder": each,
    }


def written(job: TrainJob, size: Footprint, start: int) -> dict[str, Any]:
    """Checkpoints: how large, how many, how many are kept."""
    todo, every = left(job.plan, start), job.config.train.checkpoint_every_steps
    done = job.plan.epochs * job.plan.train_steps - todo.train
    within = ((done + todo.train) // every - done // every) if every else 0
    return {
        "checkpoint_bytes": size.checkpoint_bytes,
        "at_epoch_ends": todo.epochs,
        "within_epochs": within,
        "kept": 2 + job.config.train.keep_checkpoints,
        "uploaded_bytes": size.checkpoint_bytes * (todo.epochs + within),
    }


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes that a run would have: those that were seen, and more of a kind that was seen where its ranks need them."""

    nodes: tuple[MeasuredNode, ...]
    more: int
    """How many of them are not there yet."""
    missing: str
    """Why the ranks do not fit whatever is added; empty: they do."""

    def cpus_for_decoding(self, config: Config, workers: int, *, use_gpu: bool) -> int:
        """Whole CPUs that the ranks leave, node by node as they are placed."""
        free, waiting, each = 0, workers, config.train.cpus_per_worker
        for node in sorted(self.nodes, key=lambda node: -node.gpus):
            placed = min(waiting, ranks_on(node, config, use_gpu=use_gpu))
            waiting -= placed
            free += math.floor(node.cpus - placed * each + 1e-9)
        return free

    def bill(self, prices: Prices) -> Any:
        """The cost of an hour of it."""
        return bill(
            (
                NodeTime(
                    node_id=str(number),
                    kind=Kind(instance=node.instance, market=node.market, region=node.region),
                    seconds=3600.0,
                )
                for number, node in enumerate(self.nodes)
            ),
            prices,
        )


def ranks_on(node: MeasuredNode, config: Config, *, use_gpu: bool) -> int:
    """Ranks that fit on a node."""
    room = math.floor(node.cpus / config.train.cpus_per_worker + 1e-9)
    return min(room, int(node.gpus)) if use_gpu else room


def cluster_of(nodes: Sequence[MeasuredNode], config: Config, workers: int, *, use_gpu: bool) -> Cluster:
    """The cluster for so many ranks, out of nodes that were seen."""
    room = [ranks_on(node, config, use_gpu=use_gpu) for node in nodes]
    lacking = workers - sum(room)
    if lacking <= 0:
        return Cluster(nodes=tuple(nodes), more=0, missing="")
    if not any(room):
        what = "with a GPU" if use_gpu else f"with {config.train.cpus_per_worker:g} CPUs"
        return Cluster(nodes=tuple(nodes), more=0, missing=f"none of the {len(nodes)} nodes seen holds a rank ({what})")
    kinds = Counter(node for node, fit in zip(nodes, room, strict=True) if fit)
    kind = kinds.most_common(1)[0][0]
    more = math.ceil(lacking / ranks_on(kind, config, use_gpu=use_gpu))
    return Cluster(nodes=(*nodes, *[kind] * more), more=more, missing="")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Seconds, at least and at most."""

    low: float
    high: float

    def __add__(self, other: "Span") -> "Span":
        return Span(low=self.low + other.low, high=self.high + other.high)

    def times(self, factor: float) -> "Span":
        return Span(low=self.low * factor, high=self.high * factor)

    def at_least(self, seconds: float | None) -> "Span":
        """The span of what takes no less than `seconds`, where that is known."""
        return Span(low=max(self.low, seconds or 0.0), high=max(self.high, seconds or 0.0))

    def to_json(self) -> dict[str, float]:
        return {"low": round(self.low, 3), "high": round(self.high, 3)}


def times(
    job: TrainJob,
    rates: Measurements,
    size: Footprint,
    *,
    start: int,
    workers: int,
    decode_images_per_s: float | None,
    read_bytes_per_s: float | None,
    features: bool,
    missing: int,
    num_test: int,
    scorers: int,
) -> dict[str, Any] | None:
    """Seconds of an epoch, of the pass over the prefix, of the test evaluation and in all; None without a measured step.

    A validation image takes no less than its prefix and no more than a training image; a gradient exchange is hidden behind
    the backward, or not at all.
    """
    if rates.train is None or (features and rates.prefix is None):
        return None
    step, prefix = 1 / rates.train, 1 / (rates.prefix or rates.train)
    todo, plan = left(job.plan, start), job.plan
    trained, validated = plan.train_steps * plan.global_batch, min(plan.validation.num_rows, _padded(plan))
    exchange = 0.0
    if workers > 1 and rates.allreduce_bytes_per_s:
        exchange = plan.train_steps * size.gradient_bytes / rates.allreduce_bytes_per_s
    per_epoch, whole = sum(epoch_bytes(job, 0)), START_S
    if features:
        tail = max(0.0, step - prefix)
        epoch = Span(low=trained * tail / workers, high=(trained + validated) * tail / workers + exchange)
        done_once = Span(low=missing * prefix / workers, high=missing * prefix / workers)
        rows = plan.train.num_rows + plan.validation.num_rows if missing else 0
        stored = split_bytes(job.train) + split_bytes(job.validation) if missing else 0
        done_once = done_once.at_least(_over(rows, decode_images_per_s)).at_least(_over(stored, read_bytes_per_s))
        done_once = done_once + Span(low=whole, high=whole) if missing else done_once
    else:
        epoch = Span(
            low=(trained * step + validated * prefix) / workers, high=(trained + validated) * step / workers + exchange
        )
        epoch = epoch.at_least(_over(trained + validated, decode_images_per_s))
        epoch = epoch.at_least(_over(per_epoch, read_bytes_per_s))
        done_once = Span(low=0.0, high=0.0)
    part = (todo.train + todo.validation) / plan.steps_per_epoch
    test = Span(low=num_test * prefix / scorers, high=num_test * step / scorers)
    test = test.at_least(_over(num_test, decode_images_per_s))
    return {
        "epoch_s": epoch.to_json(),
        "features_s": done_once.to_json(),
        "test_s": test.to_json(),
        "all_s": (epoch.times(part) + done_once + test).to_json(),
        "exchange_s_per_epoch": round(exchange, 3),
    }


def _padded(plan: Plan) -> int:
    return plan.validation_steps * plan.global_batch


def _over(amount: float, rate: float | None) -> float | None:
    return amount / rate if rate else None


def seen(nodes: Sequence[MeasuredNode]) -> list[dict[str, Any]]:
    """The nodes by kind, as plain values."""
    kinds = Counter(dataclasses.replace(node, object_store_bytes=0, read_bytes_per_s=None) for node in nodes)
    names = ("instance", "market", "region", "role", "cpus", "gpus")
    return [{**{name: getattr(node, name) for name in names}, "nodes": count} for node, count in kinds.items()]
