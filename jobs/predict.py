"""Predict images with a trained model: one row an image, in Parquet parts; the same command goes on where it stopped.

python jobs/predict.py --model s3://bucket/runs/NAME --images s3://bucket/pngs --out s3://bucket/predictions
python jobs/predict.py --model models:/cxr/3 --images /data/nih8-224 --split test --out predictions
"""

import argparse
import sys
from typing import Any, Literal

from cxr_dist.cli import model_flag, run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError

FEW = 5


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    optional = str | None
    parser.add_argument(
        "--model-uri",
        type=optional,
        help="the model, also given as --model: URI of a run's folder (its best checkpoint) or of a checkpoint, "
        "models:/NAME/VERSION, models:/NAME@ALIAS, or runs:/ID/PATH (of tracking.uri)",
    )
    parser.add_argument("--images", type=optional, help="URI of a folder of .png and .jpg files, or of a dataset")
    parser.add_argument("--out", type=optional, help="URI of the folder that predictions are written to")
    splits = Literal["train", "validation", "test", "all"] | None
    parser.add_argument("--split", type=splits, default=None, help="images of a dataset that are predicted")
    parser.add_argument(
        "--thresholds",
        type=str,
        default="youden",
        help="flagged is a probability from here on: youden or f1 (on the run's validation scores; 0.5 where there are "
        "none), or a number for every finding",
    )
    parser.add_argument("--part-images", type=int, default=0, help="images in a part; 0: 1024, fewer of large images")
    parser.add_argument("--scorers", type=int, default=0, help="most actors that score; 0: as many as fit the cluster")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Predict, say what came of it, and return the counts."""
    for flag, value in (("--model", args.model_uri), ("--images", args.images), ("--out", args.out)):
        if not value:
            raise ConfigError(f"{flag}: found nothing, expected a URI")
    for flag, number in (("--part-images", args.part_images), ("--scorers", args.scorers)):
        if number < 0:
            raise ConfigError(f"{flag}: found {number}, expected 0 or more")
    from cxr_dist.predict.run import predict  # Ray and torch take seconds to import; --help should not
    from cxr_dist.spending import metered

    with metered(config.cost) as cost:
        result = predict(
            config,
            model=args.model_uri,
            images=args.images,
            out=args.out,
            split=args.split,
            thresholds=args.thresholds,
            part_images=args.part_images,
            num_scorers=args.scorers,
        )
        result["cost"] = cost(result["scored"])
    parts = result["parts"]
    print(f"model: {result['model']['version']}; thresholds: {result['thresholds']['source']}")
    print(
        f"{result['readable']:,} of {result['images']:,} images predicted, {parts['written']} parts written, {parts['found']} "
        f"found: {result['out']}"
    )
    for name, reason in parts["damaged"].items():
        print(f"made again: {name}: {reason}")
    if result["left_out_by_ingest"]:
        print(f"not in the dataset, left out by ingest: {result['left_out_by_ingest']:,} images")
    if result["unreadable"]:
        share = result["unreadable"] / result["images"]
        above = share > config.data.max_corrupt
        limit = f", more than data.max_corrupt = {config.data.max_corrupt:g} of them" if above else ""
        print(
            f"unreadable: {result['unreadable']:,} images ({share:.2%}{limit}), each has a row with the reason; first"
        )
        for name, reason in list(result["unreadable_first"].items())[:FEW]:
            print(f"  {name}: {reason}")
    return result


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags, argv=model_flag(sys.argv[1:]))
