"""The plan: the same steps at any world size, every row group once an epoch, every validation row once, exact resume."""

import dataclasses
import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.plan import EMPTY, Plan, Split, allowed_world_sizes, draws, permute, view_of
from cxr_dist.errors import ConfigError

unhurried = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_plan(train: int, validation: int, *, row_group: int, global_batch: int, **changes: Any) -> Plan:
    values = {"seed": 0, "epochs": 2, **changes}
    return Plan(
        train=Split(num_rows=train, row_group=row_group),
        validation=Split(num_rows=validation, row_group=row_group),
        global_batch=global_batch,
        **values,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Small plans of any shape: batches that do and do not divide the split, short last groups, tiny validation."""
    row_group = draw(st.integers(1, 5))
    groups_per_step = draw(st.integers(1, 12))
    full_groups = groups_per_step + draw(st.integers(0, 40))
    return make_plan(
        full_groups * row_group + draw(st.integers(0, row_group - 1)),
        draw(st.integers(1, 70)),
        row_group=row_group,
        global_batch=groups_per_step * row_group,
        seed=draw(st.integers(0, 2**40)),
        epochs=draw(st.integers(1, 3)),
        max_steps=draw(st.one_of(st.none(), st.integers(1, 3))),
    )


def epoch_groups(plan: Plan, epoch: int, kind: str = "train") -> list[int]:
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(index) for index in range(first, first + plan.steps_per_epoch)]
    return [group for step in steps if step.kind == kind for group in step.groups.tolist()]


def test_a_small_run_in_full():
    """Pinned: a change of any number here changes the order of every run ever made."""
    plan = make_plan(27, 5, row_group=2, global_batch=6, seed=7)
    steps = [plan.step(index) for index in range(plan.num_steps)]
    assert [(s.index, s.kind, s.epoch, s.number, s.groups.tolist()) for s in steps] == [
        (0, "train", 0, 0, [5, 12, 2]),
        (1, "train", 0, 1, [7, 0, 4]),
        (2, "train", 0, 2, [3, 11, 10]),
        (3, "train", 0, 3, [6, 8, 9]),
        (4, "validation", 0, 0, [0, 1, 2]),
        (5, "train", 1, 0, [5, 1, 2]),
        (6, "train", 1, 1, [9, 6, 0]),
        (7, "train", 1, 2, [4, 7, 11]),
        (8, "train", 1, 3, [12, 3, 10]),
        (9, "validation", 1, 0, [0, 1, 2]),
    ]
    assert plan.dropped_rows == 3
    assert plan.train.rows(steps[0].groups).tolist() == [10, 11, 24, 25, 4, 5]
    assert plan.validation.rows(steps[4].groups).tolist() == [0, 1, 2, 3, 4, -1]


@unhurried
@given(plans())
def test_ranks_in_order_are_the_global_step_at_every_allowed_world_size(plan):
    sizes = allowed_world_sizes(plan.global_batch, plan.train.row_group)
    for index in {0, plan.train_steps - 1, plan.train_steps % plan.num_steps, plan.num_steps - 1}:
        step = plan.step(index)
        assert len(step.groups) == plan.groups_per_step
        for size in sizes:
            shares = [step.of_rank(rank, size) for rank in range(size)]
            assert {len(share) * plan.train.row_group for share in shares} == {plan.rank_batch(size)}
            assert np.concatenate(shares).tolist() == step.groups.tolist()


@unhurried
@given(plans())
def test_a_share_is_worked_out_alone_as_it_is_with_the_others(plan):
    for size in allowed_world_sizes(plan.global_batch, plan.train.row_group):
        for index in {0, plan.train_steps - 1, plan.train_steps % plan.num_steps, plan.num_steps - 1}:
            step = plan.step(index)
            for rank in {0, size // 2, size - 1}:
                share = plan.share(index, rank, size)
                assert share.groups.tolist() == step.of_rank(rank, size).tolist()
                assert (share.index, share.kind, share.epoch, share.number) == (
                    step.index, step.kind, step.epoch, step.number,
                )  # fmt: skip


@unhurried
@given(plans())
def test_places_are_where_the_steps_read_a_row_group(plan):
    for epoch in range(plan.epochs):
        places = plan.places(np.arange(plan.train.num_full_groups), epoch)
        assert sorted(places.tolist()) == list(range(plan.train.num_full_groups))
        order = np.argsort(places)[: plan.train_steps * plan.groups_per_step]
        assert order.tolist() == epoch_groups(plan, epoch)


@unhurried
@given(plans())
def test_a_training_epoch_reads_full_row_groups_once(plan):
    for epoch in range(plan.epochs):
        groups = epoch_groups(plan, epoch)
        assert len(groups) == len(set(groups)) == plan.train_steps * plan.groups_per_step
        assert set(groups) <= set(range(plan.train.num_full_groups))
        rows = plan.train.rows(np.array(groups)).tolist()
        assert len(set(rows)) == len(rows) == plan.train.num_rows - plan.dropped_rows
        assert min(rows) >= 0
        assert max(rows) < plan.train.num_rows


@unhurried
@given(plans())
def test_only_what_fills_no_step_is_dropped(plan):
    if plan.max_steps is None:
        assert plan.dropped_rows < plan.global_batch + plan.train.row_group
        assert plan.train.num_full_groups - plan.train_steps * plan.groups_per_step < plan.groups_per_step
    else:
        assert plan.train_steps <= plan.max_steps
        assert plan.validation_steps <= plan.max_steps


@pytest.mark.parametrize("row_group", [1, 2, 8])
@pytest.mark.parametrize(("num_rows", "world_size"), [(101, 2), (7, 3), (1, 2), (16, 2), (48, 3)])
def test_validation_covers_every_row_once(num_rows, world_size, row_group):
    plan = make_plan(400, num_rows, row_group=row_group, global_batch=row_group * world_size * 2)
    for epoch in range(plan.epochs):
        rows, shapes = [], set()
        for index in range(plan.steps_per_epoch):
            step = plan.step(epoch * plan.steps_per_epoch + index)
            if step.kind == "validation":
                shares = [plan.validation.rows(step.of_rank(rank, world_size)) for rank in range(world_size)]
                shapes |= {len(share) for share in shares}
                rows += np.concatenate(shares).tolist()
        assert shapes == {plan.rank_batch(world_size)}
        assert rows[:num_rows] == list(range(num_rows))
        assert set(rows[num_rows:]) <= {-1}
        assert len(rows) - num_rows < plan.global_batch


@unhurried
@given(plans())
def test_validation_covers_every_row_once_for_any_sizes(plan):
    if plan.max_steps is None:
        rows = plan.validation.rows(np.array(epoch_groups(plan, 0, "validation")))
        assert rows[rows >= 0].tolist() == list(range(plan.validation.num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    plans_of_seeds = [make_plan(640, 8, row_group=8, global_batch=16, seed=seed, epochs=3) for seed in (0, 1, 0)]
    first, other, again = ([tuple(epoch_groups(plan, epoch)) for epoch in range(3)] for plan in plans_of_seeds)
    assert first == again
    assert len({*first, *other}) == 6
    assert plans_of_seeds[0].sha256 == plans_of_seeds[2].sha256 != plans_of_seeds[1].sha256


def test_the_order_does_not_depend_on_batch_or_validation():
    """A run with another batch sees the same images in the same sequence, only cut elsewhere."""
    small = epoch_groups(make_plan(640, 8, row_group=8, global_batch=8), 1)
    large = epoch_groups(make_plan(640, 99, row_group=8, global_batch=80), 1)
    assert small == large


@unhurried
@given(plans(), st.data())
def test_kinds_alternate_and_a_resume_sees_the_rest(plan, data):
    kinds = [(plan.step(index).epoch, plan.step(index).kind) for index in range(plan.num_steps)]
    of_epoch = ["train"] * plan.train_steps + ["validation"] * plan.validation_steps
    assert kinds == [(epoch, kind) for epoch in range(plan.epochs) for kind in of_epoch]
    start = data.draw(st.integers(0, plan.num_steps))
    spec = stream_spec(plan, world_size=1, start=start, steps_per_task=data.draw(st.integers(1, 7)))
    whole = [plan.step(index).groups.tolist() for index in range(plan.num_steps)]
    rest = [index for number in range(spec.num_tasks) for index in spec.task(number)[1]]
    assert [plan.step(index).groups.tolist() for index in rest] == whole[start:]


def test_a_step_outside_the_run_is_an_error():
    plan = make_plan(27, 5, row_group=2, global_batch=6)
    for index in (-1, plan.num_steps):
        with pytest.raises(IndexError, match="of a run of 10 steps"):
            plan.step(index)


def stream_spec(plan: Plan, *, world_size: int, start: int, steps_per_task: int, pieces: int = 0) -> StreamSpec:
    return StreamSpec(
        plan=plan,
        train=cast("Any", None),
        validation=cast("Any", None),
        world_size=world_size,
        start=start,
        steps_per_task=steps_per_task,
        pieces=pieces,
        size=16,
        encoding="png",
        findings=(0,),
        views=0,
        augment=True,
        token="",
    )


@unhurried
@given(plans(), st.data())
def test_tasks_go_round_by_round_and_rank_by_rank(plan, data):
    world_size = data.draw(st.sampled_from(allowed_world_sizes(plan.global_batch, plan.train.row_group)))
    steps_per_task = data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, plan.num_steps))
    spec = stream_spec(plan, world_size=world_size, start=start, steps_per_task=steps_per_task)
    tasks = [spec.task(number) for number in range(spec.num_tasks)]
    rounds = [tasks[first : first + world_size] for first in range(0, len(tasks), world_size)]
    assert all([rank for rank, _ in of_round] == list(range(world_size)) for of_round in rounds)
    # the splitter deals in turn if the blocks of a round are of one size, and here they hold the same steps
    assert all(len({indices for _, indices in of_round}) == 1 for of_round in rounds)
    assert [index for of_round in rounds for index in of_round[0][1]] == list(range(start, plan.num_steps))
    lengths = [len(of_round[0][1]) for of_round in rounds]
    short = [length for length in (1, 2, 4, 8) if length < steps_per_task]
    expected = short + [steps_per_task] * len(lengths)
    assert lengths[:-1] == expected[: len(lengths[:-1])]
    assert not lengths or 1 <= lengths[-1] <= expected[len(lengths) - 1]


@unhurried
@given(plans(), st.data())
def test_pieces_of_the_first_step_change_nothing_after_it(plan, data):
    world_size = data.draw(st.sampled_from(allowed_world_sizes(plan.global_batch, plan.train.row_group)))
    start = data.draw(st.integers(0, plan.num_steps))
    steps_per_task = data.draw(st.integers(1, 9))
    whole = stream_spec(plan, world_size=world_size, start=start, steps_per_task=steps_per_task)
    pieces = data.draw(st.sampled_from([n for n in range(1, 9) if whole.groups_per_share % n == 0]))
    spec = dataclasses.replace(whole, pieces=pieces)
    if start == plan.num_steps:
        assert spec.num_tasks == 0
        return
    more = (pieces - 1) * world_size
    assert [spec.task(number + more) for number in range(whole.num_tasks)] == [
        whole.task(number) for number in range(whole.num_tasks)
    ]
    assert spec.num_tasks == whole.num_tasks + more
    for rank in range(world_size):
        numbers = range(rank, spec.num_tasks, world_size)
        held = [
            plan.step(index).of_rank(rank, world_size)[spec.part(number)]
            for number in numbers
            for index in spec.task(number)[1]
        ]
        assert len({len(groups) for groups in held[:pieces]}) == 1
        due = [plan.step(index).of_rank(rank, world_size) for index in range(start, plan.num_steps)]
        assert np.concatenate(held).tolist() == np.concatenate(due).tolist()


@pytest.mark.parametrize(("steps_per_task", "left", "lengths"), [
    (1, 3, [1, 1, 1]),
    (2, 6, [1, 2, 2, 1]),
    (4, 11, [1, 2, 4, 4]),
    (5, 20, [1, 2, 4, 5, 5, 3]),
    (8, 3, [1, 2]),
    (8, 7, [1, 2, 4]),
    (8, 8, [1, 2, 4, 1]),
    (8, 0, []),
])  # fmt: skip
def test_the_first_tasks_are_short_and_the_last_is_what_is_left(steps_per_task, left, lengths):
    plan = make_plan(20, 2, row_group=2, global_batch=2, epochs=2)
    assert plan.num_steps == 22
    spec = stream_spec(plan, world_size=1, start=22 - left, steps_per_task=steps_per_task)
    assert [len(spec.task(number)[1]) for number in range(spec.num_tasks)] == lengths


@unhurried
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permute_is_a_bijection(size, seed):
    keys = np.random.default_rng(seed).integers(0, 2**63, 6).astype(np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 16, 17, 255, 256, 257, 1025, 4096])
def test_permute_puts_every_value_in_every_place(size):
    """The mean over many keys of what stands at a place is that of a fair draw, to five standard errors."""
    keys = [np.random.default_rng(seed).integers(0, 2**63, 6).astype(np.uint64) for seed in range(400)]
    places = np.array([0, size // 2, size - 1])
    found = np.stack([permute(places, size, key) for key in keys])
    error = np.sqrt((size**2 - 1) / 12 / len(keys))
    assert (np.abs(found.mean(axis=0) - (size - 1) / 2) < 5 * error).all()


def test_one_step_of_a_huge_dataset_costs_no_table():
    plan = make_plan(10**8 + 3, 10**8, row_group=8, global_batch=4096)
    tracemalloc.start()
    try:
        train, validation = plan.step(plan.train_steps - 1), plan.step(plan.num_steps - 1)
        rows = plan.train.rows(train.groups)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    assert len(set(rows.tolist())) == 4096
    assert validation.groups.tolist()[-1] == EMPTY


def test_allowed_world_sizes_by_hand():
    assert allowed_world_sizes(16, 8) == [1, 2]
    assert allowed_world_sizes(96, 8) == [1, 2, 3, 4, 6, 12]
    assert allowed_world_sizes(20, 8) == []


def test_a_world_size_that_does_not_fit_names_those_that_do():
    plan = make_plan(960, 8, row_group=8, global_batch=96)
    assert [plan.rank_batch(size) for size in (1, 2, 3, 12)] == [96, 48, 32, 8]
    with pytest.raises(ConfigError, match=r"train.num_workers: found 5, expected one of 1, 2, 3, 4, 6, 12, so"):
        plan.rank_batch(5)


@pytest.mark.parametrize(
    ("train", "row_group", "global_batch", "message"),
    [
        (640, 8, 20, "train.global_batch: found 20, expected a multiple of the dataset's row group of 8"),
        (31, 8, 32, "train.global_batch: found 32, expected at most 24, the images in the train split's full"),
        (7, 8, 8, "expected at most 0"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused(train, row_group, global_batch, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(train, 8, row_group=row_group, global_batch=global_batch)


def test_splits_with_different_row_groups_are_refused():
    train, validation = Split(num_rows=64, row_group=8), Split(num_rows=64, row_group=4)
    with pytest.raises(ConfigError, match="found 8 images in train and 4 in validation"):
        Plan(train=train, validation=validation, seed=0, epochs=1, global_batch=16)


def test_views():
    assert [view_of(epoch, views=3, augment=True) for epoch in range(5)] == [1, 2, 3, 1, 2]
    assert [view_of(epoch, views=0, augment=True) for epoch in range(5)] == [1, 2, 3, 4, 5]
    assert [view_of(epoch, views=3, augment=False) for epoch in range(5)] == [0] * 5


def numbers(seed: int, image_id: str, view: int) -> np.ndarray:
    return np.frombuffer(draws(seed, image_id, view), "<f4")


def test_draws_are_pinned():
    """Whole 24-bit fractions, so the comparison is exact."""
    found = numbers(0, "00000001_000.png", 1).astype(np.float64) * 2**24
    assert found.tolist() == [4840283, 420324, 8905929, 11327394, 11651367, 396291]


@unhurried
@given(st.integers(0, 2**32), st.text(max_size=30), st.integers(1, 10**6))
def test_draws_are_six_numbers_in_the_unit_interval_and_pure(seed, image_id, view):
    found = numbers(seed, image_id, view)
    assert found.shape == (6,)
    assert (found >= 0).all()
    assert (found < 1).all()
    assert draws(seed, image_id, view) == draws(seed, image_id, view)


def test_draws_differ_by_seed_image_and_view_and_are_uniform():
    asked = [(seed, f"{image}.png", view) for seed in range(10) for image in range(20) for view in range(1, 21)]
    found = np.stack([numbers(*one) for one in asked])
    assert len(np.unique(found, axis=0)) == len(asked)
    assert np.abs(found.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / len(asked))
    assert np.abs(np.corrcoef(found.T) - np.eye(6)).max() < 5 / np.sqrt(len(asked))
