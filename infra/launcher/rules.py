"""What this project wants of a cluster file beyond being understood: closed, encrypted, paid for once, and placeable.

Each rule gives sentences with what was found, what was expected, and what to do; none asks anybody. `account` does that.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from cxr_dist.scrub import has_secret
from infra.launcher.shapes import node_config_problems, provider_problems, schema_problems

__all__ = ["file_problems", "is_spot", "local_problems", "node_types", "pinned_ray"]

Cluster = Mapping[str, Any]

ROLES = ("train", "ingest")
WORLD = ("0.0.0.0/0", "::/0")
IDLE_MINUTES = (1, 60)
"""Fewer, and nodes go between two jobs; more, and a forgotten job's nodes cost an hour."""
LEAST_DISK_GB = 100
"""Machine image, container image with CUDA, and room to spill."""


def file_problems(cluster: Cluster, *, ray_version: str) -> list[str]:
    """Everything that is wrong with the file itself, in its order; empty if nothing is. `ray_version` is the project's pin."""
    found = schema_problems(cluster)
    provider = cluster.get("provider")
    if not isinstance(provider, Mapping) or not node_types(cluster):
        return found or ["available_node_types: found none, expected a head and workers; begin with ray-cluster.yaml"]
    found += provider_problems(provider)
    for name, kind in node_types(cluster).items():
        node_config = kind.get("node_config") or {}
        found += node_config_problems(name, node_config)
        found += _node(name, node_config)
        found += _labels(name, kind, is_head=name == cluster.get("head_node_type"))
    for rule in (_profiles, _scaling, _fallback, _ssh, _token, _starts, _regions, _secrets):
        found += rule(cluster)
    return found + list(_versions(cluster, ray_version))


def local_problems(cluster: Cluster, folder: Path) -> Iterator[str]:
    """Files of this machine that `ray up`, run in `folder`, would copy to the nodes and does not find or should not send."""
    for remote, local in (cluster.get("file_mounts") or {}).items():
        path = (folder / Path(local).expanduser()).resolve()
        if not path.exists():
            make = "ray get-auth-token --generate && chmod 600 " if path.name == "auth_token" else "run this beside "
            yield f"file_mounts.{remote}: found no {local}, expected the file that goes to the nodes; {make}{local}"
        elif path.name == "auth_token" and path.stat().st_mode & 0o077:
            yield f"file_mounts.{remote}: found {local} readable by other users, expected mode 600; chmod 600 {local}"


def pinned_ray(folder: Path) -> str:
    """The version of Ray that pyproject.toml in `folder` pins."""
    [version] = re.findall(r'"ray\[[\w,]+\]==([\d.]+)"', (folder / "pyproject.toml").read_text())
    return version


def node_types(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The node types of the file by name, whatever else is wrong with it."""
    kinds = cluster.get("available_node_types")
    return {name: kind for name, kind in kinds.items() if isinstance(kind, dict)} if isinstance(kinds, dict) else {}


def is_spot(node_config: Mapping[str, Any]) -> bool:
    """Whether a node type is bought on the spot market."""
    return (node_config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"


def _workers(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in node_types(cluster).items() if name != cluster.get("head_node_type")}


def _node(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    where = f"available_node_types.{name}.node_config"
    if not config.get("ImageId"):
        yield (
            f"{where}.ImageId: found nothing, for which Ray takes an Ubuntu 18.04 with CUDA 11.2, too old for PyTorch; "
            "give a machine image with driver and Docker"
        )
    tokens = (config.get("MetadataOptions") or {}).get("HttpTokens")
    if tokens != "required":
        yield (
            f"{where}.MetadataOptions.HttpTokens: found {tokens or 'nothing'}, expected required (IMDSv2 alone), "
            "else a forged GET reads the role's credentials"
        )
    disks = [mapping.get("Ebs") or {} for mapping in config.get("BlockDeviceMappings") or [] if "Ebs" in mapping]
    if not disks:
        yield f"{where}.BlockDeviceMappings: found none, expected an encrypted disk of {LEAST_DISK_GB} GB or more; add it"
    for place, disk in enumerate(disks):
        if disk.get("Encrypted") is not True:
            yield f"{where}.BlockDeviceMappings[{place}].Ebs.Encrypted: found {disk.get('Encrypted')}, expected true"
        if disk.get("DeleteOnTermination") is False:
            yield (
                f"{where}.BlockDeviceMappings[{place}].Ebs.DeleteOnTermination: found false, expected true: a disk that "
                "outlives its node is billed"
            )
    if disks and max(int(disk.get("VolumeSize") or 0) for disk in disks) < LEAST_DISK_GB:
        yield f"{where}.BlockDeviceMappings: found no disk of {LEAST_DISK_GB} GB, expected one for the images; enlarge it"
    for resource in ("instance", "volume"):
        tags = [
            tag.get("Key")
            for spec in config.get("TagSpecifications") or []
            if spec.get("ResourceType") == resource
            for tag in spec.get("Tags") or []
        ]
        if "project" not in tags:
            yield f"{where}.TagSpecifications: found no tag project for the {resource}, expected one for the bill; add it"


def _labels(name: str, kind: Mapping[str, Any], *, is_head: bool) -> Iterator[str]:
    where, config, labels = (
        f"available_node_types.{name}.labels",
        kind.get("node_config") or {},
        kind.get("labels") or {},
    )
    expected = {"cxr-instance": config.get("InstanceType"), "cxr-market": "spot" if is_spot(config) else "on-demand"}
    for label, value in expected.items():
        if labels.get(label) != value:
            yield f"{where}.{label}: found {labels.get(label) or 'nothing'}, expected {value}, by which cost is reckoned"
    role, gpus = labels.get("cxr-role"), (kind.get("resources") or {}).get("GPU", 0)
    if is_head:
        if role:
            yield f"{where}.cxr-role: found {role} on the head, expected none: it runs no tasks; remove it"
        return
    if role not in ROLES:
        yield f"{where}.cxr-role: found {role or 'nothing'}, expected {' or '.join(ROLES)}, by which work is placed"
    elif role == "ingest" and gpus:
        yield f"{where}.cxr-role: found ingest on a type with {gpus} GPU, expected train; a decoder does not use it"


def _profiles(cluster: Cluster) -> Iterator[str]:
    """Every node has a role; only the head's starts nodes."""
    names = {}
    for name, kind in node_types(cluster).items():
        profile = (kind.get("node_config") or {}).get("IamInstanceProfile") or {}
        names[name] = profile.get("Name") or profile.get("Arn")
        if not names[name]:
            yield (
                f"available_node_types.{name}.node_config.IamInstanceProfile: found nothing, expected a profile: Ray gives "
                "its own to the head alone, and a node without one cannot read the bucket"
            )
    head = names.pop(str(cluster.get("head_node_type")), None)
    for name, profile in names.items():
        if profile and profile == head:
            yield (
                f"available_node_types.{name}.node_config.IamInstanceProfile: found {profile}, which is the head's and may "
                "start nodes; give workers one of their own"
            )


def _scaling(cluster: Cluster) -> Iterator[str]:
    head = node_types(cluster).get(str(cluster.get("head_node_type")), {})
    if (head.get("resources") or {}).get("CPU") != 0:
        yield "head: found CPUs for tasks on the head (resources.CPU), expected 0: decoding there starves the scheduler"
    if is_spot(head.get("node_config") or {}):
        yield "head: found a spot instance, expected on demand: with the head all jobs end"
    total = cluster.get("max_workers", 0)
    for name, kind in _workers(cluster).items():
        least, most = kind.get("min_workers", 0), kind.get("max_workers", 0)
        if least != 0:
            yield f"available_node_types.{name}.min_workers: found {least}, expected 0: nodes that wait for jobs are paid"
        if not 0 < most <= total:
            yield f"available_node_types.{name}.max_workers: found {most}, expected 1 to max_workers ({total}); correct one"
    minutes, (short, long) = cluster.get("idle_timeout_minutes"), IDLE_MINUTES
    if not isinstance(minutes, int | float) or not short <= minutes <= long:
        yield f"idle_timeout_minutes: found {minutes}, expected {short} to {long}; correct it"
    if cluster["provider"].get("cache_stopped_nodes", True):
        yield "provider.cache_stopped_nodes: found true (Ray's default), expected false: disks of stopped nodes are billed"


def _fallback(cluster: Cluster) -> Iterator[str]:
    """Spot GPUs have the same node on demand behind them: the autoscaler takes them for equal but for their priority."""
    kinds = _workers(cluster)
    for name, kind in kinds.items():
        config = kind.get("node_config") or {}
        if not is_spot(config) or (kind.get("labels") or {}).get("cxr-role") != "train":
            continue
        twins = [
            twin
            for twin, other in kinds.items()
            if other.get("resources") == kind.get("resources")
            and (other.get("node_config") or {}).get("InstanceType") == config.get("InstanceType")
            and not is_spot(other.get("node_config") or {})
        ]
        if not twins:
            yield (
                f"available_node_types.{name}: found spot without a type of the same instance and resources on demand, "
                "expected one: where no spot is to be had, a job would wait for ever"
            )
        for twin in twins:
            if kinds[twin].get("priority", 0) >= kind.get("priority", 0):
                yield (
                    f"available_node_types.{twin}.priority: found {kinds[twin].get('priority', 0)}, expected less than that "
                    f"of {name} ({kind.get('priority', 0)}), else on demand comes first"
                )


def _ssh(cluster: Cluster) -> Iterator[str]:
    group = cluster["provider"].get("security_group") or {}
    own = all((kind.get("node_config") or {}).get("SecurityGroupIds") for kind in node_types(cluster).values())
    if not own and not group.get("GroupName"):
        yield (
            "provider.security_group.GroupName: found nothing, upon which Ray makes a group with port 22 open to the world; "
            "name one that exists and is closed (infra/aws makes cxr-dist-nodes)"
        )
    for rule in group.get("IpPermissions") or []:
        ranges = [
            part.get(key)
            for kind, key in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6"))
            for part in rule.get(kind) or []
        ]
        for world in set(WORLD) & set(ranges):
            yield f"provider.security_group.IpPermissions: found {world}, expected no rule for the world; give your address"
    if not (cluster.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user: found nothing, expected the machine image's user (ubuntu); Ray fails without it, after the launch"


def _token(cluster: Cluster) -> Iterator[str]:
    docker = cluster.get("docker") or {}
    if not docker.get("image") or not docker.get("container_name"):
        yield "docker: found no image and container_name, expected both: packages of the machine image are not ours"
    options = [shlex.split(option) for option in docker.get("run_options") or []]
    if not any(pair == ("--env", "RAY_AUTH_MODE=token") for option in options for pair in pairwise(option)):
        yield (
            "docker.run_options: found no --env RAY_AUTH_MODE=token, without which whoever reaches a port runs code; add it"
        )
    if not any(Path(remote).match(".ray/auth_token") for remote in cluster.get("file_mounts") or {}):
        yield "file_mounts: found no …/.ray/auth_token, expected ~/.ray/auth_token of this machine on every node; add it"


def _starts(cluster: Cluster) -> Iterator[str]:
    """The commands that start Ray: what a line of them has to have, and why."""
    wanted = {
        "head": {
            "--head": "there is no head",
            "--autoscaling-config=~/ray_bootstrap_config.yaml": "no node is ever started",
            "--dashboard-host=127.0.0.1": "the job server listens on every address",
            "--object-spilling-directory=": "objects spill to the container's own layer",
            "RAY_JOB_STOP_WAIT_TIME_S=": "a stopped job has 3 s to close its MLflow run",
        },
        "worker": {
            "--address=$RAY_HEAD_IP:": "it joins no cluster",
            "--object-spilling-directory=": "objects spill to the container's own layer",
        },
    }
    for key in ("setup_commands", "head_setup_commands"):
        if key not in cluster:
            yield f"{key}: found nothing, for which Ray installs packages of its own choice on the nodes; give a list, or []"
    for kind, parts in wanted.items():
        lines = cluster.get(f"{kind}_start_ray_commands") or []
        starts = [line for line in lines if "ray start" in line]
        if len(starts) != 1:
            yield f"{kind}_start_ray_commands: found {len(starts)} lines with ray start, expected one; correct it"
        for part, without in parts.items():
            if starts and part not in starts[0]:
                yield f"{kind}_start_ray_commands: found no {part} in ray start, without which {without}; add it"


def _regions(cluster: Cluster) -> Iterator[str]:
    """Commands that name another region than the provider's."""
    region = cluster["provider"].get("region")
    for key, text in _texts(cluster):
        for other in set(re.findall(r"\b[a-z]{2}(?:-gov)?-(?:north|south|east|west|central)(?:east|west)?-\d\b", text)):
            if other != region and not key.startswith("provider"):
                yield f"{key}: found {other}, expected {region} as in provider.region; correct one of them"


def _secrets(cluster: Cluster) -> Iterator[str]:
    for key, text in _texts(cluster):
        if re.search(r"\b(AKIA|ASIA)[A-Z0-9]{12,}", text) or (has_secret(text) and "RAY_AUTH_MODE=token" not in text):
            yield f"{key}: found what looks like a credential, expected none in this file; give it by the node's role"


def _versions(cluster: Cluster, ray_version: str) -> Iterator[str]:
    for key, text in _texts(cluster):
        for found in set(re.findall(r"(?:rayproject/ray:|[:-]ray)(\d+\.\d+\.\d+)", text)):
            if found != ray_version:
                yield f"{key}: found an image with Ray {found}, expected {ray_version}, which pyproject.toml pins; correct it"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file with its key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{place}]")
    elif isinstance(value, str):
        yield key, value
