"""Keys and values of a cluster file that nobody reads: Ray's launcher passes over most of them, or EC2 refuses them late.

Three models say what there is, all of them offline: Ray's own schema, the provider keys that its AWS code reads, and
botocore's model of RunInstances, which every `node_config` becomes an argument of.
"""

import copy
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import botocore.session
import click
from botocore.model import ListShape, MapShape, Shape, StringShape, StructureShape
from ray.autoscaler._private.util import prepare_config, validate_config

__all__ = ["near", "node_config_problems", "provider_problems", "schema_problems"]

Cluster = Mapping[str, Any]

PROVIDER_KEYS = {
    *("type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "key_pair", "cloudwatch"),
    *("use_internal_ips", "use_external_head_ip", "aws_credentials", "disable_node_updaters"),
    *("disable_launch_config_check", "foreground_node_launch", "worker_liveness_check", "worker_rpc_drain"),
}
"""What Ray 2.60 looks up under `provider` for AWS; its schema lets any key pass."""

OF_RAY = {"SubnetIds"}
"""Keys of `node_config` that are Ray's: it makes one `SubnetId` of them."""
SET_BY_RAY = {"MinCount", "MaxCount", "SubnetId", "DryRun", "ClientToken"}
"""Arguments of RunInstances that are given with each launch, and not in the file."""

KINDS = {"integer": int, "long": int, "boolean": bool, "string": str, "double": (int, float), "float": (int, float)}


def schema_problems(cluster: Cluster) -> list[str]:
    """What Ray's launcher itself refuses, in its words."""
    try:
        validate_config(prepare_config(copy.deepcopy(dict(cluster))))
    except (Exception, click.ClickException) as error:  # noqa: BLE001  jsonschema's, ValueError, AssertionError, and Ray's own
        said = getattr(error, "message", "") or str(error)
        where = ".".join(str(step) for step in getattr(error, "absolute_path", ()))
        return [f"{where or 'the file'}: Ray's launcher refuses it ({' '.join(said.split())[:300]}); correct it"]
    return []


def provider_problems(provider: Mapping[str, Any]) -> Iterator[str]:
    """Unknown keys of `provider`, another cloud, a region that does not exist."""
    for key in provider:
        if key not in PROVIDER_KEYS:
            yield f"provider.{key}: found a key that Ray does not read, {near(key, PROVIDER_KEYS)}"
    if provider.get("type") != "aws":
        yield f"provider.type: found {provider.get('type')!r}, expected aws; these checks know no other cloud"
    if "aws_credentials" in provider:
        yield "provider.aws_credentials: found credentials in the file, expected none; give them by AWS_PROFILE"
    regions = _regions()
    region, zones = str(provider.get("region", "")), str(provider.get("availability_zone", ""))
    if region not in regions:
        yield f"provider.region: found {region or 'nothing'}, expected a region of AWS, {near(region, regions)}"
    for zone in filter(None, map(str.strip, zones.split(","))):
        if not zone.startswith(region):
            yield f"provider.availability_zone: found {zone}, expected zones of {region}; correct one of them"


def node_config_problems(name: str, node_config: Mapping[str, Any]) -> Iterator[str]:
    """What EC2 would refuse of a node type's `node_config`, or nobody would read, by botocore's model of RunInstances."""
    where = f"available_node_types.{name}.node_config"
    for key in sorted(SET_BY_RAY & set(node_config)):
        yield f"{where}.{key}: found a value that Ray sets itself at every launch; remove it"
    mine = {key: value for key, value in node_config.items() if key not in OF_RAY | SET_BY_RAY}
    yield from _walk(where, mine, _run_instances(), partial=SET_BY_RAY, extra=OF_RAY)
    if "InstanceType" not in node_config:
        yield f"{where}.InstanceType: found nothing, expected an instance type; add one"


@functools.cache
def _regions() -> frozenset[str]:
    session = botocore.session.get_session()
    parts = session.get_available_partitions()
    return frozenset(region for part in parts for region in session.get_available_regions("ec2", part))


@functools.cache
def _run_instances() -> StructureShape:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _walk(
    where: str, value: Any, shape: Shape, *, partial: Iterable[str] = (), extra: Iterable[str] = ()
) -> Iterator[str]:
    """What of `value` is not as botocore's shape has it; `partial` need not be there, `extra` may be."""
    if isinstance(shape, StructureShape):
        if not isinstance(value, Mapping):
            yield f"{where}: found {value!r}, expected a mapping; give one of {', '.join(sorted(shape.members))}"
            return
        for key, inner in value.items():
            if key in shape.members:
                yield from _walk(f"{where}.{key}", inner, shape.members[key])
            else:
                yield f"{where}.{key}: found a key that EC2 does not know, {near(key, {*shape.members, *extra})}"
        for key in sorted(set(shape.required_members) - set(value) - set(partial)):
            yield f"{where}.{key}: found nothing, and EC2 refuses a launch without it; add it"
    elif isinstance(shape, ListShape):
        if not isinstance(value, list):
            yield f"{where}: found {value!r}, expected a list; write [{value}]"
            return
        for place, inner in enumerate(value):
            yield from _walk(f"{where}[{place}]", inner, shape.member)
    elif isinstance(shape, MapShape):
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            yield from _walk(f"{where}.{key}", inner, shape.value)
    elif not _is_a(value, KINDS.get(shape.type_name, object)):
        yield f"{where}: found {value!r}, expected {shape.type_name}; correct it"
    elif isinstance(shape, StringShape) and shape.enum and value not in shape.enum:
        yield f"{where}: found {value!r}, which botocore {botocore.__version__} does not know, {near(value, shape.enum)}"


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or kind is object or not isinstance(value, bool))


def near(key: str, known: Iterable[str]) -> str:
    """What a person may have meant."""
    found = difflib.get_close_matches(str(key), sorted(known), n=1)
    return f"did you mean {found[0]}?" if found else "remove or correct it"
