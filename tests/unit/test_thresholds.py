"""Operating points, worked by hand."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from cxr_dist.errors import DataError
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.thresholds import RULES, fit


def validation(scores: list[float], positive: list[int]) -> ScoreTable:
    return ScoreTable(
        image_ids=np.array([f"{i}.png" for i in range(len(scores))], dtype=np.str_),
        patient_ids=np.arange(len(scores)),
        split="validation",
        findings=("Effusion",),
        probabilities_NK=np.array(scores)[:, None],
        logits_NK=None,
        labels_NK=np.array(positive, dtype=bool)[:, None],
    )


def chosen(scores: list[float], positive: list[int]) -> tuple[float | None, float | None]:
    found = fit(validation(scores, positive))["Effusion"]
    return found["youden"], found["f1"]


def test_youden_and_f1_differ_when_negatives_are_many() -> None:
    # At 0.9: TP 1, FP 0 of 2 positives, 8 negatives: J = 1/2, F1 = 2/3. At 0.6: TP 2, FP 3: J = 1 - 3/8 = 5/8, F1 = 4/7.
    scores = [0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    positive = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert chosen(scores, positive) == (0.6, 0.9)


def test_equal_choices_take_the_highest_threshold() -> None:
    # J: at 0.9 TP 1 FP 0 = 1/2, at 0.8 = 0, at 0.7 TP 2 FP 1 = 1/2. F1: 2/3, 1/2, 4/5.
    assert chosen([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == (0.9, 0.7)
    # F1: at 0.9 2*1/(1+3) = 1/2; at 0.3 TP 3 FP 6: 2*3/(9+3) = 1/2: equal, so the higher.
    scores = [0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.3, 0.3]
    assert fit(validation(scores, [1, 0, 0, 0, 0, 0, 0, 1, 1]))["Effusion"]["f1"] == 0.9


def test_tied_scores_are_called_together() -> None:
    # 0.5 holds one positive and one negative; no threshold can part them.
    assert chosen([0.5, 0.5, 0.2], [1, 0, 0]) == (0.5, 0.5)


def test_a_perfect_model_gets_the_lowest_positive_score() -> None:
    assert fit(validation([0.9, 0.7, 0.2], [1, 1, 0])) == {
        "Effusion": {"youden": 0.7, "f1": 0.7, "corner": 0.7, "sensitivity_90": 0.7, "specificity_90": 0.7}
    }


def test_corner_differs_from_youden() -> None:
    # 4 positives, 4 negatives. At 0.9: TP 2, FP 0: J = 1/2, distance² 1/4. At 0.5: TP 4, FP 2: the same; higher wins.
    # At 0.7: TP 3, FP 1: J = 1/2 too, but distance² 1/16 + 1/16.
    scores = [0.9, 0.9, 0.7, 0.7, 0.5, 0.5, 0.1, 0.1]
    found = fit(validation(scores, [1, 1, 1, 0, 1, 0, 0, 0]))["Effusion"]
    assert (found["youden"], found["corner"]) == (0.9, 0.7)


def test_corner_is_the_least_distance_of_scikit_learns_curve() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(2000) < 0.1
    scores = np.clip(rng.normal(0.4 + 0.15 * positive, 0.15), 0, 1)
    fpr, tpr, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    found = fit(validation(scores.tolist(), positive.astype(int).tolist()))["Effusion"]
    assert found["corner"] == thresholds[np.argmin(np.hypot(fpr, 1 - tpr))]
    assert found["sensitivity_90"] == thresholds[np.argmax(tpr >= 0.9)]
    assert found["specificity_90"] == thresholds[np.flatnonzero(fpr <= 0.1)[-1]]


def test_fixed_rates_hold_at_exactly_nine_tenths() -> None:
    # Scores 20, 19, ... 1 (twentieths), positive and negative in turns.
    scores = [n / 20 for n in range(20, 0, -1)]
    found = fit(validation(scores, [1, 0] * 10))["Effusion"]
    assert found["sensitivity_90"] == 4 / 20  # the ninth of ten positives
    assert found["specificity_90"] == 18 / 20  # 19/20 is the first negative, 17/20 the second


def test_a_specificity_that_no_score_reaches_is_none() -> None:
    found = fit(validation([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0]))["Effusion"]
    assert found == {"youden": 0.5, "f1": 0.5, "corner": 0.5, "sensitivity_90": 0.5, "specificity_90": None}


@pytest.mark.parametrize("positive", [[0, 0, 0], [1, 1, 1]])
def test_a_finding_of_one_class_has_no_threshold(positive: list[int]) -> None:
    assert fit(validation([0.9, 0.7, 0.2], positive)) == {"Effusion": dict.fromkeys(RULES)}


@pytest.mark.parametrize("split", ["test", "train"])
def test_only_validation_scores_are_taken(split: str) -> None:
    table = dataclasses.replace(validation([0.9, 0.2], [1, 0]), split=split)
    with pytest.raises(DataError, match=f"found scores of split '{split}', expected validation"):
        fit(table)
