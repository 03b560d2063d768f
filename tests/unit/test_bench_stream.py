"""The plain pool that the stream is measured beside, and other loaders' shards."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist.bench.passes import StreamRun
from cxr_dist.bench.pool import ProcessPool
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.plan import Plan, Split
from cxr_dist.errors import DataError
from tests.releases import noise, png

ROWS = {"train": 18, "validation": 3}


@dataclass(frozen=True)
class Rows:
    """Row groups of two noise images; reading row group `broken` is an error."""

    split: str
    broken: int = -1

    def read(self, groups: np.ndarray) -> pa.Table:
        if self.broken in groups.tolist():
            raise DataError("row group is broken")
        rows = [row for group in groups.tolist() for row in (2 * group, 2 * group + 1) if row < ROWS[self.split]]
        return pa.table(
            {
                "image_id": [str(row) for row in rows],
                "findings": pa.FixedSizeListArray.from_arrays(pa.array([True] * len(rows)), 1),
                "image": pa.array([png(noise(row, 24)) for row in rows], pa.binary()),
            }
        )


def stream_spec(**changes: Any) -> StreamSpec:
    """Two epochs of 4 steps of 4 images (2 are left out) and a validation step of 3 rows."""
    spec = StreamSpec(
        plan=Plan(
            train=Split(num_rows=18, row_group=2),
            validation=Split(num_rows=3, row_group=2),
            seed=0,
            epochs=2,
            global_batch=4,
        ),
        train=Rows("train"),
        validation=Rows("validation"),
        world_size=1,
        start=0,
        steps_per_task=2,
        size=16,
        encoding="png",
        findings=(0,),
        views=0,
        augment=True,
        token="",
    )
    return dataclasses.replace(spec, **changes)


def test_a_pool_decodes_every_task_once_and_passes_errors_on():
    with ProcessPool(2) as pool:
        for _ in range(2):
            found = pool.run(stream_spec())
            assert found.images == 2 * (16 + 3)
            assert found.cpu_s > 0
            assert found.wall_s > 0
        with pytest.raises(DataError, match="row group is broken"):
            pool.run(stream_spec(validation=Rows("validation", broken=1)))
        assert pool.run(stream_spec(start=5)).images == 16 + 3


def test_a_pass_tells_its_rates_between_blocks() -> None:
    run = StreamRun(
        blocks=((2.0, 100), (3.0, 200), (4.0, 400), (6.0, 800)), first_batch_s=2.0, rank_ms_per_step=1.0, bytes_read=0
    )
    assert (run.images, run.wall_s) == (800, 6.0)
    assert run.settled_images_per_s == 600 / 3
    first, second = run.first_epoch(2)
    assert (first, second) == (400 / 4, 400 / 2)  # its start is in the first
    first, later = run.first_epoch(8)
    assert (first, later) == (100 / 2, 700 / 4)
    first, later = run.first_epoch(4)
    assert (first, later) == (200 / 3, 600 / 3)
    between, _ = dataclasses.replace(run, blocks=((2.0, 100), (4.0, 300), (6.0, 400))).first_epoch(2)
    assert between == 200 / 3
