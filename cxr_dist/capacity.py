"""Whether a run fits: the batch over the ranks, the ranks and the decoding over the cluster. Arithmetic only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cxr_dist.config import Config
from cxr_dist.data.plan import allowed_world_sizes
from cxr_dist.errors import ConfigError

__all__ = ["check_resources", "decoding_cpus", "wants_gpu", "world_sizes"]


def world_sizes(config: Config, row_group: int) -> tuple[int, ...]:
    """Numbers of ranks within `train.num_workers` that the run can go on with, ascending; ConfigError if there is none.

    The global batch is dealt to ranks in whole row groups, and a rank's share in whole micro-batches and batch-norm
    groups. `row_group` is the dataset's (images; 1 if it is read in place). With `trainable: head` no batch-norm is in the
    tail.
    """
    least, most = config.train.workers
    fit: list[int] = []
    for workers in range(most, least - 1, -1):
        try:
            _check_shares(config, row_group, workers)
        except ConfigError:
            if workers == least and not fit:
                raise
        else:
            fit.append(workers)
    return tuple(sorted(fit))


def _check_shares(config: Config, row_group: int, workers: int) -> None:
    batch = config.train.global_batch
    unit = row_group * workers
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        near = f"{below} or {above}" if below else f"{above}"
        worlds = allowed_world_sizes(batch, row_group)
        keep = f", or keep it with train.num_workers {_either(worlds)}" if worlds else ""
        raise ConfigError(
            f"train.global_batch: found {batch} images for {_plural(workers, 'worker')} and row groups of {row_group}, "
            f"expected a multiple of {row_group} x {workers} = {unit}; set it to {near}{keep}"
        )
    share = batch // workers
    micro = config.train.micro_batch or share
    grouped = config.model.batch_norm == "group" and config.model.trainable != "head"
    group = config.model.bn_group if grouped else 1
    if share % group:
        raise ConfigError(
            f"model.bn_group: found batch-norm groups of {group} images and a rank's share of {share} "
            f"({batch} / {_plural(workers, 'worker')}), expected a share of whole groups; set train.global_batch to "
            f"{_next_multiple(batch, math.lcm(unit, group * workers))}, or model.bn_group to "
            f"{_either([size for size in _divisors(share) if size >= 2]) or 'nothing (model.batch_norm: frozen)'}"
        )
    if share % micro or micro % group:
        fit = [size for size in _divisors(share) if size % group == 0]
        groups = f" of whole batch-norm groups of {group}" if grouped else ""
        raise ConfigError(
            f"train.micro_batch: found {micro} images for a rank's share of {share}, expected a divisor of it{groups}; "
            f"set it to {_either(fit)}"
        )


def wants_gpu(config: Config, cluster: Mapping[str, float]) -> bool:
    """Whether each rank holds a GPU: `train.use_gpu`, with auto decided by the cluster."""
    return config.train.use_gpu == "yes" or (config.train.use_gpu == "auto" and cluster.get("GPU", 0) >= 1)


def check_resources(config: Config, cluster: Mapping[str, float], nodes: Sequence[Mapping[str, Any]] = ()) -> None:
    """Ranks and decoding fit the cluster: without a whole free CPU, Ray Data waits for one for ever and says nothing.

    `cluster` is `ray.cluster_resources()`; with `nodes` (`ray.nodes()`) what fits on each machine is counted too.
    """
    workers, each = config.train.workers[0], config.train.cpus_per_worker
    gpus, cpus = int(cluster.get("GPU", 0)), cluster.get("CPU", 0)
    if wants_gpu(config, cluster) and workers > gpus:
        other = (
            f"set train.num_workers to at most {gpus}, or train.use_gpu to no" if gpus else "set train.use_gpu to no"
        )
        raise ConfigError(
            f"train.num_workers: found {_plural(workers, 'worker')} with a GPU each, the cluster has "
            f"{_plural(gpus, 'GPU')}; {other}, or add nodes"
        )
    needed = max(1, config.data.decode_workers)
    left = cpus - workers * each
    if left < needed - 1e-9:
        raise ConfigError(
            f"train.cpus_per_worker: cluster has {_plural(cpus, 'CPU')}, {_plural(workers, 'worker')} x "
            f"{_plural(each, 'CPU')} leave {max(left, 0):g} for decoding; at least {needed} needed: "
            f"{_more_room(config, cpus, needed)}"
        )
    alive = [node for node in nodes if node.get("Alive", True)]
    hosts = {node.get("NodeManagerAddress", "") for node in alive}
    if config.tracking.uri.startswith("sqlite:") and len(hosts) > 1:
        raise ConfigError(
            f"tracking.uri: found a SQLite file for a cluster of {len(hosts)} machines, whose workers cannot see it; "
            "start an MLflow server and give its address (http://HOST:5000)"
        )
    if alive:
        _check_nodes(config, [node["Resources"] for node in alive], wants_gpu(config, cluster), needed)


def decoding_cpus(config: Config, nodes: Sequence[Mapping[str, Any]], *, gpu: bool) -> int:
    """Whole CPUs of the living `nodes` (`ray.nodes()`) that the fewest ranks leave for decoding."""
    alive = [node["Resources"] for node in nodes if node.get("Alive", True)]
    return _placed(config, alive, gpu)[1]


def _placed(config: Config, nodes: Sequence[Mapping[str, float]], gpu: bool) -> tuple[int, int]:
    """Workers that find no place, and whole CPUs that are left: neither workers nor decoders are cut in two."""
    waiting, each = config.train.workers[0], config.train.cpus_per_worker
    whole = 0
    for node in sorted(nodes, key=lambda node: -node.get("GPU", 0)):
        room = math.floor(node.get("CPU", 0) / each + 1e-9)
        placed = min(waiting, room, int(node.get("GPU", 0)) if gpu else room)
        waiting -= placed
        whole += math.floor(node.get("CPU", 0) - placed * each + 1e-9)
    return waiting, whole


def _check_nodes(config: Config, nodes: list[Mapping[str, float]], gpu: bool, needed: int) -> None:
    each = config.train.cpus_per_worker
    waiting, whole = _placed(config, nodes, gpu)
    sizes = ", ".join(f"{node.get('CPU', 0):g}" for node in nodes)
    if waiting:
        raise ConfigError(
            f"train.cpus_per_worker: {_plural(each, 'CPU')}{' and a GPU' if gpu else ''} for each of "
            f"{_plural(config.train.workers[0], 'worker')} do not fit on nodes of {sizes} CPUs ({waiting} left over); "
            "lower train.cpus_per_worker or train.num_workers, or add nodes"
        )
    if whole < needed:
        raise ConfigError(
            f"train.cpus_per_worker: {_plural(config.train.workers[0], 'worker')} x {_plural(each, 'CPU')} on nodes of "
            f"{sizes} CPUs leave {whole} whole CPUs for decoding; at least {needed} needed: "
            "lower train.cpus_per_worker, or add a CPU node"
        )


def _more_room(config: Config, cpus: float, needed: int) -> str:
    workers = config.train.workers[0]
    ways = []
    share = math.floor((cpus - needed) / workers * 20 + 1e-9) / 20
    if share > 0:
        ways.append(f"lower train.cpus_per_worker to {share:g}")
    fewer = math.floor((cpus - needed) / config.train.cpus_per_worker + 1e-9)
    if fewer >= 1:
        ways.append(f"lower train.num_workers to {fewer}")
    if config.data.decode_workers > 1:
        ways.append("lower data.decode_workers")
    return ", ".join([*ways, "or add CPUs"]) if ways else "add CPUs"


def _plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def _either(sizes: list[int]) -> str:
    return (
        " or ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])]) if len(sizes) > 1 else "".join(map(str, sizes))
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _next_multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit
