"""What is in a part, and that a damaged one is never taken for whole."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.data.nih import FINDINGS
from cxr_dist.errors import RunError
from cxr_dist.evaluate.external import read_external
from cxr_dist.predict.part import DamagedPartError, make_part, read_part, write_part

IDS = ["a/0.png", "a/1.png", "b/2.png"]
NAMES = ("Mass", "Hernia")
URIS = [f"s3://b/{name}" for name in IDS]
THRESHOLDS = {"Mass": 0.5, "Hernia": float(np.float32(1 / (1 + np.exp(-0.3))))}
LOGITS = np.array([[0.0, 0.3], [-800.0, 0.29999]], np.float32)


def part(**changes: object) -> pa.Table:
    options = {"thresholds": THRESHOLDS, "model_version": "cxr/3@abc", **changes}
    return make_part(IDS, URIS, [None, "truncated\nPNG", None], LOGITS, **options)  # type: ignore[arg-type]


def test_rows_are_ids_probabilities_flags_and_reasons() -> None:
    frame = part().to_pandas()
    assert list(frame.columns) == [
        *("image_id", "uri", "status", "reason"),
        *("prob_Mass", "flag_Mass", "prob_Hernia", "flag_Hernia", "model_version"),
    ]
    assert frame["image_id"].tolist() == IDS
    assert frame["uri"].tolist() == URIS
    assert frame["status"].tolist() == ["ok", "unreadable", "ok"]
    assert part()["reason"].to_pylist() == [None, "truncated PNG", None]
    assert frame["model_version"].tolist() == ["cxr/3@abc"] * 3
    assert part()["prob_Mass"].to_pylist() == [0.5, None, 0.0]
    assert part()["flag_Mass"].to_pylist() == [True, None, False]
    # on the threshold, and a hair below it
    assert part()["prob_Hernia"].to_pylist() == [
        THRESHOLDS["Hernia"],
        None,
        pytest.approx(THRESHOLDS["Hernia"], abs=1e-5),
    ]
    assert part()["flag_Hernia"].to_pylist() == [True, None, False]
    assert part().schema.field("prob_Mass").type == pa.float32()


def test_flags_can_be_had_from_the_stored_probabilities() -> None:
    """In float32 and in float64, whatever the reader compares in."""
    logits = np.random.default_rng(0).normal(size=(2000, 1)).astype(np.float32)
    threshold = float(np.float32(1 / (1 + np.exp(-np.float64(logits[7, 0])))))
    table = make_part(
        ["x"] * 2000, ["x"] * 2000, [None] * 2000, logits, thresholds={"Mass": threshold}, model_version=""
    )
    stored, flags = table["prob_Mass"].to_numpy(), np.array(table["flag_Mass"].to_pylist())
    assert (flags == (stored >= np.float32(threshold))).all()
    assert (flags == (stored.astype(np.float64) >= threshold)).all()
    assert flags[7]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_the_image(bad: float) -> None:
    with pytest.raises(RunError, match=r"b/2\.png: found a score that is no number"):
        make_part(
            IDS,
            URIS,
            [None, "x", None],
            np.array([[0, 0], [0, bad]], np.float32),
            thresholds=THRESHOLDS,
            model_version="",
        )


def test_scores_that_are_not_those_of_the_readable_images_are_an_error() -> None:
    with pytest.raises(RunError, match=r"found scores of shape \(3, 2\), expected \(2, 2\)"):
        make_part(IDS, URIS, [None, "x", None], np.zeros((3, 2), np.float32), thresholds=THRESHOLDS, model_version="")


def test_a_written_part_is_found_whole_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    write_part(str(tmp_path), 7, part(), "plan")
    first = (tmp_path / "part-00007.parquet").read_bytes()
    found = read_part(str(tmp_path), 7, "plan", IDS, NAMES)
    assert (found.rows, found.unreadable, found.bytes) == (3, 1, len(first))
    assert found.first == (("a/1.png", "truncated PNG"),)
    write_part(str(tmp_path), 7, part(), "plan")
    assert (tmp_path / "part-00007.parquet").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["part-00007.parquet"]


def test_a_part_that_is_another_is_damaged(tmp_path: Path) -> None:
    out = str(tmp_path)
    write_part(out, 0, part(), "plan")
    with pytest.raises(DamagedPartError, match="found plan 'plan', expected 'other'"):
        read_part(out, 0, "other", IDS, NAMES)
    with pytest.raises(DamagedPartError, match="found rows 3, expected 2"):
        read_part(out, 0, "plan", IDS[:2], NAMES)
    with pytest.raises(DamagedPartError, match="found other images than the 3 of the plan"):
        read_part(out, 0, "plan", [*IDS[:2], "c.png"], NAMES)
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    with pytest.raises(DamagedPartError, match="found part 0, expected 1"):
        read_part(out, 1, "plan", IDS, NAMES)
    with pytest.raises(FileNotFoundError):
        read_part(out, 2, "plan", IDS, NAMES)
    with pytest.raises(DamagedPartError, match="found other columns than those of 1 findings"):
        read_part(out, 0, "plan", IDS, NAMES[:1])


def test_no_flipped_byte_and_no_cut_gives_other_content(tmp_path: Path) -> None:
    """Whatever single byte is changed, the part is damaged, or every value of it is still what was written."""
    write_part(str(tmp_path), 0, part(), "plan")
    path = tmp_path / "part-00000.parquet"
    data, found = path.read_bytes(), 0
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            read_part(str(tmp_path), 0, "plan", IDS, NAMES)
        except DamagedPartError:
            found += 1
        else:
            assert pq.read_table(path).replace_schema_metadata(None).equals(part())
    assert found > len(data) / 10
    for cut in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedPartError, match="cannot be read"):
            read_part(str(tmp_path), 0, "plan", IDS, NAMES)


def test_a_change_of_one_value_is_damage(tmp_path: Path) -> None:
    """By someone who kept the metadata."""
    write_part(str(tmp_path), 0, part(), "plan")
    path = tmp_path / "part-00000.parquet"
    whole = pq.read_table(path)
    for name in whole.column_names:
        values = whole[name].to_pylist()
        values[2] = not values[2] if isinstance(values[2], bool) else "x" if not isinstance(values[2], float) else 0.25
        changed = whole.set_column(
            whole.column_names.index(name), name, pa.array(values, whole.schema.field(name).type)
        )
        pq.write_table(changed, path)
        with pytest.raises(DamagedPartError, match="found other content than was written"):
            read_part(str(tmp_path), 0, "plan", IDS, NAMES)


def test_the_evaluation_reads_a_part_of_readable_images(tmp_path: Path) -> None:
    names = ["00000001_000.png", "00000002_000.png"]
    table = make_part(names, names, [None, None], LOGITS, thresholds=THRESHOLDS, model_version="m")
    write_part(str(tmp_path), 0, table, "plan")
    shown = [[finding == "Mass" for finding in FINDINGS], [False] * len(FINDINGS)]
    labels = pa.table(
        {
            "image_id": names,
            "patient_id": pa.array([1, 2], pa.int32()),
            "findings": pa.array(shown, pa.list_(pa.bool_(), len(FINDINGS))),
        }
    )
    scores = read_external(tmp_path / "part-00000.parquet", labels, FINDINGS)
    assert scores.findings == tuple(finding for finding in FINDINGS if finding in THRESHOLDS)
    expected = pd.DataFrame({name: table[f"prob_{name}"].to_pylist() for name in scores.findings})
    assert (scores.probabilities_NK == expected.to_numpy()).all()
    assert scores.labels_NK.tolist() == [[finding == "Mass" for finding in scores.findings], [False, False]]
