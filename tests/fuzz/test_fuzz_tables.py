"""Label CSVs and lists, damaged and dressed otherwise: an error that names the row, or the rows that the file holds."""

import csv
import gzip
import io
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from cxr_dist.data import nih
from cxr_dist.errors import DataError
from tests.fuzz.edits import Edit, edited, edits
from tests.fuzz.errors import sentence
from tests.fuzz.plan import explore

COLUMNS = (
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
    "Height]",
)
NAME = "Data_Entry_2017.csv"
Row = dict[str, Any]


def file_of(rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS, **dialect: Any) -> bytes:
    """The CSV of rows that are cells by column."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, **dialect)
    writer.writerow(columns)
    writer.writerows([row[column] for column in columns] for row in rows)
    return out.getvalue().encode()


def cells(row: Row) -> dict[str, str]:
    """A row of a label table as NIH writes it."""
    shown = [
        row["image_id"],
        "|".join(row["findings"]) or nih.NO_FINDING,
        *(str(row[k]) for k in ("follow_up", "patient_id", "age")),
    ]
    return dict(zip(COLUMNS, [*shown, row["sex"], row["view"], "2500", "2048"], strict=True))


def held(table: pa.Table) -> list[Row]:
    """A label table as rows, findings by name in NIH's order."""
    rows = table.to_pylist()
    return [
        {**row, "findings": [f for f, there in zip(nih.FINDINGS, row["findings"], strict=True) if there]}
        for row in rows
    ]


@st.composite
def label_rows(draw: st.DrawFn) -> list[Row]:
    rows = []
    for patient in draw(st.lists(st.integers(1, 30805), min_size=1, max_size=6, unique=True)):
        for follow_up in range(draw(st.integers(1, 2))):
            rows.append(
                {
                    "image_id": f"{patient:08d}_{follow_up:03d}.png",
                    "patient_id": patient,
                    "view": draw(st.sampled_from(nih.VIEWS)),
                    "age": draw(st.integers(0, nih.MAX_AGE)),
                    "sex": draw(st.sampled_from(nih.SEXES)),
                    "follow_up": follow_up,
                    "findings": sorted(
                        draw(st.sets(st.sampled_from(nih.FINDINGS), max_size=3)), key=nih.FINDINGS.index
                    ),
                }
            )
    return rows


WRONG_CELLS = {
    "Image Index": ("", "images/x.png", 'a"b', "a\0.png", "a,b.png", "x\ny.png", "a|b"),
    "Finding Labels": ("", "Mas", "Mass,Nodule", "mass", "Mass|", "No Finding|Mass", "Pleural Thickening", "Mass\0"),
    "Follow-up #": ("", "-1", "1.5", "x", "9" * 40, "1e3", "NaN"),
    "Patient ID": ("", "-1", "0x10", "x", "99999", "1 2", "\u00b2"),
    "Patient Age": ("old", "-4", "4.5", "058W", "58 Y", "99999", "Y58"),
    "Patient Gender": ("X", "m", "MF", "0", "\0"),
    "View Position": ("PP", "pa", "LL", "AP ,", "1"),
}


@st.composite
def dressed(draw: st.DrawFn) -> tuple[list[Row], bytes, str]:
    """Rows, a file of them in some dress, and the fault that is in it, if any."""
    rows = draw(label_rows())
    written, columns = [cells(row) for row in rows], list(draw(st.permutations(COLUMNS)))
    at = draw(st.integers(0, len(rows) - 1))
    fault = draw(
        st.sampled_from(
            ["", "", "age of 412", "cell", "column lost", "column twice", "row twice", "row short", "row long"]
        )
    )
    if fault == "age of 412":
        rows[at]["age"], written[at]["Patient Age"], fault = None, draw(st.sampled_from(["412", "121", "412Y", ""])), ""
    elif fault == "cell":
        column = draw(st.sampled_from(sorted(WRONG_CELLS)))
        written[at][column] = draw(st.sampled_from(WRONG_CELLS[column]))
    elif fault == "column lost":
        columns.remove(draw(st.sampled_from(COLUMNS[:7])))
    elif fault == "column twice":
        columns.append(draw(st.sampled_from(COLUMNS[:7])))
    elif fault == "row twice":
        written.insert(draw(st.integers(0, len(rows))), written[at])
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
    ending = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    data = file_of(written, tuple(columns), quoting=quoting, lineterminator=ending)
    if fault in ("row short", "row long"):
        lines = data.removesuffix(ending.encode()).split(ending.encode())
        lines[at + 1] = lines[at + 1] + b",1" if fault == "row long" else lines[at + 1].rpartition(b",")[0]
        data = ending.encode().join([*lines, b""])
    data = (
        draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data + draw(st.sampled_from([b"", ending.encode(), b",,,,,,"]))
    )
    return rows, gzip.compress(data, mtime=0) if draw(st.booleans()) else data, fault


def check_dressed(example: tuple[list[Row], bytes, str]) -> None:
    rows, data, fault = example
    if fault:
        with pytest.raises(DataError) as caught:
            nih.read_labels(data, NAME)
        sentence(caught.value, f"{NAME}: row ", f"{NAME}: line ")
    else:
        assert held(nih.read_labels(data, NAME)) == rows


def test_every_dress_of_a_table_gives_its_rows_and_every_fault_an_error_by_row() -> None:
    explore("rows", dressed(), check_dressed)


def good_file() -> bytes:
    rows = [
        {
            "image_id": f"{p:08d}_000.png",
            "patient_id": p,
            "view": "PA",
            "age": 40 + p,
            "sex": "MF"[p % 2],
            "follow_up": 0,
        }
        for p in range(1, 25)
    ]
    return file_of(
        [cells({**row, "findings": [nih.FINDINGS[n % 14]]}) for n, row in enumerate(rows)], lineterminator="\n"
    )


GOOD = good_file()
PACKED = gzip.compress(GOOD, mtime=0)


def check_labels(example: tuple[bool, list[Edit]]) -> None:
    packed, changes = example
    data = edited(PACKED if packed else GOOD, changes)
    try:
        table = nih.read_labels(data, NAME)
    except DataError as error:
        sentence(error, NAME)
        return
    if packed and data[:2] == PACKED[:2]:
        data = GOOD
    header, *lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert held(table) == [
        by_hand(dict(zip(map(bare, header), line, strict=False))) for line in lines if any(map(bare, line))
    ]


def bare(cell: str) -> str:
    return cell.strip().lower()


def by_hand(line: dict[str, str]) -> Row:
    """A row of the CSV as its cells say, strictly; the last columns are not looked at."""
    row = {key: cell.strip() for key, cell in line.items()}
    age = int(row["patient age"]) if row["patient age"].isdigit() else 0
    findings = [] if row["finding labels"] == nih.NO_FINDING else row["finding labels"].split("|")
    assert row["patient gender"] in ("M", "F", "")
    assert row["view position"] in ("PA", "AP", "")
    return {
        "image_id": row["image index"],
        "patient_id": int(row["patient id"]),
        "view": row["view position"],
        "age": age if row["patient age"] and age <= 120 else None,
        "sex": row["patient gender"],
        "follow_up": int(row["follow-up #"]),
        "findings": sorted({f.strip() for f in findings}, key=nih.FINDINGS.index),
    }


def test_a_damaged_table_is_an_error_or_what_it_says() -> None:
    explore("labels", st.tuples(st.booleans(), edits()), check_labels)


LIST = "".join(f"{p:08d}_000.png\n" for p in range(1, 60)).encode()


def check_list(example: tuple[int, list[Edit]]) -> None:
    kind, changes = example
    base = (LIST, LIST.replace(b"\n", b"\r\n"), gzip.compress(LIST, mtime=0))[kind]
    data = edited(base, changes)
    try:
        names = nih.read_list(data, "test_list.txt")
    except DataError as error:
        sentence(error, "test_list.txt")
        return
    text = LIST if kind == 2 and data[:2] == b"\x1f\x8b" else data
    lines = text.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert names == [line.strip() for line in lines if line.strip()]
    assert len(set(names)) == len(names)
    assert all(name.isprintable() and not set(name) & set('/\\,"') for name in names)


def test_a_damaged_list_is_an_error_or_its_names() -> None:
    explore("lists", st.tuples(st.integers(0, 2), edits()), check_list)
