"""Runs from kept features: the same run as without, to the last bit where the arithmetic allows it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.job import TrainJob
from tests.training import Gang, best_scores, file_sha256, make_initial, make_job, run_rank, with_features

UNREADABLE = frozenset({5, 30})


@pytest.fixture(scope="module")
def initial() -> bytes:
    return make_initial()


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    found = Gang(tmp_path_factory.mktemp("gang"))
    yield found
    found.close()


def job_of(folder: Path, initial: bytes, **changes: Any) -> TrainJob:
    """Three epochs that show two augmented views in turn; two training images cannot be read."""
    options: dict[str, Any] = {"views": 2, "features_type": "fp32", "encoding": "png", **changes}
    return make_job(folder, initial, unreadable=UNREADABLE, max_corrupt=0.2, **options)


def outcome(result: dict[str, Any], job: TrainJob) -> dict[str, Any]:
    best = Checkpoints(job.folder).best()
    assert best is not None
    names = ("weights_sha256", "samples_sha256", "best_val_auroc", "best_epoch", "epochs", "steps", "corrupt")
    return {name: result[name] for name in names} | {
        "reports": result["reports"],
        "losses": result["losses"],
        "validation": file_sha256(best_scores(job)),
        "best": best.index,
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"augment": False, "views": 0}], ids=["two views", "plain"])
def test_run_from_features_is_bitwise_the_run_without(
    tmp_path: Path, initial: bytes, gang: Gang, world_size: int, changes: dict[str, Any]
) -> None:
    plain = job_of(tmp_path / "plain", initial, **changes)
    expected = outcome(gang.call(world_size, run_rank, plain)[0], plain)
    assert set(expected["corrupt"]) == {plain.train.image_id(row) for row in UNREADABLE}  # type: ignore[attr-defined]
    resident = with_features(job_of(tmp_path / "resident", initial, **changes))
    assert outcome(gang.call(world_size, run_rank, resident, resident=True)[0], resident) == expected
    streamed = with_features(job_of(tmp_path / "streamed", initial, **changes))
    assert outcome(gang.call(world_size, run_rank, streamed)[0], streamed) == expected


def test_interrupted_run_from_features_equals_uninterrupted_one(tmp_path: Path, initial: bytes, gang: Gang) -> None:
    whole, broken = (with_features(job_of(tmp_path / name, initial)) for name in ("whole", "broken"))
    expected = gang.call(2, run_rank, whole, resident=True)
    first = gang.call(2, run_rank, broken, resident=True, stop_after=0)
    second = gang.call(2, run_rank, broken, resident=True, crash_at=broken.plan.steps_per_epoch + 1)
    last = gang.call(2, run_rank, broken, resident=True)
    assert all(result["interrupted"] for result in first + second)
    assert last[0]["weights_sha256"] == expected[0]["weights_sha256"]
    assert last[0]["samples_sha256"] == expected[0]["samples_sha256"]
    assert first[0]["losses"] + last[0]["losses"] == expected[0]["losses"]


@pytest.mark.parametrize(("kind", "close"), [("fp16", 1e-4), ("bf16", 2e-3)])
def test_features_of_half_the_size_give_nearly_the_same_run(
    tmp_path: Path, initial: bytes, gang: Gang, kind: str, close: float
) -> None:
    exact, small = job_of(tmp_path / "exact", initial), job_of(tmp_path / "small", initial, features_type=kind)
    expected = gang.call(1, run_rank, with_features(exact), resident=True)[0]
    found = gang.call(1, run_rank, with_features(small), resident=True)[0]
    assert found["samples_sha256"] == expected["samples_sha256"]
    assert found["losses"] != expected["losses"]
    # the first step's: Adam makes large steps of small differences, so that later ones drift apart
    np.testing.assert_allclose(found["losses"][0], expected["losses"][0], rtol=close)
