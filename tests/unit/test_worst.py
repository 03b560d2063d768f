"""The worst errors of a score table: hand-worked picks."""

import numpy as np
import pytest

from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.worst import worst_errors


def table(rows: list[tuple[str, int, float, bool]]) -> ScoreTable:
    """One finding: image id, patient, probability, label."""
    ids, patients, probabilities, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    return ScoreTable(
        image_ids=np.array(ids, dtype=np.str_),
        patient_ids=np.array(patients, np.int64),
        split="test",
        findings=("Mass",),
        probabilities_NK=np.array(probabilities, np.float64).reshape(-1, 1),
        logits_NK=None,
        labels_NK=np.array(labels, np.bool_).reshape(-1, 1),
    )


ROWS = [
    ("a", 1, 0.9, False),
    ("b", 1, 0.8, False),  # patient 1 is shown by a already
    ("c", 2, 0.5, False),  # at the threshold: called
    ("d", 3, 0.49, False),  # right
    ("e", 4, 0.7, False),
    ("f", 5, 0.1, True),
    ("g", 6, 0.2, True),
    ("h", 7, 0.0, True),
    ("i", 8, 0.99, True),  # right
]


def test_the_most_confident_wrong_ones_one_a_patient_worst_first() -> None:
    found = worst_errors(table(ROWS), {"Mass": 0.5}, per_kind=2)
    assert [(one["kind"], one["image_id"], one["probability"], one["label"]) for one in found] == [
        ("false positive", "a", 0.9, False),
        ("false positive", "e", 0.7, False),
        ("false negative", "h", 0.0, True),
        ("false negative", "f", 0.1, True),
    ]
    assert {one["finding"] for one in found} == {"Mass"}
    assert {one["thumbnail_png"] for one in found} == {one["overlay_png"] for one in found} == {None}


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rows_is_of_no_account(seed: int) -> None:
    rows = [*ROWS, ("a2", 9, 0.9, False)]  # as wrong as a: the id decides
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    found = worst_errors(table(shuffled), {"Mass": 0.5}, per_kind=3)
    assert [one["image_id"] for one in found] == ["a", "a2", "e", "h", "f", "g"]


def test_what_has_no_errors_or_no_threshold_has_none() -> None:
    assert worst_errors(table(ROWS), {}) == []
    assert worst_errors(table([]), {"Mass": 0.5}) == []
    assert worst_errors(table([ROWS[3], ROWS[8]]), {"Mass": 0.5}) == []
    assert worst_errors(table(ROWS), {"Mass": 0.5}, per_kind=0) == []
