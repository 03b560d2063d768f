"""Stage `stream`: decoded batches at a rank, beside a plain pool of as many processes that decode the same and keep nothing.

PNG and pixel shards, from local files and, where the local stack is installed, from its S3 server. The pool's processes
are there before a pass begins; a pass of the stream begins with nothing, so `first batch` and `whole` have its start in
them; the settled rate counts from a quarter of the blocks on. The rank is a process of its own, as in training.
"""

import dataclasses
import logging

from cxr_dist import storage
from cxr_dist.bench import peers, s3
from cxr_dist.bench.measure import Usage
from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.passes import StreamRun, cluster, dataset, stream_once, stream_spec
from cxr_dist.bench.peers import PeerRun
from cxr_dist.bench.pool import PoolRun, ProcessPool
from cxr_dist.bench.report import Row, ratios
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.plan import EMPTY
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import RunError

__all__ = ["run"]

log = logging.getLogger(__name__)

STAGE = "stream"
OURS, OURS_KEPT = "stream beside them", "stream beside them, node cache"
BATCH, SMALL_BATCH = 128, 16
PNG_EPOCHS, PIXEL_EPOCHS, MANY_EPOCHS = 1, 10, 100
BESIDE_EPOCHS = 3
"""Epochs of the stream beside other loaders, whose second it goes on without a seam: the rate of the later two counts."""
PASSES = 3
"""Passes of each variant at most; they take a quarter of a minute each."""
SMALL_PASSES = 3
"""Passes in small batches; the first of all is the one that begins in a cold cluster."""


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


def _compared(
    options: BenchOptions, pool: ProcessPool, encoding: str, uri: str, where: str, *, epochs: int, cold: bool = False
) -> list[Row]:
    """Rows of the pool and of the stream, passes in turns; the best of each counts."""
    spec = stream_spec(uri, batch=BATCH, epochs=epochs)
    small = [stream_once(stream_spec(uri, batch=SMALL_BATCH, epochs=1), options) for _ in range(SMALL_PASSES)]
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
                f"first batch of {SMALL_BATCH}, warm, s": min(found.first_batch_s for found in small[1:]),
                f"first batch of {BATCH}, warm, s": min(found.first_batch_s for found, _ in runs),
                f"rank ms/step of {BATCH}": min(found.rank_ms_per_step for found, _ in runs),
                f"rank ms/step of {SMALL_BATCH}": min(found.rank_ms_per_step for found in small[1:]),
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
    """Rows of the other loaders and of the stream on the same images, in turns; the best of each counts."""
    shards = peers.written(options, uri, prefix)
    runs: dict[str, list[tuple[PeerRun, Usage]]] = {
        name: [] for name in (*(peer.name for peer in shards), OURS, OURS_KEPT)
    }
    for _ in range(min(options.repeats, PASSES)):
        for peer, its_uri in shards.items():
            try:
                runs[peer.name].append(peers.measured(options, peer, its_uri))
            except RunError as error:
                log.error("%s", error)
        with cluster(options), scratch(options, "node") as folder:  # gone while the others run
            stream_once(stream_spec(uri, batch=SMALL_BATCH, epochs=1), options)
            for name, cache in ((OURS, ""), (OURS_KEPT, str(folder))):
                reading = dataclasses.replace(options.config.data, cache_dir=cache)
                runs[name].append(
                    _as_peer(stream_spec(uri, batch=BATCH, epochs=BESIDE_EPOCHS, config=reading), options)
                )
    keeping = {OURS_KEPT, *(peer.name for peer in shards if peer.keeps)}
    first = {name: max(run.first_pass_images_per_s for run, _ in done) for name, done in runs.items() if done}
    second = {name: max(run.second_pass_images_per_s for run, _ in done) for name, done in runs.items() if done}
    rows = []
    for name in first:
        alike = {other: rate for other, rate in second.items() if (other in keeping) == (name in keeping)}
        run, usage = min(runs[name], key=lambda found: found[1].cpu_s)
        rows.append(
            Row(
                stage=STAGE,
                name=f"{name}, PNG, S3",
                images=run.images,
                images_per_s=second[name],
                ratios={
                    **ratios(second[name], {"best other": _best_other(alike)}),
                    **ratios(first[name], {"best other, first epoch": _best_other(first)}),
                },
                cpu_ms_per_image=1e3 * usage.cpu_s / run.images,
                peak_rss_mb=max(usage.peak_rss_mb for _, usage in runs[name]),
                extra={
                    "first epoch images/s": first[name],
                    f"first batch of {BATCH}, warm, s": min(run.first_batch_s for run, _ in runs[name]),
                },
            )
        )
    return rows


def _as_peer(spec: StreamSpec, options: BenchOptions) -> tuple[PeerRun, Usage]:
    with Usage() as usage:
        found = stream_once(spec, options)
    first, later = found.first_epoch(spec.plan.epochs)
    return PeerRun(
        images=found.images,
        first_batch_s=found.first_batch_s,
        first_pass_images_per_s=first,
        second_pass_images_per_s=later,
    ), usage


def _best_other(rates: dict[str, float]) -> float | None:
    return max((rate for name, rate in rates.items() if name not in (OURS, OURS_KEPT)), default=None)


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
