"""Metrics against hand-worked cases and scikit-learn, the weighted ones against repeated rows."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cxr_dist.errors import DataError
from cxr_dist.evaluate import metrics
from cxr_dist.evaluate.metrics import (
    Curve,
    auroc,
    average_precision,
    confusion_counts,
    measure,
    pr_curve,
    roc_curve,
    thin,
    weighted_metrics,
)
from cxr_dist.evaluate.scores import ScoreTable


def scored(probabilities_NK: np.ndarray, labels_NK: np.ndarray, patients: np.ndarray | None = None) -> ScoreTable:
    num, num_findings = labels_NK.shape
    return ScoreTable(
        image_ids=np.array([f"{i:08d}_000.png" for i in range(num)], dtype=np.str_),
        patient_ids=np.arange(num) if patients is None else patients,
        split="test",
        findings=("Effusion", "Mass", "Hernia")[:num_findings],
        probabilities_NK=probabilities_NK,
        logits_NK=None,
        labels_NK=labels_NK,
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


@given(both_classes(), st.integers(0, 2**32 - 1))
def test_weighted_metrics_are_those_of_repeated_rows(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    scores, positive = case
    weights_NB = np.random.default_rng(seed).integers(0, 4, (len(scores), 5)).astype(np.int32)
    areas, precisions = weighted_metrics(scores, positive, weights_NB)
    for b in range(5):
        repeated_scores, repeated = np.repeat(scores, weights_NB[:, b]), np.repeat(positive, weights_NB[:, b])
        if len(set(repeated.tolist())) < 2:
            assert np.isnan(areas[b])
            assert np.isnan(precisions[b])
            continue
        assert areas[b] == pytest.approx(sk.roc_auc_score(repeated, repeated_scores), abs=1e-12)
        expected = sk.average_precision_score(repeated, repeated_scores)
        assert precisions[b] == pytest.approx(expected, abs=1e-12)


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


def test_measure_gives_none_and_the_reason_where_a_class_is_missing() -> None:
    probabilities = np.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.2], [0.35, 0.3, 0.9], [0.8, 0.2, 0.5]])
    labels = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1]], dtype=bool)
    found = measure(scored(probabilities, labels), bootstrap=20)
    assert found.findings["Effusion"].auroc.value == 0.75
    assert found.findings["Effusion"].reason is None
    assert found.findings["Mass"].auroc.value is None
    assert found.findings["Mass"].average_precision.value is None
    assert (found.findings["Mass"].reason, found.findings["Hernia"].reason) == ("no positives", "no negatives")
    assert (found.findings["Mass"].positives, found.findings["Mass"].negatives) == (0, 4)
    assert found.mean_auroc.value == 0.75


def test_measure_without_any_defined_finding() -> None:
    found = measure(scored(np.full((3, 1), 0.5), np.zeros((3, 1), bool)), bootstrap=20)
    assert found.mean_auroc.value is None
    assert found.reason == "no finding has both positives and negatives"
    empty = measure(scored(np.zeros((0, 1)), np.zeros((0, 1), bool)), bootstrap=20)
    assert empty.findings["Effusion"].reason == "no images"


def random_table(seed: int = 0) -> ScoreTable:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 60, 400)
    labels = (rng.random((400, 2)) < 0.05 + 0.5 * (patients[:, None] % 4 == 0)).astype(bool)
    probabilities = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 2)
    return scored(probabilities, labels, patients)


def test_intervals_are_those_of_a_plain_loop_over_patients() -> None:
    table = random_table()
    found = measure(table, bootstrap=40, seed=3)
    draws = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=40)
    patients, index = np.unique(table.patient_ids, return_inverse=True)
    assert len(patients) == 60
    loop = []
    for times in draws:
        rows = np.repeat(np.arange(400), times[index])
        loop.append([sk.roc_auc_score(table.labels_NK[rows, k], table.probabilities_NK[rows, k]) for k in range(2)])
    expected = np.quantile(np.array(loop), [0.025, 0.975], axis=0)
    assert found.findings["Effusion"].auroc.interval == pytest.approx(tuple(expected[:, 0]), abs=1e-12)
    assert found.findings["Mass"].auroc.interval == pytest.approx(tuple(expected[:, 1]), abs=1e-12)
    mean = np.quantile(np.array(loop).mean(axis=1), [0.025, 0.975])
    assert found.mean_auroc.interval == pytest.approx(tuple(mean), abs=1e-12)


def numbers(found: metrics.Metrics) -> list[float]:
    pairs = [metric for one in found.findings.values() for metric in (one.auroc, one.average_precision)]
    pairs += [found.mean_auroc, found.mean_average_precision]
    return [number for metric in pairs for number in (metric.value, *(metric.interval or ())) if number is not None]


def test_intervals_do_not_depend_on_row_order_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table()
    found = measure(table, bootstrap=50, seed=1)
    shuffled = table.select(np.random.default_rng(0).permutation(400))
    assert numbers(measure(shuffled, bootstrap=50, seed=1)) == pytest.approx(numbers(found), abs=1e-13)
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 3 * 400)
    assert numbers(measure(table, bootstrap=50, seed=1)) == pytest.approx(numbers(found), abs=1e-13)
    assert numbers(measure(table, bootstrap=50, seed=2)) != pytest.approx(numbers(found), abs=1e-13)


def test_intervals_resample_patients_not_images() -> None:
    """One patient's images move together: with two patients, a resample draws one of three mixtures."""
    labels = np.array([[1], [0]] * 8, dtype=bool)
    good, bad = [0.9, 0.1] * 4, [0.1, 0.9] * 4
    patients = np.repeat([1, 2], 8)
    found = measure(scored(np.array([*good, *bad])[:, None], labels, patients), bootstrap=200)
    assert found.findings["Effusion"].auroc.value == 0.5
    assert found.findings["Effusion"].auroc.interval == (0.0, 1.0)


def test_a_finding_that_most_resamples_lack_has_no_interval_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((40, 2), bool)
    labels[0, 0], labels[:20, 1] = True, True
    table = scored(np.linspace(0, 1, 80).reshape(40, 2), labels)  # the one positive is in 63 % of the resamples
    assert measure(table, bootstrap=200).findings["Effusion"].auroc.interval is not None
    monkeypatch.setattr(metrics, "_LEAST_DEFINED", 0.9)
    found = measure(table, bootstrap=200)
    effusion = found.findings["Effusion"]
    assert (effusion.auroc.value, effusion.auroc.interval) == (0.0, None)
    assert effusion.reason is not None
    part = int(re.fullmatch(r"no interval: defined in (\d+) of 200 patient resamples", effusion.reason)[1])  # type: ignore[index]
    assert 100 < part < 150
    assert found.findings["Mass"].auroc.interval is not None
    assert (found.mean_auroc.interval, found.reason) == (None, effusion.reason)


def test_no_resamples_no_intervals_and_no_complaint() -> None:
    found = measure(random_table(), bootstrap=0)
    assert found.mean_auroc.interval is None
    assert found.reason is None
    assert found.findings["Mass"].reason is None


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
