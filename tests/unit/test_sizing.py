"""Tasks sized by bytes."""

from types import SimpleNamespace

import numpy as np
import pytest

from cxr_dist.data.sizing import first_pieces, steps_per_task


def shards(*row_groups: int) -> SimpleNamespace:
    """A source whose row groups are so many bytes long."""
    return SimpleNamespace(ranges=SimpleNamespace(length=np.array(row_groups)))


@pytest.mark.parametrize(("share", "steps"), [
    (16, 31),  # 487.8 images
    (128, 4),
    (488, 1),
    (487, 2),
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
    assert steps_per_task(object(), encoding="png", row_group=1, row_bytes=224**2, share=8) == known == 61


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


@pytest.mark.parametrize(("row_s", "groups", "decoders", "pieces"), [
    (0.004, 16, 1, 1),
    (0.004, 16, 2, 2),  # 0.512 s of work in 16 groups of 8
    (0.004, 16, 3, 2),  # of equal size
    (0.004, 16, 8, 2),  # and of 0.2 s at least
    (0.004, 64, 8, 8),
    (0.004, 2, 8, 1),
    (0.001, 16, 8, 1),
    (0.004, 1, 8, 1),
    (1.0, 3, 8, 3),  # a row group is not cut
    (0.004, 16, 0, 1),  # fewer decoders than ranks
])  # fmt: skip
def test_the_first_step_is_cut_where_it_pays(row_s, groups, decoders, pieces):
    assert first_pieces(row_s=row_s, row_group=8, groups=groups, decoders=decoders) == pieces
