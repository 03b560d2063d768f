"""What becomes of a run whose MLflow server goes away."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.drills.conftest import Drill
from tests.drills.runs import EQUAL, begin, has_logged, is_the_undisturbed_run, steps_logged
from tests.integration.test_tracking_server import Server
from tests.submitting import TRAIN, Submitted, find, run, still_running, wait

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An MLflow server of its own, so that it can be killed."""
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()


def found_report(client: MlflowClient, name: str) -> bool:
    [found] = find(client, name)
    return "classification_report.json" in {file.path for file in client.list_artifacts(found.info.run_id)}


@pytest.mark.drill("MLflow killed in a run, started again before its end", "training unharmed, every step logged once")
@pytest.mark.long
def test_mlflow_gone_for_a_while(drill: Drill, jobs: JobSubmissionClient, server: Server, ingested: dict) -> None:
    name, client = "drill-mlflow-back", MlflowClient(server.uri)
    flags = "--train.epochs 40 --train.patience 0"  # steps are left when the server is there again
    job_id, _ = begin(jobs, client, name, f"{TRAIN} {flags} --run.name {name} --tracking.uri {server.uri}", steps=2)
    drill.hurt()
    server.kill()
    still_running(wait(jobs, job_id, until=lambda: "MLflow does not take metrics" in jobs.get_job_logs(job_id)))
    server.start()
    known = len(steps_logged(client, name))
    still_running(wait(jobs, job_id, until=has_logged(client, name, known + 1)))
    job = wait(jobs, job_id)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    assert job.result["tracking_missed"] == []
    [found] = find(client, name)
    assert found.info.status == "FINISHED"
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))
    assert found_report(client, name)
    drill.outcome = "FINISHED, every step once, the report there"


@pytest.mark.drill(
    "MLflow killed in a run, and away at its end",
    "training unharmed; `jobs/sync.py` sends metrics, report and status later",
)
def test_mlflow_gone_for_good(drill: Drill, jobs: JobSubmissionClient, server: Server, trained: Submitted) -> None:
    name, client = "drill-mlflow-gone", MlflowClient(server.uri)
    job_id, _ = begin(jobs, client, name, f"{TRAIN} --run.name {name} --tracking.uri {server.uri}", steps=2)
    drill.hurt()
    server.kill()
    job = wait(jobs, job_id)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    for key in EQUAL:
        assert job.result[key] == trained.result[key], key
    assert "status FINISHED" in job.result["tracking_missed"]
    server.start()
    [found] = find(client, name)
    assert found.info.status == "RUNNING"
    synced = run(
        jobs, f"python jobs/sync.py --train.storage_path s3://cxr/runs --run.name {name} --tracking.uri {server.uri}"
    )
    assert synced.status == JobStatus.SUCCEEDED, synced.logs[-4000:]
    [found] = find(client, name)
    assert found.info.status == "FINISHED"
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))
    assert found.data.metrics["test/auroc_mean"] == pytest.approx(job.result["test_auroc"]["mean"])
    assert found_report(client, name)
    drill.outcome = "exit code 0, the same weights; after the sync FINISHED, every step once, the report there"


@pytest.mark.long
@pytest.mark.drill(
    "MLflow away when a run begins",
    "refused before it holds a worker; with `tracking.required false` unharmed, and `jobs/sync.py` tells MLflow of all of it",
)
def test_mlflow_away_at_the_start(drill: Drill, jobs: JobSubmissionClient, server: Server, trained: Submitted) -> None:
    name, client = "drill-mlflow-start", MlflowClient(server.uri)
    command = f"{TRAIN} --run.name {name} --tracking.uri {server.uri}"
    drill.hurt()
    server.kill()
    refused = run(jobs, command)
    assert refused.exit_code == 2
    assert f"tracking.uri: no MLflow server answers at {server.uri}" in refused.logs
    job = run(jobs, f"{command} --tracking.required false")
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    for key in EQUAL:
        assert job.result[key] == trained.result[key], key
    server.start()
    sync = f"python jobs/sync.py --train.storage_path s3://cxr/runs --run.name {name} --tracking.uri {server.uri}"
    synced = run(jobs, sync)
    assert synced.status == JobStatus.SUCCEEDED, synced.logs[-4000:]
    is_the_undisturbed_run(job, trained, client, name)
    assert found_report(client, name)
    [found] = find(client, name)
    assert found.data.params["train.global_batch"] == "32"
    drill.outcome = "exit code 2; then exit code 0, and after the sync FINISHED, every step once, the report there"
