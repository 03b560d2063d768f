"""What a checkpoint may be judged on, and that every row of a split is counted once."""

import logging
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist.data.images import PIXELS_VERSION
from cxr_dist.data.plan import Split
from cxr_dist.data.rows import CORRUPT, OK, PADDING, RowDecoder
from cxr_dist.errors import DataError, RunError
from cxr_dist.evaluate import inference
from tests.training import SIZE, MemoryRows

CHECKPOINT = {"size": 64, "manifest_sha256": "a" * 64}
FINDINGS = ("Mass", "Nodule")


def manifest(**changes) -> SimpleNamespace:
    same = {"uri": "s3://b/d", "size": 64, "hash": "a" * 64, "pixels_version": PIXELS_VERSION}
    return SimpleNamespace(**same | changes)


def test_the_dataset_of_the_run_fits_both_splits() -> None:
    inference.check_fits(manifest(), CHECKPOINT, "validation")
    inference.check_fits(manifest(), CHECKPOINT, "test")


def test_another_dataset_may_give_test_images_but_not_validation(caplog: pytest.LogCaptureFixture) -> None:
    other = manifest(hash="b" * 64)
    with caplog.at_level(logging.WARNING):
        inference.check_fits(other, CHECKPOINT, "test")
    assert "not the dataset that the checkpoint was trained on" in caplog.text
    with pytest.raises(DataError, match="another dataset's validation split may hold its training images"):
        inference.check_fits(other, CHECKPOINT, "validation")


@pytest.mark.parametrize("change", [{"size": 128}, {"pixels_version": "grey-0"}])
def test_other_pixels_are_refused(change: dict) -> None:
    with pytest.raises(DataError, match="pixels"):
        inference.check_fits(manifest(**change), CHECKPOINT, "test")


def scored(rows: list[int], states: list[int]) -> pa.Table:
    """Scores as the pipeline gives them: logits (row, -row) and labels (1, 0)."""
    logits = np.array([[row, -row] for row in rows], dtype="<f4")
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "image_id": [f"{row}.png" for row in rows],
            "state": pa.array(states, pa.uint8()),
            "reason": pa.array(["truncated PNG" if state == CORRUPT else None for state in states], pa.string()),
            "labels": pa.array([b"\x01\x00"] * len(rows), pa.binary(2)),
            "logits": pa.array([row.tobytes() for row in logits], pa.binary(8)),
        }
    )


ROWS = pa.table({"image_id": ["0.png", "1.png", "2.png"], "patient_id": pa.array([7, 7, 8], pa.int32())})


def check(table: pa.Table, num_rows: int = 3, max_corrupt: float = 0.5):
    return inference._checked(table, ROWS, "test", FINDINGS, num_rows, max_corrupt)


def test_rows_come_back_in_order_without_padding() -> None:
    table, corrupt = check(scored([2, 0, -1, 1], [OK, OK, PADDING, OK]))
    assert corrupt == {}
    assert table.image_ids.tolist() == ["0.png", "1.png", "2.png"]
    assert table.logits_NK.tolist() == [[0, 0], [1, -1], [2, -2]]
    assert table.labels_NK.tolist() == [[True, False]] * 3
    assert table.patient_ids.tolist() == [7, 7, 8]


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 1, 2], [0, 2, 3]])
def test_a_missing_or_doubled_row_is_an_error(rows: list[int]) -> None:
    with pytest.raises(RunError, match="expected each of 3 once"):
        check(scored(rows, [OK] * len(rows)))


def test_an_unreadable_image_is_left_out_and_too_many_are_an_error() -> None:
    table = scored([0, 1, 2], [OK, CORRUPT, OK])
    kept, corrupt = check(table)
    assert kept.image_ids.tolist() == ["0.png", "2.png"]
    assert corrupt == {"1.png": "truncated PNG"}
    with pytest.raises(RunError, match=r"1 of 3 images are unreadable.*first 1\.png"):
        check(table, max_corrupt=0.1)


def test_a_trial_run_scores_the_first_rows_only() -> None:
    assert len(check(scored([0, 1, 2], [OK] * 3), num_rows=2)[0]) == 2


@pytest.mark.parametrize(("padded", "lengths"), [(True, [12, 12, 12]), (False, [12, 12, 8])])
def test_tasks_have_as_many_rows_as_each_other_if_that_is_asked_for(padded: bool, lengths: list[int]) -> None:
    """30 images in row groups of 4, three of them a task: only then is a batch of 12 rows surely one task's."""
    decoder = RowDecoder(
        source=MemoryRows("test", 30, 4),
        split=Split(num_rows=30, row_group=4),
        size=SIZE,
        encoding="pixels",
        findings=(0, 1),
    )
    decode = inference.DecodeGroups(decoder, token="t", groups_per_task=3, num_groups=8, padded=padded)
    tables = [table for task in range(decode.num_tasks) for table in decode({"item": [task]})]
    assert [len(table) for table in tables] == lengths
    rows = [row for table in tables for row in table["row"].to_pylist()]
    assert [row for row in rows if row >= 0] == list(range(30))
    assert [row < 0 for row in rows] == [state == PADDING for table in tables for state in table["state"].to_pylist()]
