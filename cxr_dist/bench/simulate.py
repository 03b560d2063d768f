"""Stage `simulate`: a run of 1 to 256 ranks over 10^5 to 10^8 images, without the machines and without the images.

Measured: the real manifests' tables, what they cost a driver, the real plan, checkpoint cadence and saver, and passes of
the real stream at up to four ranks. Computed: more ranks than that, by the queue model fitted to these passes, and what
saturates first, from the rates that the reader gives. Rows of a stage are one or the other, and its name says which.
"""

import dataclasses
import functools
import logging
import statistics
from pathlib import Path
from typing import Any

from cxr_dist.bench import cadence, gathering, queueing, simulated, vast
from cxr_dist.bench.driver import driver, in_new_process
from cxr_dist.bench.limits import Known
from cxr_dist.bench.measure import in_turns
from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.paced import Pass, decoded, paced
from cxr_dist.bench.passes import cluster, dataset, stream_spec
from cxr_dist.bench.queueing import Costs, Measured, Pipeline
from cxr_dist.bench.report import Row
from cxr_dist.bench.simulated import EVERY, RANKS
from cxr_dist.data.decode import Decoder
from cxr_dist.data.sizing import steps_per_task

__all__ = ["run"]

IMAGES = (100_000, 1_000_000, 10_000_000, 100_000_000)
WALKED = (1, 16, 256)
"""Ranks whose checkpoints are written; those of the others are counted."""
GATHERED = (100_000, 1_000_000)
FINDINGS = 14
log = logging.getLogger(__name__)

REPEATS = 3
"""Passes of each kind at most, in turns; the median counts."""
LOGICAL = 16
"""CPUs that Ray is told of for passes whose decoders and ranks mostly sleep."""
REAL_IMAGES, EPOCHS_DECODED = 2048, 2
"""The dataset that is decoded for real, and how often a pass goes over it."""

TIMED = functools.partial(Pipeline, share=64, image_s=0.0005, steps_per_task=4)
"""Decoders that take 0.13 s for a task of 256 images."""
NOTHING = functools.partial(Pipeline, share=16, image_s=0.0, step_s=0.0)
"""Tasks in which there is nothing to do: Ray Data's loop, and what a rank has with every block."""
DECODED = functools.partial(Pipeline, share=16, steps_per_task=2, image_s=0.0, step_s=0.0)
"""Real files, decoded for real; `image_s` is found."""
DECODED_RANKS = (1, 2, 4)

PASSES: tuple[tuple[str, Pipeline, bool], ...] = (
    ("one-step tasks", NOTHING(ranks=1, decoders=4, steps_per_task=1, rounds=300), True),
    ("one-step tasks", NOTHING(ranks=2, decoders=8, steps_per_task=1, rounds=150), True),
    ("one-step tasks", NOTHING(ranks=4, decoders=8, steps_per_task=1, rounds=100), False),
    ("tasks of 16 steps", NOTHING(ranks=1, decoders=2, steps_per_task=16, rounds=100), True),
    ("tasks of 16 steps", NOTHING(ranks=4, decoders=4, steps_per_task=16, rounds=30), False),
    ("decoders slower", TIMED(ranks=1, decoders=4, step_s=0.0, rounds=120), True),
    ("decoders slower", TIMED(ranks=4, decoders=4, step_s=0.0, rounds=40), False),
    ("short tasks", TIMED(ranks=2, decoders=4, image_s=0.00015, step_s=0.0, rounds=100), False),
    ("ranks slower", TIMED(ranks=4, decoders=6, step_s=0.06, rounds=30), False),
    ("as fast as one another", TIMED(ranks=3, decoders=4, step_s=0.024, rounds=40), False),
)
"""Passes of the stream with times of decoders and ranks; those marked are fitted to."""


def run(options: BenchOptions) -> list[Row]:
    """All of it, smallest first; the simulated."""
    given = options.given
    with scratch(options, "simulate") as folder:
        planned = [_planned(options, count) for count in IMAGES if count <= options.max_images]
        walks = _walks(options, planned)
        gathered = _gathered()
        passes, rates = _passes(options, folder)
    costs = queueing.fitted([one for _, one in passes])
    known = _known(costs, rates, planned, [walk for _, _, walk in walks], given.share)
    return [
        *simulated.driver_rows(planned),
        *simulated.plan_rows(planned, given.share),
        *simulated.walk_rows(walks),
        *simulated.gathering_rows(gathered),
        *simulated.pass_rows(passes, costs),
        *simulated.cost_rows(known, passes),
        *simulated.limit_rows(known, given),
        *simulated.wide_rows(known, given),
    ]


def _planned(options: BenchOptions, count: int) -> dict[str, Any]:
    """A dataset's tables written, what they cost the driver, and the tables removed again."""
    with scratch(options, "tables") as place:
        manifest = vast.write_manifest(str(place), count)
        found = in_new_process(driver, str(place), str(place / "runs"), options.given.share, RANKS)
        found["images"] = count
        found["tables_bytes"] = sum(table.bytes for table in manifest.tables.values())
        found["json_bytes"] = (place / "manifest.json").stat().st_size
        found["train"], found["validation"] = (manifest.splits[name].num_rows for name in ("train", "validation"))
        found["pixel_bytes"] = sum(shard.bytes for shard in manifest.splits["train"].shards) / found["train"]
        found["row_group"] = manifest.row_group
    return found


def _walks(options: BenchOptions, planned: list[dict[str, Any]]) -> list[tuple[int, int, cadence.Walk]]:
    """Images, ranks, and what came of checkpoints of real size around the end of an epoch."""
    content, found = cadence.state(FINDINGS), []
    for one in planned:
        for ranks in WALKED:
            plan = simulated.plan_of(one, ranks, options.given.share)
            with scratch(options, "run") as place:
                found.append((one["images"], ranks, cadence.walk(place, plan, EVERY, content)))
    return found


def _gathered() -> list[tuple[str, int, dict[str, float]]]:
    """What was gathered, of how many images, and what it took of one process."""
    kinds = (("validation on every rank", gathering.validation), ("scores of a split", gathering.score_table))
    return [(name, count, in_new_process(work, count, FINDINGS)) for name, work in kinds for count in GATHERED]


def _passes(options: BenchOptions, folder: Path) -> tuple[list[tuple[str, Measured]], dict[str, float]]:
    """Passes of the real stream, each as often as asked and in turns, the median of each; and decoding rates of a core."""
    repeats = min(options.repeats, REPEATS)
    few = dataclasses.replace(options, num_images=options.count(REAL_IMAGES))
    with cluster(options):
        uris = {encoding: dataset(few, folder, encoding) for encoding in ("png", "pixels")}
    rates = _decode_rates(uris, repeats)
    real = [
        (f"PNG decoded by {options.cpus} processes", DECODED(ranks=ranks, decoders=options.cpus), ranks == 1)
        for ranks in DECODED_RANKS
    ]
    timed = [pipeline for _, pipeline, _ in PASSES]
    found: list[list[Pass]] = [[] for _ in (*PASSES, *real)]
    with cluster(dataclasses.replace(options, cpus=LOGICAL)):
        for turn in range(repeats):
            for rates_of, (name, pipeline, _) in zip(found, (*PASSES, *real), strict=True):
                rates_of.append(
                    paced(pipeline) if pipeline in timed else decoded(uris["png"], pipeline, EPOCHS_DECODED)
                )
                log.info(
                    "pass %d, %s, %d ranks: %.0f images/s", turn + 1, name, pipeline.ranks, rates_of[-1].images_per_s
                )
    medians = [Pass(*map(statistics.median, zip(*one, strict=True))) for one in found]
    # a decoder's time for an image, out of the first real pass: on fewer cores than processes it is no decoder's own
    image_s = options.cpus / medians[len(PASSES)].images_per_s
    settled = [(name, dataclasses.replace(one, image_s=image_s), fit) for name, one, fit in real]
    sharing = [(name, dataclasses.replace(one, cores=float(options.cpus)), fit) for name, one, fit in PASSES]
    passes = [
        (name, Measured(pipeline=pipeline, images_per_s=one.images_per_s, task_s=one.task_s, fit=fit))
        for (name, pipeline, fit), one in zip((*sharing, *settled), medians, strict=True)
    ]
    return passes, rates


def _decode_rates(uris: dict[str, str], repeats: int) -> dict[str, float]:
    """Images that one core makes into rows in a second of its time, PNG and pixels."""

    def work(encoding: str) -> int:
        spec = stream_spec(uris[encoding], batch=64, epochs=1)
        decoder = Decoder(dataclasses.replace(spec, steps_per_task=4, pieces=1))
        return sum(len(decoder.block(number)) for number in range(2, 5))

    best = in_turns({name: functools.partial(work, name) for name in uris}, repeats, by_cpu=True)
    return {name: timing.images_per_core_s for name, timing in best.items()}


def _known(
    costs: Costs, rates: dict[str, float], planned: list[dict[str, Any]], walks: list[cadence.Walk], share: int
) -> Known:
    size = 224
    sized = {
        encoding: steps_per_task(None, encoding=encoding, row_group=8, row_bytes=size**2, share=share)
        for encoding in ("png", "pixels")
    }
    return Known(
        costs=costs,
        png_images_per_s=rates["png"],
        pixel_images_per_s=rates["pixels"],
        pixel_bytes=planned[-1]["pixel_bytes"],
        steps_per_task=sized,
        gradient_bytes=cadence.gradient_bytes(cadence.state(FINDINGS)),
        checkpoint_bytes=1e6 * walks[0].megabytes,
        save_s=statistics.median(one.save_s for one in walks),
        every_steps=EVERY,
        final_check_us=planned[-1]["final_check_us_per_image"],
    )
