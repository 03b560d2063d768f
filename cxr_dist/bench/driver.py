"""What a manifest costs the driver of a run, in a new process: memory, time and objects, stage by stage.

The process imports what `train.run` imports and calls what it calls, as far as no image is needed. Memory is the highest
resident memory of its address space (`VmHWM`; `ru_maxrss` would begin with that of whoever started it). Times are of the
processor: what else a machine does is no part of a plan.
"""

import dataclasses
import gc
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cxr_dist.data.places import Offsets, Runs
from cxr_dist.data.shards import ShardReader

__all__ = ["Planned", "driver", "in_new_process", "peak_mb", "places_bytes"]

T = TypeVar("T")

STEPS = 200
"""Steps that are planned for a median, spread over the run."""
NAMED = 1_000_000
"""Images whose part of the final check is computed: it goes over all of a run's, one by one."""
EPOCHS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of so many ranks over a manifest, as the driver, a rank and a decoder plan it."""

    ranks: int
    step_ms: float
    """A whole step planned, median."""
    worst_step_ms: float
    """The slowest of 99 in 100."""
    share_ms: float
    """One rank's share of a step planned, as ranks and decoders do, median."""
    tasks: int
    """Tasks of Ray Data in the run."""
    task_us: float
    """Rank and steps of a task found by its number, median."""
    train_steps: int
    """Training steps of an epoch."""
    validation_steps: int


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """The result of `work(*arguments)` in a Python of its own, which ends with it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    finally:
        process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _answer(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(work(*arguments))
    except Exception as error:  # noqa: BLE001  raised again by who asked
        pipe.send(error)


def peak_mb() -> float:
    """Highest resident memory of this process so far, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def driver(uri: str, storage_path: str, share: int, worlds: tuple[int, ...]) -> dict[str, Any]:
    """A run's driver over the manifest at `uri`, `share` images a rank in a step: figures by name, `runs` a `Planned` each."""
    from cxr_dist import preflight
    from cxr_dist.config import Config, DataConfig, TrainConfig
    from cxr_dist.train import run
    from cxr_dist.train.prepare import make_job

    found: dict[str, Any] = {"imports_mb": peak_mb()}
    gc.collect()
    objects, blocks = len(gc.get_objects()), sys.getallocatedblocks()
    most = max(worlds)
    config = Config(
        data=DataConfig(uri=uri, label_set="nih14", encoding="pixels"),
        train=TrainConfig(
            num_workers=most, global_batch=share * most, epochs=EPOCHS, storage_path=storage_path, use_gpu="no"
        ),
    )

    def timed(name: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        result = work()
        found[f"{name}_s"], found[f"{name}_mb"] = time.process_time() - began, peak_mb()
        return result

    manifest = timed("manifest", lambda: preflight.check_dataset(config))
    preflight.check_positives(manifest, config)
    job = timed("job", lambda: make_job(config, manifest, use_gpu=False))
    gc.collect()
    found["objects"], found["blocks"] = len(gc.get_objects()) - objects, sys.getallocatedblocks() - blocks
    found["shards"] = sum(len(split.shards) for split in manifest.splits.values())
    found["identity_bytes"] = len(run.as_yaml(config)) + len(str(manifest.audit))
    sent = _Counted()
    ForkingPickler(sent, 5).dump(job)
    found["job_bytes"] = sent.num_bytes
    found["places_bytes"] = places_bytes(job.train) + places_bytes(job.validation)
    runs = []
    for ranks in worlds:
        planned = dataclasses.replace(job, plan=dataclasses.replace(job.plan, global_batch=share * ranks))
        runs.append(_planned(planned, ranks))
    found["runs"] = [dataclasses.asdict(one) for one in runs]
    found["planned_mb"] = peak_mb()
    found |= _final_check(job, manifest)
    found["peak_mb"] = peak_mb()
    return found


def places_bytes(reader: Any) -> int:
    """Bytes of what a reader knows of every row group; of every shard it has a name and a hash beside."""
    assert isinstance(reader, ShardReader)
    offset, files, rows = reader.ranges.offset, reader.ranges.file_index, reader.num_rows
    assert isinstance(offset, Offsets)
    assert isinstance(files, Runs)
    assert isinstance(rows, Runs)
    arrays = (offset.starts, offset.anchors, offset.lengths.more, files.ends, files.values, rows.ends, rows.values)
    return sum(array.nbytes for array in arrays)


class _Counted:
    """A file that only counts: Ray copies a job's arrays straight to its object store."""

    num_bytes = 0

    def write(self, data: Any) -> int:
        self.num_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def _planned(job: Any, ranks: int) -> Planned:
    plan = job.plan
    spec = job.stream_spec(ranks, 0)
    indices = np.linspace(0, plan.num_steps - 1, STEPS).astype(int).tolist()
    whole = _milliseconds(plan.step, [(index,) for index in indices])
    share = _milliseconds(plan.share, [(index, number % ranks, ranks) for number, index in enumerate(indices)])
    numbers = np.linspace(0, spec.num_tasks - 1, STEPS).astype(int).tolist()
    return Planned(
        ranks=ranks,
        step_ms=statistics.median(whole),
        worst_step_ms=sorted(whole)[-len(whole) // 100],
        share_ms=statistics.median(share),
        tasks=spec.num_tasks,
        task_us=1e3 * statistics.median(_milliseconds(spec.task, [(number,) for number in numbers])),
        train_steps=plan.train_steps,
        validation_steps=plan.validation_steps,
    )


def _milliseconds(work: Callable[..., Any], arguments: list[tuple[int, ...]]) -> list[float]:
    found = []
    for given in arguments:
        began = time.thread_time()
        work(*given)
        found.append(1e3 * (time.thread_time() - began))
    return found


def _final_check(job: Any, manifest: Any) -> dict[str, float]:
    """The hash of the planned images (`train.run.check_samples`) over the first images of the split, one epoch."""
    from cxr_dist.train.progress import planned_samples

    count = min(NAMED, job.plan.train.num_rows)
    batches = manifest.row_batches("train", ["image_id"])
    names = itertools.chain.from_iterable(batch["image_id"].to_pylist() for batch in batches)
    began = time.thread_time()
    planned_samples(job.plan, itertools.islice(names, count), 1)
    seconds = time.thread_time() - began
    return {"final_check_us_per_image": 1e6 * seconds / count, "final_check_mb": peak_mb()}
