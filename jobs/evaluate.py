"""Judge a model: scores in, report out (AUROC with intervals, thresholds from validation, figures, tables).

python jobs/evaluate.py --checkpoint s3://bucket/runs/NAME --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih8
python jobs/evaluate.py --scores preds.csv --data.labels Data_Entry_2017_v2020.csv.gz
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.data import nih
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.evaluate.report import table, write_report
from cxr_dist.evaluate.scores import ScoreTable, read, read_external


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    optional = str | None
    parser.add_argument("--scores", type=optional, help="score table to judge, Parquet or CSV (.gz), of any model")
    parser.add_argument("--validation-scores", type=optional, help="score table that thresholds are chosen on")
    parser.add_argument("--checkpoint", type=optional, help="URI of a run's checkpoint to score and judge")
    parser.add_argument("--split", type=Literal["validation", "test"], default="test", help="images that are judged")
    parser.add_argument("--out", type=str, default="outputs/evaluate", help="directory of the report")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Score or read, report, and return the report's numbers."""
    if bool(args.scores) == bool(args.checkpoint):
        raise ConfigError("evaluate: found neither or both of --scores and --checkpoint, expected one of them")
    if args.checkpoint and args.validation_scores:
        raise ConfigError("evaluate: --validation-scores goes with --scores; a checkpoint scores validation itself")
    dropped, missing = 0, None
    labels: dict[str, str] = {}
    validation: ScoreTable | None = None
    if args.checkpoint:
        scores, validation = _score(config, args.checkpoint, args.split)
        title = "/".join(storage.shown(args.checkpoint).rstrip("/").split("/")[-2:])
    else:
        release = _read_labels(config)
        scores, dropped = _load(config, release, args.scores, args.split)
        if args.validation_scores:
            validation, _ = _load(config, release, args.validation_scores, "validation")
        if release is not None:
            labels = {key.decode(): value.decode() for key, value in (release.schema.metadata or {}).items()}
        missing = _missing_from_test_list(config, release, scores) if args.split == "test" else None
        title = Path(args.scores).name
    report = write_report(
        args.out,
        scores,
        validation,
        bootstrap=config.evaluate.bootstrap,
        seed=config.evaluate.bootstrap_seed,
        title=title,
    )
    print(table(report))
    if args.checkpoint:
        from cxr_dist.evaluate.saliency import add_saliency

        add_saliency(args.out, config, args.checkpoint, scores, validation)
    elif config.evaluate.boxes:
        print("evaluate.boxes is not used: heat maps need the network, not its scores alone")
    if dropped:
        print(f"left out: {dropped:,} images with a finding outside {config.data.label_set} (its cleaning)")
    if args.scores and args.split == "test" and missing is None:
        print("not compared with the official test list; give data.test_list")
    if missing:
        print(f"not scored: {missing:,} images of the test list")
    print(f"figures and tables: {args.out}")
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


def _score(config: Config, checkpoint_uri: str, split: str) -> tuple[ScoreTable, ScoreTable | None]:
    """The scores of a split by a checkpoint, and those of the run's validation split, for thresholds; None if the
    dataset is not the run's."""
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
    if split == "test" and Manifest.load(uri).hash != trained_on:
        print("thresholds: 0.5, for this is not the dataset that the checkpoint was trained on")
        return score_split(config, checkpoint_uri, split, use_gpu=use_gpu)[0], None
    validation, _ = score_split(config, checkpoint_uri, "validation", use_gpu=use_gpu)
    if split == "validation":
        return validation, validation
    return score_split(config, checkpoint_uri, split, use_gpu=use_gpu)[0], validation


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
