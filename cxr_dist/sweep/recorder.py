"""What Tune's loop tells of the trials, as it comes: into the sweep's record and into MLflow."""

import logging
from typing import Any

from mlflow import MlflowClient
from ray import tune

from cxr_dist.experiment import PENDING
from cxr_dist.sweep.record import End, Record, TrialRecord
from cxr_dist.sweep.trial import EPOCH, FAILED, SCORE, WHOLE
from cxr_dist.tracking import TrackedRun
from cxr_dist.train.checkpoint import run_folder
from cxr_dist.train.identity import read_run

__all__ = ["Recorder"]

log = logging.getLogger(__name__)


class Recorder(tune.Callback):
    """Tune's callback; it runs in the sweep's driver."""

    def __init__(self, record: Record, tracked: TrackedRun, *, epochs: int, reduction: int, storage_path: str):
        self.record, self.tracked = record, tracked
        self.epochs, self.reduction, self.storage_path = epochs, reduction, storage_path

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps its callbacks to restore them one day; a sweep goes on from its record

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        one = self.of(trial)
        if FAILED in result:
            self.ended(one, "failed", result[FAILED])
        elif one.add(result[EPOCH], result[SCORE]):
            log.info("%s  epoch %d/%d  val mean AUROC %.4f", one.trial.name, result[EPOCH], self.epochs, result[SCORE])
            self.record.save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        one = self.of(trial)
        if trial.last_result.get(WHOLE):
            self.ended(one, "finished")
        elif one.ended is None:
            epoch, score = one.curve[-1]
            why = f"after epoch {epoch} of {self.epochs}: {score:.4f}, not among the best 1/{self.reduction} there"
            self.ended(one, "pruned", why)
            self.tag(one, why)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ended(self.of(trial), "failed", "the process that watched over it was lost")

    def of(self, trial: Any) -> TrialRecord:
        return self.record.trials[trial.config["trial"]["number"] - 1]

    def ended(self, one: TrialRecord, how: End, why: str = "") -> None:
        """Note the end of a trial, once."""
        if one.ended is not None:
            return
        one.ended, one.why = how, why
        self.record.save()
        log.info("%s  %s%s", one.trial.name, how, f": {why}" if why else "")
        best = self.record.best()
        found = {"sweep/trial_val_auroc_mean": one.score, "sweep/best_val_auroc_mean": best.score if best else None}
        step = sum(other.ended is not None for other in self.record.trials)
        self.tracked.log_metrics({key: value for key, value in found.items() if value is not None}, step=step)

    def tag(self, one: TrialRecord, why: str) -> None:
        """Say of the trial's own run, which ends as KILLED, that it was cut short on purpose."""
        try:
            found = read_run(run_folder(self.storage_path, one.trial.name))
            if found and not found["run_id"].startswith(PENDING):
                MlflowClient(self.tracked.tracking_uri).set_tag(found["run_id"], "pruned", why)
        except Exception as error:  # noqa: BLE001 - a tag is not worth a sweep
            log.warning("%s: its tag `pruned` is not set: %s", one.trial.name, " ".join(str(error).split()))
