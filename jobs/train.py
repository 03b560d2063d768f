"""Train a run, or go on with one: `python jobs/train.py --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih`.

With --dry-run it says what it would do and what that takes, and does nothing: no MLflow run, no lease, no GPU held.
"""

import argparse
import dataclasses
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError


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
    parser.add_argument(
        "--dry-run",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="print images, steps, bytes, memory, time and cost of the run, and train nothing",
    )
    parser.add_argument(
        "--doctor",
        type=str | None,
        default=None,
        help="with --dry-run: URI of what jobs/doctor.py --json wrote, whose measured rates give time and cost",
    )


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.promote:
        config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, promote=True))
    if args.doctor and not args.dry_run:
        raise ConfigError("--doctor: found it without --dry-run, which alone goes by it; add --dry-run or leave it out")
    # torch, Ray and MLflow take seconds to import; --help should not
    if args.dry_run:
        from cxr_dist.train.dryrun import dry_run

        return dry_run(config, doctor=args.doctor or "")
    from cxr_dist.train.run import train

    return train(config)


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
