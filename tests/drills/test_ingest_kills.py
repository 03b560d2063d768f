"""What becomes of an ingest that is killed again and again."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cxr_dist.data.synth import write_release
from tests.conftest import ROOT
from tests.drills.conftest import Drill
from tests.integration.test_ingest import contents

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

KILLS = 20


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a Ray with two CPUs, which outlives the drivers that are killed."""
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def start(cluster: str, release: Path, uri: Path) -> subprocess.Popen[str]:
    """The ingest of a release, in a process of its own."""
    flags = {"data.release": release, "data.uri": uri, "data.size": 224, "data.shard_mb": 1, "data.row_group": 4}
    command = [sys.executable, "jobs/ingest.py", *(f"--{key}={value}" for key, value in flags.items())]
    env = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.drill(f"ingest killed (SIGKILL) at {KILLS} random moments", "the same command ends with the same bytes")
def test_ingest_killed(drill: Drill, cluster: str, tmp_path: Path) -> None:
    release, whole = tmp_path / "nih", tmp_path / "whole"
    write_release(release, num_patients=150, seed=0, size=512)
    began = time.monotonic()
    first = start(cluster, release, whole)
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 0, said[-3000:]
    took = time.monotonic() - began
    drawn, kills, uri = random.Random(), 0, tmp_path / "killed-0"
    datasets = [uri]
    drill.hurt()
    while kills < KILLS:
        job = start(cluster, release, uri)
        try:
            job.communicate(timeout=drawn.uniform(0.1 * took, took))
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
            kills += 1
            continue
        assert job.returncode == 0
        uri = tmp_path / f"killed-{len(datasets)}"
        datasets.append(uri)
    for uri in datasets:
        last = start(cluster, release, uri)
        said = last.communicate(timeout=300)[0]
        assert last.returncode == 0, said[-3000:]
        assert contents(uri) == contents(whole)
    drill.outcome = f"the same bytes; {kills} kills of {len(datasets)} ingests"
