"""Labels of another source: read, mapped by name, and judged on the images that were scored."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.second_labels import OTHER_NAMES, read_second_labels, second_opinion


def scored(num: int = 60) -> ScoreTable:
    rng = np.random.default_rng(0)
    labels = rng.random((num, 3)) < 0.3
    return ScoreTable(
        image_ids=np.array([f"{i}.png" for i in range(num)], dtype=np.str_),
        patient_ids=np.arange(num) // 2,
        split="test",
        findings=("Pneumothorax", "Mass", "Nodule"),
        probabilities_NK=np.clip(rng.normal(0.3 + 0.3 * labels, 0.2), 0, 1),
        logits_NK=None,
        labels_NK=labels,
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_any_table_with_columns_named_as_findings(tmp_path: Path) -> None:
    text = "Mass,age,image_id,Hernia\n1,58,0.png,0\n0,59,1.png,\nyes,60,x.png,1\n,61,3.png,no\n"
    found = read_second_labels(write(tmp_path / "other.csv", text))
    assert (found.source, found.image_ids.tolist()) == ("other.csv", ["0.png", "1.png", "x.png", "3.png"])
    assert list(found.columns) == ["Mass", "Hernia"]
    np.testing.assert_array_equal(found.columns["Mass"], [1, 0, 1, np.nan])
    np.testing.assert_array_equal(found.columns["Hernia"], [0, np.nan, 1, 0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id,Mass\n0.png,2\n", r"row 1 \(0.png\), column Mass: found '2', expected 0 or 1"),
        ("image_id,Mass\n0.png,1\n1.png,-1\n", r"row 2 \(1.png\), column Mass: found '-1(\.0)?', expected"),
        ("image_id,Mass\n0.png,1\n0.png,1\n", "image id 0.png is there 2 times"),
        ("image_id,mass\n0.png,1\n", "found no column named as a finding among 'image_id', 'mass'"),
        ("name,Mass\n0.png,1\n", "no column image_id or 'Image Index'"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_second_labels(write(tmp_path / "other.csv", text))
    assert "other.csv" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_second_labels(tmp_path / "none.csv")


def test_both_columns_are_on_the_same_images(tmp_path: Path) -> None:
    """In another order, with images that were not scored, and one that was not judged."""
    table, rng = scored(), np.random.default_rng(1)
    order = rng.permutation(50)
    theirs = rng.random(50) < 0.4
    lines = [f"{i}.png,{'YES' if y else 'NO'},NO" for i, y in zip(order, theirs, strict=True)]
    lines += ["x.png,YES,NO", f"{55}.png,,NO"]
    text = "\n".join(["Image Index,Nodule or mass,Fracture", *lines])
    found = second_opinion(table, read_second_labels(write(tmp_path / "o.csv", text)), bootstrap=20, seed=0)
    assert found["n_images_scored"] == 51
    assert found["mapping"] == [
        {"theirs": "Nodule or mass", "ours": ["Nodule", "Mass"], "n_images": 51, "positives": int(theirs.sum()) + 1},
        {"theirs": "Fracture", "ours": [], "n_images": 52, "positives": 0},
    ]
    assert list(found["findings"]) == ["Nodule or mass"]
    one = found["findings"]["Nodule or mass"]
    score = table.probabilities_NK[order, 1:].max(axis=1)
    assert (one["n_images"], one["n_patients"], one["positives"]) == (50, 25, int(theirs.sum()))
    assert one["auroc"]["value"] == pytest.approx(roc_auc_score(theirs, score), abs=1e-12)
    first = table.labels_NK[order, 1:].any(axis=1)
    assert one["auroc_first_labels"]["value"] == pytest.approx(roc_auc_score(first, score), abs=1e-12)
    assert one["positives_first_labels"] == first.sum()
    assert one["auroc"]["lower"] < one["auroc"]["value"] < one["auroc"]["upper"]
    assert one["reason"] is None


def test_none_of_its_images_was_scored(tmp_path: Path) -> None:
    second = read_second_labels(write(tmp_path / "o.csv", "image_id,Mass\nx.png,1\ny.png,0\n"))
    found = second_opinion(scored(), second, bootstrap=20, seed=0)["findings"]["Mass"]
    assert (found["n_images"], found["auroc"]["value"]) == (0, None)
    assert found["reason"] == "none of its images was scored"


def test_a_source_without_positives_says_so(tmp_path: Path) -> None:
    second = read_second_labels(write(tmp_path / "o.csv", "image_id,Mass\n0.png,0\n1.png,0\n"))
    found = second_opinion(scored(), second, bootstrap=20, seed=0)["findings"]["Mass"]
    assert found["reason"].startswith("no positives")
    assert found["positives"] == 0


def test_the_mapping_names_findings_of_ours() -> None:
    assert set().union(*OTHER_NAMES.values()) <= set(nih.FINDINGS)


def test_the_adjudicated_labels(real_data: Path) -> None:
    found = read_second_labels(real_data / "google2019_nih-chest-xray-labels.csv.gz")
    assert len(found.image_ids) == 4376
    assert {name: int(values.sum()) for name, values in found.columns.items()} == {
        "Fracture": 186,
        "Pneumothorax": 238,
        "Airspace opacity": 2166,
        "Nodule or mass": 605,
    }
    assert set(found.columns) == set(OTHER_NAMES)
