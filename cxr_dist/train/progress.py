"""Where a run stands and what it has seen: position, best score, the hash of the images trained on.

Between two calls of `merge` each rank counts what it alone has seen; after one, all of it stands on every rank alike, and
a state can be saved, at any step, and taken up by another number of ranks.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from cxr_dist.data.plan import Plan
from cxr_dist.data.stream import Batch
from cxr_dist.train.validation import Scored, Validation

__all__ = ["Progress", "Seen", "planned_samples", "samples"]

MODULUS = 1 << 256

TOGETHER = 4096
"""Row groups whose ids `planned_samples` holds at a time."""


def samples(index: int, first: int, image_ids: Iterable[str]) -> int:
    """Sum of the SHA-256 of step, place and id over images trained on in step `index`, from place `first` of the batch on.

    Modulo 2**256. A sum does not depend on who adds first, so ranks add their own images, and a run that goes on after
    an interruption adds to what it had; an image that is lost, repeated, or at another place changes it. (Bellare and
    Micciancio, A New Paradigm for Collision-free Hashing, 1997; against faults, not against forgers.)
    """
    digests = (
        hashlib.sha256(f"{index} {place} {name}".encode()).digest() for place, name in enumerate(image_ids, first)
    )
    return sum(int.from_bytes(digest, "big") for digest in digests) % MODULUS


def planned_samples(plan: Plan, image_ids: Iterable[str], epochs: int) -> str:
    """What `samples_sha256` must be after so many epochs, from the plan and the train split's ids alone.

    The ids are taken in placement order, a few at a time, and asked of the plan where each epoch reads them: a sum has no
    order, and a split of a hundred million names need not be in memory.
    """
    total, size, per_step = 0, plan.train.row_group, plan.groups_per_step
    names, first = iter(image_ids), 0
    while ids := list(itertools.islice(names, TOGETHER * size)):
        groups = np.arange(first, min(first + len(ids) // size, plan.train.num_full_groups))
        for epoch in range(epochs):
            places = plan.places(groups, epoch)
            read = np.flatnonzero(places < plan.train_steps * per_step)
            steps, at = np.divmod(places[read], per_step)
            indices = epoch * plan.steps_per_epoch + steps
            for group, index, place in zip(read.tolist(), indices.tolist(), at.tolist(), strict=True):
                total += samples(index, place * size, ids[group * size : (group + 1) * size])
        first += TOGETHER
    return _shown(total)


def _shown(total: int) -> str:
    return f"{total % MODULUS:064x}"


class Seen(NamedTuple):
    """What one rank has seen since the last `merge`."""

    samples: int
    corrupt_in_epoch: int
    corrupt: dict[str, str]


@dataclass
class Progress:
    """One rank's account of the run."""

    index: int = 0
    """Next step of the run."""
    epochs: int = 0
    """Epochs finished."""
    steps: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """`samples` of all that was trained on, as merged."""
    best_auroc: float | None = None
    best_epoch: int | None = None
    epochs_without_gain: int = 0
    stopped: bool = False
    """Whether training ends before its last planned epoch."""
    is_best: bool = False
    """Whether the epoch that just ended is the best so far."""
    corrupt: dict[str, str] = field(default_factory=dict)
    """Unreadable images of all epochs so far, as merged: id to reason."""
    corrupt_in_epoch: int = 0
    """Unreadable images of this epoch, as merged."""
    window: list[float] = field(default_factory=list)
    """The global loss of every step since losses were last logged, as far as they are summed over the ranks."""

    losses: list[torch.Tensor] = field(default_factory=list)
    """This rank's part of the losses of later steps."""
    ids: list[list[str]] = field(default_factory=list)
    """This rank's images in these steps."""
    own_samples: int = 0
    own_corrupt: int = 0
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
        "corrupt_in_epoch",
        "window",
    )

    @property
    def samples_sha256(self) -> str:
        return _shown(self.samples)

    @samples_sha256.setter
    def samples_sha256(self, shown: str) -> None:
        self.samples = int(shown, 16)

    def state_dict(self) -> dict[str, Any]:
        """What goes on after an interruption; the same on every rank if all is merged."""
        return {name: _copied(getattr(self, name)) for name in self.SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, _copied(state[name]))

    def trained(self, batch: Batch, loss: torch.Tensor, rank: int = 0) -> None:
        """Count one training step of this rank."""
        self.losses.append(loss)
        self.ids.append(batch.image_ids)
        self.own_samples += samples(batch.step.index, rank * len(batch.image_ids), batch.image_ids)
        self.own_corrupt += len(batch.corrupt)
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
        self.own_corrupt += len(batch.corrupt)
        self.index = batch.step.index + 1

    def take_losses(self) -> tuple[list[float], list[list[str]]]:
        """This rank's losses since the last call and the images behind each; here the host waits for the device."""
        losses, ids, self.losses, self.ids = self.losses, self.ids, [], []
        return (torch.stack(losses).double().cpu().tolist() if losses else []), ids

    def take_window(self) -> list[float]:
        losses, self.window = self.window, []
        return losses

    def take_seen(self, corrupt: dict[str, str]) -> Seen:
        """This rank's part of what is to be merged, with the unreadable images that its feed has met."""
        seen = Seen(self.own_samples, self.own_corrupt, dict(corrupt))
        self.own_samples = self.own_corrupt = 0
        return seen

    def merge(self, ranks: Iterable[Seen]) -> None:
        """Add what every rank has seen."""
        for seen in ranks:
            self.samples = (self.samples + seen.samples) % MODULUS
            self.corrupt_in_epoch += seen.corrupt_in_epoch
            self.corrupt |= seen.corrupt

    def take_validation(self) -> list[Scored]:
        scored, self.scored = self.scored, []
        return scored

    def end_epoch(self, validation: Validation, *, patience: int) -> None:
        """Close an epoch of which all is merged: compare with the best, decide whether to stop."""
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


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value
