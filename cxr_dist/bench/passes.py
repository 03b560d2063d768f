"""A pass of the stream at one rank: the cluster, the dataset, and what the pass is measured by.

The rank is a process of its own, as in training.
"""

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from cxr_dist import environment
from cxr_dist.bench.options import BenchOptions, load_images, write_release
from cxr_dist.config import DataConfig
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.data.sizing import steps_per_task
from cxr_dist.data.stream import Stream, build_splits

__all__ = ["StreamRun", "cluster", "dataset", "stream_once", "stream_spec"]

NUM_IMAGES = 12_288
"""Of which a fifth is the release's test list and a twentieth validation: some 9,500 in an epoch."""
IDLE_S = 1.0
"""Time in which a rank that does nothing is watched: Ray's threads in it take 2 ms of CPU a second."""


@dataclass(frozen=True, kw_only=True)
class StreamRun:
    """One pass of a stream at its only rank."""

    blocks: tuple[tuple[float, int], ...]
    """When each block came, seconds since the stream was built, and the images that were there then."""
    first_batch_s: float
    """From building the stream to its first batch."""
    rank_ms_per_step: float
    """CPU time of the rank's process for a step, milliseconds, without what it takes while it does nothing."""
    bytes_read: int

    @property
    def images(self) -> int:
        return self.blocks[-1][1]

    @property
    def wall_s(self) -> float:
        """From building the stream to its last block."""
        return self.blocks[-1][0]

    @property
    def settled_images_per_s(self) -> float:
        """From a quarter of the blocks on."""
        (since, before), (until, after) = self.blocks[len(self.blocks) // 4], self.blocks[-1]
        return (after - before) / (until - since)

    def first_epoch(self, epochs: int) -> tuple[float, float]:
        """Images per second of the first of so many epochs, from building the stream on, and of all later ones.

        Blocks hold several batches and may come in pairs, so the first epoch's end is interpolated between two of them.
        """
        images = self.images / epochs
        end = float(np.interp(images, [there for _, there in self.blocks], [when for when, _ in self.blocks]))
        return images / end, (self.images - images) / (self.wall_s - end)


@contextmanager
def cluster(options: BenchOptions) -> Iterator[None]:
    """A new local Ray of `options.cpus` logical CPUs."""
    environment.apply()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(
        address="local",
        num_cpus=options.cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment.SETTINGS},
    )
    try:
        yield
    finally:
        ray.shutdown()


def dataset(options: BenchOptions, folder: Path, encoding: Literal["png", "pixels"]) -> str:
    """URI of the bench's images as shards."""
    release = folder / "release"
    if not release.exists():
        write_release(load_images(options, NUM_IMAGES), release)
    uri = str(folder / encoding)
    data = dataclasses.replace(
        options.config.data, release=str(release), uri=uri, encoding=encoding, validation_fraction=0.05
    )
    ingest(dataclasses.replace(options.config, data=data))
    return uri


def stream_spec(uri: str, *, batch: int, epochs: int, config: DataConfig | None = None) -> StreamSpec:
    """The stream of a run of one rank, augmented, in tasks as large as training would make them; `config` as in
    `ShardReader.from_manifest`."""
    manifest = Manifest.load(uri)
    splits = [
        Split(num_rows=manifest.splits[name].num_rows, row_group=manifest.row_group) for name in ("train", "validation")
    ]
    source = ShardReader.from_manifest(manifest, "train", config)
    return StreamSpec(
        plan=Plan(train=splits[0], validation=splits[1], seed=0, epochs=epochs, global_batch=batch),
        train=source,
        validation=ShardReader.from_manifest(manifest, "validation", config),
        world_size=1,
        start=0,
        steps_per_task=steps_per_task(
            source,
            encoding=manifest.encoding,
            row_group=manifest.row_group,
            row_bytes=manifest.size**2,
            share=batch,
        ),
        size=manifest.size,
        encoding=manifest.encoding,
        findings=tuple(range(len(FINDINGS))),
        views=0,
        augment=True,
        token=uuid.uuid4().hex,
    )


def stream_once(spec: StreamSpec, options: BenchOptions) -> StreamRun:
    """A pass of the stream in its own process."""
    rank = ray.remote(num_cpus=0)(_Rank).remote()
    ray.get(rank.ready.remote())
    began = time.time()
    [shard] = build_splits(dataclasses.replace(spec, token=uuid.uuid4().hex), num_actors=options.cpus)
    found: StreamRun = ray.get(rank.run.remote(shard, spec.plan, spec.size, began))
    return found


class _Rank:
    """What a training rank does with its stream, without the training."""

    def ready(self) -> float:
        """CPU milliseconds a second of this process while it does nothing; it has imported what it needs."""
        cpu, began = time.process_time(), time.time()
        time.sleep(IDLE_S)
        self.idle = (time.process_time() - cpu) / (time.time() - began)
        return self.idle

    def run(self, shard: Any, plan: Plan, size: int, began: float) -> StreamRun:
        stream = Stream(shard=shard, plan=plan, rank=0, world_size=1, size=size)
        came: list[tuple[float, int]] = []  # when each block came, and the images of those before it
        waited, steps, cpu = -1.0, 0, 0.0
        for batch in stream:
            steps += 1
            if stream.wait_s != waited:
                waited = stream.wait_s
                came.append((time.time(), stream.delivered - int((batch.rows_B >= 0).sum())))
            if steps == 1:
                cpu, first = time.process_time(), time.time()
        ended = time.time()
        cpu = time.process_time() - cpu - self.idle * (ended - first)
        there = [*[before for _, before in came[1:]], stream.delivered]
        return StreamRun(
            blocks=tuple((when - began, images) for (when, _), images in zip(came, there, strict=True)),
            first_batch_s=first - began,
            rank_ms_per_step=1e3 * cpu / max(1, steps - 1),
            bytes_read=stream.reads.bytes_read,
        )
