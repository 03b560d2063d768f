"""What `jobs/doctor.py` measured on a cluster, as the plan of a run needs it: its nodes and its rates.

Everything may be missing: what was not measured is None, and nothing stands in for it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from cxr_dist import storage
from cxr_dist.errors import DataError

__all__ = ["MeasuredNode", "Measurements", "read_measurements"]

FORMAT = "cxr-dist/doctor/1"


@dataclass(frozen=True, kw_only=True)
class MeasuredNode:
    """A node as the doctor found it, or as Ray says it is."""

    instance: str | None = None
    market: str | None = None
    region: str | None = None
    role: str | None = None
    cpus: float = 0.0
    gpus: float = 0.0
    object_store_bytes: int = 0
    read_bytes_per_s: float | None = None
    """From the object store of the data."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """A doctor's report, as far as a plan goes by it."""

    where: str
    when: str
    """ISO 8601, UTC."""
    verdict: str
    nodes: tuple[MeasuredNode, ...]
    decode: dict[str, float]
    """Images a second of a core, by encoding: png, pixels."""
    train: float | None = None
    """Images a second of one worker in a whole training step, prefix and tail."""
    prefix: float | None = None
    """Images a second of one worker in the frozen prefix alone."""
    allreduce_bytes_per_s: float | None = None


def read_measurements(uri: str) -> Measurements:
    """The doctor's report at a URI; DataError for anything else."""
    where = f"--doctor {storage.shown(uri)}"
    advice = "give what `jobs/doctor.py --json FILE` wrote"
    try:
        found = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        raise DataError(f"{where}: found no file; {advice}") from None
    except ValueError:
        raise DataError(f"{where}: found no JSON; {advice}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise DataError(f"{where}: found format {kind!r}, expected {FORMAT!r}; {advice}")
    try:
        rates = _section(found, "rates", where)
        return Measurements(
            where=storage.shown(uri),
            when=str(found.get("when", "")),
            verdict=str(found.get("verdict", "")),
            nodes=tuple(_node(raw, where) for raw in found.get("nodes") or ()),
            decode={
                encoding: rate
                for encoding in _section(rates, "decode_images_per_s_per_core", where)
                if (rate := _rate(rates["decode_images_per_s_per_core"], encoding, where)) is not None
            },
            train=_rate(rates, "train_images_per_s_per_worker", where),
            prefix=_rate(rates, "prefix_images_per_s_per_worker", where),
            allreduce_bytes_per_s=_rate(rates, "allreduce_bytes_per_s", where),
        )
    except (TypeError, AttributeError):
        raise DataError(f"{where}: found another layout than {FORMAT!r} has; {advice}") from None


def _section(found: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    section = found.get(name) or {}
    if not isinstance(section, dict):
        raise DataError(f"{where}: found {name} {section!r}, expected names and numbers; measure again")
    return section


def _rate(found: dict[str, Any], name: str, where: str) -> float | None:
    value = found.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DataError(f"{where}: found {name} {value!r}, expected a positive number or null; measure again")
    return float(value)


def _node(raw: dict[str, Any], where: str) -> MeasuredNode:
    return MeasuredNode(
        instance=raw.get("instance_type"),
        market=raw.get("market"),
        region=raw.get("region"),
        role=raw.get("role"),
        cpus=float(raw.get("cpus") or 0),
        gpus=float(raw.get("gpus") or 0),
        object_store_bytes=int(raw.get("object_store_bytes") or 0),
        read_bytes_per_s=_rate(raw, "store_read_bytes_per_s", where),
    )


def of_ray(node: dict[str, Any], region: str = "") -> MeasuredNode:
    """A node of `ray.nodes()`: nothing about it is measured."""
    from cxr_dist.cost import kind_of

    labels, resources = node.get("Labels") or {}, node.get("Resources") or {}
    return MeasuredNode(
        **dataclasses.asdict(kind_of(labels, region)),
        role=labels.get("cxr-role"),
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        object_store_bytes=int(resources.get("object_store_memory", 0)),
    )
