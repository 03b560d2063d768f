"""Subgroups and images without finding: counts by hand, figures against scikit-learn on the part itself."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.bootstrap import measure
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.subgroups import no_finding, rows_of, subgroups

NUM = 240
FINDINGS = ("Effusion", "Mass")


def scored() -> ScoreTable:
    rng = np.random.default_rng(0)
    labels = rng.random((NUM, 2)) < [0.4, 0.2]
    return ScoreTable(
        image_ids=np.array([f"{i}.png" for i in range(NUM)], dtype=np.str_),
        patient_ids=np.arange(NUM) // 3,
        split="test",
        findings=FINDINGS,
        probabilities_NK=np.clip(rng.normal(0.3 + 0.2 * labels, 0.2), 0, 1),
        logits_NK=None,
        labels_NK=labels,
    )


def rows(table: ScoreTable, *, hernia: int = 0) -> pa.Table:
    """Rows in another order, with three images more; `hernia` images have a finding that the table does not score."""
    num = NUM + 3
    matrix = np.zeros((num, 14), bool)
    for k, finding in enumerate(FINDINGS):
        matrix[:NUM, nih.FINDINGS.index(finding)] = table.labels_NK[:, k]
    matrix[:hernia, nih.FINDINGS.index("Hernia")] = True
    ages = [(5, 18, 39, 40, 60, 80, None, 120)[i % 8] for i in range(num)]
    made = pa.table(
        {
            "image_id": [f"{i}.png" for i in range(num)],
            "patient_id": [i // 3 for i in range(num)],
            "view": [("PA", "AP", "")[i % 3] for i in range(num)],
            "age": ages,
            "sex": ["F" if i // 3 % 2 else "M" for i in range(num)],
            "follow_up": [0] * num,
            "findings": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 14),
        },
        schema=nih.LABELS_SCHEMA,
    )
    return made.take(np.random.default_rng(1).permutation(num))


def test_rows_are_those_of_the_table_in_its_order() -> None:
    table = scored()
    assert rows_of(table, rows(table))["image_id"].to_pylist() == table.image_ids.tolist()


def test_images_without_or_with_two_rows_are_named() -> None:
    table = scored()
    few = rows(table).filter(pa.compute.not_equal(rows(table)["image_id"], "7.png"))
    with pytest.raises(DataError, match=r"found no row for 1 of 240 scored images \(first '7.png'\)"):
        rows_of(table, few)
    with pytest.raises(DataError, match="in two rows, expected one each"):
        rows_of(table, pa.concat_tables([rows(table), rows(table).slice(0, 1)]))


def test_groups_counts_and_figures() -> None:
    table = scored()
    found = subgroups(table, rows_of(table, rows(table)), [0.4, None], bootstrap=25, seed=4)
    assert {name: list(groups) for name, groups in found.items()} == {
        "sex": ["M", "F"],
        "age": ["0-17", "18-39", "40-59", "60-79", "80+", "unknown"],
        "view": ["PA", "AP", "unknown"],
    }
    for groups in found.values():
        assert sum(one["n_images"] for one in groups.values()) == NUM
    assert {name: one["n_images"] for name, one in found["age"].items()} == {
        "0-17": 30,
        "18-39": 60,
        "40-59": 30,
        "60-79": 30,
        "80+": 60,
        "unknown": 30,
    }
    women = table.select(np.arange(NUM) // 3 % 2 == 1)
    one = found["sex"]["F"]
    assert (one["n_images"], one["n_patients"]) == (120, 40)
    expected = measure(women, bootstrap=25, seed=4)
    assert one["findings"]["Mass"]["auroc"] == expected.findings["Mass"].auroc.to_json()
    assert one["mean"]["auroc"] == expected.mean_auroc.to_json()
    scores, positive = women.probabilities_NK[:, 0], women.labels_NK[:, 0]
    effusion = one["findings"]["Effusion"]
    assert effusion["auroc"]["value"] == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert effusion["sensitivity"]["value"] == pytest.approx((scores[positive] >= 0.4).mean(), abs=1e-15)
    assert effusion["specificity"]["value"] == pytest.approx((scores[~positive] < 0.4).mean(), abs=1e-15)
    assert effusion["positives"] == positive.sum()
    assert (one["findings"]["Mass"]["sensitivity"]["value"], one["findings"]["Mass"]["reason"]) == (
        None,
        "no threshold",
    )


def test_a_group_without_positives_says_so() -> None:
    table = scored()
    men = np.arange(NUM) // 3 % 2 == 0
    table = dataclasses.replace(table, labels_NK=table.labels_NK & ~men[:, None])
    found = subgroups(table, rows_of(table, rows(table)), [0.4, 0.4], bootstrap=10, seed=0)["sex"]["M"]
    assert found["findings"]["Mass"]["reason"] == "no positives"
    assert found["findings"]["Mass"]["auroc"]["value"] is None
    assert found["mean"]["auroc"]["value"] is None
    assert found["findings"]["Mass"]["specificity"]["value"] > 0


def test_images_without_finding() -> None:
    table = scored()
    given = rows_of(table, rows(table, hernia=30))
    found = no_finding(table, given, [0.4, 0.5], bootstrap=25, seed=0)
    none = ~table.labels_NK.any(axis=1) & (np.arange(NUM) >= 30)
    called = table.probabilities_NK >= [0.4, 0.5]
    assert found["n_images"] == none.sum()
    assert found["any_called"]["value"] == pytest.approx(called[none].any(axis=1).mean(), abs=1e-15)
    assert found["any_called"]["lower"] < found["any_called"]["value"] < found["any_called"]["upper"]
    for k, finding in enumerate(FINDINGS):
        assert found["per_finding"][finding]["value"] == pytest.approx(called[none, k].mean(), abs=1e-15)
    expected = roc_auc_score(none, 1 - table.probabilities_NK.max(axis=1))
    assert found["auroc"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["definition"] == "none of the fourteen findings is labelled present"
    assert found["reason"] is None


def test_images_without_finding_by_the_table_alone_and_without_thresholds() -> None:
    table = scored()
    found = no_finding(table, None, [None, None], bootstrap=5, seed=0)
    assert found["n_images"] == (~table.labels_NK.any(axis=1)).sum()
    assert (found["any_called"]["value"], found["per_finding"]["Mass"]["value"]) == (None, None)
    assert found["reason"] == "no thresholds"
    part = no_finding(table, None, [0.4, None], bootstrap=5, seed=0)
    none = ~table.labels_NK.any(axis=1)
    assert part["any_called"]["value"] == pytest.approx((table.probabilities_NK[none, 0] >= 0.4).mean(), abs=1e-15)
    sick = dataclasses.replace(table, labels_NK=np.ones((NUM, 2), bool))
    assert no_finding(sick, None, [0.4, 0.4], bootstrap=5, seed=0)["reason"] == "no positives"
