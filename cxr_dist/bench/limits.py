"""Where each stage of a run saturates: arithmetic on what was measured and on what the reader gives.

A rate of a GPU, a network and a store are the reader's (`Given`): no measurement of this project stands behind them, and
whatever is computed from them says so.
"""

import math
from dataclasses import dataclass

from cxr_dist.bench.options import Given
from cxr_dist.bench.queueing import Costs, Flow, Pipeline, flow

__all__ = ["Known", "Limit", "limits", "ring_s", "spread"]

PNG_BYTES = 410_000
"""Mean size of NIH's PNG files."""

ROW_BYTES = 224**2
"""Of a decoded image."""

HEADROOM, LEAST = 1.5, 2
"""Decoders, as a multiple of what would just do, and the fewest for each rank."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was measured, and costs fitted to it."""

    costs: Costs
    png_images_per_s: float
    """PNG decoded and resized, a core."""
    pixel_images_per_s: float
    """Pixel shards read and made into rows, a core."""
    pixel_bytes: float
    """Bytes of an image in a pixel shard."""
    steps_per_task: dict[str, int]
    """Of PNG and of pixels, by what `data/sizing.py` says of the share."""
    gradient_bytes: float
    checkpoint_bytes: float
    save_s: float
    """A checkpoint, from the state to the index that names it, local disk."""
    every_steps: int
    """Steps between checkpoints within an epoch."""
    final_check_us: float
    """The driver's account of the planned images, an image and epoch."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much one stage can do, and what it takes to get there."""

    stage: str
    basis: str
    """What it rests on: measured, fitted, given."""
    images_per_s: float | None
    """Most that it lets through; of a whole run, or of each node or rank."""
    of: str
    """run, node, rank or core."""
    remark: str

    def ranks(self, rate: float) -> float | None:
        """Ranks of that rate at which it is saturated; None where every rank brings its own."""
        return self.images_per_s / rate if self.of == "run" and self.images_per_s else None


def ring_s(ranks: int, num_bytes: float, given: Given) -> float:
    """Seconds of a ring all-reduce (Patarasuk and Yuan, 2009): 2 (n - 1) messages, each a part n of the bytes."""
    if ranks == 1:
        return 0.0
    messages = 2 * (ranks - 1)
    return messages * (num_bytes / ranks * 8 / (given.network_gbit * 1e9) + given.network_latency_us * 1e-6)


def spread(
    encoding: str, ranks: int, rate: float, known: Known, given: Given, *, steps_per_task: int = 0
) -> tuple[Pipeline, Flow]:
    """A run of so many ranks of that rate by the queue model, decoders for each as they need them."""
    decode = known.png_images_per_s if encoding == "png" else known.pixel_images_per_s
    decoders = max(LEAST * ranks, math.ceil(HEADROOM * rate * ranks / decode))
    pipeline = Pipeline(
        ranks=ranks,
        decoders=decoders,
        share=given.share,
        steps_per_task=steps_per_task or known.steps_per_task[encoding],
        image_s=1 / decode,
        step_s=given.share / rate,
        together=True,
        # twice what may wait: the start must be over before anything is counted
        rounds=max(60, 4 * (6 * decoders + ranks) // ranks),
    )
    return pipeline, flow(pipeline, known.costs)


def _waiting_mb(known: Known, given: Given) -> float:
    """Of the largest blocks."""
    window = Pipeline(ranks=1, decoders=LEAST, share=1, steps_per_task=1, image_s=0.0, step_s=0.0).window
    return window * given.share * max(known.steps_per_task.values()) * ROW_BYTES / 1e6


def limits(known: Known, given: Given) -> list[Limit]:
    """The stages in the order of an image's way."""
    store = given.store_gbit / 8 * 1e9
    loop = 1 / (2 * known.costs.task_s)
    images = {kind: given.share * steps for kind, steps in known.steps_per_task.items()}
    ring = 2 * known.gradient_bytes * 8 / (given.network_gbit * 1e9)
    save = max(known.save_s, known.checkpoint_bytes / store)
    return [
        Limit(
            stage="object storage, PNG",
            basis="given",
            images_per_s=store / PNG_BYTES,
            of="node",
            remark="more nodes read more; pixel shards take an eighth of the bytes",
        ),
        Limit(
            stage="object storage, pixels",
            basis="given",
            images_per_s=store / known.pixel_bytes,
            of="node",
            remark="read again in every epoch unless data.cache_dir keeps it",
        ),
        Limit(
            stage="decode, PNG",
            basis="measured",
            images_per_s=known.png_images_per_s,
            of="core",
            remark="ingest nodes; or pixel shards",
        ),
        Limit(
            stage="decode, pixels",
            basis="measured",
            images_per_s=known.pixel_images_per_s,
            of="core",
            remark="reading and copying; nothing is decoded",
        ),
        *[
            Limit(
                stage=f"Ray Data's loop, {kind}, tasks of {images[kind]} images",
                basis="measured",
                images_per_s=loop * images[kind],
                of="run",
                remark=f"{loop:.0f} tasks a second whatever is in them: larger tasks (data.task_images), kept features",
            )
            for kind in images
        ],
        Limit(
            stage="blocks on their way to the ranks' nodes",
            basis="given",
            images_per_s=given.network_gbit / 8 * 1e9 / ROW_BYTES,
            of="node",
            remark="where ingest nodes decode; a node that decodes for its own ranks sends nothing",
        ),
        Limit(
            stage="Ray's object store",
            basis="counted",
            images_per_s=None,
            of="rank",
            remark=f"{_waiting_mb(known, given):,.0f} MB of blocks may wait for each rank with {LEAST} decoders, however many ranks",
        ),
        Limit(
            stage="a rank's taking of blocks",
            basis="fitted",
            images_per_s=min(
                images[kind] / (known.costs.block_s + steps * known.costs.batch_s)
                for kind, steps in known.steps_per_task.items()
            ),
            of="rank",
            remark="larger tasks",
        ),
        Limit(
            stage="all-reduce, bandwidth",
            basis="given",
            images_per_s=given.share / ring,
            of="rank",
            remark=f"{known.gradient_bytes / 1e6:.1f} MB of gradients a step, nothing hidden; more images a step",
        ),
        Limit(
            stage=f"checkpoint every {known.every_steps} steps",
            basis="measured and given",
            images_per_s=known.every_steps * given.share / save,
            of="rank",
            remark="rank 0 writes beside the steps; a periodic one is left out while another is under way",
        ),
        Limit(
            stage="driver, account of the images",
            basis="measured",
            images_per_s=1e6 / known.final_check_us,
            of="run",
            remark="after training, one process: this much longer than training once the run is faster",
        ),
    ]
