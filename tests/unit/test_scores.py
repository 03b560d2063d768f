"""Score tables: exact round trip, foreign tables, and every way in which one cannot be scored."""

import contextlib
import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.external import read_external
from cxr_dist.evaluate.metrics import auroc
from cxr_dist.evaluate.scores import FORMAT, ScoreTable, read, write

LABELS = b"""Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position
00000001_000.png,Mass,0,1,57,M,PA
00000001_001.png,Mass|Effusion,1,1,58,M,PA
00000002_000.png,No Finding,0,2,80,F,AP
00000003_000.png,Hernia,0,3,81,F,PA
"""


@pytest.fixture
def labels() -> pa.Table:
    return nih.read_labels(LABELS, "labels.csv")


def table(*, logits: bool = True) -> ScoreTable:
    rng = np.random.default_rng(0)
    logits_NK = rng.normal(0, 3, (5, 2)).astype(np.float32)
    return ScoreTable(
        image_ids=np.array(["b.png", "a.png", "é.png", "d.png", "c_long_name.png"], dtype=np.str_),
        patient_ids=np.array([2, 1, 1, 9, 4]),
        split="validation",
        findings=("Mass", "Pleural_Thickening"),
        probabilities_NK=1 / (1 + np.exp(-logits_NK.astype(np.float64))),
        logits_NK=logits_NK if logits else None,
        labels_NK=rng.random((5, 2)) < 0.5,
    )


def same(a: ScoreTable, b: ScoreTable) -> None:
    assert (a.split, a.findings) == (b.split, b.findings)
    for name in ("image_ids", "patient_ids", "probabilities_NK", "logits_NK", "labels_NK"):
        left, right = getattr(a, name), getattr(b, name)
        if left is None or right is None:
            assert left is right
            continue
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("logits", [True, False])
def test_round_trip_is_exact(tmp_path: Path, logits: bool) -> None:
    original = table(logits=logits)
    write(original, tmp_path / "scores.parquet")
    same(read(tmp_path / "scores.parquet"), original)


def test_columns_on_disk(tmp_path: Path) -> None:
    write(table(), tmp_path / "scores.parquet")
    frame = pd.read_parquet(tmp_path / "scores.parquet")
    kinds = ["logit_{}", "prob_{}", "label_{}"]
    expected = [kind.format(finding) for finding in ("Mass", "Pleural_Thickening") for kind in kinds]
    assert list(frame.columns) == ["image_id", "patient_id", "split", *expected]
    assert set(frame["split"]) == {"validation"}


def test_empty_table_keeps_its_split(tmp_path: Path) -> None:
    original = table().select(np.zeros(5, bool))
    write(original, tmp_path / "scores.parquet")
    found = read(tmp_path / "scores.parquet")
    assert (len(found), found.split, found.findings) == (0, "validation", ("Mass", "Pleural_Thickening"))


def test_read_refuses_other_files_and_versions(tmp_path: Path) -> None:
    pd.DataFrame({"image_id": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=f"found no format mark, expected {FORMAT}"):
        read(tmp_path / "other.parquet")
    newer = pa.table({"image_id": ["a"]}).replace_schema_metadata({"format": "cxr-dist/scores/2", "split": "test"})
    pq.write_table(newer, tmp_path / "newer.parquet")
    with pytest.raises(DataError, match=f"found cxr-dist/scores/2, expected {FORMAT}"):
        read(tmp_path / "newer.parquet")
    with pytest.raises(DataError, match=r"missing\.parquet: no such file"):
        read(tmp_path / "missing.parquet")


def test_a_table_with_a_flipped_bit_or_a_cut_is_refused_or_the_same(tmp_path: Path) -> None:
    write(table(), tmp_path / "scores.parquet")
    data = (tmp_path / "scores.parquet").read_bytes()
    accepted = 0
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 16
        for broken in (bytes(flipped), data[:at]):
            (tmp_path / "scores.parquet").write_bytes(broken)
            with contextlib.suppress(DataError):
                same(read(tmp_path / "scores.parquet"), table())
                accepted += 1
    assert accepted < len(data) / 7 / 2


def test_tables_with_other_columns_or_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.parquet"
    write(table(), path)
    good = pq.read_table(path)
    mixed = good.set_column(2, "split", pa.array(["validation"] * 4 + ["test"]))
    for other, words in ((good.drop(["label_Mass"]), "columns that are not those"), (mixed, "rows of another")):
        pq.write_table(other, path)
        with pytest.raises(DataError, match=words):
            read(path)
    pq.write_table(good, path)
    monkeypatch.setattr("cxr_dist.evaluate.scores.MAX_ROWS", 4)
    with pytest.raises(DataError, match="found 5 rows, expected at most 4"):
        read(path)


def test_what_pandas_noted_of_a_table_is_not_needed(tmp_path: Path, labels: pa.Table) -> None:
    frame = pd.DataFrame({"image_id": ["x", "00000001_000.png"], "Mass": [0.5, 0.25]}).iloc[1:]
    frame.to_parquet(tmp_path / "scores")
    assert read_external(tmp_path / "scores", labels, nih.FINDINGS).probabilities_NK.tolist() == [[0.25]]


def test_a_table_checks_itself() -> None:
    good = table()
    fields = {name: getattr(good, name) for name in ScoreTable.__dataclass_fields__}
    with pytest.raises(DataError, match=r"labels are \(4, 2\), expected \(5, 2\)"):
        ScoreTable(**{**fields, "labels_NK": good.labels_NK[:4]})
    with pytest.raises(DataError, match=r"image id b\.png is there 2 times"):
        ScoreTable(**{**fields, "image_ids": np.array(["b.png", "a.png", "b.png", "d.png", "c.png"])})
    broken = good.probabilities_NK.copy()
    broken[1, 0] = np.nan
    with pytest.raises(DataError, match=r"row 2 \(a.png\), column Mass: found nan, expected a number"):
        ScoreTable(**{**fields, "probabilities_NK": broken})


FOREIGN = """Image Index,prob_Effusion,prob_Mass
00000003_000.png,0.1,0.30000000000000004
00000001_001.png,0.9,0.7
00000002_000.png,0.25,0
"""


def parquet(text: str) -> bytes:
    buffer = io.BytesIO()
    pd.read_csv(io.StringIO(text), float_precision="round_trip").to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("encode", [str.encode, lambda text: gzip.compress(text.encode()), parquet])
def test_external_formats_are_told_apart_by_content(
    tmp_path: Path, labels: pa.Table, encode: Callable[[str], bytes]
) -> None:
    (tmp_path / "scores").write_bytes(encode(FOREIGN))
    found = read_external(tmp_path / "scores", labels, nih.FINDINGS)
    assert found.findings == ("Effusion", "Mass")
    assert found.image_ids.tolist() == ["00000003_000.png", "00000001_001.png", "00000002_000.png"]
    assert found.patient_ids.tolist() == [3, 1, 2]
    assert found.probabilities_NK.tolist() == [[0.1, 0.30000000000000004], [0.9, 0.7], [0.25, 0.0]]
    assert found.labels_NK.tolist() == [[False, False], [True, True], [False, False]]
    assert (found.split, found.logits_NK) == ("test", None)


def test_external_columns_in_any_order_without_prefix_among_others(tmp_path: Path, labels: pa.Table) -> None:
    text = "Hernia,path,image_id,No Finding,Mass\n0.5,x,00000001_000.png,0.1,0.25\n"
    (tmp_path / "scores.csv").write_text(text)
    found = read_external(tmp_path / "scores.csv", labels, nih.NIH8, split="validation")
    assert (found.findings, found.probabilities_NK.tolist(), found.split) == (("Mass",), [[0.25]], "validation")


def test_prefixed_columns_win_over_label_columns(tmp_path: Path, labels: pa.Table) -> None:
    (tmp_path / "scores.csv").write_text("image_id,Mass,prob_Mass,bi_Mass\n00000001_000.png,1,0.25,0\n")
    assert read_external(tmp_path / "scores.csv", labels, nih.FINDINGS).probabilities_NK.tolist() == [[0.25]]


def test_own_table_keeps_its_split_when_joined_anew(tmp_path: Path, labels: pa.Table) -> None:
    original = table().select(np.arange(5) == 0)
    write(original, tmp_path / "scores.parquet")
    renamed = nih.read_labels(LABELS.replace(b"00000002_000.png", b"b.png"), "labels.csv")
    found = read_external(tmp_path / "scores.parquet", renamed, nih.FINDINGS, split="test")
    assert (found.split, found.labels_NK.tolist()) == ("validation", [[False, False]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,Mass\n00000001_000.png,0.5\n", "no column image_id or 'Image Index' among .name., .Mass."),
        ("image_id,Pleural Thickening\n00000001_000.png,0.5\n", "no finding, the nearest is 'Pleural_Thickening'"),
        (
            "image_id,prob_mass,prob_Hernia\n00000001_000.png,0.5,1\n",
            "'prob_mass' is no finding, the nearest is 'Mass'",
        ),
        (
            "image_id,prob_No Finding\n00000001_000.png,0.5\n",
            "no column of scores, expected at least one of Atelectasis",
        ),
        (
            "image_id,Mass\n00000001_000.png,0.5\n00000001_001.png,\n",
            r"row 2 \(00000001_001.png\), column Mass: found NaN or nothing, expected a probability",
        ),
        ("image_id,Mass\n00000001_000.png,high\n", r"row 1 \(00000001_000.png\), column Mass: found 'high', expected"),
        ("image_id,Mass\n00000001_000.png,-2.5\n", "found -2.5, expected 0 to 1; it looks like logits"),
        (
            "image_id,logit_Mass\n00000001_000.png,0.5\n",
            "column logit_Mass holds logits by its name, expected probabil",
        ),
        ("image_id,Mass\n00000001_000.png,0.5\n00000001_000.png,0.5\n", "image id 00000001_000.png is there 2 times"),
        ("image_id,Mass\nx.png,0.5\n00000001_000.png,0.5\n", "1 of 2 image ids have no label, first .x.png."),
    ],
)
def test_external_faults_are_named(tmp_path: Path, labels: pa.Table, text: str, message: str) -> None:
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_external(tmp_path / "scores.csv", labels, nih.FINDINGS)
    assert "scores.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PAR1 but no more", "cannot be read as Parquet or CSV"),
        (b"\x1f\x8b broken", "found a broken gzip file"),
        (b"", "cannot be read as Parquet or CSV"),
    ],
)
def test_external_unreadable_file(tmp_path: Path, labels: pa.Table, data: bytes, words: str) -> None:
    (tmp_path / "scores").write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_external(tmp_path / "scores", labels, nih.FINDINGS)


def test_published_aurocs_of_the_reference_predictions(real_data: Path) -> None:
    labels = nih.read_labels((real_data / "Data_Entry_2017_v2020.csv.gz").read_bytes(), "labels")
    found = read_external(real_data / "reference_predictions" / "preds.csv", labels, nih.FINDINGS)
    assert len(found) == 22_433
    published = pd.read_csv(real_data / "reference_predictions" / "aucs.csv").set_index("label")["auc"]
    assert set(found.findings) == set(published.index)
    for k, finding in enumerate(found.findings):
        assert auroc(found.probabilities_NK[:, k], found.labels_NK[:, k]) == pytest.approx(published[finding], abs=1e-9)
