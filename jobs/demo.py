"""The whole job on a synthetic release, on this machine: `make demo`. Nothing is downloaded, no GPU is needed.

Draws radiographs, ingests them, trains with two DDP workers, evaluates on the test list, and says where to look. With
--report (`make report-demo`) it makes the report of the latest demo again, without training, if there is one.
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


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument("--report", action="store_true", help="only the report of the latest demo that is there")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from mlflow import MlflowClient

    from cxr_dist.cluster import connect
    from cxr_dist.data.ingest import ingest
    from cxr_dist.data.synth import write_release
    from cxr_dist.experiment import absolute_uri
    from cxr_dist.train.run import train
    from cxr_dist.views import link

    finished = finished_runs(config.train.storage_path) if args.report else []
    if finished:
        return report_again(with_boxes(config), finished[-1])
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
    result = train(dataclasses.replace(with_boxes(config), run=dataclasses.replace(config.run, name=name)))
    say(
        f"4/4  done in {time.monotonic() - began:.0f} s: mean AUROC {result['test_auroc']['mean']:.3f} on the test list"
    )
    say(f"report               {result['artifacts']}/report.html")
    uri = absolute_uri(config.tracking.uri)
    experiment = MlflowClient(uri).get_run(result["run_id"]).info.experiment_id
    say(f"MLflow UI            {Path(sys.executable).parent}/mlflow ui --backend-store-uri {uri}")
    say(f"  then in a browser  http://127.0.0.1:5000/{link(experiment, 'by-epoch')}")
    return result | {"wall_s": round(time.monotonic() - began, 1)}


def with_boxes(config: Config) -> Config:
    """The config with the synthetic release's own boxes, unless it names others."""
    boxes = config.evaluate.boxes or str(Path(config.data.release, "BBox_List_2017.csv"))
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, boxes=boxes))


def finished_runs(storage_path: str) -> list[str]:
    """Folders of the runs that have been evaluated on the test list, oldest first: their names begin with the time."""
    return sorted(str(found.parent.parent) for found in Path(storage_path).glob("demo-*/scores/run_record.json"))


def report_again(config: Config, folder: str) -> dict[str, Any]:
    """The report of a run, out of what it left in its folder and in the dataset."""
    from cxr_dist.data.manifest import Manifest
    from cxr_dist.evaluate import report, scores
    from cxr_dist.evaluate.saliency import add_saliency
    from cxr_dist.evaluate.thumbnails import with_thumbnails
    from cxr_dist.train.record import kept_record

    judged, validation = (scores.read(f"{folder}/scores/{split}.parquet") for split in ("test", "validation"))
    out = Path("outputs", "reports", Path(folder).name)
    found = report.write_report(
        out,
        judged,
        validation,
        bootstrap=config.evaluate.bootstrap,
        seed=config.evaluate.bootstrap_seed,
        title=Path(folder).name,
        rows=Manifest.load(config.data.uri).rows("test"),
        calibration=config.evaluate.calibration,
        run=kept_record(folder),
        illustrate=lambda worst: (
            add_saliency(out, config, folder, judged, validation)
            or with_thumbnails(worst, config.data.uri, "test", config.data)
        ),
    )
    print(report.table(found))
    say(f"report               {out.absolute()}/report.html")
    return found | {"run_name": Path(folder).name, "artifacts": str(out.absolute())}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    defaults = ["--config", str(Path(__file__).with_name("configs") / "demo.yaml")]
    run_job(main, description=__doc__ or "", extra=add_flags, argv=[*defaults, *sys.argv[1:]])
