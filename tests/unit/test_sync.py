"""What `jobs/sync.py` makes of runs that could not say how they ended."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cxr_dist import storage, unsent
from cxr_dist.environment import SETTINGS
from cxr_dist.errors import InputError
from cxr_dist.experiment import PENDING
from cxr_dist.journal import MetricJournal
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.lease import Claim, Lease
from cxr_dist.train.outcome import Outcome
from cxr_dist.train.sync import runs_under, sync_run

GONE = Claim(number=3, token="b" * 12, owner="bob@there, process 9", machine="", pid=9, beat=1, time=time.time() - 7200)
"""Of two hours before these tests were collected."""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is given up soon, as in every job."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return client.create_run(client.create_experiment("synced")).info.run_id


@pytest.fixture
def folder(tmp_path: Path, run_id: str) -> str:
    """The folder of a run whose driver is gone."""
    where = tmp_path / "runs" / "demo"
    storage.put_atomic(str(where / "run.json"), json.dumps({"format": 1, "run_id": run_id}).encode())
    Lease(str(where), GONE)._write()
    return str(where)


def steps(client: MlflowClient, run_id: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, "loss"))


def test_a_driver_that_vanished_has_failed(folder: str, store: str, client: MlflowClient, run_id: str) -> None:
    assert sync_run(folder, store) == {"run_id": run_id, "status": "FAILED", "driver": None, "sent": 0}
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert re.fullmatch(
        r"the driver was lost \(bob@there, process 9; its last sign of life was 1\d\d minutes ago\); run the same command "
        "again to go on from the last checkpoint",
        run.data.tags["failure"],
    )


def test_an_end_that_the_server_did_not_hear_of_is_told_to_it(
    folder: str, store: str, client: MlflowClient, run_id: str
) -> None:
    Outcome(owner=2, status="FAILED", failure="an earlier owner's").write(folder)
    Outcome(owner=3, status="FINISHED").write(folder)
    assert sync_run(folder, store)["status"] == "FINISHED"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_a_failure_comes_with_its_reason(folder: str, store: str, client: MlflowClient, run_id: str) -> None:
    Outcome(owner=3, status="FAILED", failure="loss became nan").write(folder)
    assert sync_run(folder, store)["status"] == "FAILED"
    assert client.get_run(run_id).data.tags["failure"] == "loss became nan"


def test_what_mlflow_knows_stays(folder: str, store: str, client: MlflowClient, run_id: str) -> None:
    client.set_terminated(run_id, "KILLED")
    assert sync_run(folder, store)["status"] == "KILLED"
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_living_driver_is_left_alone(folder: str, store: str, client: MlflowClient, run_id: str) -> None:
    alive = dataclasses.replace(GONE, number=4, time=time.time())
    Lease(folder, alive)._write()

    def pause(seconds: float) -> None:
        Lease(folder, dataclasses.replace(alive, beat=2))._write()

    found = sync_run(folder, store, pause=pause)
    assert found == {"run_id": run_id, "status": "RUNNING", "driver": alive.owner, "sent": 0}
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_driver_that_begins_meanwhile_is_left_alone(
    folder: str, store: str, client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begins(*args: object) -> int:
        Lease(folder, dataclasses.replace(GONE, number=4, time=time.time()))._write()
        return 0

    monkeypatch.setattr(unsent, "send", begins)
    assert sync_run(folder, store)["status"] == "RUNNING"
    assert client.get_run(run_id).info.status == "RUNNING"


def test_metrics_that_were_kept_or_carried_are_sent_once(
    folder: str, store: str, client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    dead = "http://127.0.0.1:9"
    kept, carried = (MetricJournal(tmp_path / f"{name}.jsonl", dead, run_id) for name in ("kept", "carried"))
    for step in range(3):
        kept.log({"loss": 1.0}, step=step)
    for step in range(2, 6):
        carried.log({"loss": 1.0}, step=step)
    assert unsent.close(kept, folder, timeout_s=1) == 3
    state = {"journal": carried.unsent_records()}
    carried.close(1)
    Checkpoints(folder, owner=3).save(state, index=5, epoch=0, score=None, finished=False)
    assert sync_run(folder, store)["sent"] == 6
    assert steps(client, run_id) == [0, 1, 2, 3, 4, 5]
    assert storage.list_files(f"{folder}/unsent") == []
    assert sync_run(folder, store)["sent"] == 0


def test_a_server_that_is_away_loses_nothing(folder: str, run_id: str, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"
    journal = MetricJournal(tmp_path / "kept.jsonl", dead, run_id)
    journal.log({"loss": 1.0}, step=1)
    unsent.close(journal, folder, timeout_s=1)
    with pytest.raises(InputError, match=r"MLflow at http://127\.0\.0\.1:9 does not take run"):
        sync_run(folder, dead)
    assert len(storage.list_files(f"{folder}/unsent")) == 1


def test_a_run_that_began_without_mlflow_gets_its_run(
    folder: str, store: str, client: MlflowClient, tmp_path: Path
) -> None:
    content = {"format": 1, "run_id": f"{PENDING}1", "config": {"tracking.experiment": "synced", "run.name": "demo"}}
    storage.put_atomic(f"{folder}/run.json", json.dumps(content).encode())
    Outcome(owner=3, status="FINISHED").write(folder)
    journal = MetricJournal(tmp_path / "kept.jsonl", "http://127.0.0.1:9", f"{PENDING}1")
    journal.log({"loss": 1.0}, step=1)
    unsent.close(journal, folder, timeout_s=1)
    found = sync_run(folder, store)
    assert (found["status"], found["sent"]) == ("FINISHED", 1)
    run = client.get_run(found["run_id"])
    assert (run.info.run_name, run.info.status, steps(client, found["run_id"])) == ("demo", "FINISHED", [1])
    assert json.loads(storage.read_bytes(f"{folder}/run.json")) == content | {"run_id": found["run_id"]}
    assert sync_run(folder, store)["run_id"] == found["run_id"]


def test_runs_are_found_by_their_files(folder: str, tmp_path: Path, store: str) -> None:
    storage.put_atomic(str(tmp_path / "runs" / "features" / "x" / "run.json"), b"{}")
    assert runs_under(str(tmp_path / "runs")) == ["demo"]
    with pytest.raises(InputError, match=r"features: found no run\.json, expected the folder of a run"):
        sync_run(str(tmp_path / "runs" / "features"), store)
