"""How many steps a decoding task of the stream holds: arithmetic from bytes, nothing decoded, nothing read.

A task costs Ray Data and its consumer about 10 ms of CPU, however long, so it should be long; but its block lies in
memory, and what a killed process was at is done again. Costs a byte were measured (docs/stream.md). Decoding a sample
beforehand would adapt to the machine, but an image that kills its decoder would then kill whoever asks.
"""

from typing import Any

__all__ = ["steps_per_task"]

TASK_S = 1.5
"""Work in a task, seconds of one core."""

BLOCK_BYTES = 32 << 20
"""Largest block, bytes; several of them are in memory for each decoding process."""

DECODE_S_PER_BYTE, COPY_S_PER_BYTE = 10e-9, 1.3e-9
"""Seconds of a core for a byte of PNG (4.1 ms for one of NIH's), and for a byte that is only read and copied."""

PNG_BYTES = 410_000
"""Mean size of NIH's PNG files, for sources that do not tell theirs."""


def steps_per_task(source: Any, *, images: int = 0, encoding: str, row_group: int, row_bytes: int, share: int) -> int:
    """Steps of a task whose rows come from `source` (a RowSource): as many as hold `images`, or if that is 0 what pays.

    `share` is the rows of a step, `row_group` those of a stored row group, `row_bytes` the bytes of a decoded row.
    """
    if images:
        return max(1, images // share)
    if encoding == "png":
        ranges = getattr(source, "ranges", None)
        row_s = DECODE_S_PER_BYTE * (PNG_BYTES if ranges is None else ranges.length.mean() / row_group)
    else:
        row_s = COPY_S_PER_BYTE * row_bytes
    by_time = -(-TASK_S // (row_s * share))
    by_memory = BLOCK_BYTES // (row_bytes * share)
    return max(1, int(min(by_time, by_memory)))
