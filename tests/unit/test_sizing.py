"""Tasks sized by bytes."""

from types import SimpleNamespace

import numpy as np
import pytest

from cxr_dist.data.sizing import steps_per_task


def shards(*row_groups: int) -> SimpleNamespace:
    """A source whose row groups are so many bytes long."""
    return SimpleNamespace(ranges=SimpleNamespace(length=np.array(row_groups)))


@pytest.mark.parametrize(("share", "steps"), [
    (16, 23),  # 365.9 images
    (128, 3),
    (366, 1),
    (365, 2),
    (512, 1),
])  # fmt: skip
def test_png_by_work(share, steps):
    """Row groups of two of NIH's PNG: 4.1 ms an image."""
    assert (
        steps_per_task(shards(820_000, 800_000, 840_000), encoding="png", row_group=2, row_bytes=1, share=share)
        == steps
    )


def test_png_of_unknown_size_are_taken_for_nihs():
    known = steps_per_task(shards(410_000), encoding="png", row_group=1, row_bytes=224**2, share=8)
    assert steps_per_task(object(), encoding="png", row_group=1, row_bytes=224**2, share=8) == known == 46


@pytest.mark.parametrize(("encoding", "row_bytes", "share", "steps"), [
    ("pixels", 224**2, 16, 41),  # 668 rows of 50 kB fill 32 MiB
    ("pixels", 224**2, 128, 5),
    ("pixels", 1024**2, 16, 2),
    ("pixels", 1024**2, 128, 1),
    ("features", 7 * 7 * 512 * 2, 128, 5),
    ("png", 1024**2, 16, 2),
])  # fmt: skip
def test_blocks_stay_small(encoding, row_bytes, share, steps):
    assert steps_per_task(object(), encoding=encoding, row_group=8, row_bytes=row_bytes, share=share) == steps


def test_a_step_larger_than_a_block_is_a_task():
    assert steps_per_task(object(), encoding="pixels", row_group=8, row_bytes=1024**2, share=4096) == 1
