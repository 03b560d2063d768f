"""The decoding end of the stream: one task in, one block of rows out, in a process that imports no torch.

A block is a rank's run of consecutive steps, always the same number of rows. An image that cannot be read keeps its
place as mean grey and is marked; an image that kills the decoding process is found out at the second attempt (a
small journal file says what the first was decoding), tried alone in a child process, and marked if it kills that too.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist.data import images
from cxr_dist.data.plan import EMPTY, NUM_DRAWS, Int64, Plan, Split, draws, view_of
from cxr_dist.errors import RunError

__all__ = [
    "CORRUPT",
    "GREY",
    "OK",
    "PADDING",
    "Decoder",
    "Journal",
    "RowDecoder",
    "RowSource",
    "StreamSpec",
    "decode_isolated",
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
    """Whatever gives the rows of row groups: shards, or PNG objects where they lie."""

    def read(self, groups: Int64) -> pa.Table:
        """Rows of the row groups, in order: image_id, findings (one bool a finding), image (bytes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """All that decides the stream's content; small, so that every decoding process holds a copy."""

    plan: Plan
    train: RowSource
    validation: RowSource
    world_size: int
    start: int
    """First step of the run that is still to be done."""
    steps_per_task: int
    size: int
    encoding: str
    findings: tuple[int, ...]
    """Columns of the stored findings that the run uses, in the run's order."""
    views: int
    augment: bool
    token: str
    """Names the journal files of this run on a node."""

    @property
    def num_tasks(self) -> int:
        runs = -(-(self.plan.num_steps - self.start) // self.steps_per_task)
        return runs * self.world_size

    def task(self, number: int) -> tuple[int, range]:
        """Rank and step numbers of a task; numbers at or past the run's end are padding steps."""
        run, rank = divmod(number, self.world_size)
        first = self.start + run * self.steps_per_task
        return rank, range(first, first + self.steps_per_task)


def row_schema(size: int, num_findings: int) -> pa.Schema:
    """Columns of decoded rows. Fixed-size binary throughout: 8-bit list columns cost Arrow and Parquet far more."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("image_id", pa.string()),
            ("state", pa.uint8()),
            ("reason", pa.string()),
            ("labels", pa.binary(num_findings)),
            ("draws", pa.binary(4 * NUM_DRAWS)),
            ("image", pa.binary(size * size)),
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
    findings: tuple[int, ...]
    """Columns of the stored findings that the run uses, in the run's order."""
    decode: DecodeMany = images.to_grey_many
    isolated: DecodeOne = decode_isolated
    """Decodes the suspects of an attempt that died."""

    def rows(self, groups: Int64, journal: "Journal", *, seed: int = 0, view: int = 0) -> pa.Table:
        """Rows of the row groups (`row_schema`), len(groups) * row_group of them, padded where a group is not full."""
        rows = self.split.rows(groups)
        num_rows, num_read = len(rows), int((rows >= 0).sum())
        state = np.full(num_rows, PADDING, dtype=np.uint8)
        pixels = np.zeros((num_rows, self.size * self.size), dtype=np.uint8)
        labels = np.zeros((num_rows, len(self.findings)), dtype=np.uint8)
        reasons: list[str | None] = [None] * num_rows
        ids = [""] * num_rows
        view_draws = [bytes(4 * NUM_DRAWS)] * num_rows
        if num_read:
            table = self.source.read(groups[groups != EMPTY])
            if len(table) != num_read or not (rows[:num_read] >= 0).all():
                raise RunError(f"row groups {groups.tolist()}: found {len(table)} rows, expected {num_read}")
            ids[:num_read] = table["image_id"].to_pylist()
            labels[:num_read] = _findings(table)[:, list(self.findings)]
            state[:num_read] = OK
            if view:
                view_draws[:num_read] = [draws(seed, image_id, view) for image_id in ids[:num_read]]
            for row, result in enumerate(self._pixels(table, ids[:num_read], journal)):
                if isinstance(result, str):
                    state[row], reasons[row], pixels[row] = CORRUPT, result, GREY
                else:
                    pixels[row] = result.reshape(-1)
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
            schema=row_schema(self.size, len(self.findings)),
        )

    def _pixels(self, table: pa.Table, ids: Sequence[str], journal: "Journal") -> list[Pixels | str]:
        """Pixels of each row, or why it has none."""
        if self.encoding == "pixels":
            return list(fixed_rows(table["image"], np.uint8))
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


class Decoder:
    """A Ray Data actor's callable: {"item": [task number]} to a block of steps_per_task * rank_batch rows.

    Columns: `row_schema`, then the run's first step of this stream (start), the row's step (index) and its rank.
    """

    def __init__(
        self, spec: StreamSpec, decode: DecodeMany = images.to_grey_many, isolated: DecodeOne = decode_isolated
    ):
        self.spec = spec
        self.decoders = {
            kind: RowDecoder(
                source=source,
                split=split,
                size=spec.size,
                encoding=spec.encoding,
                findings=spec.findings,
                decode=decode,
                isolated=isolated,
            )
            for kind, source, split in (
                ("train", spec.train, spec.plan.train),
                ("validation", spec.validation, spec.plan.validation),
            )
        }

    def __call__(self, batch: dict[str, npt.NDArray[np.int64]]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield self.block(int(number))

    def block(self, number: int) -> pa.Table:
        """The block of one task: a rank's run of consecutive steps."""
        rank, indices = self.spec.task(number)
        with Journal(self.spec.token, number) as journal:
            steps = [self._step(index, rank, journal) for index in indices]
        return pa.concat_tables(steps).combine_chunks()

    def _step(self, index: int, rank: int, journal: "Journal") -> pa.Table:
        spec, plan = self.spec, self.spec.plan
        if index < plan.num_steps:
            step = plan.step(index)
            view = view_of(step.epoch, views=spec.views, augment=spec.augment) if step.kind == "train" else 0
            groups = step.of_rank(rank, spec.world_size)
            table = self.decoders[step.kind].rows(groups, journal, seed=plan.seed, view=view)
        else:
            nothing = np.full(plan.groups_per_step // spec.world_size, EMPTY)
            table = self.decoders["train"].rows(nothing, journal)
        table = table.append_column("start", pa.array(np.full(len(table), spec.start)))
        table = table.append_column("index", pa.array(np.full(len(table), index)))
        return table.append_column("rank", pa.array(np.full(len(table), rank, dtype=np.int32)))


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


def _findings(table: pa.Table) -> npt.NDArray[np.uint8]:
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
