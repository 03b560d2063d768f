"""What MLflow's UI shows of a run besides its metrics: the tags that people filter and group by, and its description."""

import getpass
import hashlib
import json
import os

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from cxr_dist import storage
from cxr_dist.config import Config, flatten
from cxr_dist.data.manifest import Manifest
from cxr_dist.tracking import commit_tags
from cxr_dist.train.identity import decisive
from cxr_dist.train.job import TrainJob

__all__ = ["description", "how_split", "params", "recipe", "tags", "user"]

NOT_RECIPE = {"run.name", "tracking.experiment", "train.seed"}
"""Of what decides a run's result: what runs of one recipe differ in."""


def tags(job: TrainJob, manifest: Manifest, *, new: bool) -> dict[str, str]:
    """What people filter runs by, the config's own tags included; keys with `mlflow.` are shown by its UI.

    The description is only for a `new` run: it may have been edited since.
    """
    config, commit = job.config, job.config.run.commit
    return {
        **dict(tag.split("=", 1) for tag in config.tracking.tags),
        **(commit_tags(commit) if commit else {}),
        **({MLFLOW_RUN_NOTE: description(job, manifest)} if new else {}),
        MLFLOW_SOURCE_NAME: "jobs/train.py",
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_USER: user(),
        "label_set": manifest.label_set,
        "split": how_split(manifest),
        "recipe": recipe(config),
        "manifest_sha256": manifest.hash,
        "plan_sha256": job.plan.sha256,
        "world_size": " or ".join(map(str, job.world_sizes)),
        "run_folder": storage.shown(job.folder),
    }


def params(config: Config) -> dict[str, object]:
    """What people compare runs by: the config without the run's names and addresses and prices, which are no setting."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(("run.", "tracking.", "cost."))}


def how_split(manifest: Manifest) -> str:
    """How the images were divided: equal for runs whose validation scores may be compared."""
    fraction, seed = manifest.validation_fraction, manifest.settings.get("split_seed", "unknown")
    return f"official test list, validation {fraction:.0%} of the patients, seed {seed}"


def recipe(config: Config) -> str:
    """What was trained how, in one line: equal for runs that differ in seed, name, data or machine only, and the hash at
    its end for no others."""
    model, optimizer, train = config.model, config.optimizer, config.train
    values = {key: value for key, value in decisive(config).items() if key not in NOT_RECIPE}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    views = f", {train.views} views" if train.views else ""
    parts = [
        f"{storage.shown(model.weights).rstrip('/').rpartition('/')[2]} weights",
        f"{model.trainable} trained",
        f"{model.pooling} pooling",
        f"{optimizer.name} {optimizer.lr:g} at {optimizer.lr_reference_batch} ({optimizer.lr_rule}), {optimizer.schedule}",
        f"batch {train.global_batch}",
        f"{train.epochs} epochs",
        f"augmented{views}" if train.augment else "not augmented",
    ]
    return f"{'; '.join(parts)}; #{digest[:6]}"


def description(job: TrainJob, manifest: Manifest) -> str:
    """The run in a few lines of Markdown, for whoever opens it."""
    counts = ", ".join(f"{split.num_rows:,} {name}" for name, split in manifest.splits.items())
    note = f"**{recipe(job.config)}**\n\n{len(job.findings)} findings of ChestX-ray14 ({manifest.label_set}); images: {counts}."
    if job.config.model.weights == "random":
        note += "\n\nTrained from random weights: its scores say that the job works, and nothing about radiographs."
    if not job.config.evaluate.test:
        note += "\n\nThe test split is not looked at."
    return note


def user() -> str:
    """Name of the user, or the number of one without a name (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
