"""Is the cluster ready for a run? Versions, GPUs, network, store, MLflow, room and rates, each tried on the nodes themselves.

ray job submit --runtime-env infra/runtime_env.yaml --working-dir . -- python jobs/doctor.py --config RUN.yaml [--wait 900]
python jobs/doctor.py --working-dir .        # on your own machine, before that: what would be uploaded

Exit code 0: ready, 1: not ready, 2: bad config. --json FILE or URI keeps the result, which jobs/train.py --dry-run reads.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument(
        "--wait", type=int, default=0, help="seconds to wait for nodes that come by demand: train.wait_for_nodes_s"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds in which a node or a rank must answer")
    parser.add_argument(
        "--store-mb", type=int, default=64, help="MB that each node writes to the store and reads again"
    )
    parser.add_argument(
        "--working-dir", type=str, default="", help="only look at what would be uploaded of this folder"
    )
    parser.add_argument(
        "--runtime-env",
        type=str,
        default="",
        help="with --working-dir: the YAML of ray job submit; empty: the folder's infra/runtime_env.yaml",
    )


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """The result in the format "cxr-dist/doctor/1"."""
    if not args.timeout > 0:
        raise ConfigError(f"--timeout: found {args.timeout:g}, expected more than 0 seconds")
    if not 1 <= args.store_mb <= 1024:
        raise ConfigError(f"--store-mb: found {args.store_mb}, expected 1 to 1024")
    if args.working_dir:
        return look_at_upload(args.working_dir, args.runtime_env)
    from cxr_dist.doctor.run import examine  # torch, Ray and MLflow take seconds to import; --help should not

    if args.wait:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, wait_for_nodes_s=args.wait))
    return examine(config, timeout_s=args.timeout, store_bytes=args.store_mb * 1_000_000)


def look_at_upload(folder: str, runtime_env: str) -> dict[str, Any]:
    """What `ray job submit` would upload, without a cluster."""
    from cxr_dist.doctor import upload
    from cxr_dist.doctor.report import as_json
    from cxr_dist.doctor.table import table

    beside = Path(folder, "infra", "runtime_env.yaml")
    where = runtime_env or (str(beside) if beside.is_file() else "")
    excludes = upload.read_runtime_env(where).get("excludes") if where else None
    found = upload.look(folder, excludes)
    problems, notes = upload.judge(found)
    notes.insert(0, f"{found.folder} travels as a zip of {upload.megabytes(found.zip_bytes)}, {found.files} files")
    print(table([], None, problems, notes))
    return as_json(problems=problems, notes=notes, more={"upload": found.as_json()})


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags, failed=lambda result: result["verdict"] != "ready")
