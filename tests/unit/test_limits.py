"""What saturates where: arithmetic by hand on given rates."""

import dataclasses

import pytest

from cxr_dist.bench.limits import Known, limits, ring_s, spread
from cxr_dist.bench.options import Given
from cxr_dist.bench.queueing import Costs

GIVEN = Given(rank_images_per_s=(100.0,), network_gbit=8.0, network_latency_us=10.0, store_gbit=8.0, share=50)
KNOWN = Known(
    costs=Costs(task_s=0.005, block_s=0.01, batch_s=0.001),
    png_images_per_s=200.0,
    pixel_images_per_s=10_000.0,
    pixel_bytes=50_000.0,
    steps_per_task={"png": 10, "pixels": 12},
    gradient_bytes=8e6,
    checkpoint_bytes=2e9,
    save_s=0.5,
    every_steps=1000,
    final_check_us=2.0,
)


def test_a_ring_by_hand() -> None:
    assert ring_s(1, 8e6, GIVEN) == 0.0
    # two messages of 4 MB at 1 GB/s and of 10 us
    assert ring_s(2, 8e6, GIVEN) == pytest.approx(2 * (0.004 + 10e-6))
    assert ring_s(256, 8e6, GIVEN) == pytest.approx(510 * (8e6 / 256 / 1e9 + 10e-6))


def test_every_stage_by_hand() -> None:
    found = {one.stage: (one.images_per_s, one.of, one.basis) for one in limits(KNOWN, GIVEN)}
    assert found == {
        "object storage, PNG": (pytest.approx(1e9 / 410_000), "node", "given"),
        "object storage, pixels": (pytest.approx(20_000), "node", "given"),
        "decode, PNG": (200.0, "core", "measured"),
        "decode, pixels": (10_000.0, "core", "measured"),
        "Ray Data's loop, png, tasks of 500 images": (pytest.approx(50_000), "run", "measured"),
        "Ray Data's loop, pixels, tasks of 600 images": (pytest.approx(60_000), "run", "measured"),
        "blocks on their way to the ranks' nodes": (pytest.approx(1e9 / 224**2), "node", "given"),
        "Ray's object store": (None, "rank", "counted"),
        "a rank's taking of blocks": (pytest.approx(25_000), "rank", "fitted"),
        "all-reduce, bandwidth": (pytest.approx(50 / 0.016), "rank", "given"),
        # 2 GB at 1 GB/s are slower than the disk was
        "checkpoint every 1000 steps": (pytest.approx(25_000), "rank", "measured and given"),
        "driver, account of the images": (pytest.approx(500_000), "run", "measured"),
    }
    [store] = [one for one in limits(KNOWN, GIVEN) if one.images_per_s is None]
    # two decoders: four blocks made, five more that wait, of 600 images
    assert store.remark.startswith(f"{9 * 600 * 224**2 / 1e6:,.0f} MB of blocks")
    [loop, _, driver] = [one.ranks(100.0) for one in limits(KNOWN, GIVEN) if one.of == "run"]
    assert (loop, driver) == (pytest.approx(500), pytest.approx(5000))
    assert all(one.ranks(100.0) is None for one in limits(KNOWN, GIVEN) if one.of != "run")


def test_a_run_gets_the_decoders_that_it_needs_and_is_as_fast_as_its_slowest_stage() -> None:
    one, found = spread("png", 4, 100.0, KNOWN, GIVEN)
    assert (one.decoders, one.together, one.image_s, one.step_s) == (8, True, 0.005, 0.5)
    assert found.images_per_s == pytest.approx(400, rel=0.03)
    assert spread("png", 40, 200.0, KNOWN, GIVEN)[0].decoders == 80
    assert spread("png", 40, 400.0, KNOWN, GIVEN)[0].decoders == 120
    # the loop takes 50,000 images a second, 600 ranks bring 60,000
    _, many = spread("png", 600, 100.0, KNOWN, GIVEN)
    assert many.images_per_s == pytest.approx(50_000, rel=0.03)
    assert many.busiest == "loop"
    larger = dataclasses.replace(KNOWN, steps_per_task={"png": 20, "pixels": 24})
    assert spread("png", 600, 100.0, larger, GIVEN)[1].images_per_s == pytest.approx(60_000, rel=0.03)
