"""The checkpoints of a run: when they are due by the real plan, and what the real saver does with a state of real size.

Nothing is trained. The tail and Adam's moments are what a checkpoint holds; the steps around the end of the first epoch
are walked as the loop walks them, then the run is gone on with from what was stored.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.data.plan import Plan

__all__ = ["Walk", "counted", "gradient_bytes", "state", "walk"]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What came of the steps around the end of an epoch."""

    saved: int
    kept: int
    megabytes: float
    """A checkpoint."""
    save_s: float
    """From the state to the checkpoint that counts, median."""
    exact: bool
    """Whether the run would go on exactly where each state was taken."""


def counted(plan: Plan, every: int) -> tuple[int, int]:
    """Checkpoints of the whole run: within epochs, where none is left out, and at their ends."""
    if not every:
        return 0, plan.epochs
    # one that is due after an epoch's last training step comes before its validation
    return plan.epochs * plan.train_steps // every, plan.epochs


def state(findings: int) -> dict[str, Any]:
    """What a rank would save of the tail from denseblock4 on and of Adam after a step, weights random."""
    import torch

    from cxr_dist.config import ModelConfig
    from cxr_dist.model import weights
    from cxr_dist.model.densenet import build

    _, tail = build(weights.initial("random", num_findings=findings, seed=0).state, ModelConfig(), findings)
    trained = [parameter for parameter in tail.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"tail": tail.state_dict(), "optimizer": optimizer.state_dict()}


def gradient_bytes(content: dict[str, Any]) -> int:
    """Bytes of a step's gradients: those of Adam's first moment."""
    return sum(one["exp_avg"].numel() * one["exp_avg"].element_size() for one in content["optimizer"]["state"].values())


def walk(folder: Path, plan: Plan, every: int, content: dict[str, Any]) -> Walk:
    """Walk the last `every` training steps of the first epoch and the end of its validation, saving what is due."""
    from cxr_dist.train.checkpoint import Checkpoints
    from cxr_dist.train.saver import Saver, is_due

    checkpoints, seconds, exact = Checkpoints(str(folder)), [], True
    # every training step is asked for, of validation what ends it
    indices = [*range(max(0, plan.train_steps - every), plan.train_steps), plan.steps_per_epoch - 1]
    with Saver(checkpoints) as saver:
        for index in indices:
            step = plan.step(index)
            ends = index + 1 == plan.steps_per_epoch
            if not ends and not is_due(step, step.number + 1, every):
                continue
            began = time.perf_counter()
            progress = {"progress": {"index": index + 1}}
            saver.save({**content, **progress}, index=index + 1, epoch=0, score=0.5 if ends else None, needed=ends)
            saver.wait()
            seconds.append(time.perf_counter() - began)
            latest = checkpoints.latest_whole()
            exact &= latest is not None and latest.index == index + 1
            exact &= latest is not None and checkpoints.load(latest)["progress"]["index"] == index + 1
    entries = checkpoints.entries()
    return Walk(
        saved=len(seconds),
        kept=len(entries),
        megabytes=entries[-1].bytes / 1e6,
        save_s=statistics.median(seconds),
        exact=exact,
    )
