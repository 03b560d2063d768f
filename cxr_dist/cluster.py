"""Connection to Ray: the cluster that the job was submitted to, or a local one."""

import logging
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_dist import environment, storage
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.placement import not_on_spot

__all__ = ["check_visible", "connect", "free_cpus", "join", "wait_for_room"]

log = logging.getLogger(__name__)

POLL_S = 2.0


def connect(num_cpus_needed: float = 0) -> None:
    """Join the cluster of RAY_ADDRESS, of `ray job submit`, or that runs on this machine; else start a local one.

    A local cluster has at least `num_cpus_needed` logical CPUs, even of a machine with fewer cores: a rank that shares
    a core is slow, a stream without a CPU stands still. No other machine reaches it. RAY_ADDRESS=local always starts one
    of its own. Does nothing where Ray is already up.
    """
    if join():
        return
    _stay_on_loopback()
    cores = os.cpu_count() or 1
    num_cpus = max(cores, math.ceil(num_cpus_needed))
    log.info("starting a local Ray with %d logical CPUs on %d cores", num_cpus, cores)
    # with the dashboard, for Ray Train watches its own controller through it
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **_options())


def join() -> bool:
    """Join the cluster of RAY_ADDRESS, of `ray job submit`, or that runs on this machine; whether there is one. None is started.
    Does nothing where Ray is already up. InputError if none answers at RAY_ADDRESS."""
    environment.apply()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", RayDeprecationWarning)
    if ray.is_initialized():
        return True
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "local":
        return False
    try:
        ray.init(address=address, **_options())
    except ConnectionError as error:
        if address != "auto":
            raise InputError(
                f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start it, or set RAY_ADDRESS=local"
            ) from None
        return False
    return True


def _options() -> dict[str, Any]:
    """Of ray.init. Only what is set here travels; the cluster's own credentials stay its own."""
    return {"logging_level": logging.WARNING, "runtime_env": {"env_vars": environment.SETTINGS}}


def _stay_on_loopback() -> None:
    """Have the local cluster that is started next listen on 127.0.0.1: Ray's default is every interface of the machine."""
    if os.environ.setdefault(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0") == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's processes read the variable, this one has read it at import


def wait_for_room(bundles: Sequence[Mapping[str, float]], wait_s: float) -> None:
    """Ask an autoscaling cluster for room for all bundles and wait for it, `wait_s` seconds at most.

    The cluster grows by itself only for work that waits, and a job that checks first would find nothing to work on.
    With 0 nothing is asked for. Returns when the room is there or the time is up, and takes the request back: it would
    outlive the job and keep paid nodes. The caller checks what came. (A cluster holds one such request at a time.)

    For the second third of the time, GPUs that did not come are asked for on demand: Ray 2.60 does not remember that EC2
    refused a spot node, and would ask for the same again for ever. Afterwards for any again, because a request that no
    node type can fulfil brings nothing at all.
    """
    if not wait_s:
        return
    wanted: Counter[str] = Counter()
    for bundle in bundles:
        wanted.update(bundle)
    wishes = [dict(bundle) for bundle in bundles]
    request_resources(bundles=wishes)
    try:
        began = time.monotonic()
        log.info("waiting up to %.0f s for nodes with %s", wait_s, dict(wanted))
        asked = 0
        while (waited := time.monotonic() - began) < wait_s and not _holds(there := ray.cluster_resources(), wanted):
            third = int(3 * waited / wait_s)
            if third != asked and wanted["GPU"]:
                selectors = not_on_spot(bundles, there) if third == 1 else [{} for _ in bundles]
                if any(selectors):
                    log.info("%d GPU nodes did not come, asking for them on demand", sum(map(bool, selectors)))
                request_resources(bundles=wishes, bundle_label_selectors=selectors)
            asked = third
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])


def check_visible(uris: Mapping[str, str]) -> None:
    """Every machine of the cluster sees the local files of `uris` (config key to path); ConfigError names one that does not."""
    local = {key: uri for key, uri in uris.items() if storage.is_local(uri)}
    hosts = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if not local or len(hosts) < 2:
        return
    probe = ray.remote(num_cpus=0)(lambda paths: [key for key, path in paths.items() if not os.path.exists(path)])
    for host, node_id in hosts.items():
        affinity = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        missing = ray.get(probe.options(scheduling_strategy=affinity).remote(local))
        if missing:
            raise ConfigError(
                f"{missing[0]}: {local[missing[0]]} is not there on {host}; on several machines give a path that all of "
                "them share, or an object store (s3://…)"
            )


def _holds(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in wanted.items())


def free_cpus(held: float) -> int:
    """Whole CPUs of the cluster that are left when the trainers hold `held` of them; at least one."""
    return max(1, math.floor(ray.cluster_resources().get("CPU", 0.0) - held + 1e-9))
