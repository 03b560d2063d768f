"""What a rank's batches come from, where the features stay in memory."""

import functools
import logging
from typing import Any

import ray
import torch
from ray.train import DataConfig

from cxr_dist.cluster import free_cpus
from cxr_dist.config import Config
from cxr_dist.data.features import FeatureSet
from cxr_dist.data.resident import (
    HostRows,
    Name,
    ResidentDataConfig,
    ResidentFeed,
    ResidentSet,
    ResidentShard,
    read_all,
)
from cxr_dist.data.stream import PlanDataConfig
from cxr_dist.model.features import DeviceRows
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.job import TrainJob

__all__ = ["choose", "data_config", "num_decoders", "resident_feed"]

log = logging.getLogger(__name__)

DEVICE_PART = 0.6
"""Part of a GPU's free memory that features may take; the tail, its gradients and activations need the rest."""
STORE_PART = 0.7
"""Part of a node's object store that features may take, at most; evaluation streams through it too."""


def choose(asked: str, num_bytes: int, *, device_bytes: int, store_bytes: int) -> tuple[str, str]:
    """Where features of so many bytes stay (`device`, `store` or `stream`), and why in one line.

    `device_bytes` is the free memory of a rank's GPU (0: none), `store_bytes` the smallest object store among the nodes.
    What was asked for and does not fit falls to the next.
    """
    features = _shown(num_bytes)
    fits_device = num_bytes <= DEVICE_PART * device_bytes
    fits_store = num_bytes <= STORE_PART * store_bytes
    device = f"{_shown(device_bytes)} free on the GPU" if device_bytes else "no GPU"
    have = f"{device}, {_shown(store_bytes)} of object store on each node"
    if asked in ("auto", "device") and fits_device:
        return "device", f"{features} of features stay on the device ({have})"
    fallen = f", {asked} was asked for" if asked == "device" else ""
    if asked in ("auto", "device", "store") and fits_store:
        return "store", f"{features} of features stay in each node's object store ({have}{fallen})"
    fallen = f", {asked} was asked for" if asked in ("device", "store") else ""
    return "stream", f"{features} of features are streamed from their shards ({have}{fallen})"


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def data_config(job: TrainJob, *, device_bytes: int) -> DataConfig:
    """What gives the ranks their batches: the stream, or features in memory. DamagedFeatures if a kept one is not whole.

    `device_bytes` is the free memory of a rank's GPU.
    """
    if job.features is None:
        return PlanDataConfig(job.remaining, functools.partial(num_decoders, job.config))
    num_bytes = sum(found.num_bytes for found in job.features.values())
    store_bytes = store_bytes_per_node(use_gpu=job.use_gpu)
    level, why = choose(job.config.train.features_memory, num_bytes, device_bytes=device_bytes, store_bytes=store_bytes)
    log.info("features: %s", why)
    refs = read_all(job.features, keep=level != "stream" and num_bytes <= STORE_PART * store_bytes)
    if level == "stream":
        return PlanDataConfig(job.remaining, functools.partial(num_decoders, job.config))
    return ResidentDataConfig(ResidentShard(sets=job.features, refs=refs), job.position)


def num_decoders(config: Config, world_size: int) -> int:
    """Decoding processes beside so many ranks: `data.decode_workers`, or one for each CPU that the ranks leave free."""
    return config.data.decode_workers or free_cpus(world_size * config.train.cpus_per_worker)


def store_bytes_per_node(*, use_gpu: bool) -> int:
    """The smallest object store among the nodes that can hold ranks."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if node.get("GPU" if use_gpu else "CPU", 0) >= 1]
    return int(min((node.get("object_store_memory", 0) for node in able), default=0))


def resident_feed(shard: ResidentShard, job: TrainJob, ranks: Ranks, device: torch.device) -> ResidentFeed:
    """A rank's batches from features in memory: the device's if they fit there, else the host's."""
    config = job.config.train
    num_bytes = sum(found.num_bytes for found in shard.sets.values())
    level = "store"
    if device.type == "cuda" and config.features_memory != "store":
        level, why = choose("auto", num_bytes, device_bytes=torch.cuda.mem_get_info(device)[0], store_bytes=1 << 62)
        log.info("rank %d: %s", ranks.rank, why)
    return ResidentFeed(
        sets=_sets(shard, job, device if level == "device" else None),
        plan=job.plan,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=shard.start,
        views=config.views,
        augment=config.augment,
    )


def _sets(shard: ResidentShard, job: TrainJob, device: torch.device | None) -> dict[Name, ResidentSet]:
    def rows(found: FeatureSet) -> Any:
        return HostRows(found) if device is None else DeviceRows(found, device)

    try:
        return {
            name: ResidentSet(found, shard.tables(name), job.columns, rows(found)) for name, found in shard.sets.items()
        }
    except torch.OutOfMemoryError:
        log.warning("features do not fit the device's memory after all; they stay in the host's")
        torch.cuda.empty_cache()
        return _sets(shard, job, None)
