"""Where row groups lie, in a byte or two of each: columns that are worked out for the numbers that are asked for.

Every process of a run has the places of all row groups, and a hundred million images have twelve million of them: as the
manifest's table holds them (file, offset, bytes, rows) 24 bytes each. But a shard's row groups follow one another, are about
equally long, and all full but the last, so what is kept is how long each is, less the shortest, and where a shard begins.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Lookup", "Near", "Offsets", "Places", "Runs", "places"]

TOGETHER = 64
"""Row groups of which one's offset is kept: that of another is a sum over at most so many lengths."""

Int64 = npt.NDArray[np.int64]


class Lookup(Protocol):
    """A column of whole numbers: an array, or what gives the same for the places that are asked for."""

    def __getitem__(self, numbers: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Runs:
    """A column whose neighbours are mostly alike: the value of each run of equal ones."""

    ends: Int64
    """Number of the first entry after each run."""
    values: npt.NDArray[np.integer]

    def __getitem__(self, numbers: Any) -> Any:
        return self.values[np.searchsorted(self.ends, numbers, side="right")]


@dataclass(frozen=True, eq=False)
class Near:
    """A column whose values are near one another: the least, and what each has more in the smallest type that holds it."""

    least: int
    more: npt.NDArray[np.integer]

    def __getitem__(self, numbers: Any) -> Any:
        return self.least + self.more[numbers].astype(np.int64)

    def mean(self) -> float:
        return self.least + float(self.more.mean())


@dataclass(frozen=True, eq=False)
class Offsets:
    """First bytes of row groups that follow one another within a run."""

    ends: Int64
    """Number of the first row group after each run."""
    starts: Int64
    """First byte of each run."""
    anchors: Int64
    """First byte of every row group whose number is a multiple of TOGETHER."""
    lengths: Near

    def __getitem__(self, numbers: Any) -> Any:
        wanted = np.atleast_1d(np.asarray(numbers, np.int64))
        runs = np.searchsorted(self.ends, wanted, side="right")
        first = np.where(runs > 0, self.ends[runs - 1], 0)
        anchored = wanted // TOGETHER * TOGETHER
        begun = first > anchored
        at = np.where(begun, first, anchored)[:, None] + np.arange(TOGETHER)
        before = at < wanted[:, None]
        lengths = np.where(before, self.lengths[np.where(before, at, 0)], 0)
        found = np.where(begun, self.starts[runs], self.anchors[wanted // TOGETHER]) + lengths.sum(axis=1)
        return found if np.ndim(numbers) else found[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """The columns of a row group table."""

    file_index: Runs
    offset: Offsets
    length: Near
    rows: Runs


def places(pieces: Iterable[tuple[npt.NDArray[Any], ...]]) -> Places:
    """The places out of pieces of a table in order: file, offset, bytes and rows of each row group. Any table is kept right."""
    files, rows, lengths = _Changes(), _Changes(), list[Near]()
    starts, anchors = list[Int64](), list[Int64]()
    count, end, last = 0, -1, -1
    for file, offset, length, num_rows in pieces:
        if not len(file):
            continue
        offset, length = offset.astype(np.int64), length.astype(np.int64)
        follows = np.concatenate([[end], offset[:-1] + length[:-1]]) == offset
        same = np.concatenate([[last], file[:-1]]) == file
        begins = np.flatnonzero(~(follows & same))
        files.add(count + begins, file[begins])
        starts.append(offset[begins])
        changes = np.flatnonzero(np.concatenate([[rows.last], num_rows[:-1]]) != num_rows)
        rows.add(count + changes, num_rows[changes])
        anchors.append(offset[-count % TOGETHER :: TOGETHER].copy())
        least = int(length.min())
        lengths.append(Near(least, _narrow(length - least)))
        end, last, count = int(offset[-1] + length[-1]), int(file[-1]), count + len(file)
    file_index = files.runs(count)
    length_column = _near(lengths)
    joined = np.concatenate([*starts, np.zeros(1, np.int64)])  # one past the end, for whoever asks for none
    return Places(
        file_index=file_index,
        offset=Offsets(file_index.ends, joined, np.concatenate([*anchors, np.zeros(1, np.int64)]), length_column),
        length=length_column,
        rows=rows.runs(count),
    )


class _Changes:
    """Where a column changes, and to what."""

    def __init__(self) -> None:
        self.at, self.values, self.last = list[npt.NDArray[Any]](), list[npt.NDArray[Any]](), -1

    def add(self, at: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        self.at.append(at)
        self.values.append(_narrow(values))
        self.last = int(values[-1]) if len(values) else self.last

    def runs(self, count: int) -> Runs:
        begins = np.concatenate([*self.at, np.zeros(0, np.int64)]).astype(np.int64)
        return Runs(np.append(begins[1:], count), np.concatenate([*self.values, np.zeros(1, np.uint8)]))


def _near(pieces: list[Near]) -> Near:
    """One column; what is joined is let go."""
    least = min((piece.least for piece in pieces), default=0)
    most = max((piece.least + int(piece.more.max()) for piece in pieces), default=0)
    joined, at = np.zeros(sum(len(piece.more) for piece in pieces), np.min_scalar_type(most - least)), 0
    pieces.reverse()
    while pieces:
        piece = pieces.pop()
        joined[at : at + len(piece.more)] = piece.more.astype(np.int64) + (piece.least - least)
        at += len(piece.more)
    return Near(least, joined)


def _narrow(values: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
    """The same values in the smallest type that holds them."""
    if len(values) and int(values.min()) < 0:
        return values
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
