"""Judge a model: scores in, report out (AUROC with intervals, thresholds from validation, figures, tables).

python jobs/evaluate.py --checkpoint s3://bucket/runs/NAME --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih8
python jobs/evaluate.py --scores preds.csv --data.labels Data_Entry_2017_v2020.csv.gz \\
  --validation-scores validation.csv --evaluate.second_labels google2019_nih-chest-xray-labels.csv.gz
"""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.data import nih
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.evaluate.external import read_external
from cxr_dist.evaluate.page import Illustrate
from cxr_dist.evaluate.report import table, write_report
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.evaluate.scores import ScoreTable, read
from cxr_dist.evaluate.second_labels import read_second_labels
from cxr_dist.evaluate.worst import Example


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    optional = str | None
    parser.add_argument("--scores", type=optional, help="score table to judge, Parquet or CSV (.gz), of any model")
    parser.add_argument("--validation-scores", type=optional, help="score table that thresholds are chosen on")
    parser.add_argument("--checkpoint", type=optional, help="URI of a run's checkpoint to score and judge")
    parser.add_argument(
        "--run-folder", type=optional, help="with --scores: folder of the training run that they came from"
    )
    parser.add_argument("--split", type=Literal["validation", "test"], default="test", help="images that are judged")
    parser.add_argument("--out", type=str, default="outputs/evaluate", help="directory of the report")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Score or read, report, and return the report's numbers."""
    if bool(args.scores) == bool(args.checkpoint):
        raise ConfigError("evaluate: found neither or both of --scores and --checkpoint, expected one of them")
    if args.checkpoint and args.validation_scores:
        raise ConfigError("evaluate: --validation-scores goes with --scores; a checkpoint scores validation itself")
    if args.checkpoint and args.run_folder:
        raise ConfigError("evaluate: --run-folder goes with --scores; a checkpoint lies in its run's folder")
    second = read_second_labels(config.evaluate.second_labels) if config.evaluate.second_labels else None
    dropped, missing = 0, None
    labels: dict[str, str] = {}
    validation: ScoreTable | None = None
    if args.checkpoint:
        scores, validation, rows = _score(config, args.checkpoint, args.split)
        title = "/".join(storage.shown(args.checkpoint).rstrip("/").split("/")[-2:])
        run = _run(args.checkpoint.partition("/checkpoints/")[0], required=False)
    else:
        rows = release = _read_labels(config)
        scores, dropped = _load(config, release, args.scores, args.split)
        if args.validation_scores:
            validation, _ = _load(config, release, args.validation_scores, "validation")
        if release is not None:
            labels = {key.decode(): value.decode() for key, value in (release.schema.metadata or {}).items()}
        missing = _missing_from_test_list(config, release, scores) if args.split == "test" else None
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
        "--validation-scores": args.validation_scores,
        "--data.labels": config.data.labels,
        "--data.test_list": config.data.test_list,
        "--data.label_set": config.data.label_set,
        "--evaluate.bootstrap": str(config.evaluate.bootstrap),
        "--evaluate.bootstrap_seed": str(config.evaluate.bootstrap_seed),
    }
    words = [word for flag, value in flags.items() if value for word in (flag, storage.shown(value))]
    return [shlex.join(["python", "jobs/evaluate.py", *words])]


def _read_labels(config: Config) -> Any:
    if not config.data.labels:
        return None
    try:
        return nih.read_labels(storage.read_bytes(config.data.labels), storage.shown(config.data.labels))
    except FileNotFoundError:
        raise DataError(f"data.labels: no file at {storage.shown(config.data.labels)}") from None


def _missing_from_test_list(config: Config, labels: Any, scores: ScoreTable) -> int | None:
    """How many images of `data.test_list` have no score, after the label set's cleaning; None without a list.

    Raises DataError for scored images that are not in the list: they may be training images.
    """
    if not config.data.test_list:
        return None
    where = storage.shown(config.data.test_list)
    listed = set(nih.read_list(storage.read_bytes(config.data.test_list), where))
    foreign = sorted(set(scores.image_ids.tolist()) - listed)
    if foreign:
        raise DataError(
            f"scores: found {len(foreign)} images that are not in the test list {where} (first {foreign[0]}), expected "
            "only its images; they may have been trained on: leave them out, or data.test_list empty"
        )
    if labels is not None:
        listed &= set(nih.clean(labels, config.data.label_set)["image_id"].to_pylist())
    return len(listed) - len(scores)


def _load(config: Config, labels: Any, path: str, split: str) -> tuple[ScoreTable, int]:
    """A score table, cleaned as the label set is, and how many images that left out."""
    if labels is None:
        return read(path), 0
    skipped = config.train.skip_findings
    findings = tuple(finding for finding in nih.LABEL_SETS[config.data.label_set] if finding not in skipped)
    scores = read_external(path, labels, findings, split=split)
    kept = nih.clean(labels, config.data.label_set)["image_id"].to_pylist()
    keep_N = np.isin(scores.image_ids, np.array(kept, dtype=np.str_))
    return scores.select(keep_N), int((~keep_N).sum())


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
