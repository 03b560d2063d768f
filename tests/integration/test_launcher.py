"""`ray up`, a job, `ray down`: the repository's cluster file on two machines (namespaces) over real SSH."""

import json
from pathlib import Path

import pytest

from tests import machines

pytestmark = pytest.mark.long


def test_two_machines_are_brought_up_run_a_job_and_are_left_alone_again(tmp_path: Path) -> None:
    if lacking := machines.missing():
        pytest.skip(lacking)
    done = machines.run(tmp_path, ["tests.launched"], timeout_s=550)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    head, worker = outcome["addresses"]["head"], outcome["addresses"]["worker"]
    assert outcome["job"] == {
        head: "head",
        worker: "worker",
    }  # each task on its machine, by Ray's address and by host name
    assert outcome["running"] == ["gcs_server", "raylet", "raylet"]
    assert outcome["left"] == []
