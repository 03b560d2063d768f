"""Counts and rates at thresholds, net benefit, and the reliability of probabilities, against scikit-learn, scipy and by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, classification_report, confusion_matrix

from cxr_dist.evaluate.bootstrap import resample
from cxr_dist.evaluate.operating import DECISION_THRESHOLDS, decision_curve, operating_point
from cxr_dist.evaluate.reliability import NUM_BINS, reliability, wilson
from cxr_dist.evaluate.scores import ScoreTable


def scored(probabilities_NK: np.ndarray, labels_NK: np.ndarray) -> ScoreTable:
    num = len(labels_NK)
    return ScoreTable(
        image_ids=np.array([f"{i}.png" for i in range(num)], dtype=np.str_),
        patient_ids=np.arange(num) // 2,
        split="test",
        findings=("Effusion", "Mass", "Hernia")[: labels_NK.shape[1]],
        probabilities_NK=probabilities_NK,
        logits_NK=None,
        labels_NK=labels_NK.astype(bool),
    )


def point(table: ScoreTable, thresholds: list[float | None], bootstrap: int = 20) -> dict:
    found = resample(table, {"rule": thresholds}, bootstrap=bootstrap, seed=0)
    why = [None if value is not None else "no threshold: none" for value in thresholds]
    return operating_point(found, "rule", thresholds, why, label="l", chosen_on="c")


def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.random((500, 3)) < [0.3, 0.1, 0.0]
    return np.clip(rng.normal(0.3 + 0.2 * labels, 0.15), 0, 1).round(2), labels


def test_rates_and_counts_are_scikit_learns() -> None:
    probabilities, labels = drawn()
    found = point(scored(probabilities, labels), [0.4, 0.35, None])
    for k, finding in enumerate(("Effusion", "Mass")):
        one, called = found["findings"][finding], probabilities[:, k] >= one_threshold(found, finding)
        tn, fp, fn, tp = confusion_matrix(labels[:, k], called).ravel().tolist()
        assert (one["tp"], one["fp"], one["fn"], one["tn"]) == (tp, fp, fn, tn)
        expected = classification_report(labels[:, k], called, output_dict=True)
        assert one["sensitivity"]["value"] == pytest.approx(expected["True"]["recall"], abs=1e-12)
        assert one["specificity"]["value"] == pytest.approx(expected["False"]["recall"], abs=1e-12)
        assert one["precision"]["value"] == pytest.approx(expected["True"]["precision"], abs=1e-12)
        assert one["f1"]["value"] == pytest.approx(expected["True"]["f1-score"], abs=1e-12)
        assert one["f1"]["lower"] < one["f1"]["value"] < one["f1"]["upper"]
        assert one["reason"] is None
    mean = np.mean([found["findings"][f]["f1"]["value"] for f in ("Effusion", "Mass")])
    assert found["mean"]["f1"]["value"] == pytest.approx(mean, abs=1e-15)


def one_threshold(found: dict, finding: str) -> float:
    return found["findings"][finding]["threshold"]


def test_what_is_undefined_is_none_and_says_why() -> None:
    probabilities, labels = drawn()
    found = point(scored(probabilities, labels), [None, 1.01, 0.4])["findings"]
    nothing = {"value": None, "lower": None, "upper": None}
    assert found["Effusion"] == {
        "threshold": None,
        **dict.fromkeys(("sensitivity", "specificity", "precision", "f1"), nothing),
        **dict.fromkeys(("tp", "fp", "fn", "tn")),
        "reason": "no threshold: none",
    }
    assert (found["Mass"]["precision"]["value"], found["Mass"]["f1"]["value"]) == (None, 0.0)
    assert found["Mass"]["reason"] == "nothing is called present: no precision"
    assert (found["Hernia"]["sensitivity"]["value"], found["Hernia"]["reason"]) == (None, "no positives")
    assert found["Hernia"]["specificity"]["value"] > 0.5


def test_net_benefit_by_hand() -> None:
    """Two of five images are cases. At t = 0.2 odds are 1/4: called are 0.9, 0.5, 0.2: 2 cases, 1 other."""
    found = decision_curve(np.array([0.9, 0.5, 0.2, 0.1, 0.004]), np.array([True, False, True, False, False]))
    at = DECISION_THRESHOLDS.index(0.2)
    assert found["thresholds"][at] == 0.2
    assert found["model"][at] == pytest.approx((2 - 1 / 4) / 5, abs=1e-15)
    assert found["all"][at] == pytest.approx((2 - 3 / 4) / 5, abs=1e-15)
    assert found["model"][0] == pytest.approx((2 - 2 * 0.005 / 0.995) / 5, abs=1e-15)  # 0.004 is below
    assert found["model"][-1] == pytest.approx((1 - 1) / 5, abs=1e-15)  # at 0.5: one case, one other


def test_reliability_is_scikit_learns_with_ties_and_without() -> None:
    rng = np.random.default_rng(1)
    for digits in (8, 2):
        p = rng.beta(0.3, 4, 3000).round(digits)
        positive = rng.random(3000) < p**1.3
        found = reliability(p, positive)
        observed, predicted = calibration_curve(positive, p, n_bins=NUM_BINS, strategy="quantile")
        assert [one["observed"] for one in found["bins"]] == pytest.approx(observed, abs=1e-12)
        assert [one["mean_probability"] for one in found["bins"]] == pytest.approx(predicted, abs=1e-12)
        assert sum(one["count"] for one in found["bins"]) == 3000
        assert found["brier"] == pytest.approx(brier_score_loss(positive, p), abs=1e-12)
        counts = np.array([one["count"] for one in found["bins"]])
        assert found["ece"] == pytest.approx((counts * np.abs(observed - predicted)).sum() / 3000, abs=1e-12)
        if digits == 8:
            assert set(counts.tolist()) == {200}


def test_ece_and_brier_by_hand() -> None:
    """Fifteen images at 0.2 with 6 cases, fifteen at 0.8 with 9: each bin is 0.2 off."""
    p = np.repeat([0.2, 0.8], 15)
    positive = np.array([1] * 6 + [0] * 9 + [1] * 9 + [0] * 6, bool)
    found = reliability(p, positive)
    assert [(one["count"], one["observed"]) for one in found["bins"]] == [(15, 0.4), (15, 0.6)]
    assert found["ece"] == pytest.approx(0.2, abs=1e-12)
    assert found["brier"] == pytest.approx((6 * 0.64 + 9 * 0.04 + 9 * 0.04 + 6 * 0.64) / 30, abs=1e-12)
    assert (found["mean_probability"], found["observed"]) == pytest.approx((0.5, 0.5))


def test_reliability_of_one_score_one_image_and_none() -> None:
    assert len(reliability(np.full(40, 0.3), np.arange(40) < 4)["bins"]) == 1
    assert reliability(np.full(40, 0.3), np.arange(40) < 4)["ece"] == pytest.approx(0.2)
    assert reliability(np.array([0.3]), np.array([True]))["bins"][0]["count"] == 1
    assert reliability(np.array([]), np.array([], bool)) == {
        **dict.fromkeys(("ece", "brier", "mean_probability", "observed")),
        "bins": [],
    }


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 7), (40, 1000), (1, 1)])
def test_wilson_is_scipys(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)
