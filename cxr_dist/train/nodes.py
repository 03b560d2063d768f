"""System metrics of every node of the cluster, from a small actor on each; none of it can stop the run."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["system_metrics"]

log = logging.getLogger(__name__)

STOP_S = 10.0
"""Longest wait for the last samples, seconds."""


@contextlib.contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU use of each node, as system/nodeN-ADDRESS/…, while the block runs."""
    actor = ray.remote(num_cpus=0, max_restarts=3)(NodeMonitor)
    monitors = []
    for number, node in enumerate(node for node in ray.nodes() if node["Alive"]):
        name = f"node{number}-{node['NodeManagerAddress']}"
        affinity = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        monitors.append(actor.options(scheduling_strategy=affinity).remote(tracking_uri, run_id, name))
    patient = True
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        patient = False  # a stopped job has seconds left, and the run's status needs them more than the last samples
        raise
    finally:
        if patient:
            _stop(monitors)
        for monitor in monitors:
            ray.kill(monitor)


def _stop(monitors: list[Any]) -> None:
    """Have each node send its last samples."""
    stopped = [monitor.stop.remote() for monitor in monitors]
    done, _ = ray.wait(stopped, num_returns=len(stopped), timeout=STOP_S)
    if len(done) < len(stopped):
        log.warning("system metrics: %d of %d nodes did not answer", len(stopped) - len(done), len(stopped))


class NodeMonitor:
    """The actor on one node; it starts with a process of its own, so that a dead server blocks nobody."""

    def __init__(self, tracking_uri: str, run_id: str, name: str):
        from cxr_dist.system_metrics import start_system_metrics

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.metrics = start_system_metrics(tracking_uri, run_id, name)

    def stop(self) -> None:
        self.metrics.stop()
