"""List, and with --remove remove, old runs, checkpoints that later ones have superseded, and features that nothing uses.

python jobs/gc.py --train.storage_path s3://bucket/runs --tracking.uri http://mlflow:5000 [--older-than DAYS] [--remove]
"""

import argparse
from typing import Any

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument("--older-than", type=float, default=30.0, help="days since a run ended or features were used")
    parser.add_argument("--remove", action="store_true", help="remove what may go; without, it is only listed")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """List, and remove if asked; {"remove": asked, "bytes": of what goes, "items": [all], "stayed": {what after all: why}}.

    With `run.name` only that run is judged.
    """
    if not args.older_than >= 0:
        raise ConfigError(f"--older-than: found {args.older_than:g}, expected 0 or more days")
    from cxr_dist.experiment import absolute_uri
    from cxr_dist.housekeeping.facts import gather  # MLflow takes seconds to import; --help should not
    from cxr_dist.housekeeping.plan import DAY_S, as_json, plan, table
    from cxr_dist.housekeeping.remove import Remover
    from cxr_dist.housekeeping.tracked import Tracking

    path = storage.absolute(config.train.storage_path or "outputs/runs").rstrip("/")
    features_uri = storage.absolute(config.train.features_uri or storage.join(path, "features")).rstrip("/")
    tracking, older_s = Tracking(absolute_uri(config.tracking.uri)), args.older_than * DAY_S
    facts = gather(path, features_uri, tracking, older_s=older_s)
    items = plan(facts, older_s=older_s)
    if config.run.name:
        items = [item for item in items if item.kind != "features" and item.name == config.run.name]
    if not items:
        what = f"run {config.run.name}" if config.run.name else "run and no features"
        raise ConfigError(f"train.storage_path: found no {what} under {storage.shown(path)}, expected RUN/run.json")
    print(table(items, facts.now))
    stayed: dict[str, str] = {}
    if args.remove:
        remover = Remover(storage_path=path, facts=facts, tracking=tracking, older_s=older_s)
        stayed = remover.remove(items)
        for name, why in stayed.items():
            print(f"{name} stays after all: {why}")
    elif any(item.goes for item in items):
        print("nothing was removed; give --remove")
    return {
        "remove": args.remove,
        "bytes": sum(item.bytes for item in items if item.goes and f"{item.kind} {item.name}" not in stayed),
        "items": [as_json(item, facts.now) for item in items],
        "stayed": stayed,
    }


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
