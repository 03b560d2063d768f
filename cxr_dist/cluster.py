"""Connection to Ray: the cluster that the job was submitted to, or a local one."""

import logging
import math
import os
import warnings
from typing import Any

import ray
from ray.util.annotations import RayDeprecationWarning

from cxr_dist.errors import InputError
from cxr_dist.tracking import CLIENT_ENVIRONMENT

__all__ = ["connect", "free_cpus"]

log = logging.getLogger(__name__)

ENVIRONMENT = {**CLIENT_ENVIRONMENT, "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
"""What driver and workers run with: short MLflow retries, each line printed once, logs without progress bars."""


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


def free_cpus(held: float) -> int:
    """Whole CPUs of the cluster that are left when the trainers hold `held` of them; at least one."""
    return max(1, math.floor(ray.cluster_resources().get("CPU", 0.0) - held + 1e-9))
