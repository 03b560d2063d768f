"""Connection to Ray: the cluster that the job was submitted to, or a local one."""

import logging
import math
import os
from typing import Any

import ray

from cxr_dist.tracking import CLIENT_ENVIRONMENT

__all__ = ["connect", "free_cpus"]

log = logging.getLogger(__name__)

QUIET = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


def connect(num_cpus_needed: float = 0) -> None:
    """Join the cluster of RAY_ADDRESS or `ray job submit`; else start a local one with at least so many logical CPUs.

    A local cluster of a small machine may promise more logical CPUs than there are cores: a rank that shares a core
    is slow, a stream without a CPU stands still. Does nothing where Ray is already up.
    """
    for name, value in {**CLIENT_ENVIRONMENT, **QUIET}.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    # only what is set here travels; the cluster's own credentials stay its own
    options["runtime_env"] = {"env_vars": {**CLIENT_ENVIRONMENT, **QUIET}}
    if "RAY_ADDRESS" not in os.environ:
        cores = os.cpu_count() or 1
        options |= {"num_cpus": max(cores, math.ceil(num_cpus_needed)), "include_dashboard": False}
        log.info("starting a local Ray with %d logical CPUs on %d cores", options["num_cpus"], cores)
    ray.init(**options)


def free_cpus(held: float) -> int:
    """Whole CPUs of the cluster that are left when the trainers hold `held` of them; at least one."""
    return max(1, math.floor(ray.cluster_resources().get("CPU", 0.0) - held + 1e-9))
