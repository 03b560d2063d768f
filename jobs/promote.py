"""Make a version the champion of its registered model, if a patient-paired test on validation scores finds it better.

python jobs/promote.py --version cxr-densenet121/3 --tracking.uri http://MLFLOW:5000
python jobs/promote.py --run.name NAME --train.storage_path s3://bucket/runs --tracking.uri http://MLFLOW:5000

The second form logs and registers the run's best checkpoint first, where that was not asked for or failed.
"""

import argparse
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument("--version", type=str | None, help="NAME/NUMBER of a registered version")
    parser.add_argument("--register-only", type=bool, default=False, help="register the run's model and decide nothing")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Register if need be, decide, say what came of it, and return it."""
    from cxr_dist.registry.publish import told  # MLflow and torch take seconds to import; --help should not

    if bool(args.version) == bool(config.run.name):
        raise ConfigError("promote: found neither or both of --version and --run.name, expected one of them")
    if config.run.name:
        done = of_run(config, promote=not args.register_only)
    else:
        done = {"model": None, "version": args.version, "promotion": of_version(config, args.version)}
    print(told(done))
    return done


def of_version(config: Config, version: str) -> dict[str, Any]:
    """The decision about a registered version."""
    from mlflow.exceptions import MlflowException

    from cxr_dist.registry.promote import promote

    if re.fullmatch(r"[^/@:]+/\d+", version) is None:
        raise ConfigError(
            f"--version: found {version!r}, expected NAME/NUMBER, such as {config.tracking.registered_model}/1"
        )
    name, number = version.split("/")
    client = _client(config)
    try:
        client.get_model_version(name, number)
    except MlflowException as error:
        raise ConfigError(
            f"--version: found no {version} in the registry of tracking.uri ({' '.join(str(error).split())[:200]}); give one of its"
        ) from None
    evaluate = config.evaluate
    return promote(client, name, number, bootstrap=evaluate.bootstrap, seed=evaluate.bootstrap_seed).summary()


def of_run(config: Config, *, promote: bool) -> dict[str, Any]:
    """What became of the model of a run's folder."""
    from cxr_dist.experiment import PENDING
    from cxr_dist.registry.prepare import about, evaluation_of, prepare
    from cxr_dist.registry.publish import publish
    from cxr_dist.train.checkpoint import run_folder
    from cxr_dist.train.identity import read_run

    folder = run_folder(storage.absolute(config.train.storage_path or "outputs/runs"), config.run.name)
    found = read_run(folder)
    if found is None:
        raise ConfigError(f"--run.name: found no run.json in {storage.shown(folder)}, expected the folder of a run")
    client, run_id = _client(config), found["run_id"]
    if run_id.startswith(PENDING):
        raise ConfigError(
            f"--run.name: found a run that MLflow does not have yet ({run_id}); let jobs/sync.py tell it first"
        )
    tracking = dataclasses.replace(config.tracking, register=True, promote=promote)
    run = about(config.run.name, run_id, client.get_run(run_id).data.tags, found["config"])
    with tempfile.TemporaryDirectory() as local:
        to = Path(local, "model")
        evaluation = evaluation_of(client, run_id, Path(local))
        wish = prepare(folder, to, run, evaluation, tracking=tracking, evaluate=config.evaluate)
        return publish(client, run_id, to, wish)


def _client(config: Config) -> Any:
    from mlflow import MlflowClient

    from cxr_dist.experiment import absolute_uri
    from cxr_dist.preflight import check_tracking

    check_tracking(config)
    return MlflowClient(absolute_uri(config.tracking.uri))


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
