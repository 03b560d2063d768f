"""A model's folder into MLflow: a logged model of its run, a version of a registered model, and whether it is the champion.

Each step looks first whether it has been done, so that all of them may be told again after a failure in the middle.
Only explicit clients are used. Models are found by what they are: the SHA-256 of their weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME

from cxr_dist.registry.promote import promote

__all__ = ["SHA256", "Wish", "publish", "told"]

SHA256 = "model_sha256"
"""Tag of logged models and versions: what decides their output."""
TAG_LENGTH = 5000


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to become of a model's folder."""

    name: str
    """Of the registered model, and of the logged one."""
    sha256: str
    tags: dict[str, str]
    """Of both."""
    description: str
    """Of the version: the model card, as much as MLflow keeps."""
    register: bool
    promote: bool
    bootstrap: int
    """Patient resamples of the test against the champion."""
    seed: int


def publish(client: MlflowClient, run_id: str, folder: Path, wish: Wish) -> dict[str, Any]:
    """Do what is wished, as far as it is not done: {"model": URI, "version": NAME/NUMBER or None, "promotion": … or None}.

    Raises what the server or its artifact store raises. A comparison with the champion that cannot be made is no failure:
    the model is there, `promotion` says why it is not the champion, and so do the version's tags.
    """
    logged = _logged(client, run_id, folder, wish)
    done: dict[str, Any] = {"model": f"models:/{logged.model_id}", "version": None, "promotion": None}
    if wish.register or wish.promote:
        version = _version(client, run_id, logged, wish)
        done["version"] = f"{wish.name}/{version.version}"
        if wish.promote:
            decision = promote(client, wish.name, str(version.version), bootstrap=wish.bootstrap, seed=wish.seed)
            done["promotion"] = decision.summary()
    return done


def told(done: Mapping[str, Any]) -> str:
    """What became of a model, in one line for people."""
    line = f"model: {done['version'] or done['model']}"
    decision = done["promotion"]
    if decision is not None:
        line += f", {'now' if decision['promoted'] else 'not'} the champion: {decision['reason']}"
    return line


def _logged(client: MlflowClient, run_id: str, folder: Path, wish: Wish) -> LoggedModel:
    """The logged model of this content and run, whole."""
    experiment = client.get_run(run_id).info.experiment_id
    found = _find(client, experiment, run_id, wish.sha256)
    if found is None:
        tags = {**_tags(wish.tags), SHA256: wish.sha256}
        found = client.create_logged_model(experiment, name=wish.name, source_run_id=run_id, tags=tags)
    if found.status == LoggedModelStatus.READY:
        return found
    about = Model.load(str(folder))
    about.model_id, about.run_id, about.artifact_path = found.model_id, run_id, found.artifact_location
    about.save(str(folder / MLMODEL_FILE_NAME))
    client.log_model_artifacts(found.model_id, str(folder))
    if found.model_id not in {output.model_id for output in _outputs(client, run_id)}:
        client.log_outputs(run_id, [LoggedModelOutput(found.model_id, step=0)])
    return client.finalize_logged_model(found.model_id, LoggedModelStatus.READY)


def _find(client: MlflowClient, experiment: str, run_id: str, sha256: str) -> LoggedModel | None:
    token = None
    while True:
        page = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", page_token=token)
        for model in page:
            if model.tags.get(SHA256) == sha256 and model.status != LoggedModelStatus.FAILED:
                return model
        token = page.token
        if not token:
            return None


def _outputs(client: MlflowClient, run_id: str) -> list[LoggedModelOutput]:
    outputs = client.get_run(run_id).outputs
    return list(outputs.model_outputs) if outputs else []


def _version(client: MlflowClient, run_id: str, logged: LoggedModel, wish: Wish) -> ModelVersion:
    """The version of the registered model that this logged model is."""
    try:
        client.create_registered_model(wish.name, description=ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{wish.name}' and run_id = '{run_id}'"):
        if version.tags.get(SHA256) == wish.sha256:
            return version
    # models:/ID as source would be looked up through MLflow's global URI where the store is a database
    return client.create_model_version(
        wish.name,
        logged.artifact_location,
        run_id,
        tags={**_tags(wish.tags), SHA256: wish.sha256},
        description=wish.description,
        model_id=logged.model_id,
    )


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:TAG_LENGTH] for key, value in tags.items() if value}


ABOUT = (
    "DenseNet121 on NIH ChestX-ray14. A version per run that asked for one; `champion` is moved only to one that the "
    "patient-paired test on validation scores found better. For research, not for clinical use."
)
