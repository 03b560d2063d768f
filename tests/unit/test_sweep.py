"""What a sweep tries, keeps and says: pure code; tests/integration/test_sweep_killed.py runs one."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr_dist import storage
from cxr_dist.cli import parse
from cxr_dist.config import (
    Config,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.sweep import table
from cxr_dist.sweep.record import Record
from cxr_dist.sweep.recorder import Recorder
from cxr_dist.sweep.run import Cut, room
from cxr_dist.sweep.space import Space, draw, flags, full_command, trial_config
from cxr_dist.sweep.trial import last_words, scored
from cxr_dist.train.checkpoint import Checkpoints

SPACE = Space(lr=(1e-4, 1e-1), trainable=("denseblock4", "head"), pooling=("lse", "avg"), trials=6, seed=1)


def config(tmp_path: Path, **train: Any) -> Config:
    return Config(
        run=RunConfig(name="lr"),
        train=TrainConfig(storage_path=str(tmp_path), **train),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", tags=("asked by=radiology",)),
    )


def test_trials_cover_the_range_and_take_turns() -> None:
    trials = draw(SPACE, "lr")
    parts = sorted(math.floor(6 * math.log(trial.lr / 1e-4) / math.log(1e3) + 0.05) for trial in trials)
    assert parts == [0, 1, 2, 3, 4, 5], "one learning rate in each sixth of the range"
    turns = [(trial.trainable, trial.pooling) for trial in trials]
    assert turns[:4] == [("denseblock4", "lse"), ("head", "lse"), ("denseblock4", "avg"), ("head", "avg")]
    assert turns[4:] == turns[:2]
    assert draw(SPACE, "lr") == trials
    assert [one.lr for one in draw(dataclasses.replace(SPACE, seed=2), "lr")] != [one.lr for one in trials]
    first = trials[0]
    assert first.name == f"lr-01-lr{first.lr:g}-denseblock4-lse"
    RunConfig(name=first.name)  # is a name that a run may have


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lr": "0.1,0.001"}, "--lr: found '0.1,0.001', expected the lowest and the highest"),
        ({"lr": "0.1"}, "--lr"),
        ({"lr": "0,1"}, "--lr"),
        ({"lr": "nan,1"}, "--lr"),
        ({"lr": "1e-4,inf"}, "--lr"),
        ({"trainable": "denseblock4,block3"}, "--trainable: found 'block3', expected some of head, denseblock4"),
        ({"pooling": ""}, "--pooling: found '', expected some of lse, avg"),
        ({"trials": 0}, "--trials: found 0, expected 1 to 999"),
    ],
)
def test_a_space_that_cannot_be_is_refused(given: dict[str, Any], sentence: str) -> None:
    values = {"lr": "", "trainable": "head", "pooling": "avg", "trials": 4, "seed": 0} | given
    with pytest.raises(ConfigError) as error:
        Space.parse(Config(), **values)
    assert sentence in str(error.value)


def test_the_default_range_is_around_the_configs_rate() -> None:
    found = Space.parse(Config(), lr="", trainable="head, head", pooling="avg", trials=1, seed=0)
    assert found.lr == pytest.approx((1e-4, 1e-2))
    assert found.trainable == ("head",)


@pytest.mark.parametrize("name", ["", "x" * 51])
def test_a_sweep_has_a_name_that_its_trials_names_can_begin_with(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        draw(SPACE, name)


@pytest.mark.parametrize(
    "cut", [Cut(min_epochs=0, reduction=3), Cut(min_epochs=21, reduction=3), Cut(min_epochs=1, reduction=1)]
)
def test_a_cut_that_cuts_nothing_or_everything_is_refused(cut: Cut) -> None:
    with pytest.raises(ConfigError, match=r"--min-epochs|--reduction"):
        cut.check(epochs=20)


def test_a_config_comes_back_from_its_flags() -> None:
    made = Config(
        model=ModelConfig(weights="/a folder/it's.pt", trainable="denseblock3"),
        optimizer=OptimizerConfig(lr=3e-05, schedule="cosine", warmup_epochs=0.5),
        train=TrainConfig(num_workers=(1, 2), use_gpu="no", skip_findings=("Hernia",), augment=False),
        run=RunConfig(name="12", commit="0123456"),
        tracking=TrackingConfig(tags=("a=b c", 'd=e"f')),
    )
    assert parse("", argv=flags(made))[0] == made
    assert flags(Config()) == []


def test_trials_never_look_at_test_and_the_command_for_the_best_does(tmp_path: Path) -> None:
    base = config(tmp_path)
    trial = draw(SPACE, "lr")[1]
    run = trial_config(base, trial, parent="abc", decode_workers=2)
    assert run.evaluate.test is False
    assert (run.optimizer.lr, run.model.trainable, run.model.pooling) == (trial.lr, "head", "lse")
    assert run.tracking.tags == ("asked by=radiology", "mlflow.parentRunId=abc", "sweep=lr", "trial=2")
    assert run.data.decode_workers == 2
    assert [run.tracking.log_model, run.tracking.register, run.tracking.promote] == [False, False, False]
    blind = dataclasses.replace(base, evaluate=EvaluateConfig(test=False))
    words = shlex.split(full_command(blind, trial))
    assert words[:2] == ["python", "jobs/train.py"]
    full = parse("", argv=words[2:])[0]
    assert full.evaluate.test is True
    assert full.run.name == "lr-best"
    assert (full.optimizer.lr, full.model.trainable, full.model.pooling) == (trial.lr, "head", "lse")
    assert full.tracking.tags == ("asked by=radiology",)


def test_a_record_is_gone_on_with_by_the_same_command_only(tmp_path: Path) -> None:
    base = config(tmp_path)
    record = Record.open(base, SPACE, "m" * 64)
    first, second, third, *_ = record.trials
    assert first.add(1, 0.6)
    assert first.add(2, 0.7)
    assert not first.add(2, 0.9), "an epoch has one score"
    first.ended = "finished"
    second.ended, second.why = "failed", "no luck"
    third.add(1, 0.5)
    third.ended, third.why = "pruned", "after epoch 1"
    record.run_id = "abc"
    record.save()
    again = Record.open(base, SPACE, "m" * 64)
    assert again.run_id == "abc"
    assert again.trials[0] == first
    assert again.trials[1].ended is None, "what failed is tried again"
    assert again.trials[2] == third
    assert again.best() is again.trials[0]
    # what a trial has of its own, and the machine, may be given otherwise
    other = dataclasses.replace(
        base, optimizer=OptimizerConfig(lr=0.5), train=TrainConfig(storage_path=str(tmp_path), num_workers=2)
    )
    assert Record.open(other, SPACE, "m" * 64).run_id == "abc"
    with pytest.raises(ConfigError, match=r"--trials: sweep lr was begun with 6, found 7"):
        Record.open(base, dataclasses.replace(SPACE, trials=7), "m" * 64)
    with pytest.raises(ConfigError, match=r"train\.epochs: sweep lr was begun with 20, found 3"):
        Record.open(config(tmp_path, epochs=3), SPACE, "m" * 64)
    with pytest.raises(ConfigError, match=r"data\.uri: sweep lr was begun with 'mmm"):
        Record.open(base, SPACE, "n" * 64)
    where = storage.join(record.folder, "sweep.json")
    storage.put_atomic(where, json.dumps(json.loads(storage.read_bytes(where)) | {"format": "2"}).encode())
    with pytest.raises(InputError, match=r"sweep\.json: found format '2'"):
        Record.open(base, SPACE, "m" * 64)


class Told:
    """Stands in for the parent run."""

    def __init__(self, tmp_path: Path) -> None:
        self.tracking_uri = f"sqlite:///{tmp_path}/none.db"
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        self.logged.append((step, metrics))


def test_the_end_of_a_trial_is_what_came_of_it(tmp_path: Path) -> None:
    record = Record.open(config(tmp_path), SPACE, "m" * 64)
    told = Told(tmp_path)
    recorder = Recorder(record, told, epochs=4, reduction=3, storage_path=str(tmp_path))  # type: ignore[arg-type]

    def trial(number: int, **last: Any) -> Any:
        return SimpleNamespace(config={"trial": {"number": number}}, last_result=last)

    def result(number: int, **values: Any) -> None:
        recorder.on_trial_result(0, [], trial(number), {"whole": False, **values})

    result(1, epoch=1, val_auroc_mean=0.6)
    result(1, epoch=4, val_auroc_mean=0.55, whole=True)
    recorder.on_trial_complete(0, [], trial(1, whole=True, done=True))
    result(2, epoch=1, val_auroc_mean=0.5)
    recorder.on_trial_complete(0, [], trial(2, whole=False, done=True))  # ASHA says done of what it stops
    result(3, epoch=0, val_auroc_mean=math.nan, failed="loss became nan")
    recorder.on_trial_complete(0, [], trial(3, whole=False, done=True))
    recorder.on_trial_error(0, [], trial(4))
    ends = [(one.ended, one.why) for one in Record.open(config(tmp_path), SPACE, "m" * 64).trials]
    assert ends[0] == ("finished", "")
    assert ends[1] == ("pruned", "after epoch 1 of 4: 0.5000, not among the best 1/3 there")
    assert [one.ended for one in record.trials] == ["finished", "pruned", "failed", "failed", None, None]
    assert record.trials[2].why == "loss became nan"
    assert told.logged == [
        (1, {"sweep/trial_val_auroc_mean": 0.6, "sweep/best_val_auroc_mean": 0.6}),
        (2, {"sweep/trial_val_auroc_mean": 0.5, "sweep/best_val_auroc_mean": 0.6}),
        (3, {"sweep/best_val_auroc_mean": 0.6}),
        (4, {"sweep/best_val_auroc_mean": 0.6}),
    ]
    # a sweep that goes on tells Tune of a finished trial again, which ASHA may cut: it stays finished
    recorder.on_trial_complete(0, [], trial(1, whole=False, done=True))
    assert record.trials[0].ended == "finished"

    rows = table.rows(record)
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (rows[0]["val_auroc_mean"], rows[0]["epochs"]) == (0.6, 4)
    assert table.csv(rows).splitlines()[2].startswith("2,lr-02-lr")
    assert "0.6000" in table.text(rows).splitlines()[1]
    assert "| finished | 4 | 0.6000 |" in table.note(rows, record.best(), "python x")


def test_scores_come_from_whole_epochs_only(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    assert scored(checkpoints) == []
    checkpoints.save({}, index=5, epoch=0, score=None, finished=False)
    checkpoints.save({}, index=10, epoch=0, score=0.6, finished=False)
    checkpoints.save({}, index=20, epoch=1, score=0.7, finished=True)
    assert scored(checkpoints) == [(1, 0.6, False), (2, 0.7, True)]


def test_a_job_that_failed_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\nerror: data.uri: found nothing\n(raylet) bye\n")
    assert last_words(log) == "data.uri: found nothing"
    log.write_text("2026-01-01 E failed: loss became nan\n{}\n")
    assert last_words(log) == "loss became nan"
    log.write_text("")
    assert last_words(log) == "it said nothing"


def test_as_many_trials_as_there_is_room_for() -> None:
    made = Config(train=TrainConfig(num_workers=2, use_gpu="no"))
    assert room(made, {"CPU": 3.0}, 0) == (1, 1)
    assert room(made, {"CPU": 10.0}, 0) == (3, 1)
    assert room(made, {"CPU": 10.0}, 2) == (2, 3)
    gpus = Config(train=TrainConfig(num_workers=2, use_gpu="yes"))
    assert room(gpus, {"CPU": 64.0, "GPU": 4.0}, 0) == (2, 30)
    with pytest.raises(ConfigError, match="--parallel"):
        room(made, {"CPU": 3.0}, -1)
