"""Stage `cache`: what keeping features costs once, and what it costs to have them again and to draw batches from them.

The pass is the one of a run: actors of Ray Data, one on each core, over pixel shards. Its limit is as many processes as
one alone does in its own time. Random weights; the arithmetic is the same.
"""

import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from cxr_dist.bench.measure import Usage, in_turns
from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.report import Row, ratios
from cxr_dist.bench.runs import cluster, dataset, run_config
from cxr_dist.data.decode import Decoder
from cxr_dist.data.features import FeatureShard
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.resident import ResidentShard, read_all
from cxr_dist.train.cache import build, look
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.feed import resident_feed
from cxr_dist.train.job import TrainJob
from cxr_dist.train.prefix_pass import Name, Place, Task, compute
from cxr_dist.train.prepare import make_job, prepare_weights, with_defaults
from cxr_dist.train.survey import network_of, survey

__all__ = ["run"]

STAGE = "cache"
NUM_IMAGES = 3072
ALONE_IMAGES = 64


def run(options: BenchOptions) -> list[Row]:
    """The prefix alone, the pass, the pass again when all is there, and batches from memory and from shards."""
    with scratch(options, STAGE) as folder, cluster(options):
        job = _job(options, folder)
        alone = _alone(options, job)
        limit = options.cpus * alone
        found = survey(job, measure=False)
        ended: list[tuple[float, int]] = []

        def timed(
            job: TrainJob, places: Mapping[Name, Place], tasks: list[Task]
        ) -> Iterator[tuple[Name, FeatureShard]]:
            for name, shard in compute(job, places, tasks):
                ended.append((time.perf_counter(), shard.rows))
                yield name, shard

        with Usage(object_store=True) as usage:
            sets = build(job, look(job, found), found, timed)
        images = sum(each.num_rows for each in sets.values())
        num_bytes = sum(each.num_bytes for each in sets.values())
        rows = [
            Row(stage=STAGE, name="prefix in one process", images=ALONE_IMAGES, images_per_s=alone),
            Row(
                stage=STAGE,
                name="prefix pass, settled",
                images=images,
                images_per_s=(settled := _settled(ended)),
                ratios=ratios(settled, {"limit": limit}),
                cpu_ms_per_image=1e3 * usage.cpu_s / images,
                peak_rss_mb=usage.peak_rss_mb,
                object_store_mb=usage.peak_object_store_mb,
            ),
            Row(
                stage=STAGE,
                name="prefix pass, whole, with its start",
                images=images,
                images_per_s=images / usage.wall_s,
                ratios=ratios(images / usage.wall_s, {"limit": limit}),
                extra={"s": usage.wall_s, "features MB": num_bytes / 1e6},
            ),
        ]
        with Usage(object_store=True) as usage:
            again = build(job, look(job, found), found, _nothing)
            refs = read_all(again, keep=True)
        rows.append(
            Row(
                stage=STAGE,
                name="all there: found, checked, in the object store",
                images=images,
                images_per_s=images / usage.wall_s,
                object_store_mb=usage.peak_object_store_mb,
                bytes_read=num_bytes,
                extra={"s": usage.wall_s},
            )
        )
        job = dataclasses.replace(job, features=again)
        rows += _batches(options, job, ResidentShard(sets=again, refs=refs))
    return rows


def _job(options: BenchOptions, folder: Path) -> TrainJob:
    uri = dataset(options, folder, options.count(NUM_IMAGES))
    config = with_defaults(run_config(options, folder, uri, name="cache", workers=1, features="on"))
    job = make_job(config, Manifest.load(uri), use_gpu=config.train.use_gpu == "yes")
    prepare_weights(job, resumed=False)
    return job


def _alone(options: BenchOptions, job: TrainJob) -> float:
    """Images a second of the prefix in this process, one thread."""
    network = network_of(job)
    images = np.full((ALONE_IMAGES, job.size, job.size), 100, np.uint8)

    def work() -> int:
        network.features(images)
        return len(images)

    return in_turns({"prefix": work}, options.repeats)["prefix"].images_per_s


def _settled(ended: list[tuple[float, int]]) -> float:
    """Images a second between the first shard's end and the last one's."""
    (first, _), (last, _) = ended[0], ended[-1]
    return sum(rows for _, rows in ended[1:]) / (last - first)


def _nothing(job: TrainJob, places: Mapping[Name, Place], tasks: list[Task]) -> Iterable[tuple[Name, FeatureShard]]:
    raise AssertionError(f"{len(tasks)} shards are missing after the pass")


def _batches(options: BenchOptions, job: TrainJob, shard: ResidentShard) -> list[Row]:
    """Batches of one rank over one epoch, nothing computed with them."""
    import torch

    feed = resident_feed(shard, job, Ranks(0, 1, None), torch.device("cpu"))
    decoder = Decoder(dataclasses.replace(job.stream_spec(1, 0), token=uuid.uuid4().hex))
    steps = job.plan.steps_per_epoch
    images = job.plan.train_steps * job.plan.global_batch + job.plan.validation.num_rows

    def from_memory() -> int:
        return sum(int((feed.batch(index).rows_B >= 0).sum()) for index in range(steps))

    def from_shards() -> int:
        done, number = 0, 0
        while done < images:
            done += int((decoder.block(number)["row"].to_numpy() >= 0).sum())
            number += 1
        return done

    best = in_turns({"memory": from_memory, "shards": from_shards}, options.repeats)
    names = {"memory": "batches of 16 from memory", "shards": "features from shards, one process"}
    return [
        Row(
            stage=STAGE,
            name=names[name],
            images=timing.images,
            images_per_s=timing.images_per_s,
            cpu_ms_per_image=timing.cpu_ms_per_image,
            extra={"ms/step": 1e3 * timing.wall_s / timing.images * job.plan.global_batch},
        )
        for name, timing in best.items()
    ]
