"""Rows of row groups as fixed-shape tables: images read, decoded and marked, in a process that imports no torch.

An image that cannot be read keeps its place as mean grey and is marked; an image that kills the decoding process is
found out at the second attempt (a small journal file says what the first was decoding), tried alone in a child process,
and marked if it kills that too. Features of the frozen prefix are rows like images, only wider.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist.data import images
from cxr_dist.data.plan import EMPTY, NUM_DRAWS, Int64, Split, draws
from cxr_dist.errors import RunError

__all__ = [
    "CORRUPT",
    "GREY",
    "OK",
    "PADDING",
    "Journal",
    "RowDecoder",
    "RowSource",
    "decode_isolated",
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
"""Images decoded in one call; the decoder resizes as many at once."""

ISOLATED_TIMEOUT_S = 60

DecodeMany = Callable[[list[bytes], int], Pixels]
"""Encoded images and a size to pixels [images, size, size]; ImageError if any cannot be read."""

DecodeOne = Callable[[bytes, int], Pixels | str]
"""One encoded image and a size to pixels [size, size], or why it has none."""

ISOLATED_PROGRAM = (
    "from cxr_dist.data.images import to_grey; "
    "sys.stdout.buffer.write(to_grey(sys.stdin.buffer.read(), int(sys.argv[1])).tobytes())"
)
"""What the child process of `decode_isolated` runs: an image on stdin, its size as argument, pixels on stdout."""


class RowSource(Protocol):
    """Whatever gives the rows of row groups: shards, PNG objects where they lie, or stored features."""

    def read(self, groups: Int64) -> pa.Table:
        """Rows of the row groups, in order: image_id, findings (one bool a finding), image (bytes).

        Stored features come with state and reason too: their images were decoded before.
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


def decode_isolated(encoded: bytes, size: int, program: str = ISOLATED_PROGRAM) -> Pixels | str:
    """Decode one suspicious image in a child process; a reason if that process dies, hangs or refuses."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}", str(size)]
    try:
        child = subprocess.run(command, input=encoded, capture_output=True, timeout=ISOLATED_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"decoder hung for {ISOLATED_TIMEOUT_S} s"
    if child.returncode < 0:
        return f"decoder killed by signal {-child.returncode}"
    if child.returncode or len(child.stdout) != size * size:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return last.removeprefix(f"{images.__name__}.ImageError: ") or f"decoder ended with {child.returncode}"
    return np.frombuffer(child.stdout, dtype=np.uint8).reshape(size, size)


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

    def rows(self, groups: Int64, journal: "Journal", *, seed: int = 0, view: int = 0) -> pa.Table:
        """Rows of the row groups (`row_schema`), len(groups) * row_group of them, padded where a group is not full."""
        rows = self.split.rows(groups)
        num_rows, num_read = len(rows), int((rows >= 0).sum())
        state = np.full(num_rows, PADDING, dtype=np.uint8)
        pixels = np.zeros((num_rows, self.row_bytes), dtype=np.uint8)
        labels = np.zeros((num_rows, len(self.findings)), dtype=np.uint8)
        reasons: list[str | None] = [None] * num_rows
        ids = [""] * num_rows
        view_draws = [bytes(4 * NUM_DRAWS)] * num_rows
        if num_read:
            table = self.source.read(groups[groups != EMPTY])
            if len(table) != num_read or not (rows[:num_read] >= 0).all():
                raise RunError(f"row groups {groups.tolist()}: found {len(table)} rows, expected {num_read}")
            ids[:num_read] = table["image_id"].to_pylist()
            labels[:num_read] = findings_of(table)[:, list(self.findings)]
            state[:num_read] = OK
            if self.encoding == "features":
                state[:num_read], reasons[:num_read] = table["state"].to_numpy(), table["reason"].to_pylist()
            elif view:
                view_draws[:num_read] = [draws(seed, image_id, view) for image_id in ids[:num_read]]
            if self.encoding == "png":
                for row, result in enumerate(self._decoded(table, ids[:num_read], journal)):
                    if isinstance(result, str):
                        state[row], reasons[row], pixels[row] = CORRUPT, result, GREY
                    else:
                        pixels[row] = result.reshape(-1)
            else:
                pixels[:num_read] = fixed_rows(table["image"], np.uint8)
        return pa.table(
            [
                pa.array(rows),
                pa.array(ids, pa.string()),
                pa.array(state),
                pa.array(reasons, pa.string()),
                _fixed_binary(labels),
                pa.array(view_draws, pa.binary(4 * NUM_DRAWS)),
                _fixed_binary(pixels),
            ],
            schema=row_schema(self.row_bytes, len(self.findings)),
        )

    def _decoded(self, table: pa.Table, ids: Sequence[str], journal: "Journal") -> list[Pixels | str]:
        """Pixels of each encoded image, or why it has none."""
        encoded = table["image"].to_pylist()
        results: dict[int, Pixels | str] = {
            row: self.isolated(encoded[row], self.size)
            for row, image_id in enumerate(ids)
            if image_id in journal.suspects
        }
        todo = [row for row in range(len(ids)) if row not in results]
        for start in range(0, len(todo), PACK):
            rows = todo[start : start + PACK]
            journal.mark([ids[row] for row in rows])
            results.update(zip(rows, self._decode_pack([encoded[row] for row in rows]), strict=True))
        return [results[row] for row in range(len(ids))]

    def _decode_pack(self, encoded: list[bytes]) -> list[Pixels | str]:
        try:
            return list(self.decode(encoded, self.size))
        except images.ImageError as error:
            if len(encoded) == 1:
                return [str(error)]
            return [result for one in encoded for result in self._decode_pack([one])]


class Journal:
    """What a task is decoding, in a file that outlives its process: the next attempt reads it as suspects.

    A page-cache write of a few dozen bytes for every few images, about a microsecond beside milliseconds of decoding.
    """

    def __init__(self, token: str, number: int):
        self.path = Path(tempfile.gettempdir()) / f"cxr-dist-{token}-{number}"
        self.suspects: frozenset[str] = frozenset()
        if self.path.exists():
            self.suspects = frozenset(self.path.read_text().splitlines())
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        self.base = os.fstat(self.file).st_size

    def mark(self, image_ids: Sequence[str]) -> None:
        os.ftruncate(self.file, self.base)
        os.write(self.file, ("\n".join(image_ids) + "\n").encode())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        self.path.unlink(missing_ok=True)


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
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].view(dtype).reshape(len(array), -1)
