"""The job as users run it: `ray job submit` on real servers, out of S3 into MLflow on Postgres.

Real radiographs where they are present, drawn ones in a clone without them. One release is ingested and one run is
trained for all tests of this file; what is asserted comes from the MLflow server and the object store.
"""

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist import storage
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.synth import write_release
from cxr_dist.evaluate import scores
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

EPOCHS = 4
TRAIN = (
    "python jobs/train.py --config jobs/configs/nih14.yaml --data.uri s3://cxr/nih --data.size 64"
    " --model.weights random --model.bn_group 8 --model.prefix_chunk 8"
    " --train.use_gpu no --train.num_workers 2 --train.cpus_per_worker 0.5 --train.global_batch 32 --train.log_every_steps 1"
    " --train.features off"  # what auto finds faster may change from run to run on a machine that does other things too
    f" --train.epochs {EPOCHS} --train.storage_path s3://cxr/runs --evaluate.bootstrap 50"
)
ARTIFACTS = {
    "roc_curves.png",
    "pr_curves.png",
    "classification_report.json",
    "classification_report.md",
    "auroc.csv",
    "thresholds.json",
    "curves.csv",
    "config.yaml",
    "scores.parquet",
    "split_audit.json",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Submitted:
    """A finished job, and the JSON object on the last line that it printed."""

    status: JobStatus
    exit_code: int | None
    logs: str

    @property
    def result(self) -> dict:
        return json.loads(self.logs.splitlines()[-1])


@pytest.fixture(scope="module")
def jobs(full_stack) -> JobSubmissionClient:
    return JobSubmissionClient(full_stack.addresses["ray"])


def submit(jobs: JobSubmissionClient, command: str) -> str:
    """Submit as the README says, with the project's own runtime environment."""
    import yaml

    runtime_env = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text()) | {"working_dir": str(ROOT)}
    return jobs.submit_job(entrypoint=command, runtime_env=runtime_env)


def wait(jobs: JobSubmissionClient, job_id: str, until=None, deadline_s: float = 400) -> Submitted:
    """Wait until the job has ended, or `until()` is true."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        status = jobs.get_job_status(job_id)
        if status.is_terminal() or (until is not None and until()):
            return Submitted(status, jobs.get_job_info(job_id).driver_exit_code, jobs.get_job_logs(job_id))
        time.sleep(0.5)
    pytest.fail(f"job {job_id} did not end in {deadline_s} s:\n{jobs.get_job_logs(job_id)[-4000:]}")


def still_running(job: Submitted) -> Submitted:
    """The job, which has epochs left for what the test is going to do to it."""
    assert job.status == JobStatus.RUNNING, f"the run ended before it could be hurt; raise EPOCHS: {job.logs[-2000:]}"
    return job


def run(jobs: JobSubmissionClient, command: str) -> Submitted:
    return wait(jobs, submit(jobs, command))


@pytest.fixture(scope="module")
def client(full_stack) -> MlflowClient:
    return MlflowClient(full_stack.env["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="module")
def train(full_stack) -> str:
    return f"{TRAIN} --tracking.uri {full_stack.env['MLFLOW_TRACKING_URI']}"


@pytest.fixture(scope="module")
def release(tmp_path_factory, request) -> str:
    """Flags of ingest for 177 real radiographs, or as many drawn ones."""
    try:
        real: Path = request.getfixturevalue("real_data")
    except pytest.skip.Exception:
        folder = tmp_path_factory.mktemp("release") / "nih"
        write_release(folder, num_patients=80, seed=0, size=256)
        return f"--data.release {folder}"
    return (
        f"--data.release {real}/nih_sample --data.labels {real}/Data_Entry_2017_v2020.csv.gz"
        f" --data.train_val_list {real}/train_val_list.txt --data.test_list {real}/test_list.txt"
    )


@pytest.fixture(scope="module")
def ingested(jobs, release) -> dict:
    job = run(jobs, f"python jobs/ingest.py {release} --data.uri s3://cxr/nih --data.size 64")
    assert job.status == JobStatus.SUCCEEDED, job.logs
    return job.result


@pytest.fixture(scope="module")
def trained(jobs, train, ingested) -> Submitted:
    return run(jobs, f"{train} --run.name straight --run.commit {COMMIT}")


@pytest.fixture(scope="module")
def manifest(ingested, full_stack) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in full_stack.env.items():
            patch.setenv(name, value)
        loaded = Manifest.load("s3://cxr/nih")
        yield loaded


def find(client: MlflowClient, name: str) -> list[Run]:
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids, f"attributes.run_name = '{name}'")


def test_a_submitted_run_ends_with_everything_in_mlflow(trained, client, manifest):
    assert trained.status == JobStatus.SUCCEEDED, trained.logs[-6000:]
    result = trained.result
    [found] = find(client, "straight")
    assert found.info.run_id == result["run_id"]
    assert found.info.status == "FINISHED" == result["status"]

    assert {file.path for file in client.list_artifacts(found.info.run_id)} >= ARTIFACTS
    assert found.data.tags["manifest_sha256"] == manifest.hash
    assert found.data.params["train.global_batch"] == "32"
    assert found.inputs.dataset_inputs[0].dataset.digest == manifest.hash[:36]

    steps = manifest.splits["train"].num_rows // 32
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, EPOCHS * steps + 1))
    assert np.isfinite([point.value for point in history]).all()
    validated = client.get_metric_history(found.info.run_id, "val/auroc_mean")
    assert [point.step for point in validated] == [steps * (epoch + 1) for epoch in range(EPOCHS)]
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == [
        point.step for point in validated
    ]
    assert {"train/images_per_s", "train/data_wait_fraction", "train/lr"} <= set(found.data.metrics)
    assert {"train/head_of_line_s", "train/rank_skew_fraction"} <= set(found.data.metrics)
    assert 0 < found.data.metrics["train/read_mb"] <= result["read_mb"]  # validation ends the run, after the last steps
    assert any(name.startswith("system/node0") for name in found.data.metrics)
    assert found.data.tags["mlflow.source.git.commit"] == COMMIT
    assert found.data.tags["test_evaluation"] == "number 1 of this experiment"
    for finding, value in result["test_auroc"].items():
        name = "test/auroc_mean" if finding == "mean" else f"test/auroc/{finding}"
        assert found.data.metrics.get(name) == pytest.approx(value)

    rows = {name: split.num_rows for name, split in manifest.splits.items()}
    assert result["n_scored"] == {"val": rows["validation"], "test": rows["test"]}
    assert found.data.metrics["val/n_scored"] == rows["validation"]
    assert found.data.metrics["test/n_scored"] == rows["test"]


def test_the_logged_scores_are_every_test_row_and_give_the_logged_auroc(trained, client, manifest, tmp_path):
    from sklearn.metrics import roc_auc_score

    path = mlflow.artifacts.download_artifacts(
        run_id=trained.result["run_id"],
        artifact_path="scores.parquet",
        dst_path=str(tmp_path),
        tracking_uri=client.tracking_uri,
    )
    table = scores.read(path)
    assert sorted(table.image_ids) == sorted(manifest.rows("test")["image_id"].to_pylist())
    for k, finding in enumerate(table.findings):
        found = trained.result["test_auroc"][finding]
        if found is not None:
            assert found == pytest.approx(roc_auc_score(table.labels_NK[:, k], table.logits_NK[:, k]), abs=1e-12)


def test_a_stopped_job_is_killed_in_mlflow_and_goes_on_to_the_same_result(jobs, train, client, trained):
    job_id = submit(jobs, f"{train} --run.name stopped")

    def first_epoch_is_over() -> bool:
        return any("val/loss" in found.data.metrics for found in find(client, "stopped"))

    still_running(wait(jobs, job_id, until=first_epoch_is_over))
    jobs.stop_job(job_id)
    assert wait(jobs, job_id).status == JobStatus.STOPPED
    [found] = find(client, "stopped")
    assert found.info.status == "KILLED"

    resumed = run(jobs, f"{train} --run.name stopped")
    assert resumed.status == JobStatus.SUCCEEDED, resumed.logs[-6000:]
    assert "resumed from step" in resumed.logs
    [found] = find(client, "stopped")
    assert found.info.status == "FINISHED"
    for key in ("samples_sha256", "weights_sha256", "test_auroc", "best_val_auroc"):
        assert resumed.result[key] == trained.result[key], key
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == [
        point.step for point in client.get_metric_history(trained.result["run_id"], "train/loss")
    ]


def test_a_killed_worker_costs_no_sample_and_no_step(jobs, train, client, trained):
    job_id = submit(jobs, f"{train} --run.name killed")

    def first_epoch_is_over() -> bool:
        return any("val/loss" in found.data.metrics for found in find(client, "killed"))

    running = still_running(wait(jobs, job_id, until=first_epoch_is_over))
    workers = re.findall(r"RayTrainWorker pid=(\d+)", running.logs)
    os.kill(int(workers[-1]), signal.SIGKILL)
    job = wait(jobs, job_id)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    assert "resumed from step" in job.logs
    for key in ("samples_sha256", "weights_sha256", "test_auroc"):
        assert job.result[key] == trained.result[key], key
    [found] = find(client, "killed")
    assert found.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")]
    assert steps == list(range(1, job.result["steps"] + 1))


def test_runs_from_features_are_the_run_without_and_share_what_is_whole(jobs, train, client, manifest):
    flags = f"{train} --train.epochs 2 --train.views 1 --evaluate.test false --train.features_type fp32"
    plain = run(jobs, f"{flags} --train.features off --run.name features-off")
    kept = run(jobs, f"{flags} --train.features on --run.name features-on")
    rows = {name: split.num_rows for name, split in manifest.splits.items()}
    assert kept.status == JobStatus.SUCCEEDED, kept.logs[-6000:]
    assert kept.result["features"]["computed"] == rows["train"] + rows["validation"]
    assert "object store" in kept.logs
    [found] = find(client, "features-on")
    assert found.data.tags["features"] == "kept: train.features is on"

    where = f"s3://cxr/runs/features/{kept.result['features']['keys']['train/1']}/00000.parquet"
    data = bytearray(storage.read_bytes(where))
    data[len(data) // 2] ^= 1
    storage.put_atomic(where, bytes(data))
    again = run(jobs, f"{flags} --train.features on --run.name features-again")
    assert again.status == JobStatus.SUCCEEDED, again.logs[-6000:]
    assert "00000.parquet: found another SHA-256 than the index has" in again.logs
    assert again.result["features"]["computed"] == rows["train"]
    for key in ("samples_sha256", "weights_sha256", "best_val_auroc"):
        assert kept.result[key] == plain.result[key] == again.result[key], key


def test_a_run_that_fails_is_failed_in_mlflow(jobs, train, client, ingested):
    job = run(jobs, f"{train} --run.name diverges --optimizer.lr 1e30 --optimizer.warmup_epochs 0")
    assert job.status == JobStatus.FAILED
    assert "at step" in job.logs
    assert ".png" in job.logs.partition("loss became")[2]
    [found] = find(client, "diverges")
    assert found.info.status == "FAILED"
    assert "loss became" in found.data.tags["failure"]


def test_evaluate_judges_a_checkpoint_as_the_run_did(jobs, trained):
    job = run(
        jobs,
        f"python jobs/evaluate.py --checkpoint {trained.result['checkpoint']} --split test --data.uri s3://cxr/nih"
        " --data.size 64 --train.cpus_per_worker 0.5 --evaluate.bootstrap 0",
    )
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    assert job.result["auroc"] == trained.result["test_auroc"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data.uri s3://cxr/nothing", "found nothing under s3://cxr/nothing"),
        ("--data.uri s3://no-such-bucket/nih", "bucket"),
        ("--tracking.uri http://127.0.0.1:9", "no MLflow server answers"),
        ("--train.cpus_per_worker 2", "leave 0 for decoding"),
        ("--train.use_gpu yes", "the cluster has 0 GPUs"),
        ("--train.global_batch 36", "multiple of"),
    ],
)
def test_what_cannot_work_is_said_before_training(jobs, train, client, ingested, flags, sentence):
    before = len(find(client, "refused"))
    job = run(jobs, f"{train} --run.name refused {flags}")
    assert job.status == JobStatus.FAILED
    error = [line for line in job.logs.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert job.exit_code == 2
    assert len(find(client, "refused")) == before
