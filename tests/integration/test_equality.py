"""What a run's result may depend on: the equality contract of the design, held by the real loop on gloo ranks.

Same world size: bitwise, through any interruption. Other world sizes and accumulation: the same images in the same
order, losses equal to rounding.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxr_dist.data.stream import Batch
from cxr_dist.evaluate import scores
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.job import TrainJob
from cxr_dist.train.progress import planned_samples
from tests.training import (
    NAMES,
    Gang,
    WatchedTrainer,
    best_scores,
    file_sha256,
    make_initial,
    make_job,
    make_trainer,
    run_rank,
    with_features,
)

LAYOUTS = [(1, 0), (2, 4), (3, 0)]
"""World sizes and micro-batches (0: the whole share) that take a global batch of 24 in batch-norm groups of 4."""


@pytest.fixture(scope="module")
def initial() -> bytes:
    return make_initial()


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    found = Gang(tmp_path_factory.mktemp("gang"))
    yield found
    found.close()


def outcome(result: dict[str, Any], job: TrainJob) -> dict[str, Any]:
    """All that two equal runs share to the last bit."""
    best = Checkpoints(job.folder).best()
    assert best is not None
    names = ("weights_sha256", "samples_sha256", "best_val_auroc", "best_epoch", "epochs", "steps")
    return {name: result[name] for name in names} | {
        "validation": file_sha256(best_scores(job)),
        "best": best.index,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_interrupted_run_equals_uninterrupted_one_bitwise(
    tmp_path: Path, initial: bytes, gang: Gang, world_size: int
) -> None:
    whole, broken = make_job(tmp_path / "whole", initial), make_job(tmp_path / "broken", initial)
    expected = gang.call(world_size, run_rank, whole)
    assert {result["weights_sha256"] for result in expected} == {expected[0]["weights_sha256"]}
    assert all(result["prefix_kept"] for result in expected)

    first = gang.call(world_size, run_rank, broken, stop_after=0)
    assert all(result["interrupted"] for result in first)
    # the first attempt to go on dies in the middle of the second epoch
    second = gang.call(world_size, run_rank, broken, crash_at=broken.plan.steps_per_epoch + 1)
    assert all(result["interrupted"] and len(result["losses"]) == 1 for result in second)
    third = gang.call(world_size, run_rank, broken, stop_after=1)
    last = gang.call(world_size, run_rank, broken)
    assert outcome(last[0], broken) == outcome(expected[0], whole)
    assert first[0]["losses"] + third[0]["losses"] + last[0]["losses"] == expected[0]["losses"]
    assert first[0]["reports"] + third[0]["reports"] + last[0]["reports"] == expected[0]["reports"]

    finished = gang.call(world_size, run_rank, broken)
    assert finished[0]["reports"] == []
    assert outcome(finished[0], broken) == outcome(expected[0], whole)


def within(folder: Path, initial: bytes, **changes: Any) -> TrainJob:
    """Two epochs of five training and two validation steps; a checkpoint after every second training step."""
    settings = {"train_rows": 123, "validation_rows": 42, "epochs": 2, "checkpoint_every_steps": 2, **changes}
    job = make_job(folder, initial, log_every_steps=3, **settings)
    assert (job.plan.train_steps, job.plan.validation_steps) == (5, 2)
    return job


INTERRUPTIONS = [
    # at step, goes on before step
    (3, 2),
    (8, 8),
    (11, 10),
    (12, 12),
]
"""Between two checkpoints, at one, after an epoch's last, and in the middle of a validation."""


@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "resident"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_run_interrupted_within_epochs_equals_uninterrupted_one_bitwise(
    tmp_path: Path, initial: bytes, gang: Gang, world_size: int, resident: bool
) -> None:
    settings: dict[str, Any] = {"unreadable": frozenset({7, 30, 77}), "max_corrupt": 0.1, "encoding": "png", "views": 1}
    whole = within(tmp_path / "whole", initial, checkpoint_every_steps=0, features_type="fp32", **settings)
    broken = within(tmp_path / "broken", initial, features_type="fp32", **settings)
    if resident:
        whole, broken = with_features(whole), with_features(broken)
    [expected, *_] = gang.call(world_size, run_rank, whole, resident=resident)
    losses: dict[int, float] = {}
    logged: dict[int, list[float]] = {}
    reports = []
    for crash_at, position in INTERRUPTIONS:
        [result, *_] = gang.call(world_size, run_rank, broken, crash_at=crash_at, resident=resident)
        assert result["interrupted"]
        assert broken.position() == position
        for index, loss in result["loss_at"].items():
            assert losses.setdefault(index, loss) == loss
        for index, values in result["logged_losses"].items():
            assert logged.setdefault(index, values) == values
        reports += result["reports"]
    [last, *_] = gang.call(world_size, run_rank, broken, resident=resident)
    assert outcome(last, broken) == outcome(expected, whole)
    assert last["corrupt"] == expected["corrupt"]
    assert len(last["corrupt"]) == 3
    assert losses | last["loss_at"] == expected["loss_at"]
    assert logged | last["logged_losses"] == expected["logged_losses"]
    assert reports + last["reports"] == expected["reports"]


def test_a_checkpoint_is_there_where_it_was_asked_for(tmp_path: Path, initial: bytes, gang: Gang) -> None:
    whole, broken = (within(tmp_path / name, initial, checkpoint_every_steps=0) for name in ("whole", "broken"))
    [expected, *_] = gang.call(2, run_rank, whole)
    gang.call(2, run_rank, broken, crash_at=4, ask_after=(1, 3))
    assert [entry.index for entry in Checkpoints(broken.folder).entries()] == [1, 3]
    assert [entry.score for entry in Checkpoints(broken.folder).entries()] == [None, None]
    # in a validation: the state before it
    gang.call(2, run_rank, broken, crash_at=5, ask_after=(3,))
    assert [entry.index for entry in Checkpoints(broken.folder).entries()] == [3, 5]
    [last, *_] = gang.call(2, run_rank, broken)
    assert outcome(last, broken) == outcome(expected, whole)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, initial: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = within(tmp_path / "whole", initial), within(tmp_path / "broken", initial)
    expected = run_rank(whole)
    run_rank(broken, crash_at=11)
    path = tmp_path / "broken" / "checkpoints" / "000000" / "000000010.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert broken.position() == 8
    assert "checkpoint passed over" in caplog.text
    assert "000000010.pt" in caplog.text
    assert outcome(run_rank(broken), broken) == outcome(expected, whole)


def test_resume_within_an_epoch_at_other_world_sizes_reads_the_same_images(
    tmp_path: Path, initial: bytes, gang: Gang
) -> None:
    whole, moved = within(tmp_path / "whole", initial), within(tmp_path / "moved", initial)
    expected = gang.call(1, run_rank, whole)[0]
    for world_size, crash_at in ((3, 3), (2, 9), (1, 11)):
        assert gang.call(world_size, run_rank, moved, crash_at=crash_at)[0]["interrupted"]
    result = gang.call(2, run_rank, moved)[0]
    assert result["samples_sha256"] == expected["samples_sha256"]
    assert result["steps"] == expected["steps"] == 10


def test_two_runs_of_one_config_are_one_run_and_another_seed_is_another(
    tmp_path: Path, initial: bytes, gang: Gang
) -> None:
    jobs = [make_job(tmp_path / str(number), initial, epochs=1, seed=max(0, number - 1)) for number in range(3)]
    first, again, other = (gang.call(2, run_rank, job)[0] for job in jobs)
    assert outcome(again, jobs[1]) == outcome(first, jobs[0])
    assert other["samples_sha256"] != first["samples_sha256"]
    assert other["weights_sha256"] != first["weights_sha256"]


def test_early_stop_is_kept_by_a_resume(tmp_path: Path, initial: bytes) -> None:
    # at this rate nothing changes, so no later epoch can gain on the first
    still: dict[str, Any] = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "model": {"batch_norm": "frozen"}}
    job = make_job(tmp_path, initial, patience=1, epochs=4, **still)
    result = run_rank(job)
    assert (result["epochs"], result["stopped_early"], result["best_epoch"]) == (2, True, 0)
    [*_, last] = Checkpoints(job.folder).entries()
    assert last.finished
    again = run_rank(job)
    assert (again["epochs"], again["reports"], again["stopped_early"]) == (2, [], True)


def test_resume_at_another_world_size_reads_the_same_images(tmp_path: Path, initial: bytes, gang: Gang) -> None:
    whole, moved = make_job(tmp_path / "whole", initial, epochs=2), make_job(tmp_path / "moved", initial, epochs=2)
    expected = gang.call(1, run_rank, whole)[0]
    gang.call(3, run_rank, moved, stop_after=0)
    result = gang.call(2, run_rank, moved)[0]
    assert result["samples_sha256"] == expected["samples_sha256"]
    assert result["steps"] == expected["steps"] == 4


def test_losses_and_images_agree_at_any_world_size_and_accumulation(tmp_path: Path, initial: bytes, gang: Gang) -> None:
    """In double precision, so that what differs is the arithmetic's order alone. The rate is low, for Adam and groups
    of four single pixels make a rounding error a thousand times larger within twenty steps at 1e-3."""
    found, validation = {}, {}
    for world_size, micro in LAYOUTS:
        job = make_job(
            tmp_path / f"{world_size}-{micro}",
            initial,
            train_rows=480,
            validation_rows=8,
            epochs=1,
            precision="fp64",
            micro_batch=micro,
            optimizer={"lr": 1e-4},
        )
        result = gang.call(world_size, run_rank, job)[0]
        ids = [job.train.image_id(row) for row in range(480)]  # type: ignore[attr-defined]
        assert result["samples_sha256"] == planned_samples(job.plan, ids, 1)
        found[world_size, micro] = result["losses"]
        # validation sees the running statistics; its scores are kept in single precision
        validation[world_size, micro] = result["reports"][0]["val_loss"]
    expected = found[1, 0]
    assert len(expected) == 20
    assert len(set(expected)) == 20
    for losses in found.values():
        np.testing.assert_allclose(losses, expected, rtol=1e-10, atol=0)
    assert list(validation.values()) == pytest.approx([validation[1, 0]] * len(LAYOUTS), rel=1e-6)


def test_first_step_agrees_in_single_precision(tmp_path: Path, initial: bytes, gang: Gang) -> None:
    """In batch-norm groups of 8: those of four single pixels make rounding ten times larger in the gradient."""
    found = []
    for world_size, micro in [(1, 0), (1, 8), (3, 0)]:
        job = make_job(
            tmp_path / f"{world_size}-{micro}",
            initial,
            train_rows=24,
            epochs=1,
            micro_batch=micro,
            model={"bn_group": 8},
        )
        ranks = gang.call(world_size, run_rank, job)
        assert len({result["gradients_sha256"] for result in ranks}) == 1
        found.append(ranks[0])
    expected = found[0]
    assert len(expected["gradients"]) > 50
    norm = np.linalg.norm(flat(expected["gradients"]))
    for result in found:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["gradients"].keys() == expected["gradients"].keys()
        assert np.linalg.norm(flat(result["gradients"]) - flat(expected["gradients"])) < 1e-5 * norm


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([gradient.ravel() for gradient in gradients.values()]).astype(np.float64)


class MaskingTrainer(WatchedTrainer):
    """Masks named images that are perfectly good."""

    masked: frozenset[str] = frozenset()

    def train_step(self, batch: Batch) -> torch.Tensor:
        masked = np.array([name in self.masked for name in batch.image_ids])
        return super().train_step(dataclasses.replace(batch, valid_B=batch.valid_B & ~masked))


def test_unreadable_images_only_drop_out_of_the_loss(tmp_path: Path, initial: bytes) -> None:
    bad = frozenset({2, 3, 17})
    settings: dict[str, Any] = {
        "train_rows": 24,
        "epochs": 1,
        "augment": False,
        "encoding": "png",
        "model": {"batch_norm": "frozen"},
        "max_corrupt": 1.0,
    }
    good = make_job(tmp_path / "good", initial, **settings)
    result = run_rank(make_job(tmp_path / "bad", initial, unreadable=bad, **settings))
    assert sorted(result["corrupt"]) == [f"train{row:04d}.png" for row in sorted(bad)]

    masking = make_trainer(good, Ranks(0, 1, None))
    masking.__class__ = MaskingTrainer
    masking.masked = frozenset(f"train{row:04d}.png" for row in bad)  # type: ignore[attr-defined]
    batch = next(iter(masking.feed))
    logits = masking.learner.network.score(batch.images_BSS).astype(np.float64)
    masking.train_step(batch)
    assert result["losses"] == pytest.approx(masking.losses, rel=1e-6)
    for name, gradient in masking.gradients.items():
        np.testing.assert_allclose(result["gradients"][name], gradient.numpy(), rtol=1e-5, atol=1e-7, err_msg=name)

    positive, others = batch.labels_BK == 1, np.array([name not in masking.masked for name in batch.image_ids])  # type: ignore[attr-defined]
    chance = 1 / (1 + np.exp(-logits))
    by_hand = -np.where(positive, np.array([1.5, 0.5, 2.0]) * np.log(chance), np.log(1 - chance))
    assert others.sum() == 21
    assert result["losses"][0] == pytest.approx(by_hand[others].sum() / (24 * len(NAMES)), rel=1e-5)


def test_unreadable_validation_images_are_not_scored(tmp_path: Path, initial: bytes) -> None:
    job = make_job(tmp_path, initial, train_rows=24, epochs=1, encoding="png", max_corrupt=0.5)
    job = dataclasses.replace(job, validation=dataclasses.replace(job.validation, unreadable=frozenset({0, 17})))  # type: ignore[type-var]
    result = run_rank(job)
    assert sorted(result["corrupt"]) == ["validation0000.png", "validation0017.png"]
    table = scores.read(best_scores(job))
    assert table.image_ids.tolist() == [f"validation{row:04d}.png" for row in range(1, 17)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_too_many_unreadable_images_stop_the_run(tmp_path: Path, initial: bytes, gang: Gang, world_size: int) -> None:
    rows = frozenset(range(48))
    job = make_job(tmp_path, initial, encoding="png", unreadable=rows, max_corrupt=0.1, log_every_steps=1)
    for result in gang.call(world_size, run_rank, job):
        assert "24 of 66 images of an epoch are unreadable, allowed are data.max_corrupt = 0.1" in result["error"]
        assert "train00" in result["error"]
        assert len(result["losses"]) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_poisoned_loss_stops_with_step_and_images(
    tmp_path: Path, initial: bytes, gang: Gang, world_size: int
) -> None:
    job = make_job(tmp_path, initial, pos_weight=(float("nan"), 1.0, 1.0), log_every_steps=2)
    expected = ", ".join(f"train{row:04d}.png" for row in job.plan.train.rows(job.plan.step(0).groups))
    for result in gang.call(world_size, run_rank, job):
        assert f"loss became nan at step 0 of epoch 0, images {expected}; lower optimizer.lr" in result["error"]
    assert Checkpoints(job.folder).entries() == []


def test_a_step_that_blows_up_the_weights_is_never_stored(tmp_path: Path, initial: bytes) -> None:
    rate = {"name": "sgd", "lr": 1e30, "weight_decay": 0.0}
    several = run_rank(make_job(tmp_path / "several", initial, optimizer=rate))
    assert "at step 1 of epoch 0" in several["error"]
    # one step an epoch: the loss is that of the good weights, and only validation sees the bad ones
    job = make_job(tmp_path / "one", initial, train_rows=24, epochs=2, optimizer=rate)
    assert "validation loss became nan after epoch 0; lower optimizer.lr" in run_rank(job)["error"]
    assert Checkpoints(job.folder).entries() == []


@pytest.mark.parametrize("trainable", ["head", "denseblock3", "all"])
def test_every_cut_trains_and_keeps_its_prefix(tmp_path: Path, initial: bytes, trainable: str) -> None:
    job = make_job(tmp_path, initial, train_rows=24, validation_rows=8, epochs=1, model={"trainable": trainable})
    result = run_rank(job)
    assert (result["error"], result["prefix_kept"], result["steps"]) == (None, True, 1)
    assert ("classifier.weight" in result["gradients"]) is True
    assert ("features.conv0.weight" in result["gradients"]) is (trainable == "all")


def test_cosine_schedule_and_scaler_state_survive_an_interruption(tmp_path: Path, initial: bytes) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": "adamw", "schedule": "cosine", "warmup_epochs": 1.5},
        "precision": "bf16",
        "views": 2,
    }
    whole, broken = (make_job(tmp_path / name, initial, **changes) for name in ("whole", "broken"))
    expected = run_rank(whole)
    run_rank(broken, stop_after=0)
    run_rank(broken, stop_after=1)
    assert outcome(run_rank(broken), broken) == outcome(expected, whole)
