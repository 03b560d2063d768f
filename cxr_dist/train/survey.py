"""What a rank's device makes of the network: shapes, memory, speed; and whether keeping features is worth it.

The survey runs where the ranks will run (on a GPU node as a task, else in the driver), since precision, memory and
rates belong to the device. The decision is arithmetic on it.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from cxr_dist import storage
from cxr_dist.config import Config
from cxr_dist.model import weights
from cxr_dist.model.features import key_inputs
from cxr_dist.model.network import Network, masked_loss
from cxr_dist.train.job import TrainJob

__all__ = ["Decision", "Rates", "Survey", "Work", "decide", "fits", "network_of", "rates_of", "survey"]

REPEATS = 3
"""Timed repeats of each kind of work, after one that is not counted; the fastest stands."""
WORTH = 0.9
"""Part of the uncached time that a run with features may take at most to be worth the storage."""
START_S = 10.0
"""What a pass of the prefix costs before its first image: processes that import torch, a pipeline that starts."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What an image costs one rank, seconds."""

    prefix: float
    tail: float
    """Forward and backward of the tail."""
    score: float
    """Forward of the tail alone."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A device, and what the run's network is on it."""

    inputs: dict[str, Any]
    """What the network adds to the key of features."""
    shape_HWC: tuple[int, int, int]
    free_bytes: int
    """Free memory of a GPU; 0 on CPU."""
    rates: Rates | None = None
    """None where they were not asked for."""


def survey(job: TrainJob, *, measure: bool) -> Survey:
    """Survey the device of the ranks. Needs a running Ray if they have GPUs."""
    if job.use_gpu:
        return ray.get(ray.remote(num_gpus=1)(survey_here).remote(job, measure))
    threads = torch.get_num_threads()
    try:
        return survey_here(job, measure)
    finally:
        torch.set_num_threads(threads)


def survey_here(job: TrainJob, measure: bool) -> Survey:
    """Survey this process's device."""
    network = network_of(job)
    device = network.device
    images = np.zeros((network.chunk, job.size, job.size), np.uint8)
    features = network.features(images)
    found = Survey(
        inputs=key_inputs(network, job.config.model),
        shape_HWC=(features.shape[2], features.shape[3], features.shape[1]),
        free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
    )
    if not measure:
        return found
    share = job.config.train.micro_batch or job.plan.rank_batch(job.world_sizes[-1])
    return dataclasses.replace(found, rates=rates_of(network, size=job.size, share=share, findings=len(job.findings)))


def rates_of(network: Network, *, size: int, share: int, findings: int) -> Rates:
    """What an image of `size` pixels a side costs on the network's device; the tail takes `share` of them at once."""
    device = network.device
    images = np.zeros((network.chunk, size, size), np.uint8)
    features = network.features(images)
    batch = features.repeat(math.ceil(share / len(features)), 1, 1, 1)[:share]
    labels = torch.zeros(share, findings, device=device)
    valid = torch.ones(share, dtype=torch.bool, device=device)

    def train() -> None:
        with network.mixed():
            logits = network.tail(batch)
        masked_loss(logits, labels, valid, None, divisor=1.0).backward()

    return Rates(
        prefix=fastest(lambda: network.features(images), device) / len(images),
        tail=fastest(train, device) / share,
        score=fastest(lambda: network.score_features(features), device) / len(features),
    )


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few repeats."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def network_of(job: TrainJob) -> Network:
    """The run's network at its start, on this process's device; sets its number of threads."""
    if not job.use_gpu:
        torch.set_num_threads(job.config.train.threads_per_worker)
    initial = weights.restore(storage.read_bytes(storage.join(job.folder, "initial.pt")), "initial.pt")
    return Network.build(
        initial,
        job.config.model,
        num_findings=len(job.findings),
        precision=job.config.train.precision,
        device=torch.device("cuda" if job.use_gpu else "cpu"),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run has to compute, in images."""

    epochs: int
    train: int
    """Training images of an epoch."""
    validation: int
    missing: int
    """Views of images whose features are not kept yet; 0 if all are there."""
    wanted: int
    """Views of images whose features the run would use."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a run works from kept features, and why in one line."""

    use: bool
    why: str


def settled(config: Config) -> Decision | None:
    """The decision where the config alone makes it; None where rates must be asked."""
    train = config.train
    if train.features == "off":
        return Decision(use=False, why="train.features is off")
    if config.model.trainable == "all":
        return Decision(use=False, why="model.trainable is all: no part of the network is frozen")
    if train.augment and not train.views:
        return Decision(
            use=False, why="every epoch shows fresh views (train.views 0); set train.views to keep features"
        )
    if train.features == "on":
        return Decision(use=True, why="train.features is on")
    return None


def fits(free_bytes: int | None, needed_bytes: int) -> bool:
    """Whether a disk with so much free takes so much, with a tenth to spare; None: an object store, which does."""
    return free_bytes is None or needed_bytes <= 0.9 * free_bytes


def decide(
    work: Work, rates: Rates, *, workers: int = 1, free_bytes: int | None = None, needed_bytes: int = 0
) -> Decision:
    """Whether keeping features is faster, from what there is to compute and what it costs.

    `workers` ranks share the work of both ways; `free_bytes` of the disk that features go to (None: an object store).
    """
    if not work.missing:
        return Decision(use=True, why=f"the features of all {work.wanted} views of images are there")
    if not fits(free_bytes, needed_bytes):
        return Decision(
            use=False,
            why=f"features would take {needed_bytes / 1e9:.1f} GB, more than is free there; set train.features_uri",
        )
    tail_s = work.epochs * (work.train * rates.tail + work.validation * rates.score) / workers
    without_s = tail_s + work.epochs * (work.train + work.validation) * rates.prefix / workers
    with_s = tail_s + work.missing * rates.prefix / workers + START_S
    figures = (
        f"{without_s:.0f} s without and {with_s:.0f} s with, by {rates.prefix * 1e3:.3g} ms an image for the prefix and "
        f"{rates.tail * 1e3:.3g} for the tail; {work.missing} views to compute, {work.epochs} epochs of {work.train} images"
    )
    if with_s > WORTH * without_s:
        return Decision(use=False, why=f"it would hardly be faster: {figures}")
    return Decision(use=True, why=f"{without_s / with_s:.1f} times faster: {figures}")
