"""A run's record: what it took, from its metrics; its history, from MLflow and from what MLflow has not taken."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.config import Config, CostConfig, RunConfig
from cxr_dist.experiment import PENDING
from cxr_dist.journal import dump
from cxr_dist.spending import Spending
from cxr_dist.train.record import Point, gpu_utilization, kept_record, run_record, spent
from cxr_dist.unsent import FOLDER


def points(values: list[float], times_s: list[float] | None = None) -> list[Point]:
    return [Point(10 * i, value, (times_s or values)[i - 1]) for i, value in enumerate(values, 1)]


def test_what_a_run_took() -> None:
    series = {
        "train/images_seen": points([100.0, 300.0, 500.0]),
        "train/images_per_s": points([50.0, 100.0, 20.0]),
        "train/world_size": points([2.0, 2.0, 1.0]),
    }
    found = spent(series)
    assert found["training_s"] == 100 / 50 + 200 / 100 + 200 / 20
    assert found["rank_hours"] == pytest.approx((2 * 2 + 2 * 2 + 10) / 3600)
    assert spent({}) == {"training_s": None, "rank_hours": None}


def test_how_busy_the_gpus_were_is_the_mean_over_all_samples_of_all_of_them() -> None:
    series = {
        "system/node-a/gpu_0_utilization_percentage": points([100.0, 50.0]),
        "system/node-a/gpu_1_utilization_percentage": points([0.0]),
        "system/b/gpu_10_utilization_percentage": points([30.0]),
        "system/b/gpu_0_memory_usage_percentage": points([7.0]),
        "system/b/gpu_0_power_usage_percentage": points([7.0]),
        "system/b/cpu_utilization_percentage": points([7.0]),
    }
    assert gpu_utilization(series) == pytest.approx((100 + 50 + 0 + 30) / 4 / 100)
    assert gpu_utilization({"system/b/cpu_utilization_percentage": points([7.0])}) is None


def test_mlflow_names_the_use_of_a_gpu_as_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its monitor, with a driver that says two GPUs; without nvidia-ml-py it would log none and say nothing to us."""
    import pynvml  # nvidia-ml-py
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    fake = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=1, total=4),
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=[80, 20][handle]),
        "nvmlDeviceGetPowerUsage": lambda handle: 1000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 2000,
    }
    for name, function in fake.items():
        monkeypatch.setattr(pynvml, name, function)
    monitor = GPUMonitor()
    monitor.collect_metrics()
    series = {f"system/node/{key}": points([value]) for key, value in monitor.aggregate_metrics().items()}
    assert gpu_utilization(series) == pytest.approx(0.5)


def fake_job(folder: Path, uri: str, run_id: str, commit: str = "") -> Any:
    return SimpleNamespace(
        config=Config(run=RunConfig(name="one", commit=commit)),
        folder=str(folder),
        tracking_uri=uri,
        run_id=run_id,
        use_gpu=False,
        plan=SimpleNamespace(train_steps=10, sha256="ee"),
    )


MANIFEST: Any = SimpleNamespace(
    hash="dd", uri="s3://bucket/data", audit={"patients_shared": 0}, counts={"quarantined": 1}
)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


def gathered(job: Any) -> Any:
    nodes = [{"NodeID": "a", "Labels": {"cxr-instance": "g5.2xlarge", "cxr-market": "spot"}}]
    clock = iter((0.0, 1800.0)).__next__
    spending = Spending(CostConfig(), nodes=lambda: nodes, clock=clock)
    spending.look()
    return run_record(
        job,
        MANIFEST,
        {"epochs": 1},
        config="run:\n  name: one\n",
        unreadable=2,
        now_s=2_000_000_000.0,
        spending=spending,
    )


def test_the_history_is_what_mlflow_has_and_what_it_has_not_taken_yet(store: str, tmp_path: Path) -> None:
    client = MlflowClient(store)
    run_id = client.create_run(
        "0", tags={"test_evaluation": "number 2 of this experiment", "mlflow.source.git.commit": "cc"}
    ).info.run_id
    client.set_experiment_tag("0", "test_evaluations", "3")
    for step, value in ((10, 0.5), (20, 0.25)):
        client.log_metric(run_id, "train/loss", value, step=step)
    client.log_metric(run_id, "test/auroc_mean", 0.7, step=20)
    client.log_metric(run_id, "system/a/gpu_0_utilization_percentage", 75.0, step=0)
    late = [{"step": 20, "timestamp": 1, "metrics": {"train/loss": 9.0}}]  # MLflow has it, and is right
    late += [{"step": 30, "timestamp": 1, "metrics": {"train/loss": 0.125, "val/loss": 0.75}}]
    storage.put_atomic(f"{tmp_path}/run/{FOLDER}/metrics-1.jsonl", dump(run_id, late))
    record = gathered(fake_job(tmp_path / "run", store, run_id))
    assert record.history == {"train/loss": [[10, 0.5], [20, 0.25], [30, 0.125]], "val/loss": [[30, 0.75]]}
    assert (record.test_evaluation, record.test_evaluations) == (2, 3)
    assert (record.origin["commit"], record.run_id, record.history_missing) == ("cc", run_id, "")
    assert record.spent["wall_s"] > 0
    assert (record.spent["node_hours"], record.spent["nodes"]) == (0.5, 1)
    assert record.cost is not None
    assert (record.cost["amount"], record.cost["at_most"]) == (None, pytest.approx(0.606))
    assert (record.cost["gpu_utilization"], record.cost["node_hours"]) == (0.75, 0.5)
    assert kept_record(str(tmp_path / "run")) == record
    assert kept_record(str(tmp_path / "other")) is None
    given = gathered(fake_job(tmp_path / "run", store, run_id, commit="ff"))
    assert given.origin["commit"] == "ff"


@pytest.mark.parametrize("run_id", ["unknown", f"{PENDING}1"])
def test_a_server_that_does_not_tell_costs_no_report(run_id: str, store: str, tmp_path: Path) -> None:
    MlflowClient(store).search_experiments()
    line = {"step": 10, "timestamp": 1, "metrics": {"train/loss": 1.0, "system/a/x": 1.0}}
    storage.put_atomic(f"{tmp_path}/run/{FOLDER}/metrics-1.jsonl", dump(run_id, [line]))
    record = gathered(fake_job(tmp_path / "run", store, run_id))
    assert "MLflow" in record.history_missing
    assert record.history == {"train/loss": [[10, 1.0]]}
    assert (record.test_evaluation, record.test_evaluations, record.spent["wall_s"]) == (None, None, None)
    assert record.origin["commit"] == ""
    assert json.loads(record.to_json())["history"] == record.history
