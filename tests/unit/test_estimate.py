"""The arithmetic of a dry run: steps and bytes against the plan itself, times and nodes worked by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_dist.config import Config, TrainConfig
from cxr_dist.data.plan import EMPTY, Plan, Split
from cxr_dist.measured import MeasuredNode, Measurements
from cxr_dist.prices import parse
from cxr_dist.train.estimate import Span, cluster_of, epoch_bytes, left, read_bytes, split_bytes, times


def reader(num_groups: int, seed: int) -> Any:
    lengths = np.random.default_rng(seed).integers(1, 10_000, num_groups)
    return SimpleNamespace(ranges=SimpleNamespace(length=lengths))


def job_of(plan: Plan) -> Any:
    return SimpleNamespace(
        plan=plan, train=reader(plan.train.num_groups, 1), validation=reader(plan.validation.num_groups, 2)
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    row_group, per_step = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    batch = row_group * per_step
    return Plan(
        train=Split(num_rows=draw(st.integers(batch, 60)), row_group=row_group),
        validation=Split(num_rows=draw(st.integers(1, 30)), row_group=row_group),
        seed=draw(st.integers(0, 5)),
        epochs=draw(st.integers(1, 3)),
        global_batch=batch,
        max_steps=draw(st.none() | st.integers(1, 3)),
    )


@given(plan=plans(), data=st.data())
def test_what_is_left_is_what_the_plan_has_from_there_on(plan: Plan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.num_steps))
    job = job_of(plan)
    steps = [plan.step(index) for index in range(start, plan.num_steps)]
    found = left(plan, start)
    assert found.train == sum(step.kind == "train" for step in steps)
    assert found.validation == sum(step.kind == "validation" for step in steps)
    assert found.epochs == len({step.epoch for step in steps})
    sizes = {"train": job.train.ranges.length, "validation": job.validation.ranges.length}
    wanted = sum(int(sizes[step.kind][step.groups[step.groups != EMPTY]].sum()) for step in steps)
    assert read_bytes(job, start) == wanted


@given(plan=plans())
def test_the_bytes_of_an_epoch_are_those_of_its_steps(plan: Plan) -> None:
    job = job_of(plan)
    assert sum(sum(epoch_bytes(job, epoch)) for epoch in range(plan.epochs)) == read_bytes(job, 0)
    assert split_bytes(job.train) == job.train.ranges.length.sum()


def test_a_huge_dataset_is_counted_in_no_time() -> None:
    split = Split(num_rows=100_000_000, row_group=8)
    plan = Plan(train=split, validation=Split(num_rows=8, row_group=8), seed=0, epochs=1, global_batch=1024)
    lengths = np.ones(split.num_groups, np.int64)
    job: Any = SimpleNamespace(
        plan=plan,
        train=SimpleNamespace(ranges=SimpleNamespace(length=lengths)),
        validation=reader(1, 0),
    )
    assert epoch_bytes(job, 0)[0] == plan.train_steps * 128
    assert len(plan.epoch_groups(0, plan.train_steps)) == split.num_groups - plan.train_steps * 128


def node(**more: Any) -> MeasuredNode:
    return MeasuredNode(**{"instance": "gpu", "market": "spot", "cpus": 8.0, "gpus": 1.0, **more})


HEAD = MeasuredNode(instance="head", market="on-demand", cpus=0.0)
INGEST = MeasuredNode(instance="cpu", market="on-demand", cpus=16.0)


def config(workers: int, cpus: float = 2.0) -> Config:
    return Config(train=TrainConfig(num_workers=workers, cpus_per_worker=cpus))


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "kinds", "more", "missing"),
    [
        ([HEAD, node(), node()], 2, True, ["head", "gpu", "gpu"], 0, ""),
        ([HEAD, node()], 4, True, ["head", "gpu", "gpu", "gpu", "gpu"], 3, ""),
        ([HEAD, node(gpus=4.0, cpus=6.0)], 8, True, ["head", "gpu", "gpu", "gpu"], 2, ""),  # CPUs for three ranks each
        ([HEAD, INGEST], 2, True, ["head", "cpu"], 0, "none of the 2 nodes seen holds a rank (with a GPU)"),
        ([HEAD], 2, False, ["head"], 0, "none of the 1 nodes seen holds a rank (with 2 CPUs)"),
        ([HEAD, INGEST], 8, False, ["head", "cpu"], 0, ""),
        ([HEAD, INGEST], 9, False, ["head", "cpu", "cpu"], 1, ""),
        ([], 1, False, [], 0, "none of the 0 nodes seen holds a rank (with 2 CPUs)"),
    ],
)
def test_the_nodes_that_the_ranks_need(
    nodes: list[MeasuredNode], workers: int, gpu: bool, kinds: list[str], more: int, missing: str
) -> None:
    found = cluster_of(nodes, config(workers), workers, use_gpu=gpu)
    assert ([one.instance for one in found.nodes], found.more, found.missing) == (kinds, more, missing)


def test_the_cpus_that_are_left_for_decoding_are_whole_ones() -> None:
    found = cluster_of([HEAD, node(), INGEST], config(1, 0.5), 1, use_gpu=True)
    assert found.cpus_for_decoding(config(1, 0.5), 1, use_gpu=True) == 7 + 16
    # without GPUs the ranks go wherever they come first
    found = cluster_of([INGEST], config(3, 1.5), 3, use_gpu=False)
    assert found.cpus_for_decoding(config(3, 1.5), 3, use_gpu=False) == 11


def test_an_hour_of_the_cluster() -> None:
    prices = parse(
        b'format = "cxr-dist/prices/1"\nprice = [{ instance = "gpu", market = "spot", usd_per_hour = 0.5, '
        b'date = 2026-02-09, source = "s" }, { instance = "head", market = "on-demand", usd_per_hour = 0.25, '
        b'date = 2026-02-09, source = "s" }]\n',
        "t",
    )
    assert cluster_of([HEAD, node()], config(3), 3, use_gpu=True).bill(prices).amount == pytest.approx(0.25 + 3 * 0.5)


PLAN = Plan(
    train=Split(num_rows=1010, row_group=10),
    validation=Split(num_rows=95, row_group=10),
    seed=0,
    epochs=3,
    global_batch=100,
)
"""10 training steps of 100 and one validation step an epoch."""
SIZE: Any = SimpleNamespace(gradient_bytes=1000)


def timed(start: int = 0, **more: Any) -> dict[str, Any] | None:
    rates = {"where": "", "when": "", "verdict": "", "nodes": (), "decode": {}, "train": 50.0, "prefix": 100.0}
    given = {
        "workers": 2,
        "decode_images_per_s": None,
        "read_bytes_per_s": None,
        "features": False,
        "missing": 1105,
        "num_test": 400,
        "scorers": 2,
    }
    rates |= {name: more.pop(name) for name in list(more) if name in ("train", "prefix", "allreduce_bytes_per_s")}
    return times(job_of(PLAN), Measurements(**rates), SIZE, start=start, **(given | more))  # type: ignore[arg-type]


def test_times_of_the_network_alone() -> None:
    found = timed()
    assert found is not None
    # 1,000 images at 2 x 50 a second, then 95 of validation, each no less than the prefix and no more than a step
    assert found["epoch_s"] == {"low": 10.475, "high": 10.95}
    assert found["test_s"] == {"low": 2.0, "high": 4.0}
    assert found["all_s"] == {"low": round(3 * 10.475 + 2, 3), "high": round(3 * 10.95 + 4, 3)}
    half = timed(start=16)  # 5 of 10 training steps of the second epoch are done
    assert half is not None
    assert half["all_s"]["low"] == round(10.475 * (5 + 1 + 11) / 11 + 2, 3)


def test_what_is_slower_than_the_network_decides() -> None:
    decoding = timed(decode_images_per_s=10.0)
    assert decoding is not None
    assert decoding["epoch_s"] == {"low": 109.5, "high": 109.5}
    assert decoding["test_s"] == {"low": 40.0, "high": 40.0}
    stored = sum(epoch_bytes(job_of(PLAN), 0))
    reading = timed(read_bytes_per_s=stored / 77)
    assert reading is not None
    assert reading["epoch_s"] == {"low": 77.0, "high": 77.0}


def test_the_gradients_are_exchanged_beside_the_backward_or_after_it() -> None:
    found = timed(allreduce_bytes_per_s=100.0)
    assert found is not None
    assert found["exchange_s_per_epoch"] == 100.0
    assert found["epoch_s"] == {"low": 10.475, "high": 110.95}
    alone = timed(allreduce_bytes_per_s=100.0, workers=1)
    assert alone is not None
    assert alone["exchange_s_per_epoch"] == 0.0


def test_times_with_features() -> None:
    found = timed(features=True)
    assert found is not None
    # the tail is what a step takes beside the prefix: 10 ms; the pass has 10 s of its own
    assert found["epoch_s"] == {"low": 5.0, "high": 5.475}
    assert found["features_s"] == {"low": 15.525, "high": 15.525}
    there = timed(features=True, missing=0)
    assert there is not None
    assert there["features_s"] == {"low": 0.0, "high": 0.0}


def test_without_a_measured_step_there_is_no_time() -> None:
    assert timed(train=None) is None
    assert timed(prefix=None, features=True) is None
    plain = timed(prefix=None)
    assert plain is not None
    assert plain["epoch_s"] == {"low": 10.95, "high": 10.95}


def test_spans() -> None:
    assert Span(low=1, high=2) + Span(low=3, high=5) == Span(low=4, high=7)
    assert Span(low=1, high=2).at_least(1.5) == Span(low=1.5, high=2)
    assert Span(low=1, high=2).at_least(None) == Span(low=1, high=2)
