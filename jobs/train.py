"""Train a run, or go on with one: `python jobs/train.py --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih`."""

import argparse
import dataclasses
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument(
        "--promote",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="register the model and make it the champion if it is better on validation: tracking.promote true",
    )


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cxr_dist.train.run import train  # torch, Ray and MLflow take seconds to import; --help should not

    if args.promote:
        config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, promote=True))
    return train(config)


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
