"""Jobs submitted to a Ray head as users do it, and what came of them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.conftest import ROOT

EPOCHS = 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAIN = (
    "python jobs/train.py --config jobs/configs/nih14.yaml --data.uri s3://cxr/nih --data.size 64"
    " --model.weights random --model.bn_group 8 --model.prefix_chunk 8"
    " --train.use_gpu no --train.num_workers 2 --train.cpus_per_worker 0.5 --train.global_batch 32 --train.log_every_steps 1"
    " --train.features off"  # what auto finds faster may change from run to run on a machine that does other things too
    f" --train.epochs {EPOCHS} --train.storage_path s3://cxr/runs --evaluate.bootstrap 50 --evaluate.saliency 0"
    " --tracking.log_model false"
)
SHORT = "{train} --train.epochs 2 --train.views 1 --train.features_type fp32"


@dataclass
class Submitted:
    """A finished job, and the JSON object on the last line that it printed."""

    status: JobStatus
    exit_code: int | None
    logs: str

    @property
    def result(self) -> dict:
        return json.loads(self.logs.splitlines()[-1])


def submit(jobs: JobSubmissionClient, command: str, env: dict[str, str] | None = None, *, code: Path = ROOT) -> str:
    """Submit as the README says, with the project's own runtime environment, and variables of its processes; `code` is the
    folder that travels."""
    runtime_env = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text()) | {"working_dir": str(code)}
    if env:
        runtime_env["env_vars"] = env
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


def run(jobs: JobSubmissionClient, command: str, env: dict[str, str] | None = None) -> Submitted:
    return wait(jobs, submit(jobs, command, env))


def find(client: MlflowClient, name: str) -> list[Run]:
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids, f"attributes.run_name = '{name}'")
