"""Scores of the validation split, gathered from the ranks: every row once, then metrics as pure functions of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxr_dist.data.manifest import Manifest
from cxr_dist.errors import RunError
from cxr_dist.evaluate import metrics, scores
from cxr_dist.train.job import TrainJob

__all__ = ["Scored", "Validation"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rows that one rank scored in one step; padding is left out, unreadable images are not."""

    rows_N: npt.NDArray[np.int64]
    valid_N: npt.NDArray[np.bool_]
    logits_NK: npt.NDArray[np.float32]
    labels_NK: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation split as the network scored it after an epoch, in row order, unreadable images left out."""

    rows_N: npt.NDArray[np.int64]
    logits_NK: npt.NDArray[np.float32]
    labels_NK: npt.NDArray[np.bool_]
    loss: float
    """Loss over all of it, weighed as in training."""
    auroc: dict[str, float | None]
    """AUROC of each finding; None where the split cannot define it."""
    mean_auroc: float | None

    @classmethod
    def join(cls, parts: Sequence[Sequence[Scored]], job: TrainJob) -> "Validation":
        """All ranks' parts as one; RunError unless every row that the plan covers is there exactly once."""
        scored = [part for rank in parts for part in rank]
        rows = np.concatenate([part.rows_N for part in scored])
        covered = min(job.plan.validation.num_rows, job.plan.validation_steps * job.plan.global_batch)
        order = np.argsort(rows, kind="stable")
        if not np.array_equal(rows[order], np.arange(covered)):
            raise RunError(
                f"validation: found {len(rows)} scored rows ({len(np.unique(rows))} different), expected each of "
                f"{covered} once"
            )
        keep = order[np.concatenate([part.valid_N for part in scored])[order]]
        logits = np.concatenate([part.logits_NK for part in scored])[keep]
        labels = np.concatenate([part.labels_NK for part in scored])[keep]
        auroc = {
            finding: metrics.auroc(logits[:, k], labels[:, k])
            if metrics.undefined_reason(labels[:, k]) is None
            else None
            for k, finding in enumerate(job.findings)
        }
        defined = [value for value in auroc.values() if value is not None]
        return cls(
            rows_N=rows[keep],
            logits_NK=logits,
            labels_NK=labels,
            loss=weighted_loss(logits, labels, job.pos_weight),
            auroc=auroc,
            mean_auroc=float(np.mean(defined)) if defined else None,
        )

    def scores_file(self, job: TrainJob) -> bytes:
        """These scores as the Parquet file that goes with a checkpoint: thresholds are fitted on those of the best."""
        rows = Manifest.load(job.config.data.uri).rows("validation").take(self.rows_N)
        return scores.encoded(scores.from_logits(rows, "validation", job.findings, self.logits_NK, self.labels_NK))


def weighted_loss(
    logits_NK: npt.NDArray[np.float32], labels_NK: npt.NDArray[np.bool_], pos_weight: tuple[float, ...] | None
) -> float:
    """Mean binary cross-entropy over images and findings in float64, positives weighed by `pos_weight`; NaN if a logit is."""
    logits = logits_NK.astype(np.float64)
    weight = np.ones(logits.shape[1]) if pos_weight is None else np.asarray(pos_weight)
    # -log sigmoid(x) is log(1 + exp(-x)), computed without overflow
    with np.errstate(invalid="ignore"):
        losses = np.where(labels_NK, weight * np.logaddexp(0, -logits), np.logaddexp(0, logits))
    return float(losses.mean())
