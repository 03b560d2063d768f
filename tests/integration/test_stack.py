"""The local stack: its servers do their work, and all of it is gone afterwards."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from pyarrow import fs

from infra.local import parts
from infra.local.processes import Process, is_free
from infra.local.stack import DEFAULT_PORTS, PARTS, Stack, StackError, load, start

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = start(tmp_path_factory.mktemp("stack"), num_cpus=2)
    yield stack
    stack.purge()


@pytest.fixture
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)


def client(stack: Stack) -> Any:
    env = stack.env
    return boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        region_name=env["AWS_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.mark.usefixtures("environment")
def test_s3_gives_back_what_pyarrow_uploads_in_parts(stack: Stack) -> None:
    body = random.Random(0).randbytes(20 * MB)
    store, path = fs.FileSystem.from_uri("s3://cxr/test/large")
    with store.open_output_stream(path) as stream:
        for begin in range(0, len(body), MB):
            stream.write(body[begin : begin + MB])
    with store.open_input_file(path) as file:
        assert file.size() == len(body)
        assert file.read() == body
    assert client(stack).get_object(Bucket="cxr", Key="test/large")["Body"].read() == body


@pytest.mark.usefixtures("environment")
def test_s3_gives_back_what_boto3_uploads(stack: Stack) -> None:
    body = random.Random(1).randbytes(20 * MB)
    client(stack).put_object(Bucket="cxr", Key="test/boto", Body=body)
    store, path = fs.FileSystem.from_uri("s3://cxr/test/boto")
    with store.open_input_file(path) as file:
        assert file.read() == body


def test_mlflow_keeps_artifacts_in_s3_and_runs_in_postgres(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # the server holds the keys
    from mlflow import MlflowClient

    mlflow = MlflowClient(stack.addresses["mlflow"])
    run = mlflow.create_run(mlflow.create_experiment("stack"))
    mlflow.log_metric(run.info.run_id, "auroc", 0.75)
    mlflow.log_text(run.info.run_id, "kept", "note.txt")
    assert mlflow.get_run(run.info.run_id).data.metrics == {"auroc": 0.75}
    objects = client(stack).list_objects_v2(Bucket="mlflow")["Contents"]
    (note,) = [item["Key"] for item in objects if item["Key"].endswith(f"{run.info.run_id}/artifacts/note.txt")]
    assert client(stack).get_object(Bucket="mlflow", Key=note)["Body"].read() == b"kept"

    import psycopg2

    password = stack.credentials["postgres_password"]
    with contextlib.closing(
        psycopg2.connect(host="127.0.0.1", port=stack.ports["postgres"], user="cxr", password=password, dbname="mlflow")
    ) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT value FROM metrics WHERE run_uuid = %s", (run.info.run_id,))
        assert cursor.fetchall() == [(0.75,)]


def test_a_submitted_job_sees_the_servers_and_its_exit_code_comes_back(stack: Stack) -> None:
    code = "import os; print(os.environ['AWS_ENDPOINT_URL'], os.environ['MLFLOW_TRACKING_URI']); raise SystemExit({})"
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--", "python", "-c"]
    env = os.environ | {name: value for name, value in stack.env.items() if name.startswith("RAY_")}
    good = subprocess.run([*submit, code.format(0)], env=env, capture_output=True, text=True, timeout=60)
    assert good.returncode == 0, good.stdout + good.stderr
    assert f"{stack.addresses['s3']} {stack.addresses['mlflow']}" in good.stdout
    bad = subprocess.run([*submit, code.format(3)], env=env, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1, bad.stdout + bad.stderr


def test_every_server_listens_on_loopback_alone(stack: Stack) -> None:
    listening = set()
    for process in stack.processes.values():
        leader = psutil.Process(process.pid)
        for member in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = member.net_connections("inet")
                listening |= {one.laddr.ip.removeprefix("::ffff:") for one in found if one.status == "LISTEN"}
    assert listening == {"127.0.0.1"}


def test_mlflow_answers_to_its_own_names_alone(stack: Stack) -> None:
    """A page in a browser here may give a name of its own this address; it is not answered to under that name."""
    address = stack.addresses["mlflow"]
    own = address.removeprefix("http://")
    assert [_status(address, host) for host in (own, "evil.example")] == [200, 403]


def _status(address: str, host: str) -> int:
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_password_stands_in_no_command_line_and_no_log(stack: Stack) -> None:
    secrets = (stack.credentials["postgres_password"], stack.credentials["s3_secret"])
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    logs = [stack.log(part).read_text(errors="replace") for part in PARTS]
    assert not [text for text in commands + logs if any(secret in text for secret in secrets)]
    assert (stack.directory / "stack.json").stat().st_mode & 0o777 == 0o600


def test_stop_leaves_no_process_and_no_open_port(stack: Stack) -> None:
    leaders = [psutil.Process(process.pid) for process in stack.processes.values()]
    members = [member for leader in leaders for member in [leader, *leader.children(recursive=True)]]
    assert len(members) > len(PARTS)
    report = stack.stop()
    assert [line.split(":")[0] for line in report] == ["ray", "mlflow", "postgres", "s3"]
    assert all("stopped" in line for line in report)
    assert not [one for one in members if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not [port for port in stack.ports.values() if not is_free(port)]
    assert stack.stop() == []
    assert load(stack.directory).processes == {}


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # taken already: as good
            taken.bind(("127.0.0.1", DEFAULT_PORTS["s3"]))
            taken.listen()
        with pytest.raises(StackError, match=rf"port {DEFAULT_PORTS['s3']} for s3 is taken .* --ports auto"):
            start(tmp_path, ["s3"], ports="fixed")
    assert load(tmp_path) is None


def test_a_part_that_fails_takes_the_others_down_and_shows_its_log(tmp_path: Path) -> None:
    with start(tmp_path, ["s3"]) as before:
        client(before).put_object(Bucket="cxr", Key="kept", Body=b"kept")
    (tmp_path / "postgres" / "data").mkdir(parents=True)
    with pytest.raises(StackError, match=r"(?s)postgres ended while starting; the end of .*postgres\.log:.*data"):
        start(tmp_path, ["s3", "postgres"])
    after = load(tmp_path)
    assert after.processes == {}
    assert is_free(after.ports["s3"])
    with start(tmp_path, ["s3"]) as again:  # the data outlives both
        assert client(again).get_object(Bucket="cxr", Key="kept")["Body"].read() == b"kept"


def test_unknown_and_incomplete_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="found part 's4', expected some of s3, postgres, mlflow, ray"):
        start(tmp_path, ["s4"])
    with pytest.raises(StackError, match="name all three"):
        start(tmp_path, ["s3", "mlflow"])


def test_a_recycled_pid_is_never_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        created = psutil.Process(other.pid).create_time()
        record = Process(pid=other.pid, created=created - 60, address="", stop_signal=signal.SIGTERM)
        assert not record.alive()
        assert record.end() == ""
        assert other.poll() is None
        other.kill()


def test_command_line_up_twice_env_and_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "infra" / "local" / "stack.py")]
    where = ["--dir", str(tmp_path)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments, *where], capture_output=True, text=True, timeout=60)

    assert run("env").returncode == 1
    up = ["up", "--only", "s3", "--ports", "auto"]
    with subprocess.Popen([*command, *up, *where], stdout=subprocess.PIPE, text=True) as foreground:
        for line in foreground.stdout:
            if line.startswith("Up."):
                break
        stack = load(tmp_path)
        again = run(*up)
        assert again.returncode == 0
        assert again.stdout.startswith(f"already up in {tmp_path}")
        assert f"export AWS_ENDPOINT_URL={stack.addresses['s3']}" in run("env").stdout
        assert run("status").stdout.startswith("s3        running")
        foreground.send_signal(signal.SIGINT)
        assert foreground.stdout.read() == f"s3: stopped (process {stack.processes['s3'].pid})\n"
    assert foreground.returncode == 0
    assert is_free(stack.ports["s3"])
    assert run("down", "--purge").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_ray_gets_a_short_folder_where_socket_paths_would_be_too_long(tmp_path: Path) -> None:
    assert parts.ray_temp(Path("/srv/stack")) == Path("/srv/stack/ray")
    long = parts.ray_temp(tmp_path / ("x" * 60))
    assert "x" * 60 not in str(long)
    assert long != parts.ray_temp(tmp_path / ("y" * 60))
