"""Where a run stands and what it has seen: position, best score, the hash of the images trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cxr_dist.data.plan import Plan
from cxr_dist.data.stream import Batch
from cxr_dist.train.validation import Scored, Validation

__all__ = ["Progress", "chain", "planned_chain"]


def chain(before: str, image_ids: Sequence[str]) -> str:
    """SHA-256 over the images of one more epoch, in global order, on top of the epochs before."""
    return hashlib.sha256("\n".join([before, *image_ids]).encode()).hexdigest()


def planned_chain(plan: Plan, image_ids: Sequence[str], epochs: int) -> str:
    """What `samples_sha256` must be after so many epochs, from the plan and the train split's ids alone."""
    sha, names = "", np.asarray(image_ids, dtype=object)
    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch
        rows = [plan.train.rows(plan.step(index).groups) for index in range(first, first + plan.train_steps)]
        sha = chain(sha, names[np.concatenate(rows)].tolist())
    return sha


@dataclass
class Progress:
    """One rank's account of the run. What `state_dict` holds is the same on every rank at the end of an epoch."""

    index: int = 0
    """Next step of the run."""
    epochs: int = 0
    """Epochs finished."""
    steps: int = 0
    """Optimizer steps done."""
    samples_sha256: str = ""
    best_auroc: float | None = None
    best_epoch: int | None = None
    epochs_without_gain: int = 0
    stopped: bool = False
    """Whether training ends before its last planned epoch."""
    is_best: bool = False
    """Whether the epoch that just ended is the best so far."""

    corrupt: dict[str, str] = field(default_factory=dict)
    """Unreadable images of all epochs so far: id to reason."""

    losses: list[torch.Tensor] = field(default_factory=list)
    epoch_ids: list[list[str]] = field(default_factory=list)
    """This rank's images of the epoch, a list a step."""
    corrupt_in_epoch: int = 0
    scored: list[Scored] = field(default_factory=list)

    SAVED = (
        "index",
        "epochs",
        "steps",
        "samples_sha256",
        "best_auroc",
        "best_epoch",
        "epochs_without_gain",
        "stopped",
        "corrupt",
    )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, state[name])

    def trained(self, batch: Batch, loss: torch.Tensor) -> None:
        """Count one training step."""
        self.losses.append(loss)
        self.epoch_ids.append(batch.image_ids)
        self.corrupt_in_epoch += len(batch.corrupt)
        self.steps += 1
        self.index = batch.step.index + 1

    def validated(self, batch: Batch, logits: np.ndarray) -> None:
        """Keep one validation step's scores."""
        real = batch.rows_B >= 0
        self.scored.append(
            Scored(
                rows_N=batch.rows_B[real],
                valid_N=batch.valid_B[real],
                logits_NK=logits[real],
                labels_NK=batch.labels_BK[real] == 1,
            )
        )
        self.corrupt_in_epoch += len(batch.corrupt)
        self.index = batch.step.index + 1

    def take_losses(self) -> list[float]:
        """This rank's losses since the last call; the one place where the host waits for the device."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).double().cpu().tolist() if losses else []

    def take_validation(self) -> list[Scored]:
        scored, self.scored = self.scored, []
        return scored

    def take_epoch_ids(self) -> list[list[str]]:
        ids, self.epoch_ids = self.epoch_ids, []
        return ids

    def end_epoch(self, ids_of_ranks: list[list[list[str]]], validation: Validation, *, patience: int) -> None:
        """Close an epoch: hash the images in global order, compare with the best, decide whether to stop."""
        in_order = [name for step in zip(*ids_of_ranks, strict=True) for share in step for name in share]
        self.samples_sha256 = chain(self.samples_sha256, in_order)
        score = validation.mean_auroc
        # where no epoch has a score, the last one stands for the best
        self.is_best = self.best_auroc is None or (score is not None and score > self.best_auroc)
        if self.is_best:
            self.best_auroc, self.best_epoch, self.epochs_without_gain = score, self.epochs, 0
        else:
            self.epochs_without_gain += 1
        self.epochs += 1
        self.corrupt_in_epoch = 0
        self.stopped = bool(patience) and self.epochs_without_gain >= patience

    def summary(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "samples_sha256": self.samples_sha256,
            "best_val_auroc": self.best_auroc,
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped,
        }
