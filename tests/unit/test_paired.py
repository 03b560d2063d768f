"""Two models on the same images: the paired bootstrap by a plain loop, DeLong by its definition, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.delong import delong
from cxr_dist.evaluate.external import read_external
from cxr_dist.evaluate.paired import align, compare, least_resamples
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.significance import holm, patient_error, two_sided

FINDINGS = ("Effusion", "Mass", "Hernia")


def models(noise: tuple[float, ...] = (0.0, 0.3, 3.0), num: int = 600, seed: int = 0) -> tuple[ScoreTable, ScoreTable]:
    """A model, and one that is the same with noise added to each finding's scores."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, num // 4, num)
    labels = rng.random((num, 3)) < 0.1 + 0.3 * (patients[:, None] % 3 == 0)
    logits = rng.normal(1.5 * labels, 1).round(2)
    a = ScoreTable(
        image_ids=np.array([f"{i:05d}.png" for i in range(num)]),
        patient_ids=patients,
        split="test",
        findings=FINDINGS,
        probabilities_NK=1 / (1 + np.exp(-logits)),
        logits_NK=None,
        labels_NK=labels,
    )
    worse = logits + np.array(noise) * rng.normal(0, 1, (num, 3))
    return a, dataclasses.replace(a, probabilities_NK=1 / (1 + np.exp(-worse)))


def test_differences_and_p_are_those_of_a_plain_loop_over_patients() -> None:
    a, b = models()
    found = compare(a, b, bootstrap=40, seed=5)
    patients, index = np.unique(a.patient_ids, return_inverse=True)
    draws = np.random.default_rng(5).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=40)
    for metric, reference in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        loop = np.empty((40, 3))
        for i, times in enumerate(draws):
            rows = np.repeat(np.arange(len(a)), times[index])
            for k in range(3):
                truth = a.labels_NK[rows, k]
                loop[i, k] = reference(truth, a.probabilities_NK[rows, k]) - reference(
                    truth, b.probabilities_NK[rows, k]
                )
        ours = getattr(found, metric)
        for name, samples in [*zip(FINDINGS, loop.T, strict=True), ("mean", loop.mean(axis=1))]:
            if name == "Effusion":
                continue  # the same scores: rounding decides the sign of the loop's zeros
            one = ours[name]
            assert one.difference.interval == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=1e-12)
            least = min((samples <= 0).sum(), (samples >= 0).sum())
            assert one.p == pytest.approx(min(1, 2 * (1 + least) / 41), abs=1e-12)
        truth = a.labels_NK[:, 1]
        expected = reference(truth, a.probabilities_NK[:, 1]) - reference(truth, b.probabilities_NK[:, 1])
        assert ours["Mass"].difference.value == pytest.approx(expected, abs=1e-12)


def test_a_known_answer() -> None:
    """Nothing changed in the first finding, the third is nearly noise: a tie and a win, and the other way round a loss."""
    a, b = models()
    found = compare(a, b, bootstrap=200, seed=0)
    same = found.auroc["Effusion"]
    assert (same.difference.value, same.difference.interval, same.p, same.decision) == (0.0, (0.0, 0.0), 1.0, "tie")
    worse = found.auroc["Hernia"]
    assert (worse.decision, worse.p) == ("win", 2 / 201)
    assert worse.p_holm == pytest.approx(3 * 2 / 201)
    assert worse.difference.interval is not None
    assert worse.difference.interval[0] > 0
    assert found.auroc["mean"].decision == "win"
    assert found.counts()["win"] >= 1
    other = compare(b, a, bootstrap=200, seed=0)
    assert other.auroc["Hernia"].decision == "loss"
    assert other.auroc["Hernia"].difference.value == -worse.difference.value
    assert other.counts() == {
        "win": found.counts()["loss"],
        "loss": found.counts()["win"],
        "tie": found.counts()["tie"],
        "undecided": 0,
    }


def test_a_model_against_itself_is_a_tie_everywhere() -> None:
    a, _ = models()
    found = compare(a, a, bootstrap=120, seed=0)
    assert found.counts() == found.counts("average_precision") == {"win": 0, "loss": 0, "tie": 3, "undecided": 0}
    assert all(
        one is not None and (one["difference"], one["z"], one["p"]) == (0, None, 1) for one in found.delong.values()
    )


def test_the_draws_are_the_same_for_both() -> None:
    """A constant gain leaves no spread in the difference, although both AUROCs spread widely."""
    a, _ = models()
    better = np.where(a.labels_NK, 1.0, 0.0)
    worst = np.where(a.labels_NK, 0.0, 1.0)
    found = compare(
        dataclasses.replace(a, probabilities_NK=better),
        dataclasses.replace(a, probabilities_NK=worst),
        bootstrap=120,
        seed=0,
    )
    assert found.auroc["Mass"].difference.interval == (1.0, 1.0)


def test_too_few_resamples_decide_nothing_and_say_so() -> None:
    assert least_resamples(1) == 40
    assert least_resamples(14) == 560
    a, b = models()
    found = compare(a, b, bootstrap=119, seed=0)
    assert found.counts() == {"win": 0, "loss": 0, "tie": 0, "undecided": 3}
    assert (
        found.auroc["Hernia"].reason == "undecided: 119 resamples can show no difference of so many findings, 120 can"
    )
    assert found.auroc["mean"].decision == "win"
    assert compare(a, b, bootstrap=0, seed=0).auroc["mean"].decision is None


def test_a_finding_without_positives_and_one_patient_have_no_decision() -> None:
    a, b = models()
    labels = a.labels_NK.copy()
    labels[:, 2] = False
    found = compare(*(dataclasses.replace(t, labels_NK=labels) for t in (a, b)), bootstrap=120, seed=0)
    hernia = found.auroc["Hernia"]
    assert (hernia.difference.value, hernia.p, hernia.decision, hernia.reason) == (None, None, None, "no positives")
    assert found.delong["Hernia"] is None
    assert found.auroc["Mass"].p_holm == min(1, 2 * (found.auroc["Mass"].p or 0))  # two findings are looked at
    alone = np.zeros(len(a), np.int64)
    single = compare(*(dataclasses.replace(t, patient_ids=alone) for t in (a, b)), bootstrap=120, seed=0)
    assert single.auroc["Mass"].difference.value is not None
    assert single.auroc["Mass"].reason == "no interval: all images are of one patient"
    assert single.auroc["Mass"].decision is None
    none = compare(*(dataclasses.replace(t, labels_NK=labels & False) for t in (a, b)), bootstrap=120, seed=0)
    assert none.auroc["mean"].reason == "no finding has both positives and negatives"


def test_json_is_plain() -> None:
    a, b = models()
    text = json.loads(json.dumps(compare(a, b, bootstrap=120, seed=0).to_json(), allow_nan=False))
    assert text["format"] == "cxr-dist/comparison/1"
    assert set(text["auroc"]) == {*FINDINGS, "mean"}
    assert set(text["auroc"]["Mass"]["difference"]) == {"value", "lower", "upper"}
    assert text["delong"]["label"] == "DeLong's test, images independent"


def structural_components(a: np.ndarray, b: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and their covariance by DeLong's definition: every positive against every negative."""
    v10, v01, areas = [], [], []
    for scores in (a, b):
        above = scores[positive][:, None] - scores[~positive][None, :]
        wins = (above > 0) + 0.5 * (above == 0)
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
        areas.append(wins.mean())
    return np.array(areas), np.cov(v10) / positive.sum() + np.cov(v01) / (~positive).sum()


@pytest.mark.parametrize("digits", [1, 6])
def test_delong_is_its_definition(digits: int) -> None:
    rng = np.random.default_rng(digits)
    positive = rng.random(300) < 0.2
    a = rng.normal(positive * 1.0, 1).round(digits)
    b = (0.6 * a + rng.normal(positive * 0.5, 1)).round(digits)
    found = delong(a, b, positive)
    areas, covariance = structural_components(a, b, positive)
    np.testing.assert_allclose([found.auroc_a, found.auroc_b], areas, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-15)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.z == pytest.approx((areas[0] - areas[1]) / error, abs=1e-9)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.z or 0)), abs=1e-12)
    assert (found.lower, found.upper) == pytest.approx(
        tuple(found.difference + np.array([-1, 1]) * 1.959963984540054 * error), abs=1e-9
    )
    assert found.auroc_a == pytest.approx(roc_auc_score(positive, a), abs=1e-12)


def test_delong_by_hand() -> None:
    """Two positives, two negatives. a orders all pairs but (0.4, 0.5): AUROC 3/4; b orders all: AUROC 1, no variance.

    a's positives are above 1/2 and 1 of the negatives (variance 1/8), its negatives below 1 and 1/2 of the positives.
    """
    positive = np.array([True, True, False, False])
    found = delong(np.array([0.4, 0.9, 0.1, 0.5]), np.array([0.8, 0.9, 0.1, 0.2]), positive)
    assert (found.auroc_a, found.auroc_b) == (0.75, 1.0)
    assert np.array(found.covariance).tolist() == [[1 / 8 / 2 + 1 / 8 / 2, 0], [0, 0]]
    assert found.z == pytest.approx(-0.25 / np.sqrt(1 / 8))
    certain = delong(np.array([0.8, 0.9, 0.1, 0.2]), np.array([0.1, 0.2, 0.8, 0.9]), positive)
    assert (certain.difference, certain.z, certain.p) == (1.0, None, 0.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.021]) == [0.04, 0.04]  # never below one before it
    assert holm([]) == []
    assert two_sided(1.959963984540054) == pytest.approx(0.05, abs=1e-12)


def test_patient_error_by_hand() -> None:
    """Values 1, 1, 0, 0 of patients 0, 0, 1, 1: deviations sum to 1 and -1; sqrt(2) / 4, twice what images would say."""
    assert patient_error(np.array([1.0, 1, 0, 0]), np.array([7, 7, 9, 9])) == pytest.approx(np.sqrt(2) / 4, abs=1e-15)
    assert patient_error(np.array([1.0, 1, 0, 0]), np.arange(4)) == pytest.approx(0.25, abs=1e-15)


def test_align_takes_common_findings_and_reorders() -> None:
    a, b = models()
    order = np.random.default_rng(1).permutation(len(b))
    mixed = b.select(order).with_findings(("Hernia", "Mass"))
    first, second = align(a, mixed)
    assert first.findings == second.findings == ("Mass", "Hernia")
    np.testing.assert_array_equal(first.image_ids, second.image_ids)
    np.testing.assert_array_equal(second.probabilities_NK, b.probabilities_NK[:, 1:])
    expected = compare(a.with_findings(("Mass", "Hernia")), b.with_findings(("Mass", "Hernia")), bootstrap=80, seed=0)
    assert compare(first, second, bootstrap=80, seed=0) == expected


def test_align_names_missing_and_extra_images() -> None:
    a, b = models()
    with pytest.raises(DataError, match=r"found 2 images that only the first has \(first '00000.png'\), expected"):
        align(a, b.select(np.arange(len(b)) >= 2))
    part = np.arange(len(a)) != 5
    with pytest.raises(
        DataError,
        match=r"1 images that only the first has .* and 1 images that only the second has \(first '00005.png'\)",
    ):
        align(a.select(part), b.select(np.arange(len(b)) != 7))
    with pytest.raises(DataError, match="found no finding in common"):
        align(a.with_findings(("Mass",)), b.with_findings(("Hernia",)))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda b: dataclasses.replace(b, split="validation"), "scores of the splits test and validation"),
        (lambda b: b.with_findings(("Mass", "Effusion", "Hernia")), "expected the same in the same order; align"),
        (lambda b: b.select(np.arange(600)[::-1]), "found other images, or another order, in tables of 600 and 600"),
        (lambda b: b.select(np.arange(599)), "tables of 600 and 599; align the tables first"),
        (lambda b: dataclasses.replace(b, patient_ids=b.patient_ids + 1), "another patient for '00000.png'"),
    ],
)
def test_tables_that_are_not_of_the_same_images_are_refused(other, words: str) -> None:
    a, b = models()
    with pytest.raises(DataError, match=words):
        compare(a, other(b), bootstrap=10, seed=0)


def test_other_labels_are_refused() -> None:
    a, b = models()
    labels = b.labels_NK.copy()
    labels[3, 1] ^= True
    with pytest.raises(DataError, match=r"found 1 labels that differ \(first Mass of '00003.png'\)"):
        compare(a, dataclasses.replace(b, labels_NK=labels), bootstrap=10, seed=0)


def test_reference_predictions_against_a_copy_that_is_worse_in_one_finding(real_data: Path) -> None:
    """The known answer: a loss for the copy where noise was added, exact ties where nothing was touched, in any order."""
    labels = nih.read_labels((real_data / "Data_Entry_2017_v2020.csv.gz").read_bytes(), "labels")
    model = read_external(real_data / "reference_predictions" / "preds.csv", labels, nih.FINDINGS)
    at = model.findings.index("Effusion")
    rng = np.random.default_rng(0)
    worse = model.probabilities_NK.copy()
    worse[:, at] = np.clip(worse[:, at] + rng.normal(0, 0.1, len(model)), 0, 1)
    copy = dataclasses.replace(model, probabilities_NK=worse).select(rng.permutation(len(model)))
    found = compare(*align(model, copy), bootstrap=600, seed=0)
    assert {finding: one.decision for finding, one in found.auroc.items() if finding != "mean"} == {
        finding: "win" if finding == "Effusion" else "tie" for finding in model.findings
    }
    assert all(one.p == 1 for finding, one in found.auroc.items() if finding not in ("Effusion", "mean"))
    truth = model.labels_NK[:, at]
    gap = roc_auc_score(truth, model.probabilities_NK[:, at]) - roc_auc_score(truth, worse[:, at])
    assert found.auroc["Effusion"].difference.value == pytest.approx(gap, abs=1e-12)
    assert found.auroc["mean"].difference.value == pytest.approx(gap / 14, abs=1e-12)
    assert found.auroc["mean"].decision == "win"
