"""MLflow brought up to date with what runs left in storage: unsent metrics, and how those ended that could not say so."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cxr_dist import storage, unsent
from cxr_dist.errors import InputError, RunError
from cxr_dist.experiment import PENDING, create_run
from cxr_dist.journal import send_records
from cxr_dist.scrub import scrub
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.identity import FILE, read_run
from cxr_dist.train.lease import STALE_S, Claim, latest_claims, living_owner
from cxr_dist.train.outcome import Outcome

__all__ = ["UNFINISHED", "carried", "runs_under", "sync_run"]

log = logging.getLogger(__name__)

UNFINISHED = ("RUNNING", "SCHEDULED")
"""Status in MLflow of a run that has not said how it ended."""


def runs_under(storage_path: str) -> list[str]:
    """Names of the runs whose folders lie under a URI."""
    names = [
        name.removesuffix("/run.json") for name, _ in storage.list_files(storage_path) if name.endswith("/run.json")
    ]
    return sorted(name for name in names if "/" not in name)


def carried(folder: str) -> list[dict[str, Any]]:
    """Metric records that travelled with a run's last checkpoint, for the node that had the journal may be lost."""
    checkpoints = Checkpoints(folder)
    entry = checkpoints.latest_whole()
    try:
        return checkpoints.load(entry)["journal"] if entry else []
    except RunError as error:
        log.warning("%s", error)
        return []


def sync_run(
    folder: str, tracking_uri: str, *, stale_s: float = STALE_S, pause: Callable[[float], Any] = time.sleep
) -> dict[str, Any]:
    """Send what MLflow lacks of a run, and set the status that a driver could not set; what was found and done.

    A run whose driver lives is left as it is. One that is watched for a sign of life takes `stale_s` seconds. Raises
    InputError if the server does not know the run or does not answer.
    """
    found = read_run(folder)
    if found is None:
        raise InputError(f"{storage.shown(folder)}: found no run.json, expected the folder of a run")
    run_id, client = found["run_id"], MlflowClient(tracking_uri)
    try:
        alive, claims = living_owner(folder, stale_s=stale_s, pause=pause)
        pending = run_id.startswith(PENDING)
        if alive is not None:
            status = "not in MLflow yet" if pending else client.get_run(run_id).info.status
            return {"run_id": run_id, "status": status, "driver": alive.owner, "sent": 0}
        if pending:
            run_id = _begin(folder, found, client, tracking_uri)
        status = client.get_run(run_id).info.status
        sent = unsent.send(folder, tracking_uri, run_id) + send_records(carried(folder), tracking_uri, run_id)
        # as late as can be: a driver that begins meanwhile says itself how its run stands
        if claims and latest_claims(folder) == claims and client.get_run(run_id).info.status in UNFINISHED:
            status, failure = _ending(folder, claims[-1])
            if failure:
                client.set_tag(run_id, "failure", failure)
            client.set_terminated(run_id, status)
    except MlflowException as error:
        raise InputError(
            f"tracking.uri: MLflow at {scrub(tracking_uri)} does not take run {run_id} "
            f"({scrub(' '.join(str(error).split()))[:300]}); start the server or give another URI"
        ) from None
    return {"run_id": run_id, "status": status, "driver": None, "sent": sent}


def _begin(folder: str, found: dict[str, Any], client: MlflowClient, tracking_uri: str) -> str:
    """Id of the MLflow run of a run that began while MLflow was away; from now on in its file."""
    config = found["config"]
    run_id = create_run(client, tracking_uri, config["tracking.experiment"], config["run.name"], found["run_id"])
    storage.put_atomic(storage.join(folder, FILE), json.dumps(found | {"run_id": run_id}, indent=1).encode())
    return run_id


def _ending(folder: str, claim: Claim) -> tuple[str, str]:
    """Status and failure of a run whose driver, of this claim, is gone."""
    outcome = Outcome.read(folder, claim.number)
    if outcome is not None:
        return outcome.status, outcome.failure
    last = f"{claim.owner}; its last sign of life was {claim.age_s / 60:.0f} minutes ago"
    return "FAILED", f"the driver was lost ({last}); run the same command again to go on from the last checkpoint"
