"""The record of a finished run, gathered from what it logged: MLflow's history, and what MLflow has not taken yet."""

import logging
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from platform import python_version
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from cxr_dist import storage, unsent
from cxr_dist.data.manifest import Manifest
from cxr_dist.evaluate.runrecord import FILE, RunRecord
from cxr_dist.experiment import PENDING
from cxr_dist.scrub import scrub
from cxr_dist.spending import Spending
from cxr_dist.train.job import TrainJob

__all__ = ["Point", "gpu_utilization", "kept_record", "run_record", "spent"]

log = logging.getLogger(__name__)

KEPT = f"scores/{FILE}"
"""Where a run's folder keeps it."""
_PREFIXES = ("train/", "val/")
_GPU = re.compile(r"system/.+/gpu_\d+_utilization_percentage")
"""The system metric that tells how busy a GPU was; MLflow samples every one of every node."""
_PACKAGES = ("torch", "ray", "mlflow", "numpy", "pyarrow")


class Point(NamedTuple):
    """One value of a metric."""

    step: int
    value: float
    time_s: float
    """When it was logged, seconds since 1970."""


def run_record(
    job: TrainJob,
    manifest: Manifest,
    trained: Mapping[str, Any],
    *,
    config: str,
    unreadable: int,
    now_s: float,
    spending: Spending,
) -> RunRecord:
    """What the run of `job` was; `trained` is its result, `config` its YAML. Kept in the run's folder. How busy the GPUs were is
    told to `spending`.

    Never raises because of the tracking server: what it does not tell is missing, and the record says so.
    """
    points: dict[str, dict[int, Point]] = {}
    tags: Mapping[str, str] = {}
    began_s, counted, missing = None, None, ""
    if job.run_id.startswith(PENDING):
        missing = "MLflow was away when the run began; what a lost node had logged is not here"
    else:
        try:
            client = MlflowClient(job.tracking_uri)
            run = client.get_run(job.run_id)
            tags, began_s = run.data.tags, run.info.start_time / 1000
            counted = client.get_experiment(run.info.experiment_id).tags.get("test_evaluations")
            for key in filter(_wanted, run.data.metrics):
                history = client.get_metric_history(job.run_id, key)
                points[key] = {one.step: Point(one.step, one.value, one.timestamp / 1000) for one in history}
        except Exception as error:  # noqa: BLE001 - as in `tracking`: whatever the server does, the run is judged
            log.warning("the report's history is not whole: %s", scrub(" ".join(str(error).split()))[:300])
            missing = "MLflow did not give the whole history when the report was made"
    for line in unsent.metrics(job.folder):
        for key in filter(_wanted, line["metrics"]):
            value = line["metrics"][key]
            points.setdefault(key, {}).setdefault(line["step"], Point(line["step"], value, line["timestamp"] / 1000))
    series = {key: sorted(by_step.values()) for key, by_step in sorted(points.items())}
    spending.gpu_utilization = gpu_utilization(series)
    cost = spending.cost()
    record = RunRecord(
        name=job.config.run.name,
        run_id=None if job.run_id.startswith(PENDING) else job.run_id,
        steps_per_epoch=job.plan.train_steps,
        history={
            key: [[one.step, one.value] for one in line] for key, line in series.items() if key.startswith(_PREFIXES)
        },
        history_missing=missing,
        trained=dict(trained),
        spent={
            **spent(series),
            "node_hours": cost.node_hours,
            "nodes": cost.nodes,
            "wall_s": None if began_s is None else max(0.0, now_s - began_s),
        },
        cost=cost.to_json(),
        origin={
            "commit": job.config.run.commit or tags.get(MLFLOW_GIT_COMMIT, ""),
            "manifest_sha256": manifest.hash,
            "plan_sha256": job.plan.sha256,
            "dataset": storage.shown(manifest.uri),
            "device": "GPU" if job.use_gpu else "CPU",
            "versions": {"python": python_version(), **{name: version(name) for name in _PACKAGES}},
            "weights": storage.shown(job.config.model.weights),
            "config": scrub(config),
        },
        audit=manifest.audit,
        left_out=dict(manifest.counts),
        unreadable=unreadable,
        test_evaluation=_number(tags.get("test_evaluation", "")),
        test_evaluations=_number(counted or ""),
    )
    storage.put_atomic(storage.join(job.folder, KEPT), record.to_json().encode())
    return record


def kept_record(folder: str) -> RunRecord | None:
    """The record that the run in `folder` left; None if it left none, as one that is not finished."""
    where = storage.join(folder, KEPT)
    try:
        return RunRecord.from_json(storage.read_bytes(where), storage.shown(where))
    except FileNotFoundError:
        return None


def spent(series: Mapping[str, Iterable[Point]]) -> dict[str, float | None]:
    """training_s and rank_hours, from a run's metrics; None where nothing tells.

    The time of training steps is images over images a second of each logged interval: pauses between attempts, validation and
    steps done twice are not in it.
    """
    speed = {one.step: one.value for one in series.get("train/images_per_s", [])}
    ranks = {one.step: one.value for one in series.get("train/world_size", [])}
    seconds, rank_seconds, before = 0.0, 0.0, 0.0
    for one in series.get("train/images_seen", []):
        if speed.get(one.step):
            interval = (one.value - before) / speed[one.step]
            seconds += interval
            rank_seconds += interval * ranks.get(one.step, 1.0)
        before = one.value
    return {"training_s": seconds or None, "rank_hours": rank_seconds / 3600 or None}


def gpu_utilization(series: Mapping[str, Iterable[Point]]) -> float | None:
    """Mean part of the time that the nodes' GPUs were computing, 0 to 1, over all samples of all of them; None without any."""
    samples = [one.value for key, line in series.items() if _GPU.fullmatch(key) for one in line]
    return sum(samples) / len(samples) / 100 if samples else None


def _wanted(key: str) -> bool:
    return key.startswith(_PREFIXES) or _GPU.fullmatch(key) is not None


def _number(text: str) -> int | None:
    """The first whole number in a tag."""
    words = [word for word in text.split() if word.isdigit()]
    return int(words[0]) if words else None
