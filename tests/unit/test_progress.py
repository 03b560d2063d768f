"""The hash of what was trained on, and the rules of best and patience."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from cxr_dist.data.plan import Plan, Split, Step
from cxr_dist.data.stream import Batch
from cxr_dist.train.progress import Progress, chain, planned_chain
from cxr_dist.train.validation import Validation

PLAN = Plan(
    train=Split(num_rows=27, row_group=2), validation=Split(num_rows=5, row_group=2), seed=3, epochs=3, global_batch=8
)
IDS = [f"{row}.png" for row in range(27)]


def scored(mean_auroc: float | None) -> Validation:
    nothing: Any = np.zeros((0, 1))
    return Validation(rows_N=nothing, logits_NK=nothing, labels_NK=nothing, loss=1.0, auroc={}, mean_auroc=mean_auroc)


def batch(index: int, rank: int = 0, world_size: int = 1, corrupt: int = 0) -> Batch:
    step = PLAN.step(index)
    rows = PLAN.split_of(step).rows(step.of_rank(rank, world_size))
    ids = [IDS[row] if row >= 0 else "" for row in rows]
    return Batch(
        step=step,
        images_BSS=np.zeros((len(rows), 1, 1), np.uint8),
        labels_BK=(rows[:, None] % 2 == np.arange(2)).astype(np.uint8),
        draws_B6=np.zeros((len(rows), 6), np.float32),
        rows_B=rows,
        valid_B=(rows >= 0) & (np.arange(len(rows)) >= corrupt),
        image_ids=ids,
        corrupt={name: "broken" for name in ids[:corrupt]},
    )


def steps_of(kind: str, epoch: int) -> list[Step]:
    return [step for step in map(PLAN.step, range(PLAN.num_steps)) if (step.kind, step.epoch) == (kind, epoch)]


def test_chain_by_hand() -> None:
    first = hashlib.sha256(b"\na.png\nb.png").hexdigest()
    assert chain("", ["a.png", "b.png"]) == first
    assert chain(first, ["c.png"]) == hashlib.sha256(f"{first}\nc.png".encode()).hexdigest()
    assert chain("", ["b.png", "a.png"]) != first


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_planned_chain_is_that_of_the_steps_at_any_world_size(world_size: int) -> None:
    ranks = [Progress() for _ in range(world_size)]
    for epoch in range(3):
        for step in steps_of("train", epoch):
            for rank, progress in enumerate(ranks):
                progress.trained(batch(step.index, rank, world_size), torch.zeros(()))
        ids = [progress.take_epoch_ids() for progress in ranks]
        for progress in ranks:
            progress.end_epoch(ids, scored(0.5), patience=0)
            assert progress.samples_sha256 == planned_chain(PLAN, IDS, epoch + 1)
    assert len({planned_chain(PLAN, IDS, epochs) for epochs in range(4)}) == 4
    assert planned_chain(PLAN, IDS, 0) == ""


def test_planned_chain_by_hand() -> None:
    plan = Plan(
        train=Split(num_rows=5, row_group=1),
        validation=Split(num_rows=1, row_group=1),
        seed=0,
        epochs=2,
        global_batch=2,
    )
    sha = ""
    for epoch in range(2):
        # two steps of two rows, one row of five left out
        order = [int(group) for number in range(2) for group in plan.step(epoch * 3 + number).groups]
        assert len(set(order)) == 4
        sha = chain(sha, [IDS[row] for row in order])
    assert planned_chain(plan, IDS, 2) == sha


def test_a_training_step_is_counted() -> None:
    progress = Progress()
    progress.trained(batch(0), torch.tensor(0.5))
    progress.trained(batch(1, corrupt=3), torch.tensor(0.25))
    assert (progress.index, progress.steps, progress.corrupt_in_epoch) == (2, 2, 3)
    assert progress.take_losses() == [0.5, 0.25]
    assert progress.take_losses() == []
    assert progress.epoch_ids == [batch(0).image_ids, batch(1).image_ids]


def test_a_validation_step_keeps_real_rows_and_marks_unreadable_ones() -> None:
    progress = Progress()
    [step] = steps_of("validation", 0)
    logits = np.arange(16, dtype=np.float32).reshape(8, 2)
    progress.validated(batch(step.index, corrupt=1), logits)
    [found] = progress.take_validation()
    assert found.rows_N.tolist() == [0, 1, 2, 3, 4]
    assert found.valid_N.tolist() == [False, True, True, True, True]
    assert found.logits_NK.tolist() == logits[:5].tolist()
    assert found.labels_NK.tolist() == [[True, False], [False, True]] * 2 + [[True, False]]
    assert (progress.index, progress.steps, progress.corrupt_in_epoch) == (step.index + 1, 0, 1)
    assert progress.take_validation() == []


def run(scores: list[float | None], patience: int) -> tuple[Progress, list[bool], list[bool]]:
    progress, best, stopped = Progress(), [], []
    for score in scores:
        progress.end_epoch([[]], scored(score), patience=patience)
        best.append(progress.is_best)
        stopped.append(progress.stopped)
    return progress, best, stopped


def test_best_is_the_first_of_the_highest_and_patience_counts_from_it() -> None:
    progress, best, stopped = run([0.5, 0.7, 0.7, 0.6, 0.8, 0.8, 0.1], patience=2)
    assert best == [True, True, False, False, True, False, False]
    assert stopped == [False, False, False, True, False, False, True]
    assert (progress.best_auroc, progress.best_epoch, progress.epochs, progress.epochs_without_gain) == (0.8, 4, 7, 2)


def test_no_patience_never_stops() -> None:
    assert run([0.9] + [0.1] * 30, patience=0)[2] == [False] * 31


def test_undefined_scores_are_worse_than_any_and_the_last_of_them_stands_for_the_best() -> None:
    progress, best, _ = run([None, None, 0.1, None, 0.2], patience=0)
    assert best == [True, True, True, False, True]
    assert (progress.best_auroc, progress.best_epoch) == (0.2, 4)


def test_corrupt_images_are_counted_by_the_epoch() -> None:
    progress = Progress()
    progress.trained(batch(0, corrupt=2), torch.zeros(()))
    progress.end_epoch([progress.take_epoch_ids()], scored(0.5), patience=0)
    assert progress.corrupt_in_epoch == 0


def test_state_holds_all_that_goes_on() -> None:
    whole, _, _ = run([0.5, 0.7, 0.6], patience=5)
    whole.index, whole.steps = 12, 9
    again = Progress()
    again.load_state_dict(whole.state_dict())
    for progress in (whole, again):
        progress.end_epoch([[["a.png"]]], scored(0.65), patience=2)
    assert again == whole
    assert again.stopped
    assert again.summary() == {
        "epochs": 4,
        "steps": 9,
        "samples_sha256": whole.samples_sha256,
        "best_val_auroc": 0.7,
        "best_epoch": 1,
        "stopped_early": True,
    }
