"""Real servers for the integration tests, started once in a session from pip packages on free ports."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # infra is no part of the installed package

from infra.local.stack import Stack, start


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
