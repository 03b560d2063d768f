"""Test evaluations that came after a run's own, counted like it: in the experiment of the run that was judged."""

from pathlib import Path

from mlflow import MlflowClient

from cxr_dist import writes
from cxr_dist.experiment import PENDING, absolute_uri, no_answer
from cxr_dist.scrub import scrub
from cxr_dist.train.identity import read_run

__all__ = ["COUNTER", "count_again"]

COUNTER = "test_evaluations"
"""Tag of an experiment: how often its runs were judged on test."""
AGAIN = "test_evaluation_again"
"""Tag of a run: which of these its latest later evaluation was."""


def count_again(folder: str, tracking_uri: str, *, run_id: str = "") -> tuple[int | None, str]:
    """Count one more test evaluation of a run, which `run_id` or run.json in `folder` names: its number in the experiment,
    or None and why it is not counted.

    Never raises because of the store or the server: the evaluation has been made.
    """
    try:
        if not run_id:
            found = read_run(folder)
            if found is None:
                return None, "the checkpoint has no run.json beside it that names its MLflow run"
            run_id = str(found["run_id"])
        if run_id.startswith(PENDING):
            return None, "MLflow does not have its run yet; jobs/sync.py tells MLflow of it"
        uri = absolute_uri(tracking_uri)
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            return None, f"there is no MLflow database at {uri}; give the run's tracking.uri"
        away = no_answer(uri)
        if away:
            return None, away
        client = MlflowClient(uri)
        writes.count(COUNTER, AGAIN).do(client, run_id)
        experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
        return int(experiment.tags[COUNTER]), ""
    except Exception as error:  # noqa: BLE001 - stores and servers fail in every way; the report is worth more
        return None, scrub(" ".join(str(error).split()))[:300]
