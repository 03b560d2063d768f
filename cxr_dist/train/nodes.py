"""System metrics of every node of the cluster, from a small actor on each; none of it can stop the run."""

import contextlib
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["node_names", "system_metrics"]

log = logging.getLogger(__name__)

STOP_S = 10.0
"""Longest wait for the last samples, seconds."""
LOOK_S = 15.0
"""Time between two looks for nodes that have joined the cluster, seconds."""


@contextlib.contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU use of each node, as system/HOST/…, while the block runs; nodes that join
    meanwhile included."""
    monitors = Monitors(tracking_uri, run_id)
    monitors.look()
    watching = threading.Thread(target=monitors.watch, name="nodes", daemon=True)
    watching.start()
    patient = True
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        patient = False  # a stopped job has seconds left, and the run's status needs them more than the last samples
        raise
    finally:
        monitors.over.set()
        watching.join(STOP_S)
        monitors.end(patient=patient)


def node_names(nodes: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> dict[str, str]:
    """NodeID → the name of its metrics, for the living nodes of `ray.nodes()`: the host's, with a number for a second
    node of that name. Nodes that are `known` keep theirs, a node that is gone too, for its metrics are still there."""
    names = dict(known)
    for node in sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeID"])):
        host = re.sub(r"[^\w.\-]", "_", node.get("NodeManagerHostname") or node["NodeManagerAddress"])
        number, name = 1, host
        while name in names.values() and node["NodeID"] not in names:
            number += 1
            name = f"{host}-{number}"
        names.setdefault(node["NodeID"], name)
    return names


class Monitors:
    """The actors, one a node."""

    def __init__(self, tracking_uri: str, run_id: str):
        self.about = (tracking_uri, run_id)
        self.names: dict[str, str] = {}
        self.actors: list[Any] = []
        self.over = threading.Event()

    def look(self) -> None:
        """Start the monitors of nodes that have none yet."""
        names = node_names(ray.nodes(), self.names)
        actor = ray.remote(num_cpus=0, max_restarts=3)(NodeMonitor)
        for node_id in names.keys() - self.names.keys():
            affinity = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            self.actors.append(actor.options(scheduling_strategy=affinity).remote(*self.about, names[node_id]))
        self.names = names

    def watch(self) -> None:
        """Thread body: `look`, once in a while."""
        while not self.over.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - whatever the cluster answers, it is asked again
                log.warning("system metrics: cannot look for new nodes: %s", " ".join(str(error).split()))

    def end(self, *, patient: bool) -> None:
        """End them all; if `patient`, after each has sent its last samples."""
        if patient:
            stopped = [monitor.stop.remote() for monitor in self.actors]
            done, _ = ray.wait(stopped, num_returns=len(stopped), timeout=STOP_S)
            if len(done) < len(stopped):
                log.warning("system metrics: %d of %d nodes did not answer", len(stopped) - len(done), len(stopped))
        for monitor in self.actors:
            ray.kill(monitor)


class NodeMonitor:
    """The actor on one node; it starts with a process of its own, so that a dead server blocks nobody."""

    def __init__(self, tracking_uri: str, run_id: str, name: str):
        from cxr_dist.system_metrics import start_system_metrics

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.metrics = start_system_metrics(tracking_uri, run_id, name)

    def stop(self) -> None:
        self.metrics.stop()
