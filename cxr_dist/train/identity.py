"""Who a run is: the file that ties a run's folder to its MLflow run and to what decides its result."""

import json
from dataclasses import dataclass
from typing import Any

from cxr_dist import storage
from cxr_dist.config import Config, flatten
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.job import TrainJob

__all__ = ["BEING_REMOVED", "FILE", "FORMAT", "Identity", "read_run"]

FORMAT = 1
BEING_REMOVED = "being removed"
"""Format of the file of a run that `cxr_dist.housekeeping` has begun to delete; it keeps the former content under `run`."""
FILE = "run.json"

FREE = {
    "train.num_workers",
    "train.use_gpu",
    "train.cpus_per_worker",
    "train.threads_per_worker",
    "train.micro_batch",
    "train.max_failures",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.wait_for_nodes_s",
    "train.log_every_steps",
    "train.features",
    "train.features_uri",
    "train.features_memory",
    "train.process_group_timeout_s",
    "train.storage_path",
    "run.resume",
    "run.commit",
    "tracking.uri",
    "tracking.required",
    "tracking.log_model",
    "tracking.registered_model",
    "tracking.register",
    "tracking.promote",
    "tracking.tags",
    "model.prefix_chunk",
    "model.cuda_graph",
}
"""Keys that a resumed run may change: the machine, not the result."""

FREE_SECTIONS = ("data.", "evaluate.", "cost.")
"""The dataset's identity is its manifest's hash; evaluation comes after training; prices change nothing."""


@dataclass(frozen=True)
class Identity:
    """The run's MLflow id, or None before the run has one."""

    where: str
    run_id: str | None
    features: bool | None = None
    """Whether the run works from kept features, as it began; None before that is decided."""

    @classmethod
    def claim(cls, job: TrainJob, *, resume: str) -> "Identity":
        """The identity of the job's run; ConfigError if `resume` or the config does not allow to go on with it."""
        where, found = storage.join(job.folder, FILE), read_run(job.folder)
        name = job.config.run.name
        if resume == "must" and not Checkpoints(job.folder).entries():
            raise ConfigError(
                f"run.resume: found no checkpoint of run {name} under {job.folder}, expected one for must"
            )
        if found is None:
            return cls(where, None)
        if resume == "never":
            raise ConfigError(
                f"run.name: found a run {name} under {job.folder}; give another run.name, or run.resume auto"
            )
        if found["manifest_sha256"] != job.manifest_sha256:
            raise ConfigError(
                f"data.uri: run {name} was started on the dataset with manifest {found['manifest_sha256'][:12]}…, found "
                f"{job.manifest_sha256[:12]}…; give that dataset or another run.name"
            )
        for key, value in decisive(job.config).items():
            if found["config"].get(key) != value:
                raise ConfigError(
                    f"{key}: run {name} was started with {found['config'].get(key)!r}, found {value!r}; keep the first, "
                    "or give another run.name"
                )
        return cls(where, found["run_id"], found.get("features"))

    def record(self, job: TrainJob, *, features: bool | None = None) -> None:
        """Write the file: once the MLflow run exists, and again once it is decided whether it works from features."""
        features = self.features if features is None else features
        if (self.run_id, self.features) == (job.run_id, features):
            return
        content = {
            "format": FORMAT,
            "run_id": job.run_id,
            "manifest_sha256": job.manifest_sha256,
            "plan_sha256": job.plan.sha256,
            "features": features,
            "config": decisive(job.config),
        }
        storage.put_atomic(self.where, json.dumps(content, indent=1).encode())


def read_run(folder: str) -> dict[str, Any] | None:
    """The file of the run in `folder`; None if there is none. InputError for one of another format, or being removed."""
    where = storage.join(folder, FILE)
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(where))
    except FileNotFoundError:
        return None
    if found.get("format") == BEING_REMOVED:
        raise InputError(
            f"{storage.shown(where)}: found a run that is being removed and no longer whole, expected a whole one; let "
            "jobs/gc.py --remove finish, or give another run.name"
        )
    if found.get("format") != FORMAT:
        raise InputError(f"{where}: found format {found.get('format')!r}, expected {FORMAT}")
    return found


def decisive(config: Config) -> dict[str, Any]:
    """The config values that decide a run's result, as plain JSON values."""
    values = {
        key: value for key, value in flatten(config).items() if key not in FREE and not key.startswith(FREE_SECTIONS)
    }
    return json.loads(json.dumps(values))
