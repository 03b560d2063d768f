"""What a training run was, as plain values: how it went, what it took, what it was made from, and how to make it again.

The driver gathers it when the run is done (`train.record`) and keeps it with the run, so that a report can be made again
without the tracking server. A foreign score table has none, and its report says so.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cxr_dist.errors import DataError

__all__ = ["FILE", "RunRecord"]

FORMAT = "cxr-dist/run-record/1"
FILE = "run_record.json"
"""Its name among a report's files."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run, finished."""

    name: str
    run_id: str | None
    """Of MLflow; None where it never heard of the run."""
    steps_per_epoch: int
    """Optimizer steps in an epoch: what makes epochs of the history's steps."""
    history: Mapping[str, list[list[float]]]
    """Metric, named as in MLflow, to its [step, value] points by rising step."""
    history_missing: str
    """Why some of the history is not here; empty: it is whole."""
    trained: Mapping[str, Any]
    """The result of training as the job prints it: epochs, steps, best epoch, speed, memory, hashes."""
    spent: Mapping[str, Any]
    """wall_s, training_s, rank_hours, node_hours, nodes; None where it is not known."""
    cost: Mapping[str, Any] | None
    """What it cost, as `cxr_dist.cost.Cost.to_json` gives it: amount (None where a price is not known), currency, price, in words:
    where the price is from or why there is none, node-hours, and the charge of each kind of node. None: not counted."""
    origin: Mapping[str, Any]
    """commit, manifest_sha256, plan_sha256, dataset, device, versions, weights, and config as YAML."""
    audit: Mapping[str, Any] | None
    """The dataset's split audit (`data.nih.audit`)."""
    left_out: Mapping[str, int]
    """Images of the release that are not in the dataset, by reason."""
    unreadable: int
    """Images that could not be read in training or evaluation."""
    test_evaluation: int | None
    """Which of the experiment's test evaluations this is; None if it is none, or was not counted."""
    test_evaluations: int | None
    """How many the experiment has had, this one included."""

    def to_json(self) -> str:
        """The record as a file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes, where: str) -> "RunRecord":
        """What `to_json` gave; DataError for anything else."""
        try:
            found = json.loads(content)
            if found.pop("format") == FORMAT:
                return cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise DataError(
            f"{where}: found another file, expected a run's record of format {FORMAT}; train again or leave it out"
        )
