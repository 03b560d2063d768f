"""The whole job on a synthetic release, on this machine: `make demo`. Nothing is downloaded, no GPU is needed.

Draws radiographs, ingests them, trains with two DDP workers, evaluates on the test list, and says where to look.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.data.nih import LABEL_SETS

PATIENTS = 480
PREVALENCE = 0.18


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cxr_dist.cluster import connect
    from cxr_dist.data.ingest import ingest
    from cxr_dist.data.synth import write_release
    from cxr_dist.experiment import absolute_uri
    from cxr_dist.train.run import train

    os.environ.setdefault("RAY_ADDRESS", "local")  # the demo leaves a cluster of yours alone
    began = time.monotonic()
    say(f"1/4  drawing a synthetic release of {PATIENTS} patients in {config.data.release}")
    Path(config.data.release).parent.mkdir(parents=True, exist_ok=True)
    drawn = write_release(
        config.data.release,
        num_patients=PATIENTS,
        seed=config.data.split_seed,
        findings=LABEL_SETS[config.data.label_set],
        prevalence=PREVALENCE,
    )
    say(f"2/4  ingesting {drawn['images']} images into {config.data.uri}")
    connect(config.train.workers[1] * config.train.cpus_per_worker + 1)
    ingest(config)
    say(f"3/4  training with {config.train.workers[1]} DDP workers, then the test report")
    name = config.run.name or f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    boxes = config.evaluate.boxes or str(Path(config.data.release, "BBox_List_2017.csv"))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=name),
        evaluate=dataclasses.replace(config.evaluate, boxes=boxes),
    )
    result = train(config)
    say(
        f"4/4  done in {time.monotonic() - began:.0f} s: mean AUROC {result['test_auroc']['mean']:.3f} on the test list"
    )
    say(f"figures and tables   {result['artifacts']}/roc_curves.png")
    say(
        f"MLflow UI            {Path(sys.executable).parent}/mlflow ui --backend-store-uri {absolute_uri(config.tracking.uri)}"
    )
    return result | {"wall_s": round(time.monotonic() - began, 1)}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    defaults = ["--config", str(Path(__file__).with_name("configs") / "demo.yaml")]
    run_job(main, description=__doc__ or "", argv=[*defaults, *sys.argv[1:]])
