"""docs/scaling.md is made from its JSON, and nothing computed stands in it unsaid. No Ray."""

import json
import re
from pathlib import Path

import pytest

from cxr_dist.bench import scaling
from cxr_dist.bench.report import Row, from_json, to_json
from cxr_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

MACHINE = {"cores": 2, "python": "3.11.7", "ray": "2.60.0", "date": "2026-11-24T00:00:00+00:00", "commit": "abc"}
OPTIONS = {
    "rank_images_per_s": [100.0],
    "network_gbit": 10.0,
    "network_latency_us": 20.0,
    "store_gbit": 5.0,
    "repeats": 5,
}


def wide(encoding: str, ranks: int, rate: float, through: float, busiest: str) -> Row:
    return Row(
        stage="ranks (computed)",
        name=f"{encoding}, {ranks} ranks of {rate:g} images/s (given)",
        images=0,
        images_per_s=through,
        extra={
            "encoding": encoding,
            "ranks": ranks,
            "rate (given)": rate,
            "part of ranks × rate": through / (ranks * rate),
            "busiest": busiest,
            "all-reduce ms a step": ranks / 10,
        },
    )


def plan(ranks: int) -> Row:
    name = f"10^5 images, {ranks} rank{'s' if ranks > 1 else ''}"
    extra = {"step ms": 0.2 * ranks, "a rank's share ms": 0.2}
    return Row(stage="plan (measured)", name=name, images=100_000, extra=extra)


ROWS = [
    plan(1),
    plan(2),
    plan(16),
    Row(stage="limits (computed)", name="decode", images=0, images_per_s=200.0, extra={"of a": "core"}),
    wide("png", 1, 100.0, 100.0, "step"),
    wide("png", 256, 100.0, 12_800.0, "loop"),
]
RESULT = to_json(ROWS, machine=MACHINE, options=OPTIONS)
PAGE = """# Page
<!-- simulate: ranks (computed) -->
old
<!-- end -->
by hand
<!-- simulate: limits (computed) -->
<!-- end -->
<!-- simulate: plan (measured) -->

older still

<!-- end -->
"""


def test_what_stands_between_marks_is_made_and_the_rest_is_kept() -> None:
    made = scaling.page(RESULT, PAGE)
    assert made.splitlines() == [
        "# Page",
        "<!-- simulate: ranks (computed) -->",
        "",
        "| ranks (computed) | all-reduce, ms a step | png, 100 images/s a rank (given) |",
        "|---:|---:|---:|",
        "| 1 | 0.1 | 100 (100 %) |",
        "| 256 | 25.6 | 12,800 (50 %, loop) |",
        "",
        "<!-- end -->",
        "by hand",
        "<!-- simulate: limits (computed) -->",
        "",
        "| limits (computed) | images/s | of a |",
        "|-------------------|---------:|-----:|",
        "| decode            |      200 | core |",
        "",
        "<!-- end -->",
        "<!-- simulate: plan (measured) -->",
        "",
        "| plan (measured)       | images  | step ms | a rank's share ms |",
        "|-----------------------|--------:|--------:|------------------:|",
        "|   10^5 images, 1 rank | 100,000 |     0.2 |               0.2 |",
        "| 10^5 images, 16 ranks | 100,000 |     3.2 |               0.2 |",
        "",
        "<!-- end -->",
    ]
    assert scaling.page(RESULT, made) == made


def test_a_mark_of_nothing_and_a_result_of_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found a mark for 'plans', expected one of limits"):
        scaling.page(RESULT, "<!-- simulate: plans -->\n<!-- end -->\n")
    page = tmp_path / "page.md"
    with pytest.raises(DataError, match="found no page at"):
        scaling.write_page(RESULT, page)
    page.write_text("# nothing\n")
    with pytest.raises(DataError, match=r"found no mark in .*page\.md"):
        scaling.write_page(RESULT, page)
    with pytest.raises(DataError, match="found no rows of simulate"):
        scaling.write_page(to_json(ROWS[:1], machine=MACHINE, options=OPTIONS), page)
    page.write_text(PAGE)
    scaling.write_page(RESULT, page)
    assert page.read_text() == scaling.page(RESULT, PAGE)


def test_the_page_is_what_its_json_makes() -> None:
    """If this fails: python jobs/bench.py page --results docs/scaling.json --page docs/scaling.md"""
    result = json.loads((DOCS / "scaling.json").read_text())
    text = (DOCS / "scaling.md").read_text()
    assert scaling.page(result, text) == text
    marked = [match[2] for match in scaling.MARK.finditer(text)]
    assert set(marked) == {"machine"} | {row.stage for row in from_json(result)}


def test_no_table_mixes_what_was_measured_with_what_was_computed() -> None:
    """Every stage says what it is, a rate that somebody gave says so, and so does a computed column among measured ones."""
    rows = from_json(json.loads((DOCS / "scaling.json").read_text()))
    for row in rows:
        kind = re.search(r"\((measured|computed|measured, beside the model)\)$", row.stage)
        heads = " ".join(row.extra)
        if kind is None:  # single figures, each of which says it
            assert row.stage == "costs"
            assert re.search(r"\((measured|fitted|computed)\)$", row.name), row.name
        elif kind[1] == "computed":
            assert "measured" not in heads
            assert "images/s" not in heads or "(given)" in heads
        elif "model" in heads:
            assert "model images/s (computed)" in row.extra
        else:
            assert "given" not in heads + row.name


def test_the_chart_is_there_and_shows_both_panels(tmp_path: Path) -> None:
    for name, head in (("scaling.png", b"\x89PNG"), ("scaling.svg", b"<?xml")):
        data = (DOCS / name).read_bytes()
        assert data.startswith(head)
        assert len(data) < 200_000
    drawn = (DOCS / "scaling.svg").read_text()
    assert "Planning a step, measured" in drawn
    assert "comes through, computed" in drawn
    scaling.chart(RESULT, tmp_path / "a.svg")
    scaling.chart(RESULT, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
