"""Calibration against scikit-learn, scipy and cases worked by hand; what becomes of findings that allow none."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from cxr_dist.errors import DataError
from cxr_dist.evaluate.calibrate import calibrated, fit_calibration, table_log_odds
from cxr_dist.evaluate.calibration import FORMAT, Calibration, log_odds, shift_prior, sigmoid
from cxr_dist.evaluate.label_shift import estimate_prior
from cxr_dist.evaluate.scores import ScoreTable

ROOT = Path(__file__).resolve().parent.parent.parent


def scored(
    logits_NK: np.ndarray, labels_NK: np.ndarray, *, split: str = "validation", with_logits: bool = True
) -> ScoreTable:
    logits_NK = logits_NK.astype(np.float32)
    return ScoreTable(
        image_ids=np.array([f"{i}.png" for i in range(len(labels_NK))], dtype=np.str_),
        patient_ids=np.arange(len(labels_NK)) // 2,
        split=split,
        findings=("Effusion", "Mass", "Hernia")[: labels_NK.shape[1]],
        probabilities_NK=sigmoid(logits_NK.astype(np.float64)),
        logits_NK=logits_NK if with_logits else None,
        labels_NK=labels_NK.astype(bool),
    )


def drawn(num: int = 3000, seed: int = 0) -> ScoreTable:
    """Logits that are 1.7 times too bold and too high by 2, of findings that 20 % and 3 % of the images have."""
    rng = np.random.default_rng(seed)
    truth_N2 = rng.normal(-2, 1.5, (num, 2)) - [0, 2]
    return scored(1.7 * truth_N2 + 2, rng.random((num, 2)) < sigmoid(truth_N2))


def test_platt_is_the_logistic_regression_of_smoothed_targets() -> None:
    """scikit-learn takes no soft targets: each image is there twice, as both classes, weighted by its target."""
    table = drawn()
    found = fit_calibration(table)
    for k, finding in enumerate(table.findings):
        x, positive = table_log_odds(table)[:, k], table.labels_NK[:, k]
        num = positive.sum()
        target = np.where(positive, (num + 1) / (num + 2), 1 / (len(x) - num + 2))
        model = LogisticRegression(C=np.inf, tol=1e-14, solver="newton-cholesky")
        model.fit(np.tile(x, 2)[:, None], np.repeat([1, 0], len(x)), sample_weight=np.append(target, 1 - target))
        one = found.findings[finding]
        assert one.kind == "platt"
        assert one.slope == pytest.approx(model.coef_[0, 0], abs=1e-9)
        assert one.intercept == pytest.approx(model.intercept_[0], abs=1e-9)
        assert one.slope == pytest.approx(1 / 1.7, rel=0.15)  # what it was drawn from


def test_platt_by_hand() -> None:
    """Two log odds, -1 and 1, with 3 of 4 and 1 of 4 negatives: the two free parameters hit both mean targets."""
    table = scored(np.array([-1.0] * 4 + [1.0] * 4)[:, None], np.array([1, 0, 0, 0, 1, 1, 1, 0])[:, None])
    one = fit_calibration(table).findings["Effusion"]
    low, high = (5 / 6 + 3 / 6) / 4, (3 * 5 / 6 + 1 / 6) / 4
    assert one.slope == pytest.approx((logit(high) - logit(low)) / 2, abs=1e-12)
    assert one.intercept == pytest.approx((logit(high) + logit(low)) / 2, abs=1e-12)
    assert one.prior == pytest.approx(0.5, abs=1e-12)


def test_platt_stays_finite_where_a_score_parts_the_classes() -> None:
    table = scored(np.linspace(-3, 3, 40)[:, None], (np.linspace(-3, 3, 40) > 1)[:, None])
    one = fit_calibration(table).findings["Effusion"]
    assert 0 < one.slope < 100
    assert np.isfinite(one.intercept)


def test_isotonic_is_scikit_learns() -> None:
    table, other = drawn(), drawn(seed=1)
    found = fit_calibration(table, "isotonic").apply(table_log_odds(other))
    for k in range(2):
        model = IsotonicRegression(out_of_bounds="clip").fit(table_log_odds(table)[:, k], table.labels_NK[:, k])
        np.testing.assert_allclose(found[:, k], model.predict(table_log_odds(other)[:, k]), atol=1e-12)


def test_isotonic_by_hand() -> None:
    table = scored(np.array([0.0, 1, 2, 3])[:, None], np.array([0, 1, 0, 1])[:, None])
    found = fit_calibration(table, "isotonic")
    at = np.array([-9.0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 9])[:, None]
    assert found.apply(at)[:, 0].tolist() == [0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_prior_is_the_prevalence_of_what_it_was_fitted_on(method: Any) -> None:
    table = drawn()
    for k, one in enumerate(fit_calibration(table, method).findings.values()):
        slack = 1e-12 if method == "isotonic" else 2 / len(table)  # Platt's smoothing
        assert one.prior == pytest.approx(table.labels_NK[:, k].mean(), abs=slack)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        ([0, 1, 2], [0, 0, 0], "no positives on validation"),
        ([0, 1, 2], [1, 1, 1], "no negatives on validation"),
        ([2, 2, 2], [1, 0, 1], "all scores are equal on validation"),
        ([3, 2, 1, 0], [0, 0, 1, 1], "higher scores do not mean more positives on validation"),
    ],
)
def test_findings_without_calibration_keep_their_probabilities(
    method: Any, logits: list[float], labels: list[int], reason: str
) -> None:
    table = scored(np.array(logits, float)[:, None], np.array(labels)[:, None])
    found = fit_calibration(table, method)
    assert found.findings["Effusion"].kind == "identity"
    assert found.findings["Effusion"].reason == f"not calibrated: {reason}"
    np.testing.assert_array_equal(calibrated(table, found).probabilities_NK, table.probabilities_NK)


def test_logits_and_probabilities_give_the_same_to_rounding() -> None:
    table = drawn()
    without = scored(np.asarray(table.logits_NK), table.labels_NK, with_logits=False)
    a, b = fit_calibration(table), fit_calibration(without)
    for one, other in zip(a.findings.values(), b.findings.values(), strict=True):
        assert (one.slope, one.intercept) == pytest.approx((other.slope, other.intercept), abs=1e-9)
    np.testing.assert_allclose(a.apply_probabilities(table.probabilities_NK), a.apply(table.logits_NK), atol=1e-12)


def test_probabilities_of_0_and_1_and_large_logits_are_bounded() -> None:
    odds = log_odds(np.array([0.0, 0.5, 1.0]))
    assert odds.tolist() == [-34.5, 0.0, 34.5]
    found = fit_calibration(drawn()).findings["Effusion"].apply(np.array([-1e6, 34.5, 1e6]))
    assert np.isfinite(found).all()
    assert found[1] == found[2]


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_json_is_exact(method: Any) -> None:
    table = drawn()
    labels = np.column_stack([table.labels_NK, np.zeros(len(table), bool)])
    found = fit_calibration(scored(np.column_stack([np.asarray(table.logits_NK), labels[:, 0]]), labels), method)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == found
    assert found.findings["Hernia"].kind == "identity"


def broken(**changes: Any) -> dict[str, Any]:
    value = fit_calibration(drawn()).to_json()
    value["findings"]["Mass"] |= changes
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "found no format mark"),
        ({"format": "cxr-dist/calibration/2"}, f"found cxr-dist/calibration/2, expected {FORMAT}"),
        ({"format": FORMAT}, "cannot be read .'findings'."),
        (broken(kind="other"), "kind 'other'"),
        (broken(slope=-1.0), "slope and intercept"),
        (broken(slope=None), "cannot be read"),
        (broken(kind="isotonic", knots=[1, 0], values=[0, 1]), "knots that do not rise"),
        (broken(kind="isotonic", knots=[0, 1], values=[0, 2]), "values that are no probabilities"),
    ],
)
def test_other_json_is_refused(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Calibration.from_json(value)


def test_only_validation_is_fitted_on() -> None:
    with pytest.raises(DataError, match="found scores of split 'test', expected validation"):
        fit_calibration(dataclasses.replace(drawn(), split="test"))


def test_other_findings_and_widths_are_refused() -> None:
    table = drawn()
    found = fit_calibration(table)
    with pytest.raises(DataError, match="found one of Effusion, Mass, expected Effusion"):
        calibrated(scored(np.zeros((3, 1)), np.zeros((3, 1))), found)
    with pytest.raises(DataError, match=r"found scores of shape \(3, 1\), expected \(images, 2\)"):
        found.apply(np.zeros((3, 1)))


def test_applying_needs_numpy_alone() -> None:
    code = (
        "import sys, cxr_dist.evaluate.calibration; "
        "print(sorted({'pandas', 'pyarrow', 'scipy', 'sklearn', 'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_shift_prior_by_hand() -> None:
    """Odds 1:1 at prevalence 1/5 are a likelihood ratio of 4; at prevalence 1/2 they are odds of 4:1."""
    assert shift_prior(np.array([0.5]), 0.2, 0.5)[0] == pytest.approx(0.8, abs=1e-15)
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_prior(shift_prior(p, 0.03, 0.1), 0.1, 0.03), p, atol=1e-15)


def expectation_maximisation(p: np.ndarray, prior: float, rounds: int) -> float:
    """The iteration of Saerens et al. (2002), equation 2.9, as it is printed."""
    target = prior
    for _ in range(rounds):
        target = float(shift_prior(p, prior, target).mean())
    return target


def test_estimated_prior_is_where_expectation_maximisation_ends() -> None:
    rng = np.random.default_rng(3)
    prior, truth = 0.1, 0.3
    positive = rng.random(4000) < truth
    x = rng.normal(np.where(positive, 2.0, 0.0), 1)
    p = sigmoid(2 * x - 2 + np.log(prior / (1 - prior)))  # exact posteriors of two normals at prevalence 0.1
    found = estimate_prior(p, prior)
    assert found == pytest.approx(expectation_maximisation(p, prior, 5000), abs=1e-9)
    assert found == pytest.approx(truth, abs=0.03)


def test_estimated_prior_of_the_fitted_images_is_their_own() -> None:
    table = drawn()
    found = fit_calibration(table)
    for k, one in enumerate(found.findings.values()):
        assert one.prior is not None
        assert estimate_prior(found.apply(table_log_odds(table))[:, k], one.prior) == pytest.approx(one.prior, abs=1e-9)


def test_estimated_prior_at_the_bounds() -> None:
    assert estimate_prior(np.full(5, 0.01), 0.1) == 0.0
    assert estimate_prior(np.full(5, 0.4), 0.1) == 1.0
    assert estimate_prior(np.array([0.0, 1.0, 1.0, 0.0]), 0.1) == pytest.approx(0.5, abs=1e-12)
