"""infra/kubernetes as Kubernetes would get it, and the schemas that it is held to."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ROOT / "infra" / "kubernetes" / "overlays"
FETCHED, BESIDE = ROOT / "infra" / "kubernetes" / "crds", ROOT.parent / "shared" / "reference" / "crds"
CRDS = Path(os.environ.get("CXR_CRDS", BESIDE if BESIDE.is_dir() and not FETCHED.is_dir() else FETCHED))
"""KubeRay's definitions: as infra/kubernetes/fetch_crds.py fetches them, or beside the checkout, as real data is."""
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}

Manifest = dict[str, Any]


@functools.cache
def _built(overlay: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: infra/kubernetes cannot be built")
    done = subprocess.run([kubectl, "kustomize", OVERLAYS / overlay], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send; needs no cluster. The test is skipped without kubectl."""
    return list(yaml.load_all(_built(overlay), yaml.CSafeLoader))


def the(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one of this kind (and name)."""
    [found] = [one for one in manifests if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def ray_cluster(manifests: list[Manifest]) -> Manifest:
    """The description of the Ray cluster, of a RayCluster or within a RayJob."""
    [found] = [one for one in manifests if one["kind"] in KINDS]
    return found["spec"]["rayClusterSpec"] if found["kind"] == "RayJob" else found["spec"]


def templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template, by what makes pods of it."""
    for one in manifests:
        name = one["metadata"]["name"]
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield name, one["spec"]["template"]
        if one["kind"] == "RayJob":
            yield "submitter", one["spec"]["submitterPodTemplate"]
        if one["kind"] in KINDS:
            cluster = one["spec"]["rayClusterSpec"] if one["kind"] == "RayJob" else one["spec"]
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


@functools.cache
def strict_schema(kind: str) -> jsonschema.Draft202012Validator:
    """KubeRay's definition of a kind, refusing what it does not name (Kubernetes would drop it without a word)."""
    file = CRDS / KINDS[kind]
    if not file.is_file():
        pytest.skip(f"no {file.name} in {CRDS}: run infra/kubernetes/fetch_crds.py, or set CXR_CRDS")
    definition = yaml.load(file.read_bytes(), yaml.CSafeLoader)
    [version] = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for key, value in schema.items():
            if key == "properties":
                for inner in value.values():
                    _close(inner)
            else:
                _close(value)
    elif isinstance(schema, list):
        for inner in schema:
            _close(inner)
