"""Patient resamples: the weighted metrics against repeated rows, intervals against a plain loop, and what has none."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cxr_dist.evaluate import bootstrap
from cxr_dist.evaluate.bootstrap import Ranked, measure, rates, resample, with_interval
from cxr_dist.evaluate.metrics import Metric, Metrics, auroc, average_precision
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


@given(both_classes(), st.integers(0, 2**32 - 1))
def test_weighted_metrics_are_those_of_repeated_rows(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    scores, positive = case
    weights_NB = np.random.default_rng(seed).integers(0, 4, (len(scores), 5))
    ranked = Ranked.of(scores, positive, np.arange(len(scores)), len(scores))
    areas, precisions = ranked.metrics(weights_NB.astype(np.float64))
    for b in range(5):
        repeated_scores, repeated = np.repeat(scores, weights_NB[:, b]), np.repeat(positive, weights_NB[:, b])
        if len(set(repeated.tolist())) < 2:
            assert np.isnan(areas[b])
            assert np.isnan(precisions[b])
            continue
        assert areas[b] == pytest.approx(sk.roc_auc_score(repeated, repeated_scores), abs=1e-12)
        expected = sk.average_precision_score(repeated, repeated_scores)
        assert precisions[b] == pytest.approx(expected, abs=1e-12)


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


def numbers(found: Metrics) -> list[float]:
    pairs = [metric for one in found.findings.values() for metric in (one.auroc, one.average_precision)]
    pairs += [found.mean_auroc, found.mean_average_precision]
    return [number for metric in pairs for number in (metric.value, *(metric.interval or ())) if number is not None]


def test_intervals_do_not_depend_on_row_order_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table()
    found = measure(table, bootstrap=50, seed=1)
    shuffled = table.select(np.random.default_rng(0).permutation(400))
    assert numbers(measure(shuffled, bootstrap=50, seed=1)) == pytest.approx(numbers(found), abs=1e-13)
    monkeypatch.setattr(bootstrap, "_CHUNK", 3)
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
    monkeypatch.setattr(bootstrap, "_LEAST_DEFINED", 0.9)
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


def test_a_single_image_of_each_class_weighs_as_it_should() -> None:
    """Patient 0: a positive at 0.8; patient 1: negatives at 0.9 and 0.8; patient 2: a negative at 0.1."""
    ranked = Ranked.of(np.array([0.8, 0.9, 0.8, 0.1]), np.array([True, False, False, False]), np.array([0, 1, 1, 2]), 3)
    areas, precisions = ranked.metrics(np.array([[1, 1, 2, 0], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=np.float64))
    assert areas[:3].tolist() == [1.5 / 3, 1.0, 0.5 / 2]
    assert precisions[:3] == pytest.approx([1 / 3, 1.0, 2 / 4], abs=1e-15)
    assert np.isnan([areas[3], precisions[3]]).all()


def test_rates_are_those_of_scikit_learn_in_every_resample() -> None:
    table = random_table()
    found = resample(table, {"low": [0.3, 0.4], "high": [0.6, None]}, bootstrap=30, seed=3)
    draws = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=30)
    _, index = np.unique(table.patient_ids, return_inverse=True)
    for b, times in enumerate([np.ones(60, int), *draws]):
        rows = np.repeat(np.arange(400), times[index])
        for rule, k, threshold in (("low", 0, 0.3), ("low", 1, 0.4), ("high", 0, 0.6)):
            truth, called = table.labels_NK[rows, k], table.probabilities_NK[rows, k] >= threshold
            expected = {
                "sensitivity": sk.recall_score(truth, called),
                "specificity": sk.recall_score(~truth, ~called),
                "precision": sk.precision_score(truth, called),
                "f1": sk.f1_score(truth, called),
            }
            values = {name: samples[k, b] for name, samples in rates(found, rule).items()}
            assert values == pytest.approx(expected, abs=1e-12)
    assert all(np.isnan(samples[1]).all() for samples in rates(found, "high").values())


def test_the_table_itself_is_the_first_column() -> None:
    table = random_table()
    found = resample(table, bootstrap=5, seed=0)
    for k in range(2):
        scores, positive = table.probabilities_NK[:, k], table.labels_NK[:, k]
        assert found.auroc[k, 0] == auroc(scores, positive)
        assert found.average_precision[k, 0] == pytest.approx(average_precision(scores, positive), abs=1e-14)
    assert found.auroc.shape == (2, 6)


def test_one_patient_has_values_and_no_intervals() -> None:
    table = random_table()
    alone = scored(table.probabilities_NK, table.labels_NK, np.zeros(400, np.int64))
    found = measure(alone, bootstrap=20)
    assert found.mean_auroc == Metric(measure(table).mean_auroc.value)
    assert found.findings["Mass"].auroc.interval is None
    assert found.findings["Mass"].reason == found.reason == "no interval: all images are of one patient"
    assert measure(alone).reason is None


def test_equal_scores_are_a_coin() -> None:
    labels = random_table().labels_NK
    found = measure(scored(np.full(labels.shape, 0.5), labels), bootstrap=20)
    assert found.mean_auroc == Metric(0.5, (0.5, 0.5))
    assert found.findings["Mass"].average_precision.value == pytest.approx(labels[:, 1].mean(), abs=1e-15)


def test_a_class_that_a_draw_lacks_is_left_out_of_that_draw() -> None:
    """Percentiles are those of the draws that are left, here by hand."""
    assert with_interval(np.array([0.5, np.nan, 0.0, 1.0, np.nan, 0.5])) == (
        Metric(0.5, (0.025, 0.975)),
        None,
    )
    few = np.array([0.5, np.nan, np.nan, np.nan, 1.0, 0.5])
    assert with_interval(few) == (Metric(0.5), "no interval: defined in 2 of 5 patient resamples")
    assert with_interval(np.array([np.nan, 1.0])) == (Metric(None), None)


def test_resamples_of_a_rare_class_are_undefined_where_it_was_not_drawn() -> None:
    labels = np.zeros((30, 1), bool)
    labels[4] = True
    table = scored(np.linspace(0, 1, 30)[:, None], labels)
    found = resample(table, {"rule": [0.5]}, bootstrap=50, seed=0)
    drawn = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=50)[:, 4] > 0
    assert 0 < drawn.sum() < 50
    np.testing.assert_array_equal(~np.isnan(found.auroc[0, 1:]), drawn)
    np.testing.assert_array_equal(~np.isnan(rates(found, "rule")["sensitivity"][0, 1:]), drawn)
    assert not np.isnan(rates(found, "rule")["specificity"]).any()
