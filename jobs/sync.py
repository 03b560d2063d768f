"""Bring MLflow up to date with runs whose driver or tracking server was lost: unsent metrics, and their true status.

python jobs/sync.py --train.storage_path s3://bucket/runs --tracking.uri http://mlflow:5000 [--run.name NAME]
"""

import argparse
from typing import Any

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, InputError


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Sync one run, or all under `train.storage_path`; {"runs": [what was found and done], "failed": {name: why}}."""
    from cxr_dist.experiment import absolute_uri  # MLflow takes seconds to import; --help should not
    from cxr_dist.train.checkpoint import run_folder
    from cxr_dist.train.sync import runs_under, sync_run

    path = storage.absolute(config.train.storage_path or "outputs/runs")
    names = [config.run.name] if config.run.name else runs_under(path)
    if not names:
        raise ConfigError(f"train.storage_path: found no run under {storage.shown(path)}, expected RUN/run.json")
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            runs.append({"run": name, **sync_run(run_folder(path, name), absolute_uri(config.tracking.uri))})
        except InputError as error:
            if config.run.name:
                raise
            failed[name] = str(error)
        else:
            done = runs[-1]
            print(
                f"{name}: {done['status']}, {done['sent']} metric values sent"
                + (f", written by {done['driver']}" if done["driver"] else "")
            )
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    return {"runs": runs, "failed": failed}


if __name__ == "__main__":
    run_job(main, description=__doc__ or "")
