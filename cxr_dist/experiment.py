"""MLflow experiments and the runs in them: the store's address, whether it answers, and runs that are created once."""

import urllib.error
import urllib.request
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from cxr_dist.errors import InputError
from cxr_dist.views import VIEWS, link, view_tags

__all__ = ["PENDING", "absolute_uri", "create_run", "no_answer"]

ANSWER_S = 5.0

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development", **view_tags()}
"""The first makes MLflow's UI open the experiment as model training, with its charts, and not as language-model traces,
for those who have not chosen either; the others are views of its runs."""

PENDING = "pending-"
"""Beginning of the id of a run that MLflow does not have yet; its tag `pending_id` once it has."""


def no_answer(tracking_uri: str) -> str | None:
    """Why no MLflow server answers at an HTTP address, or None: one does, or the store is a database, which needs none.

    One request, and none again: MLflow's client tries thrice, seconds apart.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    try:
        urllib.request.urlopen(f"{tracking_uri}/health", timeout=ANSWER_S).close()  # noqa: S310 - the scheme is http or https
    except urllib.error.HTTPError as error:
        return f"{tracking_uri} answers with HTTP status {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return f"no MLflow server answers at {tracking_uri} ({getattr(error, 'reason', error)})"
    return None


def create_run(client: MlflowClient, tracking_uri: str, experiment: str, name: str, pending: str = "") -> str:
    """Id of a new run in an experiment, which is created if it is missing; one for each id of `pending`, however often asked.

    Raises InputError if the experiment is deleted, MlflowException if the server does not do it.
    """
    found = _find_experiment(client, tracking_uri, experiment)
    if found.lifecycle_stage != "active":
        raise InputError(
            f"tracking.experiment: {experiment!r} is deleted; restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or give another name"
        )
    if pending:
        for run in client.search_runs([found.experiment_id], f"tags.pending_id = '{pending}'", max_results=1):
            return run.info.run_id
    tags = {"pending_id": pending} if pending else None
    return client.create_run(found.experiment_id, run_name=name or None, tags=tags).info.run_id


def _find_experiment(client: MlflowClient, tracking_uri: str, name: str) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            created = client.create_experiment(name, _artifacts_beside(tracking_uri), tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(name)
        # once: people may write their own
        client.set_experiment_tag(created, MLFLOW_RUN_NOTE, _note(created))
        return client.get_experiment(created)
    for key, value in EXPERIMENT_TAGS.items():  # one that somebody else made, or an earlier version
        if found.lifecycle_stage == "active" and found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    return found


def _note(experiment_id: str) -> str:
    """Description of an experiment: where its charts are."""
    links = (f"[{name.replace('-', ' ')}]({link(experiment_id, name)})" for name in VIEWS)
    return f"Runs side by side: {', '.join(links)}. Scores under `test/` are of the official test list."


def absolute_uri(tracking_uri: str) -> str:
    """The tracking URI as every process may use it: a relative SQLite path is taken from the current folder."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return tracking_uri
    return prefix + str(Path(tracking_uri.removeprefix(prefix)).absolute())


def _artifacts_beside(tracking_uri: str) -> str | None:
    """Folder for artifacts next to a SQLite database (MLflow's default depends on the current folder); None: the server's."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    return (database.parent / f"{database.stem}-artifacts").as_uri()
