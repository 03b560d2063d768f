"""Rows of row groups as fixed-shape tables: images read, decoded and marked, in a process that imports no torch.

An image that cannot be read, or that kills whatever decodes it (`suspects`), keeps its place as mean grey and is marked.
Features of the frozen prefix are rows like images, only wider.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist.data import images
from cxr_dist.data.plan import EMPTY, NUM_DRAWS, Int64, Split, draws_of
from cxr_dist.data.suspects import DecodeOne, Journal, decode_isolated
from cxr_dist.errors import RunError

__all__ = [
    "CORRUPT",
    "GREY",
    "OK",
    "PADDING",
    "Journal",
    "Part",
    "RowDecoder",
    "RowSource",
    "decode_isolated",
    "decode_rows",
    "findings_of",
    "fixed_rows",
    "row_schema",
]

Pixels = npt.NDArray[np.uint8]

OK, CORRUPT, PADDING = 0, 1, 2
"""States of a row: a good image, an unreadable one (masked everywhere), and padding to full shape."""

GREY = 128
"""Grey level that stands in for an unreadable image."""

PACK = 4
"""Images decoded in one call: as many are suspect when the process dies."""

RUN_PNG, RUN_ROWS = 64, 1024
"""Rows that are read together, later ones meanwhile in flight: 25 MB of NIH's PNG, which take 0.25 s to decode; rows
that need no decoding are mostly a whole block."""

DecodeMany = Callable[[list[bytes], int], Pixels]
"""Encoded images and a size to pixels [images, size, size]; ImageError if any cannot be read."""


class RowSource(Protocol):
    """Whatever gives the rows of row groups: shards, PNG objects where they lie, or stored features."""

    def read(self, groups: Int64) -> pa.Table:
        """Rows of the row groups, in order: image_id, findings (one bool a finding), image (bytes).

        Stored features come with state and reason too: their images were decoded before. A source that has to wait for
        storage also has `stream`: runs of row groups to the rows of each in turn, the next ones in flight meanwhile.
        """
        ...


def row_schema(row_bytes: int, num_findings: int) -> pa.Schema:
    """Columns of decoded rows, `image` of so many bytes. Fixed-size binary: 8-bit lists cost Arrow far more."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("image_id", pa.string()),
            ("state", pa.uint8()),
            ("reason", pa.string()),
            ("labels", pa.binary(num_findings)),
            ("draws", pa.binary(4 * NUM_DRAWS)),
            ("image", pa.binary(row_bytes)),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class RowDecoder:
    """From row groups of one split to decoded rows of a fixed shape."""

    source: RowSource
    split: Split
    size: int
    encoding: str
    """`png` and `pixels` as in the dataset, or `features`: the frozen prefix's output."""
    findings: tuple[int, ...]
    """Columns of the stored findings that the run uses, in the run's order."""
    feature_bytes: int = 0
    """Bytes of an image's features, where rows are features."""
    decode: DecodeMany = images.to_grey_many
    isolated: DecodeOne = decode_isolated
    """Decodes the suspects of an attempt that died."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return self.feature_bytes if self.encoding == "features" else self.size * self.size

    def rows(self, groups: Int64, journal: Journal, *, seed: int = 0, view: int = 0) -> pa.Table:
        """Rows of the row groups (`row_schema`), len(groups) * row_group of them, padded where a group is not full."""
        return decode_rows([Part(decoder=self, groups=groups, seed=seed, view=view)], journal)

    def _decoded(self, column: pa.ChunkedArray, ids: Sequence[str], journal: Journal) -> Iterator[Pixels | str]:
        """Pixels of each encoded image, or why it has none."""
        for start in range(0, len(ids), PACK):
            # taken out of Arrow a few at a time: 50 MB of copies at once cost a twentieth of the decoding
            encoded, names = column.slice(start, PACK).to_pylist(), ids[start : start + PACK]
            results = {
                row: self.isolated(encoded[row], self.size)
                for row, name in enumerate(names)
                if name in journal.suspects
            }
            todo = [row for row in range(len(names)) if row not in results]
            if todo:
                journal.mark([names[row] for row in todo])
                results.update(zip(todo, self._decode_pack([encoded[row] for row in todo]), strict=True))
            yield from (results[row] for row in range(len(names)))

    def _decode_pack(self, encoded: list[bytes]) -> list[Pixels | str]:
        try:
            return list(self.decode(encoded, self.size))
        except images.ImageError as error:
            if len(encoded) == 1:
                return [str(error)]
            return [result for one in encoded for result in self._decode_pack([one])]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Row groups of a table to be, one after another: what decodes them, and the view of them that is shown."""

    decoder: RowDecoder
    groups: Int64
    seed: int = 0
    view: int = 0


def decode_rows(parts: Sequence[Part], journal: Journal, turn: AbstractContextManager[Any] | None = None) -> pa.Table:
    """The rows of the parts (`row_schema`), padded where a row group is empty or not full.

    The bytes of what comes next are in flight while something is decoded. `turn` is held from the first bytes on.
    """
    rows = [part.decoder.split.rows(part.groups) for part in parts]
    starts = itertools.accumulate(map(len, rows[:-1]), initial=0)
    stored = (
        (start + at, part, table)
        for start, part in zip(starts, parts, strict=True)
        for at, table in _stored(part.decoder, part.groups)
    )
    first = list(itertools.islice(stored, 1))
    out = _Rows(np.concatenate(rows), parts[0].decoder)
    with turn or nullcontext():
        for at, part, table in itertools.chain(first, stored):
            out.fill(at, table, part, journal)
    return out.table()


def _stored(decoder: RowDecoder, groups: Int64) -> Iterator[tuple[int, pa.Table]]:
    """The stored rows of row groups in runs that are read together, each with the place of its first row."""
    at, rows = 0, decoder.split.rows(groups)
    expected = int((rows >= 0).sum())
    present = groups[groups != EMPTY]
    size = max(1, (RUN_PNG if decoder.encoding == "png" else RUN_ROWS) // decoder.split.row_group)
    runs = [present[start : start + size] for start in range(0, len(present), size)]
    source = decoder.source
    for table in source.stream(runs) if hasattr(source, "stream") else map(source.read, runs):
        yield at, table
        at += len(table)
    if at != expected or not (rows[:expected] >= 0).all():
        raise RunError(f"row groups {groups.tolist()}: found {at} rows, expected {expected}")


class _Rows:
    """A table while it is filled: N rows, all of them padding at first."""

    def __init__(self, rows_N: Int64, decoder: RowDecoder):
        count = len(rows_N)
        self.schema = row_schema(decoder.row_bytes, len(decoder.findings))
        self.rows_N = rows_N
        self.ids = [""] * count
        self.state_N = np.full(count, PADDING, dtype=np.uint8)
        self.reasons: list[str | None] = [None] * count
        self.labels_NK = np.zeros((count, len(decoder.findings)), dtype=np.uint8)
        self.draws_N6 = np.zeros((count, NUM_DRAWS), dtype="<f4")
        self.content_NB = np.zeros((count, decoder.row_bytes), dtype=np.uint8)

    def fill(self, start: int, table: pa.Table, part: Part, journal: Journal) -> None:
        """Decode stored rows to where they belong, from row `start` on."""
        decoder, ids = part.decoder, table["image_id"].to_pylist()
        at = slice(start, start + len(ids))
        if at.stop > len(self.ids):
            raise RunError(f"row groups {part.groups.tolist()}: found more rows than the {len(self.ids)} expected")
        self.ids[at] = ids
        self.labels_NK[at] = findings_of(table)[:, list(decoder.findings)]
        self.state_N[at] = OK
        if decoder.encoding == "features":
            self.state_N[at], self.reasons[at] = table["state"].to_numpy(), table["reason"].to_pylist()
        elif part.view:
            self.draws_N6[at] = draws_of(part.seed, ids, part.view)
        if decoder.encoding == "png":
            for row, result in enumerate(decoder._decoded(table["image"], ids, journal), start):
                if isinstance(result, str):
                    self.state_N[row], self.reasons[row], self.content_NB[row] = CORRUPT, result, GREY
                else:
                    self.content_NB[row] = result.reshape(-1)
        else:
            row = start
            for chunk in table["image"].chunks:
                self.content_NB[row : row + len(chunk)] = _fixed_rows(chunk, np.uint8)
                row += len(chunk)

    def table(self) -> pa.Table:
        columns = [
            pa.array(self.rows_N),
            pa.array(self.ids, pa.string()),
            pa.array(self.state_N),
            pa.array(self.reasons, pa.string()),
            _fixed_binary(self.labels_NK),
            _fixed_binary(self.draws_N6.view(np.uint8)),
            _fixed_binary(self.content_NB),
        ]
        return pa.table(columns, schema=self.schema)


def findings_of(table: pa.Table) -> npt.NDArray[np.uint8]:
    """The findings column as [rows, findings] of 0 and 1."""
    column = table["findings"].combine_chunks()
    return np.asarray(column.flatten()).astype(np.uint8).reshape(len(table), -1)


def _fixed_binary(values: npt.NDArray[np.uint8]) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def fixed_rows(column: pa.ChunkedArray, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A fixed-size binary column as a matrix of `dtype`, [rows, bytes / itemsize]; no copy if it is one chunk."""
    return _fixed_rows(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks(), dtype)


def _fixed_rows(array: pa.FixedSizeBinaryArray, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].view(dtype).reshape(len(array), -1)
