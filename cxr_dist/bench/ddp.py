"""Ranks beside one: steps of the tail from features in memory, one thread each, gradients by gloo.

One process computes alone, then as many as there are cores, first each for itself (what the machine allows them), then
as ranks of one group; turn by turn, and the best of each counts. What is measured is the step of the training loop: DDP
over the tail, Adam, group batch-norm with its all-reduce. Gradients cost the same however many images a step has.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.report import Row

__all__ = ["run"]

STAGE = "epoch"
SHARES = (16, 64)
"""Images of a rank in a step."""
STEPS = 12
FINDINGS = 14


def run(options: BenchOptions) -> list[Row]:
    """Images a second of one rank, and of one a core."""
    world = options.cpus
    if world < 2:
        return []
    best: dict[tuple[int, int, bool], float] = {}
    with scratch(options, "ddp") as folder:
        pipes, processes = zip(*(_start() for _ in range(world)), strict=True)
        try:
            for turn in range(options.repeats):
                for share in SHARES:
                    for size, joined in ((1, False), (world, False), (world, True)):
                        store = folder / f"{turn}-{share}" if joined else None
                        found = _together(pipes[:size], share, store)
                        key = share, size, joined
                        best[key] = min(best.get(key, float("inf")), max(seconds for seconds, _ in found))
                        megabytes = found[0][1]
        finally:
            for process in processes:
                process.terminate()
                process.join()
    rows = []
    for (share, size, joined), seconds in best.items():
        rate, alone = size * share / seconds, share / best[share, 1, False]
        kind = "one rank" if size == 1 else f"{size} {'ranks' if joined else 'processes, each for itself'}"
        rows.append(
            Row(
                stage=STAGE,
                name=f"tail step of {share}, {kind}",
                images=size * share,
                images_per_s=rate,
                ratios={f"{size} times one rank": rate / (size * alone)} if size > 1 else {},
                extra={"ms/step": 1e3 * seconds, **({"gradient MB/step": megabytes} if joined else {})},
            )
        )
    return rows


def _start() -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    return ours, process


def _together(pipes: tuple[Connection, ...], share: int, store: Path | None) -> list[tuple[float, float]]:
    """Seconds a step and gradient megabytes of each process, at work at once: ranks of a new group that meet at `store`, or
    strangers."""
    for rank, pipe in enumerate(pipes):
        pipe.send((share, f"file://{store}", rank, len(pipes)) if store else (share, "", 0, 1))
    return [pipe.recv() for pipe in pipes]


def _serve(pipe: Connection) -> None:
    """A rank: joins one group after another, or none, and times steps in each."""
    import torch
    import torch.distributed as dist

    from cxr_dist.config import ModelConfig, OptimizerConfig
    from cxr_dist.model import weights
    from cxr_dist.model.batchnorm import group_norms, update_running_statistics
    from cxr_dist.model.network import Network, masked_loss
    from cxr_dist.train.distributed import Ranks, parallel
    from cxr_dist.train.optimize import make_optimizer

    torch.set_num_threads(1)
    initial = weights.initial("random", num_findings=FINDINGS, seed=0)
    while True:
        share, store, rank, world_size = pipe.recv()
        if world_size > 1:
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        network = Network.build(
            initial, ModelConfig(weights="random"), num_findings=FINDINGS, precision="fp32", device=torch.device("cpu")
        )
        tail = network.tail.train()
        model = parallel(tail, Ranks(rank, world_size, None))
        trained = [parameter for parameter in tail.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(OptimizerConfig(), trained, share * world_size)
        norms = group_norms(tail)
        features = network.features(np.full((share, 224, 224), 100, np.uint8))
        labels, valid = torch.zeros(share, FINDINGS), torch.ones(share, dtype=torch.bool)
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            masked_loss(model(features), labels, valid, None, divisor=share * FINDINGS).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_running_statistics(norms)
            seconds.append(time.perf_counter() - began)
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send((sorted(seconds[2:])[(STEPS - 2) // 2], sum(value.numel() * 4 for value in trained) / 2**20))
