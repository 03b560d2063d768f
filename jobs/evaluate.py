"""Judge a model: scores in, report out (AUROC with intervals, thresholds from validation, figures, tables).

python jobs/evaluate.py --checkpoint s3://bucket/runs/NAME --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih8
python jobs/evaluate.py --xrv densenet121-res224-nih --xrv-weights xrv-nih.pt --data.uri s3://bucket/nih8
python jobs/evaluate.py --scores preds.csv --data.labels Data_Entry_2017_v2020.csv.gz \\
  --validation-scores validation.csv --evaluate.second_labels google2019_nih-chest-xray-labels.csv.gz
"""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.evaluate.loading import load, missing_from_test_list, read_labels
from cxr_dist.evaluate.page import Illustrate
from cxr_dist.evaluate.report import table, write_report
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.second_labels import read_second_labels
from cxr_dist.evaluate.worst import Example


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    optional = str | None
    parser.add_argument("--scores", type=optional, help="score table to judge, Parquet or CSV (.gz), of any model")
    parser.add_argument("--validation-scores", type=optional, help="score table that thresholds are chosen on")
    parser.add_argument("--checkpoint", type=optional, help="URI of a run's checkpoint to score and judge")
    parser.add_argument(
        "--xrv", type=optional, help="TorchXRayVision model to score and judge: densenet121-res224-nih, …"
    )
    parser.add_argument("--xrv-weights", type=optional, help="URI of its state dict (infra/xrv_state_dict.py makes it)")
    parser.add_argument(
        "--run-folder", type=optional, help="with --scores: folder of the training run that they came from"
    )
    parser.add_argument("--split", type=Literal["validation", "test"], default="test", help="images that are judged")
    parser.add_argument("--out", type=str, default="outputs/evaluate", help="directory of the report")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Score or read, report, and return the report's numbers."""
    if sum(map(bool, (args.scores, args.checkpoint, args.xrv))) != 1:
        raise ConfigError("evaluate: found none or several of --scores, --checkpoint and --xrv, expected one of them")
    if args.validation_scores and not args.scores:
        raise ConfigError("evaluate: --validation-scores goes with --scores; a checkpoint scores validation itself")
    if bool(args.xrv) != bool(args.xrv_weights):
        raise ConfigError(
            "evaluate: found one of --xrv and --xrv-weights, expected both: the library's own files are pickled code, of "
            "which infra/xrv_state_dict.py makes a state dict"
        )
    if args.run_folder and not args.scores:
        raise ConfigError("evaluate: --run-folder goes with --scores; a checkpoint lies in its run's folder")
    second = read_second_labels(config.evaluate.second_labels) if config.evaluate.second_labels else None
    dropped, missing, run = 0, None, None
    labels: dict[str, str] = {}
    validation: ScoreTable | None = None
    if args.checkpoint:
        scores, validation, rows = _score(config, args.checkpoint, args.split)
        title = "/".join(storage.shown(args.checkpoint).rstrip("/").split("/")[-2:])
        run = _run(args.checkpoint.partition("/checkpoints/")[0], required=False)
    elif args.xrv:
        scores, validation, rows = _score_xrv(config, args.xrv, args.xrv_weights, args.split)
        title = f"TorchXRayVision {args.xrv}"
        print(f"note: {scores.note}")
    else:
        rows = release = read_labels(config.data)
        scores, dropped = load(config, release, args.scores, args.split)
        if args.validation_scores:
            validation, _ = load(config, release, args.validation_scores, "validation")
        if release is not None:
            labels = {key.decode(): value.decode() for key, value in (release.schema.metadata or {}).items()}
        missing = missing_from_test_list(config.data, release, scores) if args.split == "test" else None
        run = _run(args.run_folder, required=True) if args.run_folder else None
        title = run.name if run else Path(args.scores).name
    report = write_report(
        args.out,
        scores,
        validation,
        bootstrap=config.evaluate.bootstrap,
        seed=config.evaluate.bootstrap_seed,
        title=title,
        run=run,
        illustrate=_illustrate(config, args, scores, validation),
        commands=_commands(config, args),
        rows=rows,
        second=second,
        calibration=config.evaluate.calibration,
    )
    print(table(report))
    if args.scores and config.evaluate.boxes:
        print("evaluate.boxes is not used: heat maps need the network, not its scores alone")
    if dropped:
        print(f"left out: {dropped:,} images with a finding outside {config.data.label_set} (its cleaning)")
    if args.scores and args.split == "test" and missing is None:
        print("not compared with the official test list; give data.test_list")
    if missing:
        print(f"not scored: {missing:,} images of the test list")
    print(f"figures and tables: {args.out}/report.html")
    number = _count(config, args.checkpoint) if args.checkpoint and args.split == "test" else None
    return {
        **report,
        "n_left_out": dropped,
        "n_missing": missing,
        "labels": labels,
        "out": str(args.out),
        "test_evaluation": number,
    }


def _count(config: Config, checkpoint_uri: str) -> int | None:
    """Count this look at test where the checkpoint's run is; which it is, or None, and said why, if that cannot be."""
    from cxr_dist.evaluate.counted import count_again
    from cxr_dist.train.checkpoint import find_checkpoint

    number, why = count_again(find_checkpoint(storage.absolute(checkpoint_uri))[0], config.tracking.uri)
    if number is None:
        print(f"this test evaluation is not counted in MLflow: {why}")
    else:
        print(f"test evaluation number {number} of the run's experiment")
    return number


def _score(config: Config, checkpoint_uri: str, split: str) -> tuple[ScoreTable, ScoreTable | None, pa.Table]:
    """The scores of a split by a checkpoint, those of the run's validation split, for thresholds (None if the dataset is
    not the run's), and the split's rows."""
    if not config.data.uri:
        raise ConfigError("data.uri: found nothing, expected the URI that jobs/ingest.py wrote the dataset to")
    import ray  # only this branch needs Ray and torch, which take seconds to import

    from cxr_dist import cluster
    from cxr_dist.capacity import wants_gpu
    from cxr_dist.data.manifest import Manifest
    from cxr_dist.evaluate.inference import score_split
    from cxr_dist.preflight import check_boxes
    from cxr_dist.train.checkpoint import load_checkpoint

    uri, checkpoint_uri = storage.absolute(config.data.uri), storage.absolute(checkpoint_uri)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))
    check_boxes(config, Manifest.load(uri))
    trained_on = load_checkpoint(checkpoint_uri)["manifest_sha256"]
    cluster.connect(2)
    use_gpu = wants_gpu(config, ray.cluster_resources())
    manifest = Manifest.load(uri)
    rows = manifest.rows(split)
    if split == "test" and manifest.hash != trained_on:
        print("thresholds: 0.5, for this is not the dataset that the checkpoint was trained on")
        return score_split(config, checkpoint_uri, split, use_gpu=use_gpu)[0], None, rows
    validation, _ = score_split(config, checkpoint_uri, "validation", use_gpu=use_gpu)
    if split == "validation":
        return validation, validation, rows
    return score_split(config, checkpoint_uri, split, use_gpu=use_gpu)[0], validation, rows


def _run(folder: str, *, required: bool) -> RunRecord | None:
    """The record that a training run left; an earlier version's runs, and those that go on, have none."""
    from cxr_dist.train.record import kept_record  # imports Ray and torch

    record = kept_record(storage.absolute(folder))
    if record is None and required:
        raise DataError(f"--run-folder {storage.shown(folder)}: found no record, expected the folder of a finished run")
    return record


def _illustrate(
    config: Config, args: argparse.Namespace, scores: ScoreTable, validation: ScoreTable | None
) -> Illustrate | None:
    """Pictures for the report: heat maps where there is a network, else the worst errors where there is a dataset."""
    if not config.data.uri:
        return None
    from cxr_dist.evaluate.thumbnails import with_thumbnails

    def illustrate(worst: list[Example]) -> Sequence[Mapping[str, Any]]:
        pictures: Sequence[Mapping[str, Any]] = ()
        if args.checkpoint:
            from cxr_dist.evaluate.saliency import add_saliency

            pictures = add_saliency(args.out, config, args.checkpoint, scores, validation)
        return pictures or with_thumbnails(worst, storage.absolute(config.data.uri), scores.split, config.data)

    return illustrate


def _commands(config: Config, args: argparse.Namespace) -> list[str]:
    """What makes this report of a score table again."""
    flags = {
        "--scores": args.scores,
        "--xrv": args.xrv,
        "--xrv-weights": args.xrv_weights,
        "--data.uri": config.data.uri if args.xrv else None,
        "--validation-scores": args.validation_scores,
        "--data.labels": config.data.labels,
        "--data.test_list": config.data.test_list,
        "--data.label_set": config.data.label_set,
        "--evaluate.bootstrap": str(config.evaluate.bootstrap),
        "--evaluate.bootstrap_seed": str(config.evaluate.bootstrap_seed),
    }
    words = [word for flag, value in flags.items() if value for word in (flag, storage.shown(value))]
    return [shlex.join(["python", "jobs/evaluate.py", *words])]


def _score_xrv(config: Config, name: str, weights: str, split: str) -> tuple[ScoreTable, ScoreTable, pa.Table]:
    """The scores of a split and of validation by one of TorchXRayVision's models, and the split's rows."""
    if not config.data.uri:
        raise ConfigError("data.uri: found nothing, expected the URI that jobs/ingest.py wrote the dataset to")
    import ray  # as in `_score`

    from cxr_dist import cluster
    from cxr_dist.capacity import wants_gpu
    from cxr_dist.data.manifest import Manifest
    from cxr_dist.evaluate.xrv import score_xrv

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=storage.absolute(config.data.uri)))
    weights = storage.absolute(weights)
    rows = Manifest.load(config.data.uri).rows(split)
    cluster.connect(2)
    cluster.check_visible({"data.uri": config.data.uri, "--xrv-weights": weights})
    use_gpu = wants_gpu(config, ray.cluster_resources())
    validation, _ = score_xrv(config, name, weights, "validation", use_gpu=use_gpu)
    if split == "validation":
        return validation, validation, rows
    return score_xrv(config, name, weights, split, use_gpu=use_gpu)[0], validation, rows


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
