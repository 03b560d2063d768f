"""How many steps a decoding task of the stream holds: arithmetic from bytes, nothing decoded, nothing read.

A task costs Ray Data and its consumer about 10 ms of CPU, however long, so it should be long; but its block lies in
memory, and what a killed process was at is done again. Costs a byte were measured (docs/stream.md). Decoding a sample
beforehand would adapt to the machine, but an image that kills its decoder would then kill whoever asks.
"""

from typing import Any

__all__ = ["first_pieces", "row_seconds", "steps_per_task"]

TASK_S = 2.0
"""Work in a task, seconds of one core."""

PIECE_S = 0.2
"""Least work in a piece of the first step, seconds of one core: what Ray Data takes to bring one more block."""

BLOCK_BYTES = 32 << 20
"""Largest block, bytes; several of them are in memory for each decoding process."""

DECODE_S_PER_BYTE, COPY_S_PER_BYTE = 10e-9, 1.3e-9
"""Seconds of a core for a byte of PNG (4.1 ms for one of NIH's), and for a byte that is only read and copied."""

PNG_BYTES = 410_000
"""Mean size of NIH's PNG files, for sources that do not tell theirs."""


def row_seconds(source: Any, *, encoding: str, row_group: int, row_bytes: int) -> float:
    """Seconds of a core for a row of `source` (a RowSource), whose row groups hold `row_group` rows, decoded `row_bytes`."""
    if encoding != "png":
        return COPY_S_PER_BYTE * row_bytes
    ranges = getattr(source, "ranges", None)
    return DECODE_S_PER_BYTE * float(PNG_BYTES if ranges is None else ranges.length.mean() / row_group)


def steps_per_task(source: Any, *, images: int = 0, encoding: str, row_group: int, row_bytes: int, share: int) -> int:
    """Steps of a task whose rows come from `source` (a RowSource): as many as hold `images`, or if that is 0 what pays.

    `share` is the rows of a step, `row_group` those of a stored row group, `row_bytes` the bytes of a decoded row.
    """
    if images:
        return max(1, images // share)
    row_s = row_seconds(source, encoding=encoding, row_group=row_group, row_bytes=row_bytes)
    by_time = -(-TASK_S // (row_s * share))
    by_memory = BLOCK_BYTES // (row_bytes * share)
    return max(1, int(min(by_time, by_memory)))


def first_pieces(*, row_s: float, row_group: int, groups: int, decoders: int) -> int:
    """Equal pieces that the first step's `groups` row groups of a rank are cut into, for so many decoders at once."""
    return max(
        pieces
        for pieces in range(1, max(1, decoders) + 1)
        if pieces == 1 or (groups % pieces == 0 and groups * row_group * row_s / pieces >= PIECE_S)
    )
