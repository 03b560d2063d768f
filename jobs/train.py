"""Train a run, or go on with one: `python jobs/train.py --config jobs/configs/nih8.yaml --data.uri s3://bucket/nih`."""

import argparse
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cxr_dist.train.run import train  # torch, Ray and MLflow take seconds to import; --help should not

    return train(config)


if __name__ == "__main__":
    run_job(main, description=__doc__ or "")
