"""evaluation.json whole: its layout, that test labels choose nothing, prevalence moved only where it is shown, bad input."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.analysis import FORMAT, analyse, resampled
from cxr_dist.evaluate.calibration import sigmoid
from cxr_dist.evaluate.external import read_external
from cxr_dist.evaluate.label_shift import estimate_prior, mixture_p, prior_interval
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.thresholds import RULES, fit

FINDINGS = ("Effusion", "Mass", "Hernia")


def scored(
    split: str, *, num: int = 1200, first: int = 0, prevalence: tuple[float, ...] = (0.2, 0.1, 0.05), seed: int = 0
) -> ScoreTable:
    """Scores whose distribution within each class is always the same: only prevalence moves."""
    rng = np.random.default_rng(seed)
    labels = rng.random((num, 3)) < prevalence
    logits = rng.normal(2.5 * labels - 2, 1).astype(np.float32)
    return ScoreTable(
        image_ids=np.array([f"{first + i:06d}.png" for i in range(num)], dtype=np.str_),
        patient_ids=first + np.arange(num) // 2,
        split=split,
        findings=FINDINGS,
        probabilities_NK=sigmoid(logits.astype(np.float64)),
        logits_NK=logits,
        labels_NK=labels,
    )


VALIDATION = scored("validation", first=10_000, seed=1)
MOVED = (0.5, 0.1, 0.05)


def analysed(scores: ScoreTable, validation: ScoreTable | None = VALIDATION, **more: Any) -> dict[str, Any]:
    found = analyse(scores, validation, bootstrap=10, seed=0, **more)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_layout() -> None:
    found = analysed(scored("test"))
    assert found["format"] == FORMAT == "cxr-dist/evaluation/1"
    assert list(found["discrimination"]) == [*FINDINGS, "mean"]
    assert list(found["operating_points"]) == [*RULES, "half"]
    assert list(found["calibration"]["kinds"]) == ["raw", "calibrated", "prior_shift", "prior_shift_checked", "oracle"]
    assert found["validation"] == {"n_images": 1200, "n_patients": 600, "patients_shared": 0, "is_judged": False}
    assert (found["subgroups"], found["second_labels"]) == ({}, None)
    points = fit(VALIDATION)
    for rule in RULES:
        for finding in FINDINGS:
            assert found["operating_points"][rule]["findings"][finding]["threshold"] == points[finding][rule]
        assert found["operating_points"][rule]["chosen_on"] == "validation split, 1,200 images"


def test_labels_of_the_judged_images_choose_nothing() -> None:
    """Other labels, the same scores: thresholds, calibration and the estimated prevalence stay; the oracle does not."""
    test = scored("test", prevalence=MOVED)
    other = dataclasses.replace(test, labels_NK=~test.labels_NK)
    one, two = analysed(test), analysed(other)

    def chosen(found: dict[str, Any]) -> Any:
        points = {
            rule: {f: one["threshold"] for f, one in point["findings"].items()}
            for rule, point in found["operating_points"].items()
        }
        names = ("mean_probability", "prior", "moved", "estimated", "p_holm", "p_mixture", "against")
        kinds = {
            kind: {f: {name: one.get(name) for name in names} for f, one in value["findings"].items()}
            for kind, value in found["calibration"]["kinds"].items()
            if kind != "oracle"
        }
        return points, kinds

    assert chosen(one) == chosen(two)
    oracle = [found["calibration"]["kinds"]["oracle"]["findings"]["Mass"]["prior"] for found in (one, two)]
    assert oracle == [test.labels_NK[:, 1].mean(), 1 - test.labels_NK[:, 1].mean()]
    assert one["calibration"]["kinds"]["oracle"]["label"].startswith("oracle: ")


def test_prevalence_is_moved_where_the_scores_show_it_and_then_helps() -> None:
    test = scored("test", prevalence=MOVED, num=2000)
    kinds = analysed(test)["calibration"]["kinds"]
    assert all(one["moved"] for one in kinds["prior_shift"]["findings"].values())
    moved = kinds["prior_shift_checked"]["findings"]
    assert [moved[f]["moved"] for f in FINDINGS] == [True, False, False]
    effusion = moved["Effusion"]
    assert effusion["prior"] == pytest.approx(0.5, abs=0.06)
    assert effusion["estimated"]["lower"] < 0.5 < effusion["estimated"]["upper"]
    assert effusion["ece"] < 0.4 * kinds["calibrated"]["findings"]["Effusion"]["ece"]
    assert effusion["reason"] is None
    mass = moved["Mass"]
    assert mass["ece"] == kinds["calibrated"]["findings"]["Mass"]["ece"]
    assert mass["prior"] == kinds["calibrated"]["findings"]["Mass"]["prior"]
    assert mass["reason"].startswith("not moved: the scores do not show another prevalence than validation's (p = ")
    plain = kinds["prior_shift"]["findings"]["Mass"]
    assert plain["against"] == mass["against"]
    assert plain["mean_probability"] != mass["mean_probability"]


def test_prevalence_is_not_moved_where_the_images_themselves_differ() -> None:
    """Every image of one finding scores higher by a constant: a prevalence that explains it would be wrong for all."""
    test = scored("test", num=3000, prevalence=MOVED)
    logits = np.asarray(test.logits_NK) + np.array([0, 1.2, 0], np.float32)
    brighter = dataclasses.replace(test, logits_NK=logits, probabilities_NK=sigmoid(logits.astype(np.float64)))
    kinds = analysed(brighter)["calibration"]["kinds"]
    found = kinds["prior_shift_checked"]["findings"]
    assert not any(one["moved"] for one in found.values())
    assert found["Mass"]["reason"].startswith(
        "not moved: no prevalence makes a mixture of validation's classes of these"
    )
    assert (
        found["Effusion"]["reason"]
        == "not moved: the scores of Mass show that more than prevalence differs in these images"
    )
    assert kinds["prior_shift"]["findings"]["Mass"]["ece"] > kinds["calibrated"]["findings"]["Mass"]["ece"]


def test_mixture_test_holds_its_level_and_sees_other_images() -> None:
    """Patients with three images alike: 60 seeded pairs of tables, another prevalence, and another look."""
    refused = {"prevalence": 0, "look": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)

        def drawn(num: int, prevalence: float, brighter: float, rng: np.random.Generator = rng) -> Any:
            positive = np.repeat(rng.random(num) < prevalence, 3)
            x = rng.normal(1.5 * positive + np.repeat(rng.normal(0, 0.7, num), 3) + brighter, 0.7)
            return sigmoid(x - 3), positive, np.repeat(np.arange(num), 3)

        there, positive, patients = drawn(1500, 0.05, 0)
        for name, (prevalence, brighter) in {"prevalence": (0.12, 0.0), "look": (0.12, 0.4)}.items():
            here, _, others = drawn(800, prevalence, brighter)
            p = mixture_p(there, positive, patients, here, others)
            assert p is not None
            refused[name] += p < 0.05
    assert refused["prevalence"] <= 8
    assert refused["look"] >= 50
    assert mixture_p(np.full(9, 0.5), np.arange(9) < 3, np.arange(9), np.full(5, 0.5), np.arange(5)) is None


def test_interval_of_the_estimated_prevalence_covers() -> None:
    """95 % of intervals hold the truth; of 60 seeded tables of images in pairs, between 52 and 60 do."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        patients = np.arange(1000) // 2
        positive = np.repeat(rng.random(500) < 0.3, 2)  # both images of a patient alike
        x = rng.normal(np.where(positive, 2.0, 0.0), 1)
        p = sigmoid(2 * x - 2 + np.log(0.1 / 0.9))
        found = prior_interval(p, 0.1, estimate_prior(p, 0.1), patients)
        assert found is not None
        covered += found[0] <= 0.3 <= found[1]
    assert 52 <= covered <= 60


def test_isotonic_is_said_to_be_it() -> None:
    found = analysed(scored("test"), calibration="isotonic")["calibration"]
    assert found["method"] == "isotonic"
    assert found["kinds"]["calibrated"]["label"] == "isotonic regression fitted on validation"


def test_without_validation_nothing_is_chosen() -> None:
    found = analysed(scored("test"), None)
    youden = found["operating_points"]["youden"]
    assert youden["findings"]["Mass"]["threshold"] is None
    assert youden["findings"]["Mass"]["reason"] == "no threshold: no validation scores were given"
    assert youden["mean"]["f1"]["value"] is None
    assert found["operating_points"]["half"]["findings"]["Mass"]["tp"] is not None
    assert list(found["calibration"]["kinds"]) == ["raw"]
    assert found["calibration"]["reason"] == "no validation scores were given"
    assert found["validation"] is None
    assert found["decision_curves"]["Mass"]["probabilities"] == "probabilities as the model gave them"


def test_validation_judged_by_itself_says_so() -> None:
    found = analysed(VALIDATION, VALIDATION)
    assert found["validation"]["is_judged"]
    assert found["operating_points"]["f1"]["chosen_on"].endswith("which are the very images judged here")
    assert found["calibration"]["fitted_on"].endswith("which are the very images judged here")


def test_a_finding_that_validation_lacks_or_has_one_class_of() -> None:
    labels = VALIDATION.labels_NK.copy()
    labels[:, 1] = False
    validation = dataclasses.replace(VALIDATION, labels_NK=labels).with_findings(("Mass", "Effusion"))
    found = analysed(scored("test"), validation)
    reasons = {f: one["reason"] for f, one in found["operating_points"]["youden"]["findings"].items()}
    assert reasons == {
        "Effusion": None,
        "Mass": "no threshold: no positives on validation",
        "Hernia": "no threshold: not in the validation scores",
    }
    kinds = found["calibration"]["kinds"]
    for kind in ("calibrated", "prior_shift", "prior_shift_checked", "oracle"):
        assert kinds[kind]["findings"]["Mass"]["reason"] == "not calibrated: no positives on validation"
        assert kinds[kind]["findings"]["Hernia"]["reason"] == "not calibrated: not in the validation scores"
        assert kinds[kind]["findings"]["Hernia"]["ece"] == kinds["raw"]["findings"]["Hernia"]["ece"]
    assert kinds["calibrated"]["findings"]["Effusion"]["ece"] != kinds["raw"]["findings"]["Effusion"]["ece"]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_tables_of_no_image_or_of_one_patient(num: int) -> None:
    found = analysed(scored("test").select(np.arange(1200) < num))
    assert found["n_images"] == num
    assert found["discrimination"]["mean"]["auroc"]["lower"] is None


def test_one_patient_has_figures_without_intervals() -> None:
    test = scored("test")
    found = analysed(dataclasses.replace(test, patient_ids=np.zeros(1200, np.int64)))
    mass = found["operating_points"]["youden"]["findings"]["Mass"]
    assert mass["sensitivity"]["value"] is not None
    assert mass["sensitivity"]["lower"] is None
    assert mass["reason"] == found["discrimination"]["Mass"]["reason"] == "no interval: all images are of one patient"
    shifted = found["calibration"]["kinds"]["prior_shift_checked"]["findings"]
    assert not any(one["moved"] for one in shifted.values())
    assert shifted["Mass"]["estimated"]["lower"] is None
    assert shifted["Mass"]["p_mixture"] is None


def test_equal_scores_are_defined() -> None:
    half = np.full((1200, 3), 0.5)
    test = dataclasses.replace(scored("test"), probabilities_NK=half, logits_NK=None)
    validation = dataclasses.replace(VALIDATION, probabilities_NK=half, logits_NK=None)
    found = analysed(test, validation)
    assert found["discrimination"]["mean"]["auroc"] == {"value": 0.5, "lower": 0.5, "upper": 0.5}
    points = found["operating_points"]
    assert points["youden"]["findings"]["Mass"]["sensitivity"]["value"] == 1.0
    assert (
        points["specificity_90"]["findings"]["Mass"]["reason"]
        == "no threshold: no score on validation reaches the rate"
    )
    assert (
        found["calibration"]["kinds"]["calibrated"]["findings"]["Mass"]["reason"]
        == "not calibrated: all scores are equal on validation"
    )


def test_no_order_of_rows_or_columns_matters() -> None:
    test = scored("test")
    mixed = test.select(np.random.default_rng(0).permutation(1200)).with_findings(("Hernia", "Effusion", "Mass"))
    one, two = analysed(test), analysed(mixed)
    for part in ("discrimination", "decision_curves"):
        for finding in FINDINGS:
            assert numbers(two[part][finding]) == pytest.approx(numbers(one[part][finding]), abs=1e-12)
    for finding in FINDINGS:
        for rule in RULES:
            a, b = (found["operating_points"][rule]["findings"][finding] for found in (one, two))
            assert numbers(b) == pytest.approx(numbers(a), abs=1e-12)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, (int, float)) else []


def test_test_scores_and_shared_images_are_refused() -> None:
    with pytest.raises(DataError, match="found scores of split 'test', expected validation"):
        analysed(scored("test"), dataclasses.replace(VALIDATION, split="test"))
    with pytest.raises(DataError, match="1200 images are both in the test scores and in the validation scores"):
        analysed(scored("test"), scored("validation"))


def test_resamples_made_before_are_used() -> None:
    test = scored("test")
    found = resampled(test, VALIDATION, bootstrap=10, seed=0)
    assert analysed(test, found=found) == analysed(test)


def test_reference_predictions_judged_with_half_of_the_patients_as_validation(real_data: Any) -> None:
    """A real model's probabilities: calibration helps, half of the same patients show no other prevalence."""
    labels = nih.read_labels((real_data / "Data_Entry_2017_v2020.csv.gz").read_bytes(), "labels")
    table = read_external(real_data / "reference_predictions" / "preds.csv", labels, nih.FINDINGS)
    patients = np.unique(table.patient_ids)
    first = np.isin(table.patient_ids, np.random.default_rng(0).permutation(patients)[: len(patients) // 2])
    validation = dataclasses.replace(table.select(first), split="validation")
    found = analyse(table.select(~first), validation, rows=labels, bootstrap=20, seed=0)
    kinds = found["calibration"]["kinds"]
    assert kinds["calibrated"]["mean"]["ece"] < 0.8 * kinds["raw"]["mean"]["ece"]
    assert kinds["calibrated"]["mean"]["brier"] < kinds["raw"]["mean"]["brier"]
    assert not any(one["moved"] for one in kinds["prior_shift_checked"]["findings"].values())
    assert 0.83 < found["discrimination"]["mean"]["auroc"]["value"] < 0.85
    assert found["subgroups"]["view"]["PA"]["n_images"] + found["subgroups"]["view"]["AP"]["n_images"] == 11_371
