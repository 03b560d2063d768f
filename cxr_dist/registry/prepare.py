"""A run's checkpoint made ready to be told to MLflow: the model's folder with its card, and what is to become of it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from cxr_dist.config import EvaluateConfig, TrackingConfig
from cxr_dist.registry.card import About, model_card, recipe, shortened
from cxr_dist.registry.package import Contents, contents, write_model
from cxr_dist.registry.publish import Wish

__all__ = ["about", "evaluation_in", "evaluation_of", "prepare"]

EVALUATION = "evaluation.json"


def prepare(
    checkpoint_uri: str,
    to: Path,
    run: About,
    evaluation: Mapping[str, Any] | None,
    *,
    tracking: TrackingConfig,
    evaluate: EvaluateConfig,
) -> Wish:
    """Write the model of a checkpoint to a folder, over what an earlier attempt left there; what is to become of it."""
    found = contents(checkpoint_uri, method=evaluate.calibration)
    card = model_card(tracking.registered_model, found, run, evaluation)
    shutil.rmtree(to, ignore_errors=True)
    write_model(checkpoint_uri, found, card, to)
    return Wish(
        name=tracking.registered_model,
        sha256=found.facts["sha256"],
        tags=_tags(found, run),
        description=shortened(card),
        register=tracking.register,
        promote=tracking.promote,
        bootstrap=evaluate.bootstrap,
        seed=evaluate.bootstrap_seed,
    )


def about(run_name: str, run_id: str, tags: Mapping[str, str], config: Mapping[str, Any]) -> About:
    """The run of an MLflow run's tags and of dotted config values."""
    return About(
        run=run_name,
        run_id=run_id,
        label_set=tags.get("label_set", ""),
        split=tags.get("split", ""),
        commit=tags.get(MLFLOW_GIT_COMMIT, ""),
        recipe=recipe(config),
    )


def evaluation_in(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a report's folder; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / EVALUATION).read_text())
    except FileNotFoundError:
        return None
    return found


def evaluation_of(client: MlflowClient, run_id: str, scratch: Path) -> dict[str, Any] | None:
    """The evaluation that was logged with a run; None if none was."""
    if not any(entry.path == EVALUATION for entry in client.list_artifacts(run_id)):
        return None
    found: dict[str, Any] = json.loads(Path(client.download_artifacts(run_id, EVALUATION, str(scratch))).read_text())
    return found


def _tags(found: Contents, run: About) -> dict[str, str]:
    return {
        "run": run.run,
        "manifest_sha256": found.manifest_sha256,
        "label_set": run.label_set,
        "recipe": run.recipe,
        "commit": run.commit,
        "weights": found.origin,
        "model_version": found.facts["model_version"],
        "pixels_version": found.facts["pixels_version"],
        "val_auroc_mean": "" if found.score is None else f"{found.score:.6f}",
    }
