"""What `simulate` found, as rows: of each stage either all measured or all computed, and its name says which."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from cxr_dist.bench import cadence, limits, queueing
from cxr_dist.bench.driver import EPOCHS
from cxr_dist.bench.limits import Known
from cxr_dist.bench.options import Given
from cxr_dist.bench.queueing import Costs, Measured
from cxr_dist.bench.report import Row
from cxr_dist.data.plan import Plan, Split

__all__ = [
    "EVERY",
    "RANKS",
    "cost_rows",
    "driver_rows",
    "gathering_rows",
    "limit_rows",
    "pass_rows",
    "plan_of",
    "plan_rows",
    "power",
    "ranks_of",
    "walk_rows",
    "wide_rows",
]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EVERY = 1000
"""`train.checkpoint_every_steps`, as it comes."""


def driver_rows(planned: list[dict[str, Any]]) -> Iterator[Row]:
    for found in planned:
        yield Row(
            stage="driver (measured)",
            name=f"{power(found['images'])} images",
            images=found["images"],
            extra={
                "side tables MB": found["tables_bytes"] / 1e6,
                "manifest.json MB": found["json_bytes"] / 1e6,
                "shards": f"{found['shards']:,}",
                "imports MB": found["imports_mb"],
                "manifest s": found["manifest_s"],
                "job s": found["job_s"],
                "row groups' places MB": found["places_bytes"] / 1e6,
                "job as sent MB": found["job_bytes"] / 1e6,
                "Python objects": f"{found['objects']:,}",
                "peak MB": found["peak_mb"],
                "final check us an image": found["final_check_us_per_image"],
            },
        )


def plan_rows(planned: list[dict[str, Any]], share: int) -> Iterator[Row]:
    for found in planned:
        for one in found["runs"]:
            plan = plan_of(found, one["ranks"], share)
            within, ends = cadence.counted(plan, EVERY)
            yield Row(
                stage="plan (measured)",
                name=f"{power(found['images'])} images, {ranks_of(one['ranks'])}",
                images=found["images"],
                extra={
                    "step ms": one["step_ms"],
                    "slowest 1 % ms": one["worst_step_ms"],
                    "a rank's share ms": one["share_ms"],
                    "task us": one["task_us"],
                    "steps an epoch": f"{one['train_steps']:,}",
                    "tasks of the run": f"{one['tasks']:,}",
                    "checkpoints within epochs": f"{within:,}",
                    "at their ends": str(ends),
                },
            )


def walk_rows(walks: Sequence[tuple[int, int, cadence.Walk]]) -> Iterator[Row]:
    for images, ranks, done in walks:
        yield Row(
            stage="checkpoints (measured)",
            name=f"{power(images)} images, {ranks_of(ranks)}",
            images=images,
            extra={
                "saved": str(done.saved),
                "kept": str(done.kept),
                "MB each": done.megabytes,
                "s each": done.save_s,
                "goes on exactly": "yes" if done.exact else "no",
            },
        )


def gathering_rows(gathered: Sequence[tuple[str, int, dict[str, float]]]) -> Iterator[Row]:
    for name, count, found in gathered:
        yield Row(
            stage="gathering (measured)",
            name=f"{name}, {power(count)} images",
            images=count,
            extra={
                "bytes an image, sent or stored": found["bytes"] / count,
                "peak bytes an image": 1e6 * found["mb"] / count,
                "us an image": 1e6 * found["s"] / count,
            },
        )


def pass_rows(passes: list[tuple[str, Measured]], costs: Costs) -> Iterator[Row]:
    for name, one in passes:
        pipeline = one.pipeline
        predicted = queueing.flow(pipeline, costs)
        yield Row(
            stage="stream (measured, beside the model)",
            name=f"{name}: {ranks_of(pipeline.ranks)}, {pipeline.decoders} decoders",
            images=pipeline.ranks * pipeline.rounds * pipeline.images_per_task,
            images_per_s=one.images_per_s,
            extra={
                "images a task": str(pipeline.images_per_task),
                "tasks/s": one.images_per_s / pipeline.images_per_task,
                "loop ms a task": 2e3 * one.task_s,
                "model images/s (computed)": predicted.images_per_s,
                "model / measured": predicted.images_per_s / one.images_per_s,
                "the model was": "fitted to it" if one.fit else "not shown it",
            },
        )


def cost_rows(known: Known, passes: list[tuple[str, Measured]]) -> Iterator[Row]:
    apart = [abs(error) for error in queueing.errors([one for _, one in passes], known.costs, fit=False)]
    figures = {
        "Ray Data's loop, a task given out or taken in (measured)": (1e3 * known.costs.task_s, "ms"),
        "a rank, a block (fitted)": (1e3 * known.costs.block_s, "ms"),
        "a rank, a step's rows (fitted)": (1e3 * known.costs.batch_s, "ms"),
        "a decoder, a block beside its images (fitted)": (1e3 * known.costs.made_s, "ms"),
        "PNG, a core (measured)": (known.png_images_per_s, "images/s"),
        "pixels, a core (measured)": (known.pixel_images_per_s, "images/s"),
        "a checkpoint (measured)": (known.save_s, "s"),
        "model, passes it was not shown, median error (computed)": (100 * statistics.median(apart), "%"),
        "model, passes it was not shown, largest error (computed)": (100 * max(apart), "%"),
    }
    for name, (value, unit) in figures.items():
        yield Row(stage="costs", name=name, images=0, extra={"value": value, "unit": unit})


def limit_rows(known: Known, given: Given) -> Iterator[Row]:
    for one in limits.limits(known, given):
        saturated = {}
        for rate in given.rank_images_per_s:
            ranks = one.ranks(rate)
            saturated[f"ranks of {rate:g} images/s (given)"] = "" if ranks is None else f"{ranks:.1f}"
        yield Row(
            stage="limits (computed)",
            name=one.stage,
            images=0,
            images_per_s=one.images_per_s,
            extra={"of a": one.of, "rests on": one.basis, **saturated, "remark": one.remark},
        )


def wide_rows(known: Known, given: Given) -> Iterator[Row]:
    for encoding in ("png", "pixels"):
        for rate in given.rank_images_per_s:
            for ranks in RANKS:
                pipeline, found = limits.spread(encoding, ranks, rate, known, given)
                ring = limits.ring_s(ranks, known.gradient_bytes, given)
                yield Row(
                    stage="ranks (computed)",
                    name=f"{encoding}, {ranks_of(ranks)} of {rate:g} images/s (given)",
                    images=0,
                    images_per_s=found.images_per_s,
                    extra={
                        "encoding": encoding,
                        "ranks": ranks,
                        "rate (given)": rate,
                        "part of ranks × rate": found.images_per_s / (ranks * rate),
                        "decoding cores": pipeline.decoders,
                        "Ray Data's loop at work": found.loop,
                        "busiest": found.busiest,
                        "all-reduce ms a step": 1e3 * ring,
                        "its part of a step": ring / (given.share / rate),
                    },
                )


def plan_of(found: dict[str, Any], ranks: int, share: int) -> Plan:
    """The plan of a run over a dataset whose figures these are."""
    splits = [Split(num_rows=found[name], row_group=found["row_group"]) for name in ("train", "validation")]
    return Plan(train=splits[0], validation=splits[1], seed=0, epochs=EPOCHS, global_batch=share * ranks)


def power(count: int) -> str:
    exponent = round(math.log10(count))
    return f"10^{exponent}" if 10**exponent == count else f"{count:,}"


def ranks_of(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
