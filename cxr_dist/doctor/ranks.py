"""Workers placed as the run's: how fast each trains, and how fast they add up their gradients.

The placement group is that of Ray Train (one bundle a rank, packed), the step is the run's own `Learner`, first each rank
for itself, then the sum of as many bytes as the tail has gradients, over the run's backend.
"""

import dataclasses
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cxr_dist.config import Config
from cxr_dist.data.nih import FINDINGS, LABEL_SETS
from cxr_dist.data.plan import NUM_DRAWS, Plan, Split
from cxr_dist.doctor.ask import Answer, answers
from cxr_dist.doctor.problems import Problem
from cxr_dist.doctor.report import RanksReport
from cxr_dist.train.job import TrainJob

__all__ = ["Rank", "findings_of", "measure", "rehearsal"]

STEPS, STEPS_S = 4, 10.0
"""Steps that are timed after one that is not, and the time after which no further is begun, seconds."""
SUMS = 5
"""All-reduces that are timed after two that are not; the middle one counts."""
MEASURE_S = 300.0
"""Longest that the ranks may take to measure their steps, seconds."""


def findings_of(config: Config) -> tuple[str, ...]:
    """The findings that a run trains on."""
    return tuple(name for name in LABEL_SETS[config.data.label_set] if name not in config.train.skip_findings)


def rehearsal(config: Config, *, world_size: int, use_gpu: bool, row_group: int) -> TrainJob:
    """The run as its ranks would see it, but for data: it reads nothing, and has no folder yet."""
    findings = findings_of(config)
    split = Split(num_rows=16 * config.train.global_batch, row_group=row_group)
    return TrainJob(
        config=config,
        plan=Plan(
            train=split,
            validation=split,
            seed=config.train.seed,
            epochs=config.train.epochs,
            global_batch=config.train.global_batch,
        ),
        findings=findings,
        columns=tuple(FINDINGS.index(name) for name in findings),
        size=config.data.size,
        encoding=config.data.encoding,
        train=None,  # type: ignore[arg-type]  # nothing is read
        validation=None,  # type: ignore[arg-type]
        pos_weight=(1.0,) * len(findings) if config.train.pos_weight else None,
        folder="",
        manifest_sha256="",
        pixels_version="",
        tracking_uri="",
        run_id="",
        use_gpu=use_gpu,
        world_sizes=(world_size,),
    )


class Rank:
    """The actor that stands in a rank's place."""

    def where(self) -> dict[str, Any]:
        """Its node, and an address at which the others could meet it."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        context = ray.get_runtime_context()
        return {"node_id": context.get_node_id(), "address": f"tcp://{ray.util.get_node_ip_address()}:{port}"}

    def rehearse(self, job: TrainJob, initial: bytes) -> dict[str, Any]:
        """Rates of training steps and of the network's parts on this rank's device, from noise."""
        import numpy as np
        import torch

        from cxr_dist.data.stream import Batch
        from cxr_dist.train.distributed import Ranks
        from cxr_dist.train.learner import Learner
        from cxr_dist.train.survey import rates_of

        device = torch.device("cuda" if job.use_gpu else "cpu")
        with tempfile.TemporaryDirectory(prefix="cxr-doctor-") as folder:
            Path(folder, "initial.pt").write_bytes(initial)
            learner = Learner(dataclasses.replace(job, folder=folder), Ranks(0, 1, None), device)
        share, findings = job.plan.rank_batch(job.world_sizes[-1]), len(job.findings)
        random = np.random.default_rng(0)
        batch = Batch(
            step=job.plan.step(0),
            images_BSS=random.integers(0, 256, (share, job.size, job.size), dtype=np.uint8),
            labels_BK=random.integers(0, 2, (share, findings), dtype=np.uint8),
            draws_B6=random.random((share, NUM_DRAWS), dtype=np.float32),
            rows_B=np.arange(share),
            valid_B=np.ones(share, np.bool_),
            image_ids=[],
            corrupt={},
        )
        seconds: list[float] = []
        began = time.perf_counter()
        while len(seconds) <= STEPS and (len(seconds) < 2 or time.perf_counter() - began < STEPS_S):
            start = time.perf_counter()
            learner.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        micro = job.config.train.micro_batch or share
        rates = rates_of(learner.network, size=job.size, share=micro, findings=findings)
        return {
            "train": share / min(seconds[1:]),
            "prefix": 1 / rates.prefix,
            "tail": 1 / rates.tail,
            "gradient_bytes": learner.gradient_bytes,
        }

    def join(self, rank: int, world_size: int, address: str, backend: str, timeout_s: float) -> None:
        """Meet the others at rank 0's address."""
        import datetime

        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=timeout)

    def add_up(self, num_bytes: int) -> float:
        """Seconds of an all-reduce of so many bytes of gradients; a collective call."""
        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        values = torch.ones(max(1, num_bytes // 4), device=device)
        seconds = []
        for _ in range(2 + SUMS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        dist.destroy_process_group()
        return statistics.median(seconds[2:])


def measure(
    job: TrainJob, initial: bytes, hosts: dict[str, str], *, timeout_s: float
) -> tuple[RanksReport, list[Problem]]:
    """Place the ranks of a rehearsal and have them measure; what they found, and what went wrong.

    `initial` are starting weights (`weights.save`), `hosts` names of nodes by id; `timeout_s` bounds each wait for a worker
    to come up or to meet the others.
    """
    world_size, backend = job.world_sizes[-1], "nccl" if job.use_gpu else "gloo"
    bundle = {"CPU": job.config.train.cpus_per_worker, **({"GPU": 1.0} if job.use_gpu else {})}
    found = RanksReport(backend=backend, share=job.plan.rank_batch(world_size))
    group = placement_group([bundle] * world_size, strategy="PACK")
    ranks: list[Any] = []
    try:
        if not group.wait(timeout_s):
            return found, [_no_room(world_size, bundle, timeout_s)]
        actor = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_restarts=0)(Rank)
        ranks = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            ).remote()
            for index in range(world_size)
        ]
        places = answers({index: rank.where.remote() for index, rank in enumerate(ranks)}, timeout_s)
        if problems := _failed("placement", places, {}, "look at the node's raylet and at the ports between nodes"):
            return found, problems
        names = {index: hosts.get(place.value["node_id"], "?") for index, place in places.items()}
        found = dataclasses.replace(found, hosts=tuple(names.values()))
        weights = ray.put(initial)
        steps = answers({index: rank.rehearse.remote(job, weights) for index, rank in enumerate(ranks)}, MEASURE_S)
        advice = "if it is memory, set train.micro_batch; else see that the node's image has requirements.lock"
        if problems := _failed("training step", steps, names, advice):
            return found, problems
        found = dataclasses.replace(
            found,
            train_images_per_s=tuple(step.value["train"] for step in steps.values()),
            prefix_images_per_s=tuple(step.value["prefix"] for step in steps.values()),
            tail_images_per_s=tuple(step.value["tail"] for step in steps.values()),
            gradient_bytes=steps[0].value["gradient_bytes"],
        )
        if world_size == 1:
            return found, []
        meet = {
            index: rank.join.remote(index, world_size, places[0].value["address"], backend, timeout_s)
            for index, rank in enumerate(ranks)
        }
        advice = "open all ports among the nodes (their security group), or name the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        if problems := _failed(f"all-reduce ({backend})", answers(meet, 2 * timeout_s), names, advice):
            return found, problems
        sums = answers({index: rank.add_up.remote(found.gradient_bytes) for index, rank in enumerate(ranks)}, MEASURE_S)
        if problems := _failed(f"all-reduce ({backend})", sums, names, advice):
            return found, problems
        slowest = max(answer.value for answer in sums.values())
        return dataclasses.replace(found, allreduce_bytes_per_s=found.gradient_bytes / slowest), []
    finally:
        for rank in ranks:
            ray.kill(rank)
        remove_placement_group(group)


def _no_room(world_size: int, bundle: dict[str, float], timeout_s: float) -> Problem:
    each = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return Problem(
        check="placement",
        found=f"no room for {world_size} ranks of {each} within {timeout_s:g} s",
        expected="that they can be placed",
        do="see who holds it (ray status), end that job, lower train.num_workers, or run with --wait SECONDS where nodes come by demand",
    )


def _failed(check: str, found: dict[int, Answer], names: dict[int, str], do: str) -> list[Problem]:
    """A problem for each rank that gave no answer; of several errors at once the first, for the others lost their peer."""
    silent = [
        Problem(check=check, node=names.get(index), found=f"rank {index}: {answer.error}", expected="an answer", do=do)
        for index, answer in found.items()
        if answer.silent
    ]
    failed = [
        Problem(
            check=check, node=names.get(index), found=f"rank {index}: {answer.error}", expected="a measurement", do=do
        )
        for index, answer in found.items()
        if answer.error and not answer.silent
    ]
    return silent or failed[:1]
