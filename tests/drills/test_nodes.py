"""What becomes of a run when the cluster loses a node, and gets another."""

import re

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.local.stack import Stack
from tests.drills.conftest import Drill
from tests.drills.runs import back_at, begin, is_the_undisturbed_run, steps_logged
from tests.nodes import Node
from tests.submitting import Submitted, find, still_running, wait

pytestmark = [pytest.mark.slow, pytest.mark.long]

A_NODE_EACH = "--train.cpus_per_worker 3"
"""Of the head's four CPUs one decodes and three hold a rank; a node of three holds the other."""


def world_sizes(client: MlflowClient, name: str) -> list[int]:
    """The number of ranks after every step, each once in a row."""
    [found] = find(client, name)
    points = sorted(client.get_metric_history(found.info.run_id, "train/world_size"), key=lambda point: point.step)
    sizes = [int(point.value) for point in points]
    return [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before]


@pytest.mark.drill("a node lost (SIGKILL of its raylet), another comes", "goes on there, to the same result")
def test_node_replaced(
    drill: Drill,
    full_stack: Stack,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    trained: Submitted,
) -> None:
    name = "drill-node-replaced"
    labels = "cxr-instance=g5.2xlarge,cxr-market=on-demand"
    with Node(full_stack, 3, labels=labels) as node:
        job_id, _ = begin(
            jobs, client, name, f"{train} {A_NODE_EACH} --run.name {name} --train.checkpoint_every_steps 1", steps=2
        )
        drill.hurt()
        node.kill()
        with Node(full_stack, 3, labels=labels):
            job = wait(jobs, job_id)
    is_the_undisturbed_run(job, trained, client, name)
    priced, unknown = job.result["cost"]["charges"]  # both nodes, each for its time; the head says nothing of itself
    assert (priced["instance"], priced["nodes"], unknown["nodes"]) == ("g5.2xlarge", 2, 1)
    assert priced["amount"] == pytest.approx(priced["node_hours"] * 1.212)
    assert 0 < priced["node_hours"] < 2 * unknown["node_hours"]
    assert (job.result["cost"]["amount"], job.result["cost"]["attempts"]) == (None, 1)
    drill.recovered(back_at(client, name, drill.hurt_at))
    [resumed] = re.findall(r"resumed from step (\d+)", job.logs)[:1]
    drill.outcome = f"FINISHED, the same weights; went on from step {resumed}"


@pytest.mark.drill(
    "a node lost (SIGKILL of its raylet), none comes for a while (`train.num_workers: [1, 2]`)",
    "goes on with fewer ranks, and with more when a node comes; the same images in the same steps",
)
def test_node_lost(
    drill: Drill, full_stack: Stack, jobs: JobSubmissionClient, train: str, client: MlflowClient
) -> None:
    name = "drill-node-lost"
    command = f"{train} {A_NODE_EACH} --run.name {name} --train.num_workers [1,2] --train.epochs 60 --train.patience 0"
    with Node(full_stack, 3) as node:
        job_id, _ = begin(jobs, client, name, command, steps=2)
        assert world_sizes(client, name) == [2]
        drill.hurt()
        node.kill()
        still_running(wait(jobs, job_id, until=lambda: world_sizes(client, name) == [2, 1]))
        drill.recovered(back_at(client, name, drill.hurt_at))
        with Node(full_stack, 3):
            still_running(wait(jobs, job_id, until=lambda: world_sizes(client, name) == [2, 1, 2]))
            job = wait(jobs, job_id)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    [found] = find(client, name)
    assert found.info.status == "FINISHED"
    assert steps_logged(client, name) == list(range(1, job.result["steps"] + 1))
    assert "now: the number of ranks is going to change" in job.logs
    drill.outcome = "FINISHED; 2 ranks, then 1, then 2; every step once, the images of the plan"
