"""Connection to Ray: the cluster that the job was submitted to, or a local one."""

import contextlib
import logging
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.annotations import RayDeprecationWarning

from cxr_dist.errors import InputError

__all__ = ["ENVIRONMENT", "connect", "free_cpus", "room_for"]

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
"""What driver and workers run with, unless the environment says otherwise. MLflow reads these from there alone, and its
defaults are 7 retries of up to 2 minutes and usage reports to its makers; Ray prints lines twice and draws bars in logs."""

POLL_S = 2.0


def connect(num_cpus_needed: float = 0) -> None:
    """Join the cluster of RAY_ADDRESS, of `ray job submit`, or that runs on this machine; else start a local one.

    A local cluster has at least `num_cpus_needed` logical CPUs, even of a machine with fewer cores: a rank that shares
    a core is slow, a stream without a CPU stands still. RAY_ADDRESS=local always starts one of its own. Does nothing
    where Ray is already up.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", RayDeprecationWarning)
    if ray.is_initialized():
        return
    # only what is set here travels; the cluster's own credentials stay its own
    options: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": ENVIRONMENT}}
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "local":
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            if address != "auto":
                raise InputError(
                    f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start it, or set RAY_ADDRESS=local"
                ) from None
        else:
            return
    cores = os.cpu_count() or 1
    num_cpus = max(cores, math.ceil(num_cpus_needed))
    log.info("starting a local Ray with %d logical CPUs on %d cores", num_cpus, cores)
    # with the dashboard, for Ray Train watches its own controller through it
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **options)


@contextlib.contextmanager
def room_for(bundles: Sequence[Mapping[str, float]], wait_s: float) -> Iterator[None]:
    """Keep an autoscaling cluster at a size that holds all bundles while the block runs; wait `wait_s` seconds at most.

    The cluster grows by itself only for work that waits, and a job that checks first would find nothing to work on.
    With 0 nothing is asked for. Returns when the room is there or the time is up: the caller checks what came.
    """
    if not wait_s:
        yield
        return
    wanted: Counter[str] = Counter()
    for bundle in bundles:
        wanted.update(bundle)
    request_resources(bundles=[dict(bundle) for bundle in bundles])
    try:
        deadline = time.monotonic() + wait_s
        log.info("waiting up to %.0f s for nodes with %s", wait_s, dict(wanted))
        while time.monotonic() < deadline and not _holds(ray.cluster_resources(), wanted):
            time.sleep(POLL_S)
        yield
    finally:
        request_resources(bundles=[])


def _holds(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in wanted.items())


def free_cpus(held: float) -> int:
    """Whole CPUs of the cluster that are left when the trainers hold `held` of them; at least one."""
    return max(1, math.floor(ray.cluster_resources().get("CPU", 0.0) - held + 1e-9))
