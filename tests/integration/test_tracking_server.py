"""Runs and journals against a real MLflow server, which is killed and started again."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cxr_dist.config import Config, RunConfig, TrackingConfig
from cxr_dist.environment import SETTINGS as CLIENT_ENVIRONMENT
from cxr_dist.journal import MetricJournal, send_unsent
from cxr_dist.preflight import check_tracking
from cxr_dist.system_metrics import start_system_metrics
from cxr_dist.tracking import open_run

DRIVER = """
import os, signal, sys
from cxr_dist.config import Config, RunConfig, TrackingConfig
from cxr_dist.tracking import open_run

uri, folder, end = sys.argv[1:]
config = Config(tracking=TrackingConfig(uri=uri, experiment="drivers"), run=RunConfig(name=end))
with open_run(config, run_id=None, params={"end": end}, tags={}, storage_dir=folder) as run:
    run.log_metrics({"loss": 0.5}, step=7)
    print(run.run_id, flush=True)
    if end == "raise":
        raise ValueError("no luck")
    if end == "exit":
        sys.exit(5)
    if end == "wait":
        sys.stdin.readline()
"""


class Server:
    """An MLflow server on SQLite that keeps its port and its database when it is killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | CLIENT_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Uvicorn running on" in line:
                return
        pytest.fail("the server ended: " + "".join(said[-20:]))

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(module_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, running."""
    for name, value in CLIENT_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if module_server.process is None:
        module_server.start()
    return module_server


@pytest.fixture
def run_id(server: Server) -> str:
    return MlflowClient(server.uri).create_run("0").info.run_id


def _config(server: Server) -> Config:
    return Config(tracking=TrackingConfig(uri=server.uri, experiment="inside"), run=RunConfig(name="one"))


def _losses(server: Server, run_id: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(server.uri).get_metric_history(run_id, "loss")]


def _start_driver(server: Server, folder: Path, end: str) -> tuple[subprocess.Popen[str], str]:
    """A driver process and the id of its run, which is open."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, server.uri, str(folder), end],
        env=CLIENT_ENVIRONMENT | os.environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    return driver, driver.stdout.readline().strip()


@pytest.mark.parametrize(
    ("end", "code", "status", "failure"),
    [("return", 0, "FINISHED", None), ("raise", 1, "FAILED", "no luck"), ("exit", 5, "KILLED", None)],
)
def test_driver_leaves_the_right_status(
    server: Server, tmp_path: Path, end: str, code: int, status: str, failure: str | None
) -> None:
    driver, run_id = _start_driver(server, tmp_path, end)
    driver.communicate(timeout=120)
    run = MlflowClient(server.uri).get_run(run_id)
    assert (driver.returncode, run.info.status, run.info.run_name) == (code, status, end)
    assert run.data.params == {"end": end}
    assert run.data.tags.get("failure") == failure
    assert _losses(server, run_id) == [(7, 0.5)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_stopped_driver_is_killed(server: Server, tmp_path: Path, number: signal.Signals, code: int) -> None:
    driver, run_id = _start_driver(server, tmp_path, "wait")
    driver.send_signal(number)
    driver.communicate(timeout=120)
    assert driver.returncode == code
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.end_time is not None


def test_driver_ends_as_it_would_when_the_server_is_gone(server: Server, tmp_path: Path) -> None:
    driver, run_id = _start_driver(server, tmp_path, "wait")
    server.kill()
    _, said = driver.communicate("go on\n", timeout=120)
    assert driver.returncode == 0
    assert f"MLflow run {run_id} lacks status FINISHED" in said


def test_an_outage_loses_no_metric_and_doubles_none(server: Server, tmp_path: Path, run_id: str) -> None:
    (tmp_path / "report.md").write_text("# AUROC\n")
    left_open = MetricJournal(tmp_path / "rank0.jsonl", server.uri, run_id, retry_s=0.1)
    closed_path = tmp_path / "rank0-closed.jsonl"
    other_id = MlflowClient(server.uri).create_run("0").info.run_id
    closed = MetricJournal(closed_path, server.uri, other_id, retry_s=0.1)
    for step in range(50):
        left_open.log({"loss": 1 / (step + 1)}, step=step)
        closed.log({"loss": 1 / (step + 1)}, step=step)
    assert left_open.flush(60) == closed.flush(60) == 0
    with open_run(_config(server), run_id=None, params={}, tags={}, storage_dir=str(tmp_path)) as run:
        server.kill()
        for step in range(50, 100):
            left_open.log({"loss": 1 / (step + 1)}, step=step)
            closed.log({"loss": 1 / (step + 1)}, step=step)
        assert closed.close(30) == 50
        run.log_params({"late": 1})
        run.log_metrics({"loss": 0.25}, step=1)
        run.log_artifact(tmp_path / "report.md")
    assert run.missed[0].startswith("metrics in ")
    assert run.missed[1:] == ["params", f"artifact {tmp_path}/report.md", "status FINISHED"]
    assert left_open.flush(0) == 50

    server.start()
    assert left_open.flush(120) == left_open.close() == 0
    assert _losses(server, run_id) == [(step, 1 / (step + 1)) for step in range(100)]
    assert send_unsent(closed_path, server.uri, other_id) == 50
    assert send_unsent(closed_path, server.uri, other_id) == 0
    assert _losses(server, other_id) == [(step, 1 / (step + 1)) for step in range(100)]
    with open_run(_config(server), run_id=run.run_id, params={}, tags={}, storage_dir=str(tmp_path)) as again:
        again.log_artifact(tmp_path / "report.md")
        again.log_metrics({"loss": 0.125}, step=2)
    assert again.missed == []
    client = MlflowClient(server.uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [entry.path for entry in client.list_artifacts(run.run_id)] == ["report.md"]
    assert _losses(server, run.run_id) == [(1, 0.25), (2, 0.125)]


def test_system_metrics_carry_the_node(server: Server, run_id: str) -> None:
    client = MlflowClient(server.uri)
    sampling = start_system_metrics(server.uri, run_id, "node-a", interval_s=0.1)
    key = "system/node-a/cpu_utilization_percentage"
    while key not in client.get_run(run_id).data.metrics:
        assert sampling.alive
    sampling.stop()
    assert not sampling.alive


def test_preflight_accepts_a_running_server(server: Server) -> None:
    check_tracking(_config(server))
