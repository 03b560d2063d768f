"""The runs of a drill: begun, hurt, told apart from an undisturbed one."""

import itertools
import re
import time
from collections.abc import Callable

import psutil
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.drills.conftest import Drill
from tests.submitting import Submitted, find, run, still_running, submit, wait

EQUAL = ("samples_sha256", "weights_sha256", "test_auroc", "best_val_auroc", "steps", "epochs")
"""What an interruption must not change in a run's result."""


def steps_logged(client: MlflowClient, name: str) -> list[int]:
    return [
        point.step for run in find(client, name) for point in client.get_metric_history(run.info.run_id, "train/loss")
    ]


def has_logged(client: MlflowClient, name: str, steps: int) -> Callable[[], bool]:
    return lambda: len(steps_logged(client, name)) >= steps


def driver_of(name: str) -> psutil.Process:
    """The process of the driver of a run, not the shell that started it."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (line := process.info["cmdline"]) and "python" in line[0] and "jobs/train.py" in line and name in line
    ]
    assert len(found) == 1, found
    return found[0]


def first_after(client: MlflowClient, name: str, steps: int, since: float = 0.0) -> float | None:
    """When the first step after so many was logged, if that was after `since`, seconds since 1970; None if there is none.

    What an earlier attempt logged and could not send comes with its own times.
    """
    [found] = find(client, name)
    points = client.get_metric_history(found.info.run_id, "train/loss")
    times = [point.timestamp / 1000 for point in points if point.step > steps]
    return min((when for when in times if when > since), default=None)


def back_at(client: MlflowClient, name: str, hurt_at: float) -> float:
    """When steps came again after what happened at `hurt_at`: the end of the longest pause since; seconds since 1970.

    The first steps after a fault may still be of the ranks that it is about to end.
    """
    [found] = find(client, name)
    points = client.get_metric_history(found.info.run_id, "train/loss")
    times = [hurt_at, *sorted(point.timestamp / 1000 for point in points if point.timestamp / 1000 > hurt_at)]
    return max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])[1]


def is_the_undisturbed_run(job: Submitted, trained: Submitted, client: MlflowClient, name: str) -> None:
    """Same images, same weights, same scores; one MLflow run, FINISHED, with every step once."""
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    for key in EQUAL:
        assert job.result[key] == trained.result[key], key
    [found] = find(client, name)
    assert found.info.status == "FINISHED"
    assert "failure" not in found.data.tags
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))


def begin(
    jobs: JobSubmissionClient,
    client: MlflowClient,
    name: str,
    command: str,
    *,
    steps: int,
    env: dict[str, str] | None = None,
) -> tuple[str, Submitted]:
    """Submit a run and wait until it has logged so many steps: its job's id, and the job as it then is, still running."""
    job_id = submit(jobs, command, env)
    return job_id, still_running(wait(jobs, job_id, until=has_logged(client, name, steps)))


def go_on(
    drill: Drill,
    jobs: JobSubmissionClient,
    client: MlflowClient,
    name: str,
    command: str,
    trained: Submitted,
    env: dict[str, str] | None = None,
) -> int:
    """The same command after the run has ended: it goes on from a checkpoint to the undisturbed run's result.

    The step that it resumed from; the drill's time to recover is that to the first step that the hurt run had not logged.
    """
    done, again = len(steps_logged(client, name)), time.time()
    job = run(jobs, command, env)
    resumed = re.findall(r"resumed from step (\d+)", job.logs)
    assert resumed, job.logs[-4000:]
    is_the_undisturbed_run(job, trained, client, name)
    drill.recovered(first_after(client, name, done, again))
    return int(resumed[0])
