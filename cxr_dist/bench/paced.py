"""Passes of the real stream at a few ranks, for the queue model to be fitted to and judged by.

Ray Data, its splitter, the blocks' order and the consumer's checks are real; what stands in for a cluster's many cores
and GPUs is time: a decoder makes its block and then sleeps until the time that its images are said to take is over, a rank
sleeps for its step. So two cores carry eight decoders and four ranks, and what is measured is Ray's part and the order of
things. Passes over real PNG files, decoded for real, come beside them (`decoded`).
"""

import contextlib
import dataclasses
import threading
import time
import uuid
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import ray

from cxr_dist.bench.passes import stream_spec
from cxr_dist.bench.queueing import Pipeline, settled_rate
from cxr_dist.data.decode import Decoder, StreamSpec
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import EMPTY, Int64, Plan, Split
from cxr_dist.data.stream import Stream, build_splits

__all__ = ["Blank", "Paced", "Pass", "decoded", "paced"]

SIZE = 16
"""Side of an image that nobody looks at."""
ROW_GROUP = 8


@dataclasses.dataclass(frozen=True)
class Blank:
    """Rows of black images, as many as asked for: a split that needs no storage."""

    split: Split
    size: int

    def read(self, groups: Int64) -> pa.Table:
        rows = self.split.rows(groups[groups != EMPTY])
        rows = rows[rows >= 0]
        findings = pa.array(np.zeros(len(rows) * len(FINDINGS), bool))
        content = np.zeros(len(rows) * self.size**2, np.uint8)
        image = pa.FixedSizeBinaryArray.from_buffers(pa.binary(self.size**2), len(rows), [None, pa.py_buffer(content)])
        return pa.table(
            {
                "image_id": pa.array([f"{row}.png" for row in rows.tolist()]),
                "findings": pa.FixedSizeListArray.from_arrays(findings, len(FINDINGS)),
                "image": image,
            }
        )


class Paced:
    """A decoder whose blocks take the time that their images are said to take; one at a time, as in the real one."""

    def __init__(self, spec: StreamSpec, image_s: float):
        self.decoder, self.image_s, self.turn = Decoder(spec), image_s, threading.Lock()

    def block(self, number: int) -> pa.Table:
        with self.turn:
            began = time.monotonic()
            block = self.decoder.block(number)
            time.sleep(max(0.0, began + self.image_s * len(block) - time.monotonic()))
            return block


@dataclasses.dataclass(frozen=True)
class _Pace:
    """Makes a `Paced` of a stream; sent to the actors."""

    image_s: float

    def __call__(self, spec: StreamSpec) -> Paced:
        return Paced(spec, self.image_s)


class Pass(NamedTuple):
    """What came of a pass of the stream."""

    images_per_s: float
    """Settled, all ranks."""
    task_s: float
    """Processor time of the process with Ray Data's loop, for each of a task's two events."""


def paced(pipeline: Pipeline) -> Pass:
    """A pass of the stream with these times. Needs a running Ray."""
    warm = _warm_steps(pipeline.steps_per_task)
    steps = warm + pipeline.rounds * pipeline.steps_per_task
    batch = pipeline.share * pipeline.ranks
    train = Split(num_rows=steps * batch, row_group=ROW_GROUP)
    nothing = Split(num_rows=0, row_group=ROW_GROUP)
    spec = StreamSpec(
        plan=Plan(train=train, validation=nothing, seed=0, epochs=1, global_batch=batch),
        train=Blank(train, SIZE),
        validation=Blank(nothing, SIZE),
        world_size=pipeline.ranks,
        start=0,
        steps_per_task=pipeline.steps_per_task,
        pieces=1,
        size=SIZE,
        encoding="pixels",
        findings=tuple(range(len(FINDINGS))),
        views=0,
        augment=False,
        token=uuid.uuid4().hex,
    )
    return _pass(spec, pipeline, _Pace(pipeline.image_s))


def decoded(uri: str, pipeline: Pipeline, epochs: int) -> Pass:
    """A pass over the dataset at `uri`, decoded for real; `image_s` is not looked at."""
    spec = stream_spec(uri, batch=pipeline.share * pipeline.ranks, epochs=epochs)
    spec = dataclasses.replace(
        spec, world_size=pipeline.ranks, steps_per_task=pipeline.steps_per_task, pieces=1, token=uuid.uuid4().hex
    )
    return _pass(spec, pipeline, Decoder)


def _pass(spec: StreamSpec, pipeline: Pipeline, decoder: Any) -> Pass:
    ranks = [ray.remote(num_cpus=0)(_Rank).remote() for _ in range(pipeline.ranks)]
    ray.get([rank.ready.remote() for rank in ranks])
    splits = build_splits(spec, num_actors=pipeline.decoders, decoder=decoder)
    runs = [
        rank.run.remote(split, spec.plan, number, pipeline.ranks, spec.size, pipeline.step_s)
        for number, (rank, split) in enumerate(zip(ranks, splits, strict=True))
    ]
    came, spent = zip(*ray.get(runs), strict=True)
    for rank in ranks:
        ray.kill(rank)
    skipped = _warm_steps(pipeline.steps_per_task)
    taken_RW = np.array([times[skipped :: pipeline.steps_per_task] for times in came]).T
    blocks = len(taken_RW) * pipeline.ranks
    return Pass(settled_rate(taken_RW, pipeline.images_per_task), spent[0] / blocks / 2)


def _warm_steps(steps_per_task: int) -> int:
    """Steps of the short tasks that a stream begins with: 1, 2, 4, … of them."""
    return 2 ** (steps_per_task - 1).bit_length() - 1


class _Rank:
    """A rank that sleeps where it would compute."""

    def ready(self) -> bool:
        return True

    def run(
        self, shard: Any, plan: Plan, rank: int, world_size: int, size: int, step_s: float
    ) -> tuple[list[float], float]:
        """When each step began, seconds of a clock of this machine; what the loop's process spent from the first on."""
        came, before = list[float](), 0.0
        for _ in Stream(shard=shard, plan=plan, rank=rank, world_size=world_size, size=size):
            came.append(time.monotonic())
            if len(came) == 1:
                before = _loop_s() if rank == 0 else 0.0
            time.sleep(step_s)
        return came, _loop_s() - before if rank == 0 else 0.0


def _loop_s() -> float:
    """Processor time so far of the youngest process on this machine that has Ray Data's loop and splitter in it."""
    found: list[tuple[float, float]] = []
    for process in psutil.Process().parent().children():  # the raylet's
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "SplitCoordinator" in "".join(process.cmdline()):
                times = process.cpu_times()
                found.append((process.create_time(), times.user + times.system))
    return max(found)[1]
