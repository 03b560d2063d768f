"""The weights that a run starts from are its own, and its precision stays what it was begun in."""

import dataclasses
from pathlib import Path

import pytest

from cxr_dist.config import Config, RunConfig, TrainConfig
from cxr_dist.errors import RunFaultError
from cxr_dist.model import weights
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.prepare import bundles, prepare_weights, with_defaults
from tests.training import make_initial, make_job, make_trainer

INITIAL = "initial.pt"


def stored_sha256(folder: Path) -> str:
    return weights.sha256(weights.restore((folder / INITIAL).read_bytes(), INITIAL).state)


def test_a_fresh_run_takes_no_weights_that_lie_in_its_folder(tmp_path: Path) -> None:
    job = make_job(tmp_path, seed=1)
    prepare_weights(job, resumed=False)
    first = stored_sha256(tmp_path)
    other = make_job(tmp_path, seed=2)
    prepare_weights(other, resumed=False)
    assert stored_sha256(tmp_path) != first
    prepare_weights(job, resumed=False)
    assert stored_sha256(tmp_path) == first


def test_a_resumed_run_keeps_its_weights(tmp_path: Path) -> None:
    prepare_weights(make_job(tmp_path, seed=1), resumed=False)
    first = (tmp_path / INITIAL).read_bytes()
    prepare_weights(make_job(tmp_path, seed=2), resumed=True)
    assert (tmp_path / INITIAL).read_bytes() == first


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path) -> None:
    job = make_job(tmp_path, make_initial(), precision="fp32")
    state = make_trainer(job, Ranks(0, 1, None)).state({})
    assert state["precision"] == "fp32"
    config = dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, precision="fp64"))
    trainer = make_trainer(dataclasses.replace(job, config=config), Ranks(0, 1, None))
    with pytest.raises(RunFaultError, match="found fp64 on these devices, expected fp32"):
        trainer.load_state(state)


def test_ranks_of_different_precision_are_refused(tmp_path: Path) -> None:
    class Mixed(Ranks):
        def gather(self, value):
            return [value, "fp16"] if isinstance(value, str) else [value]

    job = make_job(tmp_path, make_initial(), precision="fp32")
    with pytest.raises(RunFaultError, match="auto is fp32, fp16 on ranks 0, 1"):
        make_trainer(job, Mixed(0, 1, None))


def test_defaults_are_a_name_and_paths_that_hold_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_defaults(Config())
    assert config.run.name.startswith("nih14-")
    assert config.train.storage_path == str(tmp_path / "outputs/runs")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    named = with_defaults(Config(run=RunConfig(name="mine"), train=TrainConfig(storage_path="s3://bucket/runs")))
    assert (named.run.name, named.train.storage_path) == ("mine", "s3://bucket/runs")


def test_bundles_are_the_ranks_and_the_decoding() -> None:
    train = TrainConfig(num_workers=2, use_gpu="yes", cpus_per_worker=3)
    assert bundles(Config(train=train)) == [{"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1}, {"CPU": 1.0}]
