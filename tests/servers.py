"""Real servers for the integration tests, started once in a session from pip packages on free ports."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # infra is no part of the installed package

from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist.data.synth import write_release
from infra.local.stack import Stack, start
from tests.submitting import COMMIT, SHORT, TRAIN, Submitted, run, submit, wait


@pytest.fixture(scope="session")
def s3_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An S3 server alone, with the buckets `cxr` and `mlflow`."""
    stack = start(tmp_path_factory.mktemp("s3"), ["s3"])
    yield stack
    stack.purge()


@pytest.fixture(scope="session")
def full_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """S3, Postgres, MLflow and a Ray head with 4 logical CPUs; give `full_stack.env` to the programs a test starts."""
    stack = start(tmp_path_factory.mktemp("full"), num_cpus=4)
    yield stack
    stack.purge()


@pytest.fixture(scope="session")
def s3_env(s3_stack: Stack) -> Iterator[dict[str, str]]:
    """The S3 server's settings in this process's environment, until the session ends."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in s3_stack.env.items():
            patch.setenv(name, value)
        yield s3_stack.env


@pytest.fixture(scope="session")
def jobs(full_stack) -> JobSubmissionClient:
    return JobSubmissionClient(full_stack.addresses["ray"])


@pytest.fixture(scope="session")
def client(full_stack) -> MlflowClient:
    return MlflowClient(full_stack.env["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="session")
def train(full_stack) -> str:
    return f"{TRAIN} --tracking.uri {full_stack.env['MLFLOW_TRACKING_URI']}"


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def ingested(jobs, release) -> dict:
    job = run(jobs, f"python jobs/ingest.py {release} --data.uri s3://cxr/nih --data.size 64")
    assert job.status == JobStatus.SUCCEEDED, job.logs
    return job.result


@pytest.fixture(scope="session")
def trained(jobs, train, ingested) -> Submitted:
    """A run that nothing disturbs."""
    flags = f"--evaluate.saliency 3 --tracking.log_model true --run.name straight --run.commit {COMMIT}"
    return run(jobs, f"{train} {flags}")


@pytest.fixture(scope="session")
def second_id(jobs, train, ingested) -> str:
    """Job of a shorter run of the same data, without features, test or heat maps; it goes on beside whatever comes next."""
    flags = "--evaluate.test false --train.features off --run.name features-off"
    return submit(jobs, f"{SHORT.format(train=train)} {flags}")


@pytest.fixture(scope="session")
def second(jobs, second_id) -> Submitted:
    """That run, ended."""
    return wait(jobs, second_id)
