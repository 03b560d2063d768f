"""The hash of what was trained on, and the rules of best and patience."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from cxr_dist.data.plan import Plan, Split, Step
from cxr_dist.data.stream import Batch
from cxr_dist.train.progress import MODULUS, Progress, planned_samples, samples
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


def merged(ranks: list[Progress]) -> None:
    """All ranks take in what each has seen, as the trainer has them do."""
    seen = [progress.take_seen({}) for progress in ranks]
    for progress in ranks:
        progress.merge(seen)


def number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def test_samples_by_hand() -> None:
    assert samples(7, 2, ["a.png", "b.png"]) == (number("7 2 a.png") + number("7 3 b.png")) % MODULUS
    assert samples(7, 0, []) == 0
    parts = samples(7, 0, ["a.png"]) + samples(7, 1, ["b.png"])
    assert samples(7, 0, ["a.png", "b.png"]) == parts % MODULUS


def test_samples_tell_another_order_step_or_count() -> None:
    found = [
        samples(0, 0, ["a", "b"]),
        samples(0, 0, ["b", "a"]),
        samples(1, 0, ["a", "b"]),
        samples(0, 0, ["a"]),
        samples(0, 0, ["a", "b"]) + samples(0, 0, ["a"]),
        samples(0, 0, ["a", "a"]),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_planned_samples_are_those_of_the_steps_at_any_world_size(world_size: int) -> None:
    ranks = [Progress() for _ in range(world_size)]
    for epoch in range(3):
        for step in steps_of("train", epoch):
            for rank, progress in enumerate(ranks):
                progress.trained(batch(step.index, rank, world_size), torch.zeros(()), rank)
            if step.number != 1:  # it does not matter when
                merged(ranks)
        merged(ranks)
        for progress in ranks:
            progress.end_epoch(scored(0.5), patience=0)
            assert progress.samples_sha256 == planned_samples(PLAN, IDS, epoch + 1)
    assert len({planned_samples(PLAN, IDS, epochs) for epochs in range(4)}) == 4
    assert planned_samples(PLAN, IDS, 0) == 64 * "0"


def test_planned_samples_by_hand() -> None:
    plan = Plan(
        train=Split(num_rows=5, row_group=1),
        validation=Split(num_rows=1, row_group=1),
        seed=0,
        epochs=2,
        global_batch=2,
    )
    total = 0
    for epoch in range(2):
        # two steps of two rows, one row of five left out
        for index in (epoch * 3, epoch * 3 + 1):
            for place, group in enumerate(plan.step(index).groups):
                total += number(f"{index} {place} {IDS[group]}")
    assert planned_samples(plan, IDS, 2) == f"{total % 2**256:064x}"


def test_a_training_step_is_counted() -> None:
    progress = Progress()
    progress.trained(batch(0), torch.tensor(0.5))
    progress.trained(batch(1, corrupt=3), torch.tensor(0.25))
    assert (progress.index, progress.steps, progress.own_corrupt) == (2, 2, 3)
    assert progress.take_losses() == ([0.5, 0.25], [batch(0).image_ids, batch(1).image_ids])
    assert progress.take_losses() == ([], [])


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
    assert (progress.index, progress.steps, progress.own_corrupt) == (step.index + 1, 0, 1)
    assert progress.take_validation() == []


def run(scores: list[float | None], patience: int) -> tuple[Progress, list[bool], list[bool]]:
    progress, best, stopped = Progress(), [], []
    for score in scores:
        progress.end_epoch(scored(score), patience=patience)
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
    ranks = [Progress(), Progress()]
    ranks[0].trained(batch(0, 0, 2, corrupt=2), torch.zeros(()))
    ranks[1].trained(batch(0, 1, 2, corrupt=1), torch.zeros(()))
    merged(ranks)
    ranks[1].trained(batch(1, 1, 2, corrupt=1), torch.zeros(()))
    merged(ranks)
    assert [progress.corrupt_in_epoch for progress in ranks] == [4, 4]
    for progress in ranks:
        progress.end_epoch(scored(0.5), patience=0)
    assert [progress.corrupt_in_epoch for progress in ranks] == [0, 0]


def test_names_of_corrupt_images_come_from_every_rank() -> None:
    progress = Progress()
    progress.merge([progress.take_seen({"a.png": "cut"}), Progress().take_seen({"b.png": "empty"})])
    assert progress.corrupt == {"a.png": "cut", "b.png": "empty"}


def test_state_holds_all_that_goes_on() -> None:
    whole, _, _ = run([0.5, 0.7, 0.6], patience=5)
    whole.trained(batch(4, corrupt=1), torch.zeros(()))
    whole.window = [0.3, 0.2]
    merged([whole])
    whole.take_losses()
    again = Progress()
    again.load_state_dict(whole.state_dict())
    assert again == whole
    for progress in (whole, again):
        progress.trained(batch(5), torch.zeros(()))
        merged([progress])
        progress.take_losses()
        progress.end_epoch(scored(0.65), patience=2)
    assert again == whole
    assert again.stopped
    assert again.take_window() == [0.3, 0.2]
    assert again.summary() == {
        "epochs": 4,
        "steps": 2,
        "samples_sha256": f"{(samples(4, 0, batch(4).image_ids) + samples(5, 0, batch(5).image_ids)) % MODULUS:064x}",
        "best_val_auroc": 0.7,
        "best_epoch": 1,
        "stopped_early": True,
    }


def test_a_state_does_not_change_with_the_progress() -> None:
    progress = Progress(window=[1.0])
    state = progress.state_dict()
    progress.window.append(2.0)
    progress.corrupt["a.png"] = "cut"
    assert (state["window"], state["corrupt"]) == ([1.0], {})
    again = Progress()
    again.load_state_dict(state)
    again.window.append(3.0)
    assert state["window"] == [1.0]
