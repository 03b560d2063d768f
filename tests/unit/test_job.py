"""What is left of a run, as the stream is told."""

from pathlib import Path

import pytest

from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.job import PIXELS_TASK_IMAGES, PNG_TASK_IMAGES
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


@pytest.mark.parametrize(
    ("encoding", "expected"), [("pixels", PIXELS_TASK_IMAGES // 12), ("png", PNG_TASK_IMAGES // 12)]
)
def test_a_task_is_about_half_a_second_of_whole_steps(tmp_path: Path, encoding: str, expected: int) -> None:
    job = make_job(tmp_path, encoding=encoding, epochs=30)
    assert job.remaining(2).steps_per_task == expected
    # never more than there is to do, never none
    assert job.stream_spec(2, 88).steps_per_task == 2
    large = make_job(tmp_path, encoding="png", global_batch=240, train_rows=240)
    assert large.stream_spec(1, 0).steps_per_task == 1


def test_streams_of_one_run_do_not_share_their_journals(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert job.remaining(1).token != job.remaining(1).token
