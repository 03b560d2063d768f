"""The images' commands as containers would run them: without rights, on a read-only root, with the writable folders of the manifests."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.containers import Container, Network, health_check, image_environment, image_folder, needed
from tests.manifests import Manifest, built, containers, ray_cluster, templates

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5d" * 32}
"""What KubeRay gives to every container for `authOptions`."""
PREEMPTED = 3
"""Ray's NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED."""


def from_template(
    network: Network, name: str, template: Manifest, command: list[str], env: dict[str, str]
) -> Container:
    [container] = containers(template)
    own = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    user = template["spec"]["securityContext"]["runAsUser"]
    return Container(
        network,
        name,
        command,
        env=image_environment("cpu") | own | env,
        writable=folders,
        user=user,
        folder=image_folder("cpu"),
    )


def start_command(group: Manifest, **more: str) -> list[str]:
    """What KubeRay makes of a group's start parameters; one core less of GPUs, which are not here."""
    given = {"block": "true", "dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"} | more
    words = {name: value for name, value in (group["rayStartParams"] | given).items() if name != "num-gpus"}
    flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(words.items())]
    return ["/bin/bash", "-c", "--", f"ulimit -n 65536; ray start {' '.join(flags)}"]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    needed()
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return built("dev-train")


@pytest.fixture(scope="module")
def head(network: Network, manifests: list[Manifest]) -> Iterator[Container]:
    group = ray_cluster(manifests)["headGroupSpec"]
    command = start_command(group, **{"head": "true", "no-monitor": "true"})
    template = dict(templates(manifests))["head"]
    with from_template(network, "head", template, command, TOKEN) as head:
        head.well_at_first = head.run(health_check("cpu")).returncode
        head.wait(lambda: head.run(health_check("cpu")).returncode == 0)
        yield head


@pytest.fixture(scope="module")
def worker(network: Network, manifests: list[Manifest], head: Container) -> Iterator[Container]:
    [group] = [one for one in ray_cluster(manifests)["workerGroupSpecs"] if one["groupName"] == "gpu-spot"]
    labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
    command = start_command(group, address=f"{head.address}:6379", labels=labels)
    with from_template(network, "worker", group["template"], command, TOKEN) as worker:
        worker.wait(lambda: worker.run(health_check("cpu")).returncode == 0)
        yield worker


def ask(container: Container, code: str) -> Any:
    """A driver's answer, from within a container."""
    begin = "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
    done = container.run(["python", "-c", f"{begin}print(json.dumps({code}))"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_containers_are_what_they_say(head: Container) -> None:
    """Else nothing below shows anything."""
    done = head.run(
        [
            "sh",
            "-c",
            "id -u; grep CapBnd /proc/self/status; touch /x /app/x /var/tmp/x; touch /tmp/x /home/ray/x /dev/shm/x",
        ]
    )
    assert done.stdout.split() == ["1000", "CapBnd:", "0000000000000000"]
    assert done.stderr.count("Read-only file system") == 3


def test_a_head_is_well_once_it_answers_and_not_before(head: Container) -> None:
    assert head.well_at_first == 1
    probe = {name: container["livenessProbe"]["httpGet"] for name, container in _ray_containers()}
    assert [*probe.values()] == [{"path": "/api/healthz", "port": 52365}] * 4
    look = "import urllib.request as web; print(web.urlopen('http://{}:52365/api/healthz').read().decode())"
    done = head.run(["python", "-c", look.format(head.address)])  # a kubelet comes to the pod's address
    assert "raylet: success" in done.stdout
    assert "gcs: success" in done.stdout


def _ray_containers() -> Iterator[tuple[str, Manifest]]:
    for name, template in templates(built("dev")):
        if template["metadata"]["labels"]["cxr-part"] == "ray":
            yield name, containers(template)[0]


def test_a_run_is_submitted_with_the_token_alone_and_finds_the_images_code(
    network: Network, head: Container, manifests: list[Manifest]
) -> None:
    jobs = f"http://{head.address}:8265/api/jobs/"
    ask = "import sys, urllib.request as w; w.urlopen(w.Request(sys.argv[1], headers={'Authorization': sys.argv[2]}))"
    refused = head.run(["python", "-c", ask, jobs, f"Bearer {'0' * 64}"])
    assert "HTTP Error 403" in refused.stderr
    assert head.run(["python", "-c", ask, jobs, f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"]).returncode == 0
    code = "import os, cxr_dist; print(cxr_dist.__file__, os.environ['RAY_AUTH_MODE'])"
    submit = f'ray job submit --address http://{head.address}:8265 -- python -c "{code}"'
    template = dict(templates(manifests))["submitter"]
    with from_template(network, "submitter", template, ["bash", "-c", submit], TOKEN) as submitter:
        assert submitter.ended() == 0, submitter.said()
        assert "/app/cxr_dist/__init__.py token" in submitter.said()


def test_a_workers_labels_reach_ray_and_its_end_is_told(
    head: Container, worker: Container, manifests: list[Manifest]
) -> None:
    nodes = ask(head, "[[n['NodeManagerAddress'], n['Labels'], n['Alive']] for n in ray.nodes()]")
    [labels] = [labels for address, labels, _ in nodes if address == worker.address]
    assert {key: labels[key] for key in labels if key.startswith("cxr-")} == {"cxr-role": "train", "cxr-market": "spot"}
    [container] = containers(dict(templates(manifests))["gpu-spot"])
    *command, _ = container["lifecycle"]["preStop"]["exec"]["command"]
    done = worker.run([*command, "5"])
    assert done.returncode == 0, done.stderr
    answer = "[[n['NodeManagerAddress'], n['Alive'], n['DeathReason'], n['DeathReasonMessage']] for n in ray.nodes()]"
    [why] = [why for address, *why in ask(head, answer) if address == worker.address]
    assert why == [False, PREEMPTED, "its pod is being ended"]
