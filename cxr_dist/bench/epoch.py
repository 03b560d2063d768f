"""Stage `epoch`: whole runs with and without kept features, on every core; what the first epochs and the later ones cost.

Both are `train.run.train`, the job that people run, from random weights over pixel shards with one recurring view, 64
images a rank in a step (16 would tell of gradients on one machine's loopback: see the ranks' rows).
Times count from the first batch to the end of an epoch with its validation and checkpoint; the run with features has
the pass of the prefix on top, from the start of its processes to the last stored shard.
"""

from typing import Any

from cxr_dist.bench import ddp
from cxr_dist.bench.measure import Usage
from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.report import Row
from cxr_dist.bench.runs import cluster, dataset, run_config
from cxr_dist.train.run import train

__all__ = ["run"]

STAGE = "epoch"
NUM_IMAGES, SHARE = 2048, 64
EPOCHS = 20
COMPARED = (10, EPOCHS)
"""Numbers of epochs that are compared."""


def run(options: BenchOptions) -> list[Row]:
    """Twenty epochs without features, then with; then two ranks beside one."""
    with scratch(options, STAGE) as folder, cluster(options):
        uri = dataset(options, folder, options.count(NUM_IMAGES))
        found: dict[str, tuple[dict[str, Any], Usage]] = {}
        for mode in ("off", "on"):
            config = run_config(
                options,
                folder,
                uri,
                name=f"features-{mode}",
                workers=options.cpus,
                share=SHARE,
                features=mode,
                epochs=EPOCHS,
            )
            with Usage(object_store=True) as usage:
                result = train(config)
            found[mode] = result, usage
    rows = _rows(found)
    return rows + ddp.run(options)


def _rows(found: dict[str, tuple[dict[str, Any], Usage]]) -> list[Row]:
    (plain, plain_usage), (kept, kept_usage) = found["off"], found["on"]
    rows = []
    for name, result, usage in (("without features", plain, plain_usage), ("with features", kept, kept_usage)):
        pass_s = result["features"]["seconds"]
        seconds = {epochs: pass_s + sum(result["epoch_s"][:epochs]) for epochs in COMPARED}
        others = {epochs: sum(plain["epoch_s"][:epochs]) for epochs in COMPARED}
        epoch_s = min(result["epoch_s"])
        per_epoch = result["images_per_epoch"]
        rows.append(
            Row(
                stage=STAGE,
                name=name,
                images=per_epoch,
                images_per_s=per_epoch / epoch_s,
                ratios={
                    "epoch without": min(plain["epoch_s"]) / epoch_s,
                    **{f"{epochs} epochs without": others[epochs] / seconds[epochs] for epochs in COMPARED},
                },
                peak_rss_mb=usage.peak_rss_mb,
                object_store_mb=usage.peak_object_store_mb,
                extra={
                    "prefix pass s": pass_s,
                    "epoch s": epoch_s,
                    **{f"{epochs} epochs s": seconds[epochs] for epochs in COMPARED},
                    "whole job s": usage.wall_s,
                    "data wait": result["data_wait_fraction"],
                    "gradient MB/step": result["gradient_mb_per_step"],
                },
            )
        )
    return rows
