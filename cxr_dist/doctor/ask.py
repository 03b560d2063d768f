"""Questions to every node of the cluster at once, each with a bound: a node that does not answer is named, not waited for."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_dist.config import Config
from cxr_dist.doctor.node import NodeProbe
from cxr_dist.doctor.problems import one_line
from cxr_dist.doctor.report import NodeReport
from cxr_dist.train.nodes import node_names

__all__ = ["Answer", "answers", "ask_nodes"]

K = TypeVar("K")

MEASURE_S = 300.0
"""Longest that a node may take to measure its decoding or its way to the store, seconds."""
PINGS = 3
"""Times that a node's clock is asked; the answer that came fastest counts."""
PING_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question."""

    value: Any = None
    error: str | None = None
    """Why there is no value; None where there is one."""
    silent: bool = False
    """Whether nothing came at all in the time there was."""


def answers(refs: Mapping[K, Any], timeout_s: float) -> dict[K, Answer]:
    """The answer of each question that was asked, after `timeout_s` seconds at most."""
    done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
    came = set(done)
    return {key: _answer(ref) if ref in came else _silence(timeout_s) for key, ref in refs.items()}


def ask_nodes(
    config: Config,
    nodes: Sequence[Mapping[str, Any]],
    *,
    prefix_of: Callable[[str], str] | None,
    store_bytes: int,
    images: Sequence[bytes],
    timeout_s: float,
) -> list[NodeReport]:
    """A report of each living node of `ray.nodes()`, the head first.

    `prefix_of` gives the URI under which a node, by its id, may write to try the store (None: it is not tried); `images`
    are the PNG files that it decodes.
    """
    alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
    names = node_names(list(alive.values()), {})
    make = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    probes = {
        node_id: make.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)).remote()
        for node_id in alive
    }
    try:
        facts = answers({key: probe.facts.remote(config.data.cache_dir) for key, probe in probes.items()}, timeout_s)
        up = {key: probe for key, probe in probes.items() if facts[key].error is None}
        clocks = {key: _clock(probe) for key, probe in up.items()}
        where = config.tracking.uri if config.tracking.uri.startswith(("http://", "https://")) else ""
        reaches = answers({key: probe.reaches.remote(where, config.data.uri) for key, probe in up.items()}, MEASURE_S)
        stores: dict[str, Answer] = {}
        if prefix_of is not None:
            refs = {key: probe.store.remote(prefix_of(key), store_bytes) for key, probe in up.items()}
            stores = answers(refs, MEASURE_S)
        data, refs = ray.put(list(images)), {}
        for key, probe in up.items():
            processes = min(int(alive[key]["Resources"].get("CPU", 0)), facts[key].value["cores"])
            if processes and images:
                refs[key] = probe.decode.remote(data, config.data.size, config.data.row_group, processes)
        decodes = answers(refs, MEASURE_S)
    finally:
        for probe in probes.values():
            ray.kill(probe)
    reports = [
        NodeReport.of(
            node,
            name=names[key],
            facts=facts[key],
            clock_skew_s=clocks.get(key),
            reaches=reaches.get(key),
            store=stores.get(key),
            decode=decodes.get(key),
        )
        for key, node in alive.items()
    ]
    return sorted(reports, key=lambda report: (not report.is_head, report.role or "", report.name))


def _clock(probe: Any) -> float | None:
    """Seconds by which a node's clock is ahead of this process's; None if it does not answer."""
    best: tuple[float, float] | None = None
    for _ in range(PINGS):
        asked = time.time()
        answer = answers({0: probe.now.remote()}, PING_S)[0]
        came = time.time()
        if answer.error is not None:
            return None
        if best is None or came - asked < best[0]:
            best = came - asked, answer.value - (asked + came) / 2
    return best[1] if best else None


def _answer(ref: Any) -> Answer:
    try:
        return Answer(value=ray.get(ref))
    except RayTaskError as error:
        return Answer(error=one_line(getattr(error, "cause", error)) or "failed")
    except RayError as error:
        text = str(error).strip()
        if "creation task" in text:  # a traceback follows, whose last line says why
            return Answer(error=one_line(text.splitlines()[-1]))
        return Answer(error=one_line(text).partition(". ")[0])


def _silence(timeout_s: float) -> Answer:
    return Answer(error=f"no answer within {timeout_s:g} s", silent=True)
