"""Stage `stream`: decoded batches at a rank, beside a plain pool of as many processes that decode the same and keep nothing.

PNG and pixel shards, from local files and, where the local stack is installed, from its S3 server. The pool's processes
are there before a pass begins; a pass of the stream begins with nothing, so `first batch` and `whole` have its start in
them; the settled rate counts from a quarter of the blocks on. The rank is a process of its own, as in training.
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

import ray

from cxr_dist import environment, storage
from cxr_dist.bench import peers, s3
from cxr_dist.bench.measure import Usage
from cxr_dist.bench.options import BenchOptions, load_images, scratch, write_release
from cxr_dist.bench.pool import PoolRun, ProcessPool
from cxr_dist.bench.report import Row, ratios
from cxr_dist.config import DataConfig
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import EMPTY, Plan, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.data.sizing import steps_per_task
from cxr_dist.data.stream import Stream, build_splits
from cxr_dist.errors import RunError

__all__ = ["run"]

log = logging.getLogger(__name__)

STAGE = "stream"
NUM_IMAGES = 12_288
"""Of which a fifth is the release's test list and a twentieth validation: some 9,500 in an epoch."""
OURS = "stream beside them"
BATCH, SMALL_BATCH = 128, 16
PNG_EPOCHS, PIXEL_EPOCHS, MANY_EPOCHS = 1, 10, 100
PASSES = 3
"""Passes of each variant at most; they take a quarter of a minute each."""
IDLE_S = 1.0
"""Time in which a rank that does nothing is watched: Ray's threads in it take 2 ms of CPU a second."""


@dataclass(frozen=True, kw_only=True)
class StreamRun:
    """One pass of a stream at its only rank."""

    images: int
    first_batch_s: float
    """From building the stream to its first batch."""
    wall_s: float
    """From building the stream to the last batch."""
    settled_images_per_s: float
    rank_ms_per_step: float
    """CPU time of the rank's process for a step, milliseconds, without what it takes while it does nothing."""
    head_of_line_s: float
    bytes_read: int
    last_epoch_images_per_s: float
    """From the last block that begins before the last epoch, to the last one."""


def run(options: BenchOptions) -> list[Row]:
    """PNG and pixels from local files, then from S3, then other loaders."""
    rows = []
    with scratch(options, STAGE) as folder:
        with cluster(options):
            local = {"png": dataset(options, folder, "png"), "pixels": dataset(options, folder, "pixels")}
        with ProcessPool(options.cpus) as pool, cluster(options):
            rows += _compared(options, pool, "png", local["png"], "local files", epochs=PNG_EPOCHS, cold=True)
            rows += _compared(options, pool, "pixels", local["pixels"], "local files", epochs=PIXEL_EPOCHS)
            rows.append(_flat(options, local["pixels"]))
        with s3.server(folder) as prefix:
            if prefix is None:
                return rows
            remote = {encoding: s3.upload(uri, storage.join(prefix, encoding)) for encoding, uri in local.items()}
            with ProcessPool(options.cpus) as pool, cluster(options):
                rows += _compared(options, pool, "png", remote["png"], "S3", epochs=PNG_EPOCHS)
                rows += _compared(options, pool, "pixels", remote["pixels"], "S3", epochs=PIXEL_EPOCHS)
            if options.peers:
                rows += _beside_peers(options, remote["png"], storage.join(prefix, "peers"))
    return rows


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
        for _ in stream:
            steps += 1
            if stream.wait_s != waited:
                waited = stream.wait_s
                came.append((time.time(), stream.delivered))
            if steps == 1:
                cpu, first = time.process_time(), time.time()
        ended = time.time()
        cpu = time.process_time() - cpu - self.idle * (ended - first)
        (since, before), (until, last) = came[len(came) // 4], came[-1]
        an_epoch = plan.train_steps * plan.global_batch + plan.validation.num_rows
        then, had = max((one for one in came if one[1] <= stream.delivered - an_epoch), default=(began, 0))
        return StreamRun(
            images=stream.delivered,
            first_batch_s=first - began,
            wall_s=until - began,
            settled_images_per_s=(last - before) / (until - since),
            rank_ms_per_step=1e3 * cpu / max(1, steps - 1),
            head_of_line_s=stream.head_of_line_s,
            bytes_read=stream.reads.bytes_read,
            last_epoch_images_per_s=(last - had) / (until - then),
        )


def _compared(
    options: BenchOptions, pool: ProcessPool, encoding: str, uri: str, where: str, *, epochs: int, cold: bool = False
) -> list[Row]:
    """Rows of the pool and of the stream, passes in turns; the best of each counts."""
    spec = stream_spec(uri, batch=BATCH, epochs=epochs)
    small = [stream_once(stream_spec(uri, batch=SMALL_BATCH, epochs=1), options) for _ in range(2)]
    limits: list[PoolRun] = []
    runs: list[tuple[StreamRun, Usage]] = []
    for _ in range(min(options.repeats, PASSES)):
        limits.append(pool.run(spec))
        with Usage(object_store=True) as usage:
            found = stream_once(spec, options)
        runs.append((found, usage))
    limit = min(limits, key=lambda found: found.wall_s / found.images)
    best, usage = max(runs, key=lambda found: found[0].settled_images_per_s)
    limit_rate = limit.images / limit.wall_s
    stored = _stored_bytes(spec)
    title = f"{encoding.upper() if encoding == 'png' else encoding}, {where}"
    return [
        Row(
            stage=STAGE,
            name=f"pool of {options.cpus} processes, {title}",
            images=limit.images,
            images_per_s=limit_rate,
            cpu_ms_per_image=1e3 * limit.cpu_s / limit.images,
        ),
        Row(
            stage=STAGE,
            name=f"stream, {title}",
            images=best.images,
            images_per_s=best.settled_images_per_s,
            ratios=ratios(best.settled_images_per_s, {"pool": limit_rate}),
            cpu_ms_per_image=1e3 * usage.cpu_s / best.images,
            peak_rss_mb=max(found.peak_rss_mb for _, found in runs),
            object_store_mb=max(found.peak_object_store_mb for _, found in runs),
            bytes_read=best.bytes_read,
            extra={
                "whole images/s": best.images / best.wall_s,
                **({f"first batch of {SMALL_BATCH}, cold, s": small[0].first_batch_s} if cold else {}),
                f"first batch of {SMALL_BATCH}, warm, s": small[1].first_batch_s,
                f"first batch of {BATCH}, warm, s": min(found.first_batch_s for found, _ in runs),
                f"rank ms/step of {BATCH}": min(found.rank_ms_per_step for found, _ in runs),
                f"rank ms/step of {SMALL_BATCH}": small[1].rank_ms_per_step,
                "read / stored": best.bytes_read / stored,
            },
        ),
    ]


def _stored_bytes(spec: StreamSpec) -> float:
    """Bytes of all row groups that the stream's steps name, as stored."""
    sources = {"train": spec.train, "validation": spec.validation}
    total = 0
    for index in range(spec.start, spec.plan.num_steps):
        step = spec.plan.step(index)
        source = sources[step.kind]
        assert isinstance(source, ShardReader)
        total += int(source.ranges.length[step.groups[step.groups != EMPTY]].sum())
    return float(total)


def _beside_peers(options: BenchOptions, uri: str, prefix: str) -> list[Row]:
    """Rows of the other loaders and of the stream on the same images, passes in turns; the best of each counts."""
    shards = peers.written(options, uri, prefix)
    spec = stream_spec(uri, batch=BATCH, epochs=1)
    runs: dict[str, list[tuple[peers.PeerRun | StreamRun, Usage]]] = {
        name: [] for name in (*(peer.name for peer in shards), OURS)
    }
    again: dict[str, float] = {}
    for _ in range(min(options.repeats, PASSES)):
        for peer, its_uri in shards.items():
            try:
                found, usage = peers.measured(options, peer, its_uri)
            except RunError as error:
                log.error("%s", error)
                continue
            runs[peer.name].append((found, usage))
            if found.again_images_per_s:
                again[peer.name] = max(again.get(peer.name, 0.0), found.again_images_per_s)
        with cluster(options):  # gone while the others run
            stream_once(stream_spec(uri, batch=SMALL_BATCH, epochs=1), options)
            with Usage() as usage:
                runs[OURS].append((stream_once(spec, options), usage))
            with scratch(options, "node") as folder:
                reading = dataclasses.replace(options.config.data, cache_dir=str(folder))
                kept = stream_once(stream_spec(uri, batch=BATCH, epochs=2, config=reading), options)
            again[OURS] = max(again.get(OURS, 0.0), kept.last_epoch_images_per_s)
    best = {name: max(of_one, key=lambda run: _whole(run[0])) for name, of_one in runs.items() if of_one}
    whole = {name: _whole(run) for name, (run, _) in best.items()}
    return [
        Row(
            stage=STAGE,
            name=f"{name}, PNG, S3",
            images=run.images,
            images_per_s=whole[name],
            ratios={
                **ratios(whole[name], {"best other": _best_other(whole)}),
                **(ratios(again[name], {"best other, second epoch": _best_other(again)}) if name in again else {}),
            },
            cpu_ms_per_image=1e3 * usage.cpu_s / run.images,
            peak_rss_mb=usage.peak_rss_mb,
            extra={
                "settled images/s": max(run.settled_images_per_s for run, _ in runs[name]),
                f"first batch of {BATCH}, warm, s": min(run.first_batch_s for run, _ in runs[name]),
                **({"second epoch images/s": again[name]} if name in again else {}),
            },
        )
        for name, (run, usage) in best.items()
    ]


def _whole(run: peers.PeerRun | StreamRun) -> float:
    return run.images / run.wall_s


def _best_other(rates: dict[str, float]) -> float | None:
    return max((rate for name, rate in rates.items() if name != OURS), default=None)


def _flat(options: BenchOptions, uri: str) -> Row:
    """Memory of ten times the images beside that of one, whose peak is the highest of several passes: it lasts seconds."""
    peaks = []
    for epochs in (*[PIXEL_EPOCHS] * min(options.repeats, PASSES), MANY_EPOCHS):
        with Usage(object_store=True) as usage:
            found = stream_once(stream_spec(uri, batch=BATCH, epochs=epochs), options)
        peaks.append(usage.peak_rss_mb + usage.peak_object_store_mb)
    return Row(
        stage=STAGE,
        name=f"stream, pixels, {MANY_EPOCHS // PIXEL_EPOCHS} times the images",
        images=found.images,
        images_per_s=found.settled_images_per_s,
        peak_rss_mb=usage.peak_rss_mb,
        object_store_mb=usage.peak_object_store_mb,
        extra={"peak / peak before": peaks[-1] / max(peaks[:-1])},
    )
