"""Places in few bytes are the table's, whatever the table: in order or not, with gaps, in any pieces."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_dist.data.places import TOGETHER, Places, places

COLUMNS = ("file_index", "offset", "length", "rows")


def shards(groups: list[int], *, row_group: int = 8, seed: int = 0) -> np.ndarray:
    """A table [4, G] as ingest writes it: so many row groups in each file, one after another from byte 4 on."""
    random, table = np.random.default_rng(seed), []
    for file, count in enumerate(groups):
        at = 4
        for _ in range(count):
            length = int(random.integers(400_000, 400_050))
            table.append((file, at, length, row_group))
            at += length
    return np.array(table, np.int64).reshape(-1, 4).T


def held(found: Places) -> int:
    arrays = (
        found.file_index.ends, found.file_index.values, found.rows.ends, found.rows.values,
        found.offset.starts, found.offset.anchors, found.length.more,
    )  # fmt: skip
    return sum(array.nbytes for array in arrays)


def check(table: np.ndarray, found: Places) -> None:
    everything = np.arange(table.shape[1])
    for name, column in zip(COLUMNS, table, strict=True):
        assert getattr(found, name)[everything].tolist() == column.tolist()
        for number in {0, len(column) // 2, len(column) - 1} if len(column) else ():
            assert int(getattr(found, name)[number]) == column[number]
        assert getattr(found, name)[[]].tolist() == []
    assert len(column) == 0 or found.length.mean() == pytest.approx(table[2].mean())


def cut(table: np.ndarray, at: list[int]) -> list[tuple[np.ndarray, ...]]:
    edges = [0, *sorted(at), table.shape[1]]
    return [tuple(table[:, a:b]) for a, b in itertools.pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3 * TOGETHER), max_size=5), st.data())
def test_the_places_of_shards_are_the_tables(groups: list[int], data: st.DataObject) -> None:
    table = shards(groups)
    at = data.draw(st.lists(st.integers(0, table.shape[1]), max_size=4))
    check(table, places(cut(table, at)))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1 << 40), st.integers(0, 1 << 33), st.integers(0, 300)),
        max_size=200,
    ),
    st.data(),
)
def test_the_places_of_any_row_groups_are_the_tables(rows: list[tuple[int, ...]], data: st.DataObject) -> None:
    table = np.array(rows, np.int64).reshape(-1, 4).T
    at = data.draw(st.lists(st.integers(0, table.shape[1]), max_size=4))
    check(table, places(cut(table, at)))


def test_a_shards_row_group_takes_a_byte_and_an_eighth() -> None:
    """And 30 bytes for each shard, and for the whole what does not grow."""
    table = shards([400] * 100)
    assert held(places([tuple(table)])) <= 1.125 * 40_000 + 30 * 100 + 100
    # radiographs as PNG differ by more than 64 KB, never by 4 GB
    table[2] = np.arange(40_000) * 100
    table[1] = np.concatenate([np.cumsum([4, *part[:-1]]) for part in table[2].reshape(100, 400)])
    assert held(places([tuple(table)])) <= 4.125 * 40_000 + 30 * 100 + 100


def test_a_short_last_row_group_and_files_that_take_turns() -> None:
    table = shards([3, 2])
    table[3, -1] = 5
    found = places([tuple(table)])
    assert (found.rows.ends.tolist(), found.rows.values.tolist()[:2]) == ([4, 5], [8, 5])
    assert found.offset[4] == 4 + table[2, 3]
    turns = table[:, [0, 3, 1, 4, 2]]
    check(turns, places([tuple(turns)]))
