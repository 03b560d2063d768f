"""What the doctor found out, as plain values: the nodes, the ranks, and the JSON that other jobs read ("cxr-dist/doctor/1")."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cxr_dist.doctor.problems import Problem

if TYPE_CHECKING:
    from cxr_dist.doctor.ask import Answer

__all__ = ["FORMAT", "NodeReport", "RanksReport", "as_json", "decode_rates", "figure"]

FORMAT = "cxr-dist/doctor/1"

ROLE, INSTANCE, MARKET = "cxr-role", "cxr-instance", "cxr-market"
"""Labels that ray-cluster.yaml and infra/kubernetes give their nodes."""
REGION, RAY_MARKET, RAY_REGION = "cxr-region", "ray.io/market-type", "ray.io/availability-region"
"""The last two are Ray's own, which only some launchers set."""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node: what Ray was told of it, and what it says of itself (None, or empty, where it does not answer)."""

    node_id: str
    name: str
    """Host, with a number for a second node of that host."""
    is_head: bool = False
    role: str | None = None
    instance_type: str | None = None
    market: str | None = None
    region: str | None = None
    cpus: float = 0.0
    gpus: int = 0
    """GPUs that Ray was told."""
    memory_bytes: int = 0
    """Memory that Ray gives to tasks."""
    object_store_bytes: int = 0
    error: str | None = None
    """Why it says nothing of itself."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    gpu_names: tuple[str, ...] = ()
    """GPUs that torch computes on."""
    gpu_errors: tuple[str, ...] = ()
    """What torch says of those that it cannot use, or of itself."""
    scratch_free_bytes: int | None = None
    scratch_bytes: int | None = None
    cache_free_bytes: int | None = None
    """Free on the disk of `data.cache_dir`; None without one."""
    shm_bytes: int | None = None
    clock_skew_s: float | None = None
    """By which its clock is ahead of the driver's."""
    tracking_error: str | None = None
    dataset_error: str | None = None
    store_error: str | None = None
    store_read_bytes_per_s: float | None = None
    store_write_bytes_per_s: float | None = None
    decode_error: str | None = None
    decode_images_per_s: Mapping[str, float] = field(default_factory=dict)
    """Of all its CPUs together, by what is decoded: png, pixels."""

    @classmethod
    def of(
        cls,
        node: Mapping[str, Any],
        *,
        name: str,
        facts: "Answer",
        clock_skew_s: float | None = None,
        reaches: "Answer | None" = None,
        store: "Answer | None" = None,
        decode: "Answer | None" = None,
    ) -> "NodeReport":
        """The report of a node of `ray.nodes()` from its answers."""
        resources, labels, told = node["Resources"], node.get("Labels") or {}, facts.value or {}
        can, wrote, decoded = (_values(answer) for answer in (reaches, store, decode))
        market = labels.get(MARKET) or labels.get(RAY_MARKET)
        return cls(
            node_id=node["NodeID"],
            name=name,
            is_head="node:__internal_head__" in resources,
            role=labels.get(ROLE),
            instance_type=labels.get(INSTANCE),
            market=market if market in ("spot", "on-demand") else None,
            region=labels.get(REGION) or labels.get(RAY_REGION),
            cpus=float(resources.get("CPU", 0)),
            gpus=int(resources.get("GPU", 0)),
            memory_bytes=int(resources.get("memory", 0)),
            object_store_bytes=int(resources.get("object_store_memory", 0)),
            error=facts.error,
            versions=told.get("versions", {}),
            gpu_names=tuple(told.get("gpus", ())),
            gpu_errors=tuple(told.get("gpu_errors", ())),
            scratch_free_bytes=told.get("scratch_free_bytes"),
            scratch_bytes=told.get("scratch_bytes"),
            cache_free_bytes=told.get("cache_free_bytes"),
            shm_bytes=told.get("shm_bytes"),
            clock_skew_s=clock_skew_s,
            tracking_error=can.get("tracking", can.get("error")),
            dataset_error=can.get("dataset"),
            store_error=wrote.get("error"),
            store_read_bytes_per_s=wrote.get("read"),
            store_write_bytes_per_s=wrote.get("write"),
            decode_error=decoded.get("error"),
            decode_images_per_s={kind: decoded[kind] for kind in ("png", "pixels") if kind in decoded},
        )

    def as_json(self) -> dict[str, Any]:
        names = ("python", "ray", "torch", "cuda", "driver")
        others = [name for name in self.versions if name not in names]
        return {
            "node_id": self.node_id,
            "host": self.name,
            "role": self.role,
            "instance_type": self.instance_type,
            "market": self.market,
            "region": self.region,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "gpu_name": self.gpu_names[0] if self.gpu_names else None,
            "memory_bytes": self.memory_bytes,
            "object_store_bytes": self.object_store_bytes,
            "scratch_free_bytes": self.scratch_free_bytes,
            "versions": {name: self.versions.get(name) for name in (*names, *others)},
            "clock_skew_s": self.clock_skew_s,
            "store_read_bytes_per_s": self.store_read_bytes_per_s,
            "store_write_bytes_per_s": self.store_write_bytes_per_s,
            "decode_images_per_s": dict(self.decode_images_per_s) or None,
        }


@dataclass(frozen=True, kw_only=True)
class RanksReport:
    """What workers placed as the run's measured, by rank; empty or None where they did not."""

    backend: str
    hosts: tuple[str, ...] = ()
    train_images_per_s: tuple[float, ...] = ()
    """Whole training steps from pixels, each rank for itself."""
    prefix_images_per_s: tuple[float, ...] = ()
    tail_images_per_s: tuple[float, ...] = ()
    """Training steps from kept features: forward and backward of the tail."""
    share: int = 0
    """Images of a rank in a step."""
    gradient_bytes: int = 0
    """What the ranks add up in a step."""
    allreduce_bytes_per_s: float | None = None
    """Bytes of a gradient, summed over all ranks, a second."""

    def as_json(self) -> dict[str, Any]:
        """The slowest rank's rates, for the others wait for it."""
        return {
            "train_images_per_s_per_worker": min(self.train_images_per_s, default=None),
            "prefix_images_per_s_per_worker": min(self.prefix_images_per_s, default=None),
            "tail_images_per_s_per_worker": min(self.tail_images_per_s, default=None),
            "allreduce_bytes_per_s": self.allreduce_bytes_per_s,
            "gradient_bytes": self.gradient_bytes or None,
            "workers": len(self.hosts),
            "images_per_step_per_worker": self.share or None,
            "backend": self.backend,
        }


def decode_rates(nodes: Sequence[NodeReport]) -> dict[str, float | None]:
    """Images a second of one Ray CPU while all of its node decode, over the nodes that measured it."""
    found: dict[str, float | None] = {}
    for kind in ("png", "pixels"):
        measured = [node for node in nodes if kind in node.decode_images_per_s]
        cpus = sum(int(node.cpus) for node in measured)
        found[kind] = sum(node.decode_images_per_s[kind] for node in measured) / cpus if cpus else None
    return found


def as_json(
    *,
    problems: Sequence[Problem],
    notes: Sequence[str],
    nodes: Sequence[NodeReport] = (),
    ranks: RanksReport | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The job's result. Without problems the verdict is `ready`."""
    rates = (ranks or RanksReport(backend="gloo")).as_json()
    return {
        "format": FORMAT,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": "not ready" if problems else "ready",
        "problems": [problem.as_json() for problem in problems],
        "notes": list(notes),
        "nodes": [node.as_json() for node in nodes],
        "rates": {"decode_images_per_s_per_core": decode_rates(nodes), **rates},
        **(more or {}),
    }


def figure(value: float) -> str:
    """A rate for people: three digits, or all of its whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _values(answer: "Answer | None") -> Mapping[str, Any]:
    if answer is None:
        return {}
    return {"error": answer.error} if answer.error else answer.value
