"""Fixtures for every test: where the real data lies, and an environment that cannot touch a user's own Ray or MLflow."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers"]

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "no clock", deadline=None
)  # by default an example that takes 0.2 s fails: on a busy machine any
settings.load_profile("no clock")

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real NIH data; the test is skipped where it is not present."""
    folder = Path(os.environ.get("CXR_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real NIH data not found at {folder}; set CXR_REAL_DATA")
    return folder
