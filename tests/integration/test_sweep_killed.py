"""A sweep as users submit it: stopped in the middle, given again, and what MLflow has of it."""

import re
import shlex

import pytest
from ray.job_submission import JobStatus

from cxr_dist.cli import parse
from tests.submitting import TRAIN, find, run, submit, wait

pytestmark = [pytest.mark.slow, pytest.mark.long]

TRIALS = 3


@pytest.fixture(scope="module")
def command(full_stack, ingested) -> str:
    flags = TRAIN.replace("jobs/train.py", "jobs/sweep.py").replace("--train.num_workers 2", "--train.num_workers 1")
    swept = f"--trials {TRIALS} --trainable denseblock4,head --pooling avg --lr 0.0001,0.01 --parallel 1 --reduction 2"
    return f"{flags} --tracking.uri {full_stack.env['MLFLOW_TRACKING_URI']} --run.name sweep {swept}"


def test_a_sweep_that_is_stopped_goes_on_and_never_looks_at_test(jobs, command, client):
    job_id = submit(jobs, command)
    ended = re.compile(r"sweep-01-\S+  finished")
    begun = wait(jobs, job_id, until=lambda: ended.search(jobs.get_job_logs(job_id)) and find_trial(client, 2))
    assert begun.status == JobStatus.RUNNING, begun.logs[-6000:]
    jobs.stop_job(job_id)
    wait(jobs, job_id)
    [parent] = find(client, "sweep")
    assert parent.info.status == "KILLED"
    first = find_trial(client, 1)[0]

    again = run(jobs, command)
    assert again.status == JobStatus.SUCCEEDED, again.logs[-6000:]
    assert "a sweep never looks at test" in again.logs
    result = again.result
    assert result["run_id"] == parent.info.run_id
    [parent] = find(client, "sweep")
    assert parent.info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {
        "trials.csv",
        "best_command.sh",
    }
    assert "train.num_workers" in parent.data.params
    assert "optimizer.lr" not in parent.data.params

    rows = {row["number"]: row for row in result["trials"]}
    assert sorted(rows) == [1, 2, 3]
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {row["run_name"] for row in rows.values()}
    assert find_trial(client, 1)[0].info.end_time == first.info.end_time, "what finished is not run again"
    for child in children:
        row = rows[int(child.data.tags["trial"])]
        assert not [key for key in child.data.metrics if key.startswith("test/")]
        assert child.data.params["evaluate.test"] == "False"
        assert child.data.params["optimizer.lr"] == str(row["lr"])
        assert child.info.status == {"finished": "FINISHED", "pruned": "KILLED"}[row["ended"]]
        assert ("pruned" in child.data.tags) == (row["ended"] == "pruned")
        scores = [point.value for point in client.get_metric_history(child.info.run_id, "val/auroc_mean")]
        if row["ended"] == "finished":
            assert row["val_auroc_mean"] == pytest.approx(max(scores))

    best = result["best"]
    assert best["val_auroc_mean"] == max(row["val_auroc_mean"] for row in rows.values() if row["ended"] == "finished")
    words = shlex.split(result["best_command"])
    chosen = parse("", argv=words[2:])[0]
    assert (chosen.optimizer.lr, chosen.model.trainable) == (best["lr"], best["trainable"])
    assert chosen.evaluate.test is True


def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(jobs, command, client):
    for flags, sentence in (("--trainable blocks", "--trainable: found 'blocks'"), ("--min-epochs 9", "--min-epochs")):
        job = run(jobs, f"{command} --run.name refused-sweep {flags}")
        assert job.exit_code == 2
        assert f"error: {sentence}" in job.logs
    assert find(client, "refused-sweep") == []


def find_trial(client, number: int):
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids, f"tags.sweep = 'sweep' and tags.trial = '{number}'")
