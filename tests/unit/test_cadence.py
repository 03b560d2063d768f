"""Checkpoints of a run: counted as the loop would make them, written and gone on with as it goes on. No Ray."""

from pathlib import Path

import pytest
import torch

from cxr_dist.bench import cadence
from cxr_dist.data.plan import Plan, Split
from cxr_dist.train.saver import is_due


def plan_of(train: int, validation: int, batch: int = 16, epochs: int = 3) -> Plan:
    splits = [Split(num_rows=rows, row_group=8) for rows in (train, validation)]
    return Plan(train=splits[0], validation=splits[1], seed=0, epochs=epochs, global_batch=batch)


@pytest.mark.parametrize("every", [0, 1, 3, 7, 10, 1000])
@pytest.mark.parametrize("train", [160, 176, 400])
def test_checkpoints_are_counted_as_the_loop_makes_them(train: int, every: int) -> None:
    plan = plan_of(train, 40)
    within = ends = steps = 0
    for index in range(plan.num_steps):
        step = plan.step(index)
        steps += step.kind == "train"
        if step.kind == "validation" and step.number + 1 == plan.validation_steps:
            ends += 1
        elif is_due(step, steps, every):
            within += 1
    assert cadence.counted(plan, every) == (within, ends)


def test_a_checkpoint_is_due_after_training_steps_only() -> None:
    plan = plan_of(160, 40)
    train, validation = plan.step(0), plan.step(plan.steps_per_epoch - 1)
    assert [is_due(train, steps, 5) for steps in (1, 5, 9, 10)] == [False, True, False, True]
    assert not is_due(validation, 5, 5)
    assert not is_due(train, 5, 0)


def test_a_walk_saves_what_is_due_and_goes_on_from_each(tmp_path: Path) -> None:
    plan = plan_of(1600, 320)
    content = {"tail": {"weight": torch.zeros(1000)}}
    # of the last ten training steps of 100 the last, then the end of validation
    found = cadence.walk(tmp_path, plan, 10, content)
    assert (found.saved, found.kept, found.exact) == (2, 2, True)
    assert found.megabytes == pytest.approx(0.0055, abs=0.002)
    names = sorted(path.stem for path in (tmp_path / "checkpoints" / "000000").glob("*.pt"))
    assert names == [f"{100:09d}", f"{120:09d}"]


def test_the_state_has_the_tail_and_both_of_adams_moments() -> None:
    content = cadence.state(14)
    trained = cadence.gradient_bytes(content)
    assert {"tail", "optimizer"} == set(content)
    assert trained == sum(one["exp_avg_sq"].numel() * 4 for one in content["optimizer"]["state"].values())
    assert round(trained / 2**20, 1) == 8.3  # as docs/benchmarks.md has it of a run
