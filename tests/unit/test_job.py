"""What is left of a run, as the stream is told."""

import dataclasses
from pathlib import Path

from cxr_dist.train.checkpoint import Checkpoints
from tests.training import make_job


def test_the_rest_starts_at_the_latest_whole_checkpoint(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert (job.plan.steps_per_epoch, job.plan.num_steps) == (3, 9)
    assert job.remaining(2).start == 0
    checkpoints = Checkpoints(job.folder)
    checkpoints.save({}, index=3, epoch=0, score=0.5, finished=False)
    last = checkpoints.save({}, index=6, epoch=1, score=0.6, finished=False)
    assert job.remaining(2).start == 6
    Path(job.folder, "checkpoints", last.file).write_bytes(b"damaged")
    assert job.remaining(2).start == 3


def test_nothing_is_left_of_a_finished_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    Checkpoints(job.folder).save({}, index=6, epoch=1, score=0.5, finished=True)
    spec = job.remaining(1)
    assert (spec.start, spec.num_tasks) == (9, 0)


def test_a_task_is_whole_steps_of_two_seconds_of_work(tmp_path: Path) -> None:
    """488 of NIH's PNG; smaller ones cost less."""
    job = make_job(tmp_path, encoding="png")
    assert job.plan.rank_batch(2) == 12
    assert job.remaining(2).steps_per_task == 41
    assert job.remaining(1).steps_per_task == 21
    asked = dataclasses.replace(job.config, data=dataclasses.replace(job.config.data, task_images=50))
    assert dataclasses.replace(job, config=asked).remaining(2).steps_per_task == 4
    asked = dataclasses.replace(job.config, data=dataclasses.replace(job.config.data, task_images=5))
    assert dataclasses.replace(job, config=asked).remaining(2).steps_per_task == 1


def test_streams_of_one_run_do_not_share_their_journals(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert job.remaining(1).token != job.remaining(1).token
