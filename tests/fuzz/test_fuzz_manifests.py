"""Damaged manifests and side tables: an error that names the file, or a dataset whose numbers agree."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from cxr_dist.data.manifest import MANIFEST, Manifest
from cxr_dist.data.nih import SPLITS
from cxr_dist.errors import DataError
from tests.fuzz.edits import Edit, edited, edits
from tests.fuzz.errors import sentence
from tests.fuzz.plan import explore
from tests.unit.test_manifest import make_dataset

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from(
        [10**30, -(10**30), 1.5, 1e308, float("nan"), float("inf"), "", "x" * 5000, "..", "/etc", "s3://b", "\0", "é"]
    ),
    st.sampled_from([[], {}, [[]], {"": None}, [1, "a"], "png", "pixels", "nih14", "train", "0" * 64, ["Mass"]]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset's files, as they were saved."""
    saved, _ = make_dataset(tmp_path_factory.mktemp("saved"))
    return Path(saved.uri)


def test_a_damaged_manifest_is_an_error_or_agrees_with_itself(dataset: Path, tmp_path: Path) -> None:
    good = (dataset / MANIFEST).read_bytes()
    raw = json.loads(good)
    change = st.tuples(
        st.sampled_from(list(places(raw))), st.sampled_from(["set", "set", "set", "drop", "add", "copy"]), VALUES
    )

    def changed(at: tuple[Any, ...], how: str, value: Any) -> bytes:
        new = copy.deepcopy(raw)
        holder = new
        for key in at[:-1]:
            holder = holder[key]
        if how == "drop":
            del holder[at[-1]]
        elif how == "add" and isinstance(holder, dict):
            holder[f"{at[-1]}2"] = value
        elif how == "copy" and isinstance(holder, list):
            holder.append(holder[at[-1]])
        else:
            holder[at[-1]] = value
        return json.dumps(new).encode()

    def check(example: tuple[str, Any]) -> None:
        kind, what = example
        data = edited(good, what) if kind == "bytes" else changed(*what)
        try:
            manifest = Manifest.from_json(data, str(dataset))
            rows = {split: manifest.rows(split).num_rows for split in SPLITS}
            groups = {split: manifest.row_groups(split).num_rows for split in SPLITS}
            left_out = manifest.all_quarantined().num_rows
        except DataError as error:
            sentence(error, MANIFEST, ".parquet")
            return
        assert json.loads(manifest.to_json()) == json.loads(data)
        assert (
            rows
            == {split: manifest.splits[split].num_rows for split in SPLITS}
            == {"train": 14, "validation": 0, "test": 5}
        )
        assert groups == {split: manifest.splits[split].num_row_groups for split in SPLITS}
        assert left_out == 150

    explore("manifests", st.one_of(st.tuples(st.just("bytes"), edits()), st.tuples(st.just("json"), change)), check)


def test_a_damaged_side_table_is_an_error(dataset: Path, tmp_path: Path) -> None:
    number = 0

    def check(example: tuple[str, list[Edit]]) -> None:
        nonlocal number
        name, changes = example
        number += 1
        folder = shutil.copytree(dataset, tmp_path / str(number))  # a name of its own: tables are kept in memory
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(edited(good, changes))
        manifest = Manifest.load(str(folder))
        if edited(good, changes) == good:
            return
        with pytest.raises(DataError) as caught:
            manifest.rows("train"), manifest.row_groups("test"), manifest.all_quarantined()
        sentence(caught.value, name)
        shutil.rmtree(folder)

    explore(
        "side tables",
        st.tuples(st.sampled_from(["rows.parquet", "row_groups.parquet", "quarantine.parquet"]), edits()),
        check,
    )
