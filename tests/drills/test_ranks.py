"""What becomes of a run when a rank hangs, when its loss is no number, and when its node is to be taken away."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.local.stack import Stack
from tests.drills.conftest import Drill
from tests.drills.runs import back_at, begin, is_the_undisturbed_run, steps_logged
from tests.drills.test_nodes import A_NODE_EACH
from tests.nodes import Node
from tests.submitting import Submitted, find, run, still_running, wait

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.drill(
    "a rank that hangs (SIGSTOP), with `train.process_group_timeout_s 20`",
    "the log names the rank, its step and what it did; goes on from the last checkpoint",
)
def test_rank_hangs(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted
) -> None:
    name = "drill-hang"
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1 --train.process_group_timeout_s 20"
    job_id, running = begin(jobs, client, name, command, steps=2)
    pid = int(re.findall(r"RayTrainWorker pid=(\d+)", running.logs)[-1])
    drill.hurt()
    os.kill(pid, signal.SIGSTOP)
    job = wait(jobs, job_id)
    is_the_undisturbed_run(job, trained, client, name)
    named = re.search(r"rank \d hangs: it [\w ]+ at step \d+ for \d+ s \(\S+, process (\d+), no sign of life", job.logs)
    assert named is not None, job.logs[-6000:]
    assert int(named[1]) == pid
    drill.recovered(back_at(client, name, drill.hurt_at))
    drill.outcome = "FINISHED, the same weights; the log names rank and process"


@pytest.mark.drill("a loss that is no number", "FAILED at once, not tried again; step and images are named")
def test_loss_is_no_number(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, ingested: dict
) -> None:
    job = run(jobs, f"{train} --run.name drill-nan --optimizer.lr 1e30 --optimizer.warmup_epochs 0")
    assert job.status == JobStatus.FAILED
    assert job.exit_code == 1
    [found] = find(client, "drill-nan")
    assert found.info.status == "FAILED"
    assert re.search(r"loss became \S+ at step \d+ of epoch 0, images \d+_\d+\.png", found.data.tags["failure"])
    drill.outcome = "FAILED, with the step and its images"


@pytest.mark.drill(
    "a node is to be taken away (`ray drain-node`, two minutes ahead), another comes",
    "a checkpoint at once; goes on from it",
)
def test_node_drained(
    drill: Drill, full_stack: Stack, jobs: JobSubmissionClient, train: str, client: MlflowClient, ingested: dict
) -> None:
    name = "drill-drain"
    with Node(full_stack, 3) as node:
        flags = "--train.checkpoint_every_steps 0 --train.epochs 60 --train.patience 0"
        job_id, _ = begin(jobs, client, name, f"{train} {A_NODE_EACH} {flags} --run.name {name}", steps=2)
        drill.hurt()
        drain(full_stack, node)
        told = still_running(wait(jobs, job_id, until=lambda: "is about to be taken away" in jobs.get_job_logs(job_id)))
        stored, *_ = re.findall(r"checkpoint before step (\d+) now: the node of rank", told.logs)
        node.kill()
        with Node(full_stack, 3):
            job = wait(jobs, job_id)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    [resumed] = re.findall(r"resumed from step (\d+)", job.logs)[:1]
    assert int(resumed) >= int(stored)
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))
    drill.recovered(back_at(client, name, drill.hurt_at))
    drill.outcome = f"FINISHED, every step once; went on from step {resumed}"


def drain(stack: Stack, node: Node) -> None:
    """Tell the cluster that the node goes, as a cloud's notice does."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={stack.env['RAY_ADDRESS']}"]
    options = {
        "node-id": node.node_id,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": "spot",
        "deadline-remaining-seconds": 120,
    }
    command += [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run(command, env=os.environ | stack.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, json.dumps([done.stdout, done.stderr])
