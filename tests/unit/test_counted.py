"""Test evaluations after a run's own are counted where the run is, or it is said why not."""

import json
from pathlib import Path

from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.evaluate.counted import count_again
from cxr_dist.experiment import create_run


def test_an_evaluation_is_counted_in_the_experiment_of_the_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = create_run(client, uri, "ours", "first")
    client.set_tag(run_id, "test_evaluation", "number 1 of this experiment")
    client.set_experiment_tag(client.get_run(run_id).info.experiment_id, "test_evaluations", "1")
    folder = str(tmp_path / "first")
    storage.put_atomic(f"{folder}/run.json", json.dumps({"format": 1, "run_id": run_id}).encode())
    assert count_again(folder, uri) == (2, "")
    assert count_again(folder, uri) == (3, "")
    tags = client.get_run(run_id).data.tags
    assert tags["test_evaluation"] == "number 1 of this experiment", "the run's own stays what it was"
    assert tags["test_evaluation_again"] == "number 3 of this experiment"


def test_what_cannot_be_counted_is_said_and_makes_no_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = str(tmp_path / "first")
    assert count_again(folder, uri) == (None, "the checkpoint has no run.json beside it that names its MLflow run")
    storage.put_atomic(f"{folder}/run.json", json.dumps({"format": 1, "run_id": "abc"}).encode())
    assert "there is no MLflow database" in count_again(folder, uri)[1]
    assert not (tmp_path / "mlflow.db").exists()
    assert "no MLflow server answers" in count_again(folder, "http://127.0.0.1:9")[1]
    create_run(MlflowClient(uri), uri, "ours", "other")
    number, why = count_again(folder, uri)
    assert number is None
    assert "abc" in why
    storage.put_atomic(f"{folder}/run.json", json.dumps({"format": 1, "run_id": "pending-1"}).encode())
    assert "jobs/sync.py" in count_again(folder, uri)[1]
    storage.put_atomic(f"{folder}/run.json", json.dumps({"format": 9}).encode())
    assert "found format 9" in count_again(folder, uri)[1]
