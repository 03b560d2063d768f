"""What becomes of a run whose driver or worker is hurt, on a real Ray head, S3, Postgres and MLflow."""

import os
import re
import signal
import time

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist.spending import attempts_in
from infra.local.stack import Stack
from tests.drills.conftest import Drill
from tests.drills.runs import back_at, begin, driver_of, go_on, is_the_undisturbed_run, steps_logged
from tests.submitting import Submitted, find, run, submit, wait

pytestmark = pytest.mark.slow


@pytest.mark.drill(
    "training worker killed (SIGKILL)", "goes on from the last checkpoint, within the epoch, to the same result"
)
def test_worker_killed(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-worker"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1"
    job_id, running = begin(jobs, client, name, command, steps=2)
    drill.hurt()
    os.kill(int(re.findall(r"RayTrainWorker pid=(\d+)", running.logs)[-1]), signal.SIGKILL)
    job = wait(jobs, job_id)
    is_the_undisturbed_run(job, trained, client, name)
    [resumed] = re.findall(r"resumed from step (\d+)", job.logs)[:1]
    assert int(resumed) >= 1
    drill.recovered(back_at(client, name, drill.hurt_at))
    drill.outcome = f"FINISHED, the same weights; went on from step {resumed}"


@pytest.mark.drill(
    "driver killed (SIGKILL), then the same command",
    "`jobs/sync.py` says FAILED; the same command goes on in the same MLflow run, to the same result",
)
def test_driver_killed(
    drill: Drill, full_stack: Stack, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-driver"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1"
    job_id, _ = begin(jobs, client, name, command, steps=2)
    drill.hurt()
    driver_of(name).kill()
    assert wait(jobs, job_id).status == JobStatus.FAILED
    [found] = find(client, name)
    assert found.info.status == "RUNNING"  # who could have said it
    synced = run(
        jobs,
        f"python jobs/sync.py --train.storage_path s3://cxr/runs --run.name {name} --tracking.uri {client.tracking_uri}",
    )
    assert synced.status == JobStatus.SUCCEEDED, synced.logs[-4000:]
    [found] = find(client, name)
    assert found.info.status == "FAILED"
    assert "the driver was lost" in found.data.tags["failure"]
    go_on(drill, jobs, client, name, command, trained)
    costs = sorted(
        (point.step, point.value) for point in client.get_metric_history(found.info.run_id, "cost/node_hours")
    )
    assert [step for step, _ in costs] == [1]  # the first attempt could not say what it cost, and is counted
    with pytest.MonkeyPatch.context() as patch:
        for key, value in full_stack.env.items():
            patch.setenv(key, value)
        kept, unread = attempts_in(f"s3://cxr/runs/{name}")
    assert (sorted(kept), unread) == ([1, 2], 0)
    assert all(one.seconds > 0 for times in kept.values() for one in times)
    assert costs[0][1] == pytest.approx(sum(one.seconds for times in kept.values() for one in times) / 3600, rel=0.2)
    drill.outcome = "FAILED, then FINISHED, the same weights"


@pytest.mark.long
@pytest.mark.drill("driver told to stop (SIGTERM)", "a checkpoint at once, KILLED; the same command goes on from there")
def test_driver_told_to_stop(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-stop"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 0"
    job_id, _ = begin(jobs, client, name, command, steps=1)
    drill.hurt()
    driver_of(name).terminate()
    stopped = wait(jobs, job_id)
    assert "told to stop: a checkpoint was stored" in stopped.logs, stopped.logs[-3000:]
    assert stopped.status == JobStatus.FAILED
    assert stopped.exit_code == 128 + signal.SIGTERM
    [stored] = re.findall(r"checkpoint before step (\d+) now: the driver was told to stop", stopped.logs)
    [found] = find(client, name)
    assert found.info.status == "KILLED"
    resumed = go_on(drill, jobs, client, name, command, trained)
    assert resumed >= int(stored)  # or from the end of the epoch, if the ranks came to it before they were ended
    drill.outcome = f"KILLED, then FINISHED, the same weights; went on from step {resumed}"


@pytest.mark.drill("`ray job stop`", "KILLED, though the head gives 3 s; the same command goes on")
def test_job_stopped(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-job-stop"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1"
    job_id, _ = begin(jobs, client, name, command, steps=2)
    drill.hurt()
    jobs.stop_job(job_id)
    assert wait(jobs, job_id).status == JobStatus.STOPPED
    [found] = find(client, name)
    assert found.info.status == "KILLED"
    go_on(drill, jobs, client, name, command, trained)
    drill.outcome = "KILLED, then FINISHED, the same weights"


@pytest.mark.long
@pytest.mark.drill("a second driver of the same run", "refused, naming the first; the first is not disturbed")
def test_second_driver(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-second"
    command = f"{train} --run.name {name} --train.epochs 12"
    first, _ = begin(jobs, client, name, command, steps=1)
    drill.hurt()
    second = run(jobs, command)
    assert second.exit_code == 2
    assert "run.name: this run is being written by " in second.logs, second.logs[-3000:]
    job = wait(jobs, first)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    [found] = find(client, name)
    assert found.info.status == "FINISHED"
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))
    drill.outcome = "the second exits with 2; the first FINISHED"


@pytest.mark.long
@pytest.mark.drill(
    "a driver that sleeps (SIGSTOP) until another has taken its run over",
    "the sleeper changes nothing any more, and says why it ends",
)
def test_sleeping_driver(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-sleeper"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1"
    first, _ = begin(jobs, client, name, command, steps=1)
    sleeper = driver_of(name)
    drill.hurt()
    sleeper.suspend()
    second = submit(jobs, command)
    deadline = time.monotonic() + 200
    while "run taken over from" not in jobs.get_job_logs(second):
        assert not jobs.get_job_status(second).is_terminal(), jobs.get_job_logs(second)[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    sleeper.resume()
    ended = wait(jobs, first)
    assert ended.status == JobStatus.FAILED
    assert "another driver has taken this run over" in ended.logs
    is_the_undisturbed_run(wait(jobs, second), trained, client, name)
    drill.outcome = "the sleeper exits with 1; the other FINISHED, the same weights"
