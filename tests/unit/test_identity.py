"""What a run may be resumed with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.config import Config, flatten
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.identity import BEING_REMOVED, FREE, FREE_SECTIONS, Identity, decisive
from cxr_dist.train.job import TrainJob
from tests.training import make_job


def started(tmp_path: Path, **train: Any) -> TrainJob:
    """A job whose run has been recorded."""
    job = make_job(tmp_path, **train)
    identity = Identity.claim(job, resume="auto")
    assert identity.run_id is None
    identity.record(dataclasses.replace(job, run_id="abc"))
    return job


def changed(job: TrainJob, section: str, **values: Any) -> TrainJob:
    part = dataclasses.replace(getattr(job.config, section), **values)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **{section: part}))


def test_a_recorded_run_is_taken_up_with_its_id(tmp_path: Path) -> None:
    job = started(tmp_path)
    assert Identity.claim(job, resume="auto").run_id == "abc"


def test_must_wants_a_checkpoint_and_never_wants_no_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert Identity.claim(job, resume="never").run_id is None
    with pytest.raises(
        ConfigError, match=r"run\.resume: found no checkpoint of run test under .*, expected one for must"
    ):
        Identity.claim(job, resume="must")
    started(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.resume: found no checkpoint"):
        Identity.claim(job, resume="must")
    with pytest.raises(
        ConfigError, match=r"run\.name: found a run test under .*; give another run\.name, or run\.resume"
    ):
        Identity.claim(job, resume="never")
    Checkpoints(job.folder).save({}, index=1, epoch=0, score=None, finished=False)
    assert Identity.claim(job, resume="must").run_id == "abc"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"seed": 7}, r"train\.seed: run test was started with 0, found 7; keep the first, or give another"),
        ("train", {"skip_findings": ("Hernia",)}, r"train\.skip_findings: .* with \[\], found \['Hernia'\]"),
        ("optimizer", {"lr": 0.5}, r"optimizer\.lr: run test was started with 0\.001, found 0\.5"),
        ("model", {"batch_norm": "frozen"}, r"model\.batch_norm: run test was started with 'group', found 'frozen'"),
    ],
)
def test_a_changed_value_that_decides_the_result_is_named(
    tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    job = started(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Identity.claim(changed(job, section, **values), resume="auto")


def test_the_machine_the_reading_and_the_report_may_change(tmp_path: Path) -> None:
    job = started(tmp_path)
    other = changed(job, "train", num_workers=3, threads_per_worker=2, micro_batch=4, log_every_steps=1)
    other = changed(changed(other, "data", decode_workers=5), "evaluate", bootstrap=7)
    other = changed(other, "tracking", uri="sqlite:///other.db")
    assert Identity.claim(other, resume="auto").run_id == "abc"


def test_another_dataset_is_named(tmp_path: Path) -> None:
    job = started(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.uri: .* with manifest 000000000000…, found ffffffffffff…"):
        Identity.claim(dataclasses.replace(job, manifest_sha256="f" * 64), resume="auto")


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    job = started(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(InputError, match=r"run\.json: found format 2, expected 1"):
        Identity.claim(job, resume="auto")


def test_a_run_that_is_being_removed_is_refused(tmp_path: Path) -> None:
    job = started(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"format": BEING_REMOVED, "run": json.loads(path.read_text())}))
    for resume in ("auto", "must", "never"):
        with pytest.raises(InputError, match=r"run\.json: found a run that is being removed and no longer whole"):
            Identity.claim(job, resume=resume)


def test_a_new_mlflow_id_is_recorded_and_the_same_is_not_written_again(tmp_path: Path) -> None:
    job = started(tmp_path)
    identity, path = Identity.claim(job, resume="auto"), tmp_path / "run.json"
    path.write_text(path.read_text() + " ")
    identity.record(dataclasses.replace(job, run_id="abc"))
    assert path.read_text().endswith(" ")
    identity.record(dataclasses.replace(job, run_id="def"))
    assert Identity.claim(job, resume="auto").run_id == "def"


def test_free_keys_exist_and_the_rest_is_decisive() -> None:
    keys = set(flatten(Config()))
    assert keys >= FREE
    assert set(decisive(Config())) == {key for key in keys - FREE if not key.startswith(FREE_SECTIONS)}
    assert {"train.seed", "train.global_batch", "train.views", "model.bn_group"} <= set(decisive(Config()))
