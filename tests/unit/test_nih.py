"""The NIH label table: both file versions, its faults by row, the cleaning, the split by patient, the audit."""

import gzip

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_dist.data import nih, texts
from cxr_dist.errors import ConfigError, DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
V2020 = f"""{HEADER}
00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143
00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143
00000002_000.png,Pleural_Thickening,0,2,81,F,PA,2500,2048,0.171,0.171
"""
V2017 = (
    V2020.replace(HEADER, HEADER + ",")
    .replace(",57,", ",057Y,")
    .replace(",58,", ",412,")
    .replace("0.143\n", "0.143,\n")
)


def labels_of(rows: list[tuple[str, str, int]]) -> pa.Table:
    """A table of (image, findings, patient)."""
    lines = [f"{image},{findings},0,{patient},50,M,PA,1,1,1,1" for image, findings, patient in rows]
    return nih.read_labels("\n".join([HEADER, *lines]).encode(), "labels.csv")


def test_v2020_values():
    table = nih.read_labels(V2020.encode(), "x.csv")
    assert table.schema.remove_metadata().equals(nih.LABELS_SCHEMA)
    assert table.drop(["findings"]).to_pylist()[0] == {
        "image_id": "00000001_000.png",
        "patient_id": 1,
        "view": "PA",
        "age": 57,
        "sex": "M",
        "follow_up": 0,
    }
    expected = np.zeros((3, 14), bool)
    expected[0, [1, 2]] = True
    expected[2, 12] = True
    assert (nih.findings_matrix(table) == expected).all()


def test_2017_ages_trailing_column_and_impossible_age():
    table = nih.read_labels(V2017.encode(), "x.csv")
    assert table["age"].to_pylist() == [57, None, 81]
    assert table["patient_id"].to_pylist() == [1, 1, 2]


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(V2020.encode(), mtime=0),
        b"\xef\xbb\xbf" + V2020.encode(),
        V2020.replace("\n", "\r\n").encode(),
        V2020.strip().encode(),
        V2020.replace("OriginalImage[Width,Height]", '"OriginalImage[Width","Height]"').encode(),
        V2020.replace("Patient Gender", "Patient Sex").encode(),
        (V2020 + "\n,,,,\n").encode(),
    ],
)
def test_dress_does_not_change_the_table(data):
    assert (
        nih.read_labels(data, "x.csv")
        .replace_schema_metadata(None)
        .equals(nih.read_labels(V2020.encode(), "x.csv").replace_schema_metadata(None))
    )


def test_gzip_does_not_change_the_hash():
    first, second = (
        nih.read_labels(d, "x").schema.metadata for d in (V2020.encode(), gzip.compress(V2020.encode(), mtime=0))
    )
    assert first == second


@pytest.mark.parametrize(
    ("age", "years"), [("058Y", 58), ("013M", 1), ("030D", 0), ("120", 120), ("121", None), ("", None)]
)
def test_ages(age, years):
    assert nih.read_labels(V2020.replace(",57,", f",{age},").encode(), "x")["age"].to_pylist()[0] == years


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("Finding Labels", "Findings"), r"x.csv: row 1: found no column 'finding labels' \(nearest: 'findings'\)"),
        (("Cardiomegaly|", "Cardiomegally|"), "row 2: found finding 'Cardiomegally'.*nearest: Cardiomegaly"),
        (("Pleural_Thickening", "Pleural Thickening"), "row 4: found finding 'Pleural Thickening'.*Pleural_Thickening"),
        (("Cardiomegaly|Effusion", "No Finding|Effusion"), "row 2: found finding 'No Finding'"),
        (("00000001_001", "00000001_000"), "row 3: 00000001_000.png is already in row 2"),
        ((",0,2,81,", ",0,two,81,"), "row 4: found 'two' in Patient ID"),
        ((",57,", ",old,"), "row 2: found age 'old'"),
        (("View Position", "Patient ID"), "row 1: found column 'patient id' 2 times"),
        (("00000001_000.png,", "00000001\0_000.png,"), r"row 2: found '00000001\\x00_000.png', expected an image name"),
        (
            ("00000001_000.png,", "images/00000001_000.png,"),
            "row 2: found 'images/00000001_000.png', expected an image",
        ),
        (("Effusion,0,1,57", "Effusion,0,7,57"), "row 2: found patient 7 for 00000001_000.png, expected 1"),
        ((",57,M,PA", ",57,M,PB"), "row 2: found 'PB' in View Position, expected PA or AP"),
        ((",57,M,PA", ",57,X,PA"), "row 2: found 'X' in Patient Gender, expected M or F"),
        (("Effusion,0,1,57,M", "Effusion,0,1,1,57,M"), "row 2: found 12 columns, expected the header's 11"),
        (("2500,2048,0.171,0.171", "2500"), "row 4: found 8 columns, expected the header's 11"),
        (
            ("00000002_000.png,Pleural_Thickening,0,2,81,F,PA,2500,2048,0.171,0.171", "00000002_000.png,Mass"),
            "row 4: found 2 columns",
        ),
    ],
)
def test_faults_name_the_row(change, words):
    with pytest.raises(DataError, match=words):
        nih.read_labels(V2020.replace(*change).encode(), "x.csv")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (b" \n", "empty file"),
        (HEADER.encode(), "no rows"),
        (gzip.compress(V2020.encode(), mtime=0)[:40], "broken gzip"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xff", "broken gzip file .*invalid block type"),
    ],
)
def test_files_that_are_no_table(data, words):
    with pytest.raises(DataError, match=f"x.csv.*{words}"):
        nih.read_labels(data, "x.csv")


@pytest.mark.parametrize(
    ("row", "quoted"),
    [
        ("00000001_001.png", '"00000001_001.png'),
        ("No Finding", '"No Finding'),
        (
            "00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143",
            '00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,"0.143',
        ),
    ],
)
@pytest.mark.parametrize("more", [0, 5000])
def test_a_quote_that_stays_open_swallows_no_rows(row, quoted, more):
    tail = "".join(f"{p:08d}_000.png,Mass,0,{p},50,M,PA,1,1,1,1\n" for p in range(10, 10 + more))
    with pytest.raises(DataError, match=r"x\.csv: line 3: found a row that is no CSV"):
        nih.read_labels((V2020.replace(row, quoted, 1) + tail).encode(), "x.csv")


def test_lists():
    assert nih.read_list(b"a.png\r\n\r\n b.png \nc.png", "l.txt") == ["a.png", "b.png", "c.png"]
    with pytest.raises(DataError, match=r"l\.txt: line 3: a\.png is already in line 1"):
        nih.read_list(b"a.png\nb.png\na.png", "l.txt")
    with pytest.raises(DataError, match="empty"):
        nih.read_list(b"\n\n", "l.txt")
    for wrong in (b"a.png\nimages/b.png", b"a.png\nb.png,1", b"a.png\nb\0.png", b"a.png\nb.png\x0cc.png"):
        with pytest.raises(DataError, match=r"l\.txt: line 2: found .*expected an image name"):
            nih.read_list(wrong, "l.txt")


def test_a_gzip_file_that_unpacks_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(texts, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="found more than 1 MiB in a gzip file"):
        nih.read_list(gzip.compress(bytes((1 << 20) + 1)), "l.txt")


def test_nih8_drops_every_image_with_a_dropped_finding():
    table = labels_of([("a", "Mass|Hernia", 1), ("b", "Mass", 1), ("c", "No Finding", 2), ("d", "Pneumonia", 3)])
    assert nih.clean(table, "nih8")["image_id"].to_pylist() == ["b", "c"]
    assert nih.clean(table, "nih14").num_rows == 4
    assert nih.finding_columns("nih8") == [7, 4, 0, 5, 8, 12, 2, 3]
    with pytest.raises(ConfigError, match=r"data\.label_set"):
        nih.clean(table, "nih9")


def test_split_is_by_list_and_patient():
    rows = [(f"{p}_{i}", "No Finding", p) for p in range(40) for i in range(3)]
    table = labels_of(rows)
    train_val, test = [r[0] for r in rows if r[2] < 30], [r[0] for r in rows if 30 <= r[2] < 38]
    splits = nih.split_patients(table, train_val, test, 0.3, 5)
    patients = {s: {rows[i][2] for i in numbers} for s, numbers in splits.items()}
    assert patients["test"] == set(range(30, 38))
    assert patients["train"] | patients["validation"] == set(range(30))
    assert not patients["train"] & patients["validation"]
    assert patients["validation"] == {p for p in range(30) if nih.in_validation(p, 0.3, 5)} != set()
    assert len(splits["train"]) == 3 * len(patients["train"])


@given(st.sets(st.integers(1, 60), min_size=2), st.integers(0, 3))
def test_a_patients_side_does_not_depend_on_who_else_is_there(present, seed):
    everyone = labels_of([(f"{p}", "No Finding", p) for p in range(1, 61)])
    some = labels_of([(f"{p}", "No Finding", p) for p in sorted(present)])
    names = [str(p) for p in range(1, 61)]
    whole = {
        s: set(everyone["image_id"].take(pa.array(n)).to_pylist())
        for s, n in nih.split_patients(everyone, names, ["x"], 0.4, seed).items()
    }
    part = {
        s: set(some["image_id"].take(pa.array(n)).to_pylist())
        for s, n in nih.split_patients(some, names, ["x"], 0.4, seed).items()
    }
    here = {str(p) for p in present}
    assert part == {split: ids & here for split, ids in whole.items()}


def test_the_cut_is_of_the_asked_size():
    share = sum(nih.in_validation(p, 0.2, 0) for p in range(20_000)) / 20_000
    assert abs(share - 0.2) < 0.01
    both = sum(nih.in_validation(p, 0.2, 0) and nih.in_validation(p, 0.2, 1) for p in range(20_000)) / 20_000
    assert abs(both - 0.04) < 0.01


def test_overlap_of_the_lists_is_refused():
    table = labels_of([("a", "Mass", 1), ("b", "Mass", 1)])
    with pytest.raises(DataError, match=r"1 patients \(e.g. 1\) have images in both"):
        nih.split_patients(table, ["a"], ["b"], 0.2, 0)
    with pytest.raises(DataError, match=r"share 1 images \(e.g. a\)"):
        nih.split_patients(table, ["a", "b"], ["a"], 0.2, 0)


def test_audit_counts_by_hand():
    table = labels_of([("a", "Mass|Nodule", 1), ("b", "Mass", 1), ("c", "No Finding", 2), ("d", "Effusion", 3)])
    result = nih.audit(table, {"train": np.array([0, 1, 2]), "test": np.array([3])}, "nih8", {"labels": "ab"})
    assert result["train"]["images"] == 3
    assert result["train"]["patients"] == 2
    assert result["train"]["positives"]["Mass"] == 2
    assert result["train"]["prevalence"]["Nodule"] == 0.333333
    assert list(result["test"]["positives"]) == list(nih.NIH8)
    assert result["patients_shared"] == 0
    assert result["label_version"] == "unknown"
    assert result["sha256"] == {"labels": "ab"}
    assert nih.audit(table, {"x": np.array([0]), "y": np.array([1])}, "nih8", {})["patients_shared"] == 1


def test_the_whole_release_after_the_notebooks_cleaning(real_data):
    table = nih.read_labels((real_data / "Data_Entry_2017_v2020.csv.gz").read_bytes(), "labels")
    lists = [nih.read_list((real_data / f).read_bytes(), f) for f in ("train_val_list.txt", "test_list.txt")]
    assert (table.num_rows, len(lists[0]), len(lists[1])) == (112_120, 86_524, 25_596)
    kept = nih.clean(table, "nih8")
    splits = nih.split_patients(kept, *lists, 0.2, 0)
    splits = {"train_val": np.concatenate([splits["train"], splits["validation"]]), "test": splits["test"]}
    result = nih.audit(kept, splits, "nih8", {})
    assert result["label_version"] == "v2020"
    assert result["patients_shared"] == 0
    assert result["train_val"]["images"] == 80_097
    assert result["test"]["images"] == 21_801
    assert list(result["test"]["positives"].values()) == [2124, 1491, 2764, 1401, 1528, 926, 3755, 5013]
    assert list(result["train_val"]["positives"].values()) == [2267, 3686, 7342, 4369, 2542, 1939, 7277, 12198]
