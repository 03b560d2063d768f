"""Running many independent calls on a Ray cluster: few enough at once to bound memory, with progress, in order."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray

from cxr_dist.cluster import connect
from cxr_dist.placement import decoding

PROGRESS_S = 10.0
"""Longest time between progress lines, seconds."""
LEAST_SUBMITTED = 8
"""Calls submitted even where the cluster has no CPU yet: an autoscaler starts nodes for what waits."""

log = logging.getLogger(__name__)


def run(function: Callable[..., Any], arguments: Iterable[tuple], weights: Sequence[int], what: str) -> list[Any]:
    """The result of `function` for each tuple of arguments, in their order; one CPU a call.

    Joins the cluster if that has not been done. Two calls for each CPU that the cluster has by now are submitted at a
    time, so that it can grow and memory stays bounded; on ingest nodes first. `weights` (one a call, counted in `what`) give progress and ETA.
    An error stops what runs, waits for it, and is raised as the function raised it.
    """
    connect()
    remote = ray.remote(num_cpus=1, max_retries=3)(function)
    results: list[Any] = [None] * len(weights)
    running: dict[ray.ObjectRef, int] = {}
    started = said = time.monotonic()
    done = 0
    try:
        waiting = enumerate(arguments)
        while True:
            cpus, where = int(ray.cluster_resources().get("CPU", 0)), decoding()
            placed = remote.options(**where) if where else remote
            while len(running) < max(LEAST_SUBMITTED, 2 * cpus) and (following := next(waiting, None)) is not None:
                running[placed.remote(*following[1])] = following[0]
            if not running:
                break
            ready, _ = ray.wait(list(running), timeout=max(0.0, said + PROGRESS_S - time.monotonic()))
            for reference in ready:
                number = running.pop(reference)
                results[number] = ray.get(reference)
                done += weights[number]
            now = time.monotonic()
            if now - said >= PROGRESS_S or not running:
                said = now
                log.info("%s, %d CPUs", progress(done, sum(weights), now - started, what), cpus)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)
    return results


def progress(done: int, total: int, elapsed_s: float, what: str) -> str:
    """One line: how much is done, how fast, and how long the rest takes at that speed."""
    speed = done / elapsed_s if elapsed_s > 0 else 0.0
    left = f"{(total - done) / speed:.0f} s" if speed else "unknown"
    return f"{done:,} of {total:,} {what} ({speed:.0f}/s), {left} left"
