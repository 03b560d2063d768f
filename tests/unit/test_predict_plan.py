"""How images are cut in parts, and when predictions that are there already are gone on with."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_dist.data.plan import Split
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.predict.model import Model, Thresholds
from cxr_dist.predict.plan import Cut, Plan, claim, part_images_of, part_name
from cxr_dist.predict.source import LISTING_SCHEMA, Section, Source, digest_of

MODEL = Model(
    asked="runs/a", uri="runs/a/checkpoints/0/1.pt", name="a/1", sha256="1" * 64, findings=("Mass",), size=224
)
HALF = Thresholds(source="0.5 for every finding, as asked", values={"Mass": 0.5})


def source_of(counts: list[int], row_group: int = 1) -> Source:
    """A source of sections of so many images each, named section-row."""
    sections = tuple(
        Section(
            image_ids=pa.array([f"{at}-{row}" for row in range(count)], pa.string()),
            reader=SimpleNamespace(),  # type: ignore[arg-type]
            split=Split(num_rows=count, row_group=row_group),
            encoding="pixels",
        )
        for at, count in enumerate(counts)
    )
    return Source(kind="dataset", uri="/d", split="all", sha256="d" * 64, sections=sections, listing=None)


def prefix(files: dict[str, int]) -> Source:
    """A prefix with these files and sizes."""
    listing = pa.table([pa.array(files, pa.string()), pa.array(files.values(), pa.int64())], schema=LISTING_SCHEMA)
    sections = source_of([len(files)]).sections
    return Source(kind="prefix", uri="/p", split="", sha256=digest_of(listing), sections=sections, listing=listing)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 9))
def test_parts_hold_every_image_once_in_order_and_whole_row_groups(
    counts: list[int], part_images: int, row_group: int
) -> None:
    source = source_of(counts, row_group)
    cut = Cut(source=source, part_images=part_images)
    parts = [cut.image_ids(number) for number in range(cut.num_parts)]
    assert [name for part in parts for name in part] == [n for s in source.sections for n in s.image_ids.to_pylist()]
    for section in source.sections:
        numbers = cut.parts_of(section)
        rows = cut.part_rows(section)
        assert rows % row_group == 0
        assert rows <= max(part_images, row_group)
        assert {len(parts[number]) for number in numbers[:-1]} <= {rows}
        assert 0 < len(parts[numbers[-1]]) <= rows
        assert len({name.split("-")[0] for number in numbers for name in parts[number]}) == 1


def test_names_and_sizes_of_parts() -> None:
    assert [part_name(number) for number in (0, 31, 123456)] == [
        "part-00000.parquet",
        "part-00031.parquet",
        "part-123456.parquet",
    ]
    assert [part_images_of(size) for size in (16, 224, 256, 512, 1024)] == [1024, 1024, 1024, 256, 64]


def test_a_new_plan_is_written_and_found_again(tmp_path: Path) -> None:
    out = str(tmp_path)
    first = claim(out, MODEL, prefix({"a.png": 1, "b.png": 2}), HALF, 0)
    data = (tmp_path / "predict.json").read_bytes()
    assert claim(out, MODEL, prefix({"a.png": 1, "b.png": 2}), HALF, 0) == first
    assert claim(out, MODEL, prefix({"a.png": 1, "b.png": 2}), HALF, 1024) == first
    assert (tmp_path / "predict.json").read_bytes() == data
    assert json.loads(data) == {
        "format": 1,
        "model": {
            "uri": "runs/a",
            "version": "a/1@111111111111",
            "sha256": "1" * 64,
            "findings": ["Mass"],
            "size": 224,
        },
        "source": {
            "kind": "prefix",
            "uri": "/p",
            "split": "",
            "images": 2,
            "sha256": digest_of(prefix({"a.png": 1, "b.png": 2}).listing),
        },
        "thresholds": {"source": "0.5 for every finding, as asked", "values": {"Mass": 0.5}},
        "part_images": 1024,
    }


def test_the_same_weights_under_another_spelling_of_the_same_name_are_the_same_model(tmp_path: Path) -> None:
    one = Model(**{**vars(MODEL), "asked": "models:/a/1"})
    first = claim(str(tmp_path), one, source_of([3]), HALF, 0)
    assert claim(str(tmp_path), MODEL, source_of([3]), HALF, 0) == first


@pytest.mark.parametrize(("change", "sentence"), [
    ({"model": {"sha256": "2" * 64}}, r"found predictions of the model a/1@1{12}, now a/1@2{12}; weights .*give another --out"),
    ({"model": {"name": "a/2"}}, r"found predictions of the model a/1@1{12}, now a/2@1{12}; give another --out"),
    ({"thresholds": {"Mass": 0.25}}, "found predictions of threshold of Mass 0.5, now 0.25; give another --out"),
    ({"source": {"uri": "/e"}}, "found predictions of images /d, now /e; give another --out"),
    ({"source": {"split": "test"}}, "found predictions of split all, now test; give another --out"),
    ({"source": {"sha256": "e" * 64}}, "found predictions of the dataset with manifest d{64}, now e{64}; give another --out"),
    ({"part_images": 7}, "found predictions of part_images 1024, now 7; give another --out"),
])  # fmt: skip
def test_predictions_of_something_else_are_refused_by_name(tmp_path: Path, change: dict, sentence: str) -> None:
    source = source_of([3])
    claim(str(tmp_path), MODEL, source, HALF, 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = Model(**{**vars(MODEL), **change.get("model", {})})
    other = Source(**{**vars(source), **change.get("source", {})})
    thresholds = Thresholds(source="", values=change.get("thresholds", {"Mass": 0.5}))
    with pytest.raises(DataError, match=sentence):
        claim(str(tmp_path), model, other, thresholds, change.get("part_images", 0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("files", "told"), [
    ({"a.png": 1, "b.png": 2, "c.png": 3, "d.png": 4}, r"found 1 new \(d\.png\), expected the 3 images"),
    ({"a.png": 1, "c.png": 3}, r"found 1 gone \(b\.png\), expected the 3 images"),
    ({"a.png": 1, "b.png": 2, "c.png": 5}, r"found 1 changed \(c\.png\), expected the 3 images"),
    ({"c.png": 3, "d": 1, "e": 1, "f": 1, "g": 1}, r"found 4 new \(d, e, f\), 2 gone \(a\.png, b\.png\), expected"),
])  # fmt: skip
def test_a_changed_listing_is_refused_and_told(tmp_path: Path, files: dict[str, int], told: str) -> None:
    claim(str(tmp_path), MODEL, prefix({"a.png": 1, "b.png": 2, "c.png": 3}), HALF, 0)
    with pytest.raises(DataError, match=told + ".*put them back as they were, or give another --out"):
        claim(str(tmp_path), MODEL, prefix(files), HALF, 0)


def test_a_changed_listing_is_told_without_the_old_one(tmp_path: Path) -> None:
    claim(str(tmp_path), MODEL, prefix({"a.png": 1}), HALF, 0)
    (tmp_path / "_work" / "images.parquet").unlink()
    with pytest.raises(DataError, match="are not those that predictions began with; give another --out"):
        claim(str(tmp_path), MODEL, prefix({"b.png": 1}), HALF, 0)


def test_parts_without_a_plan_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"whose?")
    with pytest.raises(ConfigError, match=r"found part-00000\.parquet and no predict\.json .*give another --out"):
        claim(str(tmp_path), MODEL, source_of([3]), HALF, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet"]


@pytest.mark.parametrize(("data", "sentence"), [
    (b"{", "found no plan of predictions in it"),
    (b"[]", "found no plan of predictions in it"),
    (b'{"format": 1, "model": {}}', "found no plan of predictions in it"),
    (b'{"format": 2}', "found format 2, expected 1; use the version that wrote it"),
])  # fmt: skip
def test_what_is_no_plan_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=r"where: " + sentence):
        Plan.from_json(data, "where")


def test_a_listing_is_known_by_paths_and_sizes() -> None:
    digests = {digest_of(prefix(files).listing) for files in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1})}
    assert len(digests) == 4
    assert np.unique([len(digest) for digest in digests]).tolist() == [64]
