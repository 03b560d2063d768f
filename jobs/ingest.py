"""Turn an NIH release into a dataset: Parquet shards and a manifest (`ray job submit -- python jobs/ingest.py …`)."""

import argparse
import dataclasses
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.data.ingest import ingest, labels_only
from cxr_dist.spending import metered


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.labels_only:
        return labels_only(config)
    if args.in_place:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, in_place=True))
    with metered(config.cost) as cost:
        result = ingest(config)
        images = sum(split["images"] for split in result["splits"].values())
        return result | {"cost": cost(None if result["unchanged"] else images)}


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels-only", action="store_true", help="clean and audit labels and lists; touch no image")
    parser.add_argument("--in-place", action="store_true", help="the same as --data.in_place true")


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=flags)
