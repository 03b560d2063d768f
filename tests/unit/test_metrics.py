"""Metrics against hand-worked cases and scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cxr_dist.errors import DataError
from cxr_dist.evaluate.metrics import (
    Curve,
    auroc,
    average_precision,
    confusion_counts,
    pr_curve,
    roc_curve,
    thin,
)


@st.composite
def both_classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct scores, so that ties are the rule, and labels with both classes."""
    size = draw(st.integers(2, 40))
    scores = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    labels = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda x: len(set(x)) == 2))
    return np.array(scores) / 8, np.array(labels)


def test_auroc_by_hand() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    positive = np.array([False, False, True, True])
    assert auroc(scores, positive) == 0.75  # of 4 pairs only (0.35, 0.4) is the wrong way round
    assert average_precision(scores, positive) == pytest.approx((1 / 1 + 2 / 3) / 2, abs=1e-15)


def test_auroc_counts_a_tie_as_half() -> None:
    assert auroc(np.array([0.5, 0.5, 0.9]), np.array([True, False, False])) == 0.25
    assert auroc(np.full(7, 0.3), np.array([True, False, True, False, False, False, True])) == 0.5


@given(both_classes())
def test_auroc_and_average_precision_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, positive = case
    assert auroc(scores, positive) == pytest.approx(sk.roc_auc_score(positive, scores), abs=1e-12)
    assert average_precision(scores, positive) == pytest.approx(sk.average_precision_score(positive, scores), abs=1e-12)


@given(both_classes())
def test_curves_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, positive = case
    fpr, tpr, thresholds = sk.roc_curve(positive, scores, drop_intermediate=False)
    ours = roc_curve(scores, positive)
    np.testing.assert_allclose([ours.x, ours.y, ours.threshold], [fpr, tpr, thresholds], atol=1e-15)
    precision, recall, thresholds = sk.precision_recall_curve(positive, scores)
    ours = pr_curve(scores, positive)
    np.testing.assert_allclose([ours.x, ours.y], [recall[::-1], precision[::-1]], atol=1e-15)
    np.testing.assert_array_equal(ours.threshold, np.append(np.inf, thresholds[::-1]))


def test_confusion_counts_by_hand() -> None:
    thresholds, tp, fp = confusion_counts(np.array([0.2, 0.9, 0.2, 0.5]), np.array([True, True, False, False]))
    assert thresholds.tolist() == [0.9, 0.5, 0.2]
    assert tp.tolist() == [1, 1, 2]
    assert fp.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("positive", "reason"),
    [([False, False], "no positives"), ([True, True], "no negatives"), ([], "no images")],
)
def test_auroc_of_one_class_is_an_error(positive: list[bool], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        auroc(np.linspace(0, 1, len(positive)), np.array(positive, bool))


@pytest.mark.parametrize("make", [roc_curve, pr_curve])
def test_thinned_curve_keeps_ends_and_shape(make: Callable[..., Curve]) -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(30_000) < 0.05
    curve = make(rng.normal(positive * 1.5, 1), positive)
    few = thin(curve)
    assert len(curve.x) == 30_001
    assert 1000 < len(few.x) <= 2000
    for name in ("x", "y", "threshold"):
        whole, part = getattr(curve, name), getattr(few, name)
        assert (part[0], part[-1]) == (whole[0], whole[-1])
    points = set(zip(curve.x, curve.y, curve.threshold, strict=True))
    assert set(zip(few.x, few.y, few.threshold, strict=True)) <= points
    before = np.searchsorted(-few.threshold, -curve.threshold, side="right") - 1
    apart = np.abs(curve.x - few.x[before]) + np.abs(curve.y - few.y[before])
    assert apart.max() < 0.005


def test_short_curve_is_not_thinned() -> None:
    curve = Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([np.inf, 0.5]))
    assert thin(curve) is curve
