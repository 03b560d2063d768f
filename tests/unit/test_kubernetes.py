"""infra/kubernetes: what Kubernetes, KubeRay and Ray itself make of it; all offline."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cxr_dist.cli import parse
from tests.manifests import (
    KINDS,
    OVERLAYS,
    ROOT,
    Manifest,
    built,
    containers,
    ray_cluster,
    strict_schema,
    templates,
    the,
)

SERVICES, RUNS = ("dev", "prod"), ("dev-train", "prod-train")
VERSIONS = ("1.31", "1.37")
"""Kubernetes' oldest release that this is checked for, and the newest that the package knows."""
SECRETS = {
    "cxr-postgres": {"password"},
    "cxr-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "cxr-ray-token": {"auth_token"},
}


@pytest.fixture(params=[*SERVICES, *RUNS])
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    return built(request.param)


def check(manifest: Manifest, version: str) -> None:
    """Kubernetes' own schema of its kind, without fields that it does not know."""
    kubernetes_validate.validate(manifest, version, strict=True)


def as_template(template: Manifest) -> Manifest:
    """A pod template as an object of its own, whose schema Kubernetes has."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": template}


def test_there_are_no_other_overlays() -> None:
    assert {folder.name for folder in OVERLAYS.iterdir()} == {*SERVICES, *RUNS}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(overlay: list[Manifest], version: str) -> None:
    for manifest in overlay:
        if manifest["kind"] not in KINDS:
            check(manifest, version)
    for _, template in templates(overlay):  # those of Ray's kinds too, without KubeRay's definitions
        check(as_template(template), version)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "securityContext", "runAsNonroot"), True),
        (("spec", "containers", 0, "readinessProbe", "httpGet", "pth"), "/"),
        (("spec", "containers", 0, "resources", "request"), {"cpu": 1}),
        (("spec", "terminationGracePeriodSeconds"), "long"),
    ],
)
def test_a_field_that_is_misspelt_or_of_another_type_is_found(path: tuple[Any, ...], value: Any) -> None:
    template = copy.deepcopy(dict(templates(built("dev")))["head"])
    *parents, last = path
    place = template
    for step in parents:
        place = place[step]
    place[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        check(as_template(template), VERSIONS[0])


def test_kuberay_knows_every_field(overlay: list[Manifest]) -> None:
    for manifest in overlay:
        if manifest["kind"] in KINDS:
            errors = [
                f"{error.json_path}: {error.message}" for error in strict_schema(manifest["kind"]).iter_errors(manifest)
            ]
            assert errors == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "named"),
    [
        ("RayCluster", ("spec", "enableIntreeAutoscaling"), True, "enableIntreeAutoscaling"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplica"), 3, "maxReplica"),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "volumes", 0, "emptydir"), {}, "emptydir"),
        ("RayJob", ("spec", "shutdownAfterJobFinish"), True, "shutdownAfterJobFinish"),
        ("RayJob", ("spec", "backoffLimit"), "two", "two"),
        ("RayJob", ("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "tokens"),
    ],
)
def test_what_kuberay_does_not_know_is_found(kind: str, path: tuple[Any, ...], value: Any, named: str) -> None:
    manifest = the(built("prod" if kind == "RayCluster" else "prod-train"), kind)
    *parents, last = path
    place = manifest
    for step in parents:
        place = place[step]
    place[last] = value
    [error] = strict_schema(kind).iter_errors(manifest)
    assert named in error.message


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_nodes_of_the_cluster_that_stays_up(name: str) -> None:
    run, services = built(name), built(name.removesuffix("-train"))
    assert [manifest["kind"] for manifest in run] == ["RayJob"]
    assert the(run, "RayJob")["spec"]["rayClusterSpec"] == the(services, "RayCluster")["spec"]
    assert {one["metadata"].get("namespace") for one in run} == {the(services, "Namespace")["metadata"]["name"]}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_its_cluster_and_neither_it_nor_its_retries_go_on_for_ever(name: str) -> None:
    job = the(built(name), "RayJob")["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] == 2
    assert 0 < job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"] <= 86400
    assert job["ttlSecondsAfterFinished"] <= 600


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_command_is_one_that_the_job_takes(name: str) -> None:
    job = the(built(name), "RayJob")
    python, script, *flags = job["spec"]["entrypoint"].split()
    assert (python, script) == ("python", "/app/jobs/train.py")
    config, _ = parse("train", argv=[flag.replace("/app/", f"{ROOT}/") for flag in flags])
    assert config.run.name == job["metadata"]["name"]
    assert config.tracking.uri == "http://mlflow:5000"
    assert config.train.wait_for_nodes_s > 900  # the time after which Ray looks for nodes in another group
    if name == "prod-train":  # what docs/security.md's policy lets it read and write
        assert config.data.uri.startswith("s3://BUCKET/dataset/")
        assert config.train.storage_path == "s3://BUCKET/runs"
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.train.workers[0] <= sum(group["maxReplicas"] for group in groups if "gpu" in group["groupName"])


def test_no_container_is_root_writes_to_its_image_or_has_rights_beyond(overlay: list[Manifest]) -> None:
    for name, template in templates(overlay):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True, name
        assert pod["runAsUser"] >= 999, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert template["spec"].get("automountServiceAccountToken") is (None if name == "head" else False), name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"]), name
        assert not [volume for volume in template["spec"]["volumes"] if set(volume) - {"name", "emptyDir"}], name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
    if KINDS.keys() & {one["kind"] for one in overlay}:
        autoscaler = ray_cluster(overlay)["autoscalerOptions"]
        assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["mountPath"] for mount in autoscaler["volumeMounts"]} == {"/tmp"}


def test_every_container_says_what_it_needs_and_where_memory_and_disk_end(overlay: list[Manifest]) -> None:
    for name, template in templates(overlay):
        for container in containers(template):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() >= {"cpu", "memory"}, name
            assert limits["memory"], name
            assert "cpu" not in limits, name  # it would be throttled while the machine's other cores are idle
        for volume in template["spec"]["volumes"]:
            assert volume["emptyDir"]["sizeLimit"], (name, volume)


def test_ray_has_its_writable_folders(overlay: list[Manifest]) -> None:
    for name, template in templates(overlay):
        if template["metadata"]["labels"]["cxr-part"] == "ray":
            kinds = {volume["name"]: volume["emptyDir"].get("medium", "disk") for volume in template["spec"]["volumes"]}
            [container] = containers(template)
            found = {mount["mountPath"]: kinds[mount["name"]] for mount in container["volumeMounts"]}
            assert found == {"/tmp": "disk", "/home/ray": "disk", "/dev/shm": "Memory"}, name


def test_all_that_is_started_is_watched(overlay: list[Manifest]) -> None:
    for name, template in templates(overlay):
        for container in containers(template):
            if name != "submitter":
                assert container.keys() >= {"startupProbe", "livenessProbe", "readinessProbe"}, name


def test_a_worker_tells_ray_before_it_goes_and_its_pod_waits_for_that(overlay: list[Manifest]) -> None:
    for name, template in templates(overlay):
        if name.startswith(("gpu", "cpu")):
            [container] = containers(template)
            *command, grace = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["python", "/app/infra/drain.py", "--grace"], name
            assert int(grace) < template["spec"]["terminationGracePeriodSeconds"] <= 120, name


def test_secrets_are_named_and_none_is_here(overlay: list[Manifest]) -> None:
    assert not [one for one in overlay if one["kind"] == "Secret"]
    named: dict[str, set[str]] = {}
    for _, template in templates(overlay):
        for container in containers(template):
            for entry in container.get("envFrom", []):
                if "secretRef" in entry:
                    named.setdefault(entry["secretRef"]["name"], set())
            for entry in container.get("env", []):
                reference = entry.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    named.setdefault(reference["name"], set()).add(reference["key"])
                else:
                    assert not re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", entry["name"]), entry
                    assert not re.search(r"://[^@/]*:[^@/]*@", entry["value"]), entry
    if KINDS.keys() & {one["kind"] for one in overlay}:
        options = ray_cluster(overlay)["authOptions"]
        assert options["mode"] == "token"
        named.setdefault(options["secretName"], {"auth_token"})
    assert all(keys <= SECRETS[name] for name, keys in named.items())


def test_the_page_makes_the_secrets_that_pods_name_and_uses_overlays_that_are_there() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    made = {
        name: set(re.findall(r"--from-literal=(\w+)=", rest))
        for name, rest in re.findall(r"create secret generic (\S+)(.*)", text)
    }
    assert made == SECRETS
    applied = set(re.findall(r"kubectl apply -k (\S+)", text))
    assert applied == {"infra/kubernetes/overlays/dev", "infra/kubernetes/overlays/dev-train"}
    job = the(built("dev-train"), "RayJob")["metadata"]
    assert f"kubectl --namespace {job['namespace']} get rayjob {job['name']} --watch" in text
    services = {one["metadata"]["name"] for one in built("dev") if one["kind"] == "Service"} | {"cxr-head-svc"}
    assert set(re.findall(r"port-forward service/(\S+)", text)) <= services


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_referred_to_is_there(name: str) -> None:
    manifests = built(name)
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    everything = [*templates(manifests), *templates(built(f"{name}-train"))]
    for who, template in everything:
        spec = template["spec"]
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in there, who
        owner = next((one for one in manifests if one["metadata"]["name"] == who and one["kind"] == "StatefulSet"), {})
        claims = [claim["metadata"]["name"] for claim in owner.get("spec", {}).get("volumeClaimTemplates", [])]
        volumes = {*(volume["name"] for volume in spec["volumes"]), *claims}
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, who
            for entry in container.get("envFrom", []):
                if "configMapRef" in entry:
                    assert ("ConfigMap", entry["configMapRef"]["name"]) in there, who
    labels = [template["metadata"]["labels"] | RAYS.get(who, {}) for who, template in everything]
    for one in manifests:
        if one["kind"] == "Service":
            assert any(one["spec"]["selector"].items() <= found.items() for found in labels), one["metadata"]
        if one["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            wanted = one["spec"].get("podSelector", one["spec"].get("selector")).get("matchLabels", {})
            assert any(wanted.items() <= found.items() for found in labels), one["metadata"]


RAYS = {"head": {"ray.io/node-type": "head"}, "gpu-spot": {"ray.io/node-type": "worker"}}
"""What KubeRay adds to the labels of its pods."""


@pytest.mark.parametrize("name", SERVICES)
def test_who_may_speak_to_whom(name: str) -> None:
    """The policies as a table: everything is closed, and these are the doors; none leads out of the cluster."""
    assert not [one for one in built(name) if one["kind"] in ("Ingress", "Gateway")]
    assert {one["spec"].get("type", "ClusterIP") for one in built(name) if one["kind"] == "Service"} == {"ClusterIP"}
    assert ray_cluster(built(name))["headGroupSpec"].keys() == {"rayStartParams", "template"} | (
        {"labels"} if name == "prod" else set()
    )  # no serviceType, no enableIngress
    doors = {}
    for one in built(name):
        if one["kind"] == "NetworkPolicy":
            assert one["spec"]["policyTypes"] == ["Ingress"]
            for rule in one["spec"].get("ingress", []):
                ports = tuple(port["port"] for port in rule.get("ports", []))
                who = [str(list(_selectors(source))) for source in rule["from"]]
                doors[one["metadata"]["name"], ports] = who
    expected = {
        ("ray", ()): ["['ray']"],
        ("ray", (8265,)): ["['submitter']", "['kuberay-operator']"],
        ("mlflow", (5000,)): ["['ray']"],
    }
    if name == "dev":
        expected |= {("postgres", (5432,)): ["['mlflow']"], ("s3", (9000,)): ["['ray', 'mlflow']"]}
    assert doors == expected
    assert the(built(name), "NetworkPolicy", "nobody")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def _selectors(source: Manifest) -> Iterator[str]:
    for selector in source.values():
        yield from selector.get("matchLabels", {}).values()
        for expression in selector.get("matchExpressions", []):
            yield from expression["values"]


def test_kubernetes_itself_refuses_pods_that_are_root() -> None:
    for name in SERVICES:
        assert the(built(name), "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_a_drained_machine_waits_for_the_head_and_never_for_mlflow() -> None:
    budgets = {one["metadata"]["name"]: one["spec"] for one in built("prod") if one["kind"] == "PodDisruptionBudget"}
    assert budgets["ray-head"]["minAvailable"] == 1
    assert budgets["ray-head"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert budgets["mlflow"]["maxUnavailable"] == 1
    assert the(built("prod"), "Deployment")["spec"]["replicas"] == 2


@pytest.mark.parametrize("name", SERVICES)
def test_rays_own_autoscaler_reads_the_nodes_that_are_meant(name: str) -> None:
    manifest = the(built(name), "RayCluster")
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    types = config["available_node_types"]
    assert config["idle_timeout_minutes"] == 10
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {key: types[key]["min_workers"] for key in types} == dict.fromkeys(types, 0)
    assert types["gpu-spot"]["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "memory": 0}
    assert types["gpu-on-demand"]["resources"] == types["gpu-spot"]["resources"]
    assert "GPU" not in types["cpu-ingest"]["resources"]
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert {key: types[key]["labels"]["cxr-role"] for key in types if key != "headgroup"} == {
        "gpu-spot": "train",
        "gpu-on-demand": "train",
        "cpu-ingest": "ingest",
    }
    assert types["gpu-spot"]["labels"]["cxr-market"] == "spot"
    assert types["gpu-on-demand"]["labels"]["cxr-market"] == "on-demand"


def test_prods_labels_are_what_its_selectors_ask_for() -> None:
    cluster = ray_cluster(built("prod"))
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        selector = group["template"]["spec"]["nodeSelector"]
        assert group["labels"]["cxr-instance"] == selector["node.kubernetes.io/instance-type"]
        assert group["labels"]["cxr-market"] == selector["karpenter.sh/capacity-type"]


def test_prods_nodes_are_those_of_ray_cluster_yaml() -> None:
    launcher = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())["available_node_types"]
    cluster = ray_cluster(built("prod"))
    config = _derive_autoscaling_config_from_ray_cr(the(built("prod"), "RayCluster"))["available_node_types"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert launcher.keys() <= groups.keys()
    for name, kind in launcher.items():
        ours = config["headgroup" if name == "head" else name]
        assert (
            groups[name]["template"]["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"]
            == kind["node_config"]["InstanceType"]
        )
        assert {key: ours["resources"].get(key) for key in kind["resources"]} == kind["resources"]
        assert ours["labels"].items() >= kind.get("labels", {}).items(), name
