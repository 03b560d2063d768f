"""Validation scores joined from the ranks: every row once, and the loss that training minimises."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_dist.errors import RunError
from cxr_dist.evaluate import scores
from cxr_dist.model.network import masked_loss
from cxr_dist.train.job import TrainJob
from cxr_dist.train.validation import Scored, Validation, weighted_loss
from tests.training import NAMES, make_job, memory_manifest

ROWS = 10


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return make_job(tmp_path, validation_rows=ROWS)


def logits(num: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (num, 3)).astype(np.float32)


def labels(num: int = ROWS) -> np.ndarray:
    return (np.arange(num)[:, None] + np.arange(3)) % 3 == 0


def part(rows: list[int], unreadable: tuple[int, ...] = ()) -> Scored:
    return Scored(
        rows_N=np.array(rows, dtype=np.int64),
        valid_N=~np.isin(rows, unreadable),
        logits_NK=logits()[rows],
        labels_NK=labels()[rows],
    )


def test_parts_of_ranks_and_steps_become_one_in_row_order(job: TrainJob) -> None:
    found = Validation.join([[part([0, 1, 2]), part([6, 7])], [part([3, 4, 5]), part([8, 9])]], job)
    assert found.rows_N.tolist() == list(range(ROWS))
    np.testing.assert_array_equal(found.logits_NK, logits())
    np.testing.assert_array_equal(found.labels_NK, labels())


def test_it_does_not_matter_who_scored_what(job: TrainJob) -> None:
    one = Validation.join([[part(list(range(ROWS)))]], job)
    three = Validation.join([[part([9, 2])], [part([0, 1, 8])], [part([7, 6, 5, 4, 3])]], job)
    assert (three.loss, three.auroc, three.mean_auroc) == (one.loss, one.auroc, one.mean_auroc)


def test_unreadable_images_are_left_out(job: TrainJob) -> None:
    found = Validation.join([[part(list(range(ROWS)), unreadable=(0, 4))]], job)
    kept = [1, 2, 3, 5, 6, 7, 8, 9]
    assert found.rows_N.tolist() == kept
    assert found.loss == weighted_loss(logits()[kept], labels()[kept], job.pos_weight)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], r"found 9 scored rows \(9 different\), expected each of 10 once"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], r"found 10 scored rows \(9 different\), expected each of 10 once"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9], r"found 11 scored rows \(10 different\), expected each of 10 once"),
    ],
)
def test_a_missing_or_doubled_row_is_an_error(job: TrainJob, rows: list[int], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Validation.join([[part(rows)]], job)


def test_auroc_by_hand_and_none_where_it_is_undefined(job: TrainJob) -> None:
    scored = Scored(
        rows_N=np.arange(ROWS),
        valid_N=np.arange(ROWS) < 4,
        logits_NK=np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], 3, axis=1),
        labels_NK=np.array([[0, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1]] + [[1, 1, 0]] * 6, dtype=bool),
    )
    found = Validation.join([[scored]], job)
    # of four pairs of a positive and a negative, three are in order; no positive of Mass, no negative of Hernia
    assert found.auroc == {"Effusion": 0.75, "Mass": None, "Hernia": None}
    assert found.mean_auroc == 0.75
    nothing = Scored(**{**vars(scored), "valid_N": np.arange(ROWS) == 1})
    assert Validation.join([[nothing]], job).mean_auroc is None


@pytest.mark.parametrize("weight", [None, (1.5, 0.5, 2.0)])
def test_loss_is_torchs_and_the_one_that_training_minimises(weight: tuple[float, ...] | None) -> None:
    found = weighted_loss(logits(), labels(), weight)
    tensors = torch.from_numpy(logits()).double(), torch.from_numpy(labels())
    weights = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(tensors[0], tensors[1].double(), pos_weight=weights)
    assert found == pytest.approx(float(expected), rel=1e-12)
    trained = masked_loss(*tensors, torch.ones(ROWS, dtype=torch.bool), weights, divisor=ROWS * 3)
    assert found == pytest.approx(float(trained), rel=1e-12)


def test_loss_by_hand_and_at_the_extremes() -> None:
    zero, three = np.zeros((1, 1), np.float32), np.full((1, 1), np.log(3), np.float64)
    yes, no = np.ones((1, 1), bool), np.zeros((1, 1), bool)
    assert weighted_loss(zero, yes, None) == pytest.approx(np.log(2))
    assert weighted_loss(zero, yes, (5.0,)) == pytest.approx(5 * np.log(2))
    assert weighted_loss(zero, no, (5.0,)) == pytest.approx(np.log(2))
    # chances of 3 in 4
    assert weighted_loss(three, yes, None) == pytest.approx(np.log(4 / 3))
    assert weighted_loss(three, no, None) == pytest.approx(np.log(4))
    assert weighted_loss(np.full((1, 1), -1e4, np.float32), yes, None) == 1e4
    assert np.isnan(weighted_loss(np.full((1, 1), np.nan, np.float32), yes, None))


def test_masked_loss_by_hand() -> None:
    given = torch.tensor([[0.0, 0.0], [7.0, -7.0]])
    marks = torch.tensor([[1, 0], [1, 1]])
    found = masked_loss(given, marks, torch.tensor([True, False]), torch.tensor([3.0, 1.0]), divisor=8)
    assert float(found) == pytest.approx((3 + 1) * np.log(2) / 8)


def test_best_scores_are_written_with_the_ids_of_their_rows(job: TrainJob, tmp_path: Path) -> None:
    path = tmp_path / "best.parquet"
    with memory_manifest(job):
        path.write_bytes(Validation.join([[part(list(range(ROWS)), unreadable=(1,))]], job).scores_file(job))
    found = scores.read(path)
    kept = [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (found.split, found.findings) == ("validation", NAMES)
    assert found.image_ids.tolist() == [f"validation{row:04d}.png" for row in kept]
    assert found.patient_ids.tolist() == [row // 2 for row in kept]
    np.testing.assert_array_equal(found.logits_NK, logits()[kept])
    np.testing.assert_array_equal(found.labels_NK, labels()[kept])
    np.testing.assert_allclose(found.probabilities_NK, 1 / (1 + np.exp(-logits()[kept].astype(float))))
