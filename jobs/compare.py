"""Judge any number of models on the same images: reports side by side, ROC curves over one another, paired differences.

python jobs/compare.py ours=outputs/runs/nih8-first xrv=outputs/xrv/scores.parquet --out outputs/compare
python jobs/compare.py a.csv b.csv --data.labels Data_Entry_2017_v2020.csv.gz --reference b
"""

import argparse
import sys
from typing import Any, Literal

from cxr_dist.cli import run_job
from cxr_dist.config import Config


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument(
        "models",
        type=str,
        nargs="*",
        help="two or more: URI or NAME=URI of a score table (ours, or any model's with data.labels), a run's folder, a "
        "report's folder, a checkpoint (with data.uri), models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID",
    )
    parser.add_argument(
        "--reference", type=str, default="", help="name of the model to hold the others against; the first"
    )
    parser.add_argument(
        "--validation",
        type=str,
        nargs="+",
        default=[],
        help="NAME=URI of the validation scores that a model's thresholds are chosen on; runs bring theirs",
    )
    rules = Literal["youden", "f1", "corner", "sensitivity_90", "specificity_90"]
    parser.add_argument("--rule", type=rules, default="youden", help="how a model's thresholds are chosen there")
    parser.add_argument("--split", type=Literal["validation", "test"], default="test", help="images that are judged")
    parser.add_argument("--common", action="store_true", help="judge only the images that all models have scored")
    parser.add_argument("--out", type=str, default="outputs/compare", help="directory of the comparison")
    parser.add_argument("--track", action="store_true", help="keep it in MLflow too, as a run of tracking.experiment")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Read or score, compare, write, and return the result in short."""
    from cxr_dist.compare.page import summary
    from cxr_dist.compare.run import compare_models, track

    result = compare_models(
        config,
        args.models,
        validation=args.validation,
        reference=args.reference,
        rule=args.rule,
        split=args.split,
        common=args.common,
        out=args.out,
        command=" ".join(["python", "jobs/compare.py", *sys.argv[1:]]),
    )
    print(summary(result))
    run_id = track(config, result, args.out) if args.track else None
    print(f"tables, figures and page: {args.out}")
    return {
        "out": str(args.out),
        "split": result["split"],
        "n_images": result["n_images"],
        "n_patients": result["n_patients"],
        "findings": result["findings"],
        "reference": result["reference"],
        "auroc_mean": {name: one["mean"]["auroc"] for name, one in result["discrimination"].items()},
        "differences": {
            name: {"mean": one["auroc"]["mean"], **one["auroc_counts"]} for name, one in result["differences"].items()
        },
        "labels": result["labels"],
        "run_id": run_id,
    }


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
