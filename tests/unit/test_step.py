"""The bench's stage `step`: what it counts, and that its rows compare what they say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cxr_dist.bench import step
from cxr_dist.bench.device import Clock, finished, flops
from cxr_dist.bench.options import BenchOptions
from cxr_dist.config import Config, DataConfig
from cxr_dist.model.densenet import DenseNet121

CPU = torch.device("cpu")


def test_flops_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, kernel_size=3, padding=1, stride=2), nn.Flatten(), nn.Linear(4 * 5 * 5, 7))
    found = flops(layers, torch.zeros(2, 3, 10, 10))
    # 25 pixels of 4 channels from 27 values; 7 outputs from 100
    assert found == {"0": 2 * 25 * 4 * 27, "2": 2 * 7 * 100}


def test_flops_of_densenet121_are_the_published_ones() -> None:
    # 224 x 224 and 1,000 classes: torchvision says 2.83 GFLOPS,
    # a multiplication and an addition counted as one
    total = sum(flops(DenseNet121(1000).eval(), torch.zeros(1, 3, 224, 224)).values())
    assert total / 2e9 == pytest.approx(2.83, abs=0.01)


def test_a_clock_names_the_phase_that_ends() -> None:
    clock = Clock(CPU)
    clock.mark("first")
    clock.mark("second")
    found = clock.ms()
    assert list(found) == ["first", "second"]
    assert all(value >= 0 for value in found.values())


def test_finished_work_is_done_once_and_counted() -> None:
    done: list[int] = []
    assert finished(lambda: done.append(1), CPU, 16)() == 16
    assert done == [1]


def test_rows_of_a_small_step(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    options = BenchOptions(out=tmp_path, repeats=1, num_images=9, config=Config(data=DataConfig(size=64)))
    rows = {row.name: row for row in step.run(options)}
    assert torch.get_num_threads() == threads
    # whole batch-norm groups
    assert {row.images for row in rows.values()} == {0, 16}
    for precision in ("fp32", "bf16"):
        plain, folded = (rows[f"prefix, {form}, {precision}"] for form in ("layer by layer", "folded"))
        cached, uncached = (rows[f"{name}, {precision}"] for name in ("whole step from kept features", "whole step"))
        for row, base, column in ((folded, plain, "layer by layer"), (cached, uncached, "whole step")):
            assert row.images_per_s is not None
            assert base.images_per_s is not None
            assert row.ratios == {column: pytest.approx(row.images_per_s / base.images_per_s)}
        assert float(folded.extra["GFLOP/image"]) < float(plain.extra["GFLOP/image"])
        phases = [name for name in uncached.extra if name.endswith("ms/image")]
        assert phases == [
            f"{name} ms/image"
            for name in ("transfer", "augmentation", "prefix", "tail forward", "tail backward", "optimizer")
        ]
        assert f"limit: matrix product, {precision}" in rows
    assert rows["transition2, folded, fp32"].ratios
