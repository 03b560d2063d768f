"""Models logged, registered and promoted, in a real MLflow: a SQLite store, and a server that is asked over HTTP."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.artifacts
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from cxr_dist import storage, unsent
from cxr_dist.config import Config, EvaluateConfig, RunConfig, TrackingConfig, TrainConfig
from cxr_dist.environment import SETTINGS
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.housekeeping.tracked import Tracking
from cxr_dist.predict.model import find_model
from cxr_dist.registry import promote as promotion
from cxr_dist.registry.card import About
from cxr_dist.registry.prepare import prepare
from cxr_dist.registry.publish import Wish, publish
from cxr_dist.tracking import TrackedRun, open_run
from cxr_dist.train import run as train_run
from jobs import promote as job
from tests.integration.test_tracking_server import Server
from tests.predicting import NAMES, make_model

NAME = "cxr-densenet121"
PATIENTS, EACH = 150, 2


def validation(skill: float, *, seed: int = 0, images: int = PATIENTS * EACH) -> ScoreTable:
    """Scores that are the truth times `skill` plus noise: the same images, patients and labels whatever the skill."""
    truth = np.random.default_rng(1).random((PATIENTS * EACH, len(NAMES))) < 0.3
    noise = np.random.default_rng(seed).normal(size=truth.shape)
    probabilities = 1 / (1 + np.exp(-(skill * truth + noise)))
    table = ScoreTable(
        image_ids=np.array([f"{row:08d}_000.png" for row in range(len(truth))]),
        patient_ids=np.arange(len(truth)) // EACH,
        split="validation",
        findings=NAMES,
        probabilities_NK=probabilities,
        logits_NK=None,
        labels_NK=truth,
    )
    return table.select(np.arange(len(truth)) < images)


POOR, GOOD, ALIKE, OTHER = range(4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run folders: of a poor model, a good one, one that is as good but for noise, and one of other images."""
    folder = tmp_path_factory.mktemp("runs")
    tables = [validation(0.5), validation(2.5), validation(2.6, seed=7), validation(9, images=200)]
    return [make_model(folder / f"run{k}", seed=k, validation=table) for k, table in enumerate(tables)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        found = Server(tmp_path_factory.mktemp("server"))
        found.start()
        assert found.process is not None
        assert found.process.stdout is not None
        threading.Thread(target=found.process.stdout.read, daemon=True).start()  # or it stops when the pipe is full
        yield found.uri
        found.kill()


@pytest.fixture(scope="module", params=["sqlite", "http"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "http":
        return str(request.getfixturevalue("server"))
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def new_run(client: MlflowClient, folder: str, tmp_path: Path) -> str:
    experiment = client.get_experiment_by_name("models")
    number = (
        experiment.experiment_id if experiment else client.create_experiment("models", _artifacts(client, tmp_path))
    )
    run_id = client.create_run(number, run_name=Path(folder).name).info.run_id
    client.set_tag(run_id, "run_folder", folder)
    return run_id


def _artifacts(client: MlflowClient, tmp_path: Path) -> str | None:
    return (tmp_path / "artifacts").as_uri() if client.tracking_uri.startswith("sqlite") else None


def wished(folder: str, to: Path, name: str, **tracking: bool) -> Wish:
    about = About(run=Path(folder).name, run_id="id", label_set="nih14", recipe="a recipe")
    config = TrackingConfig(registered_model=name, **tracking)
    return prepare(folder, to, about, None, tracking=config, evaluate=EvaluateConfig(bootstrap=200))


def test_a_model_is_logged_with_its_run_and_registered_only_if_asked(
    client: MlflowClient, runs: list[str], tmp_path: Path
) -> None:
    run_id = new_run(client, runs[POOR], tmp_path)
    done = publish(client, run_id, tmp_path / "model", wished(runs[POOR], tmp_path / "model", "unasked"))
    logged = client.get_logged_model(done["model"].removeprefix("models:/"))
    assert (logged.status, logged.source_run_id, logged.name) == (LoggedModelStatus.READY, run_id, "unasked")
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [logged.model_id]
    assert done["version"] is None
    assert client.search_registered_models("name = 'unasked'") == []


def test_what_was_done_is_not_done_again(client: MlflowClient, runs: list[str], tmp_path: Path) -> None:
    run_id = new_run(client, runs[POOR], tmp_path)
    wish = wished(runs[POOR], tmp_path / "model", "again", register=True)
    first = publish(client, run_id, tmp_path / "model", wish)
    assert publish(client, run_id, tmp_path / "model", wish) == first
    assert [int(version.version) for version in client.search_model_versions("name = 'again'")] == [1]
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_an_upload_that_broke_off_is_taken_up(
    client: MlflowClient, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = new_run(client, runs[POOR], tmp_path)
    wish = wished(runs[POOR], tmp_path / "model", "broken", register=True)

    def breaks(model_id: str, folder: str) -> None:
        client.log_model_artifact(model_id, f"{folder}/MLmodel")
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(client, "log_model_artifacts", breaks)
        with pytest.raises(ConnectionError):
            publish(client, run_id, tmp_path / "model", wish)
    assert client.search_registered_models("name = 'broken'") == []
    done = publish(client, run_id, tmp_path / "model", wish)
    assert len(client.get_run(run_id).outputs.model_outputs) == 1
    with find_model(f"models:/{done['version']}", client.tracking_uri) as model:
        assert model.sha256 == wish.sha256


def test_a_version_has_its_tags_its_card_and_the_checkpoint(
    client: MlflowClient, runs: list[str], tmp_path: Path
) -> None:
    run_id = new_run(client, runs[GOOD], tmp_path)
    wish = wished(runs[GOOD], tmp_path / "model", "tagged", register=True)
    done = publish(client, run_id, tmp_path / "model", wish)
    version = client.get_model_version("tagged", "1")
    assert (done["version"], version.run_id) == ("tagged/1", run_id)
    assert version.tags["run"] == "run1"
    assert version.tags["manifest_sha256"] == "0" * 64
    assert (version.tags["label_set"], version.tags["recipe"], version.tags["weights"]) == (
        "nih14",
        "a recipe",
        "random",
    )
    assert "RANDOM WEIGHTS" in version.description
    assert "not for diagnosis" in version.description
    with find_model("models:/tagged/1", client.tracking_uri) as model, find_model(runs[GOOD], "") as own:
        assert (model.sha256, model.name, model.local) == (own.sha256, "tagged/1", True)
    names = [pointer.what for pointer in Tracking(client.tracking_uri).pointers() if run_id in pointer.text]
    assert names == ["version 1 of model tagged"]  # so that jobs/gc.py leaves the run alone


def test_the_champion_is_moved_only_to_what_is_better_on_validation(
    client: MlflowClient, runs: list[str], tmp_path: Path
) -> None:
    decisions = []
    for which in (POOR, GOOD, ALIKE, OTHER, POOR):
        to = tmp_path / f"model{len(decisions)}"
        wish = wished(runs[which], to, NAME, promote=True)
        decisions.append(publish(client, new_run(client, runs[which], tmp_path), to, wish)["promotion"])
    first, better, alike, other, worse = decisions
    assert (first["promoted"], first["champion"], first["p"]) == (True, "", None)
    assert first["reason"] == "the first: there was no champion to compare with"
    assert (better["promoted"], better["champion"], better["version"]) == (True, f"{NAME}/1", f"{NAME}/2")
    assert better["p"] == pytest.approx(2 / 201)
    assert 0 < better["lower"] < better["difference"] < better["upper"]
    assert (alike["promoted"], alike["champion"]) == (False, f"{NAME}/2")
    assert alike["difference"] > 0
    assert alike["p"] > 0.05
    assert alike["reason"].startswith("not better: validation mean AUROC ")
    assert (other["promoted"], other["p"]) == (False, None)
    assert (
        f"found 200 validation images, expected those of the champion {NAME}/2 with the same labels (300; 200 in common)"
        in (other["reason"])
    )
    assert (worse["promoted"], worse["p"]) == (False, pytest.approx(2 / 201))
    assert worse["difference"] < 0
    assert int(client.get_model_version_by_alias(NAME, "champion").version) == 2

    tags = client.get_model_version(NAME, "2").tags
    assert tags["promotion"] == "promoted"
    assert tags["promotion.compared_with"] == f"{NAME}/1"
    assert float(tags["promotion.difference"]) == pytest.approx(better["difference"], rel=1e-5)
    assert float(tags["promotion.p"]) == pytest.approx(2 / 201, rel=1e-5)
    assert tags["promotion.interval"] == f"{better['lower']:.6g} to {better['upper']:.6g}"
    refused = client.get_model_version(NAME, "4").tags
    assert refused["promotion"] == "not promoted"
    assert "promotion.p" not in refused
    assert refused["promotion.reason"].startswith("not compared: ")

    again = promotion.promote(client, NAME, "2", bootstrap=200, seed=0)
    assert again.reason == "it is the champion already"
    assert client.get_model_version(NAME, "2").tags == tags


def test_a_job_decides_about_a_version(client: MlflowClient, uri: str, runs: list[str], tmp_path: Path) -> None:
    for which in (POOR, GOOD):
        wish = wished(runs[which], tmp_path / f"model{which}", "by-job", register=True)
        publish(client, new_run(client, runs[which], tmp_path), tmp_path / f"model{which}", wish)
    config = Config(tracking=TrackingConfig(uri=uri), evaluate=EvaluateConfig(bootstrap=200))
    assert job.of_version(config, "by-job/1")["promoted"]
    assert job.of_version(config, "by-job/2")["champion"] == "by-job/1"
    assert int(client.get_model_version_by_alias("by-job", "champion").version) == 2
    few = dataclasses.replace(config, evaluate=EvaluateConfig(bootstrap=0))
    assert "undecided" in job.of_version(few, "by-job/1")["reason"]
    for version, sentence in (
        ("by-job", "expected NAME/NUMBER, such as"),
        ("by-job/9", "found no by-job/9 in the registry"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            job.of_version(config, version)


def test_a_job_registers_the_model_of_a_run_later(
    client: MlflowClient, uri: str, runs: list[str], tmp_path: Path
) -> None:
    run_id = new_run(client, runs[GOOD], tmp_path)
    config = {"run.name": "run1", "model.trainable": "denseblock4", "train.seed": 7}
    content = {"format": 1, "run_id": run_id, "manifest_sha256": "0" * 64, "config": config}
    storage.put_atomic(f"{runs[GOOD]}/run.json", json.dumps(content).encode())
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"split": "test", "n_images": 2, "n_patients": 1, "discrimination": {"Mass": {"positives": 12345}}})
    )
    client.log_artifact(run_id, str(tmp_path / "evaluation.json"))
    asked = Config(
        tracking=TrackingConfig(uri=uri, registered_model="later"),
        evaluate=EvaluateConfig(bootstrap=200),
        train=TrainConfig(storage_path=str(Path(runs[GOOD]).parent)),
        run=RunConfig(name="run1"),
    )
    assert job.of_run(asked, promote=False)["promotion"] is None
    first = job.of_run(asked, promote=True)
    assert (first["version"], first["promotion"]["promoted"]) == ("later/1", True)
    assert job.of_run(asked, promote=True)["promotion"]["reason"] == "it is the champion already"
    version = client.get_model_version_by_alias("later", "champion")
    assert int(version.version) == 1
    assert "| Mass | 12,345 |" in version.description
    assert "seed 7" in version.tags["recipe"]
    with pytest.raises(ConfigError, match=r"found no run\.json in .*, expected the folder of a run"):
        job.of_run(dataclasses.replace(asked, run=RunConfig(name="none")), promote=True)


def test_test_scores_decide_nothing(client: MlflowClient, tmp_path: Path, runs: list[str]) -> None:
    table = dataclasses.replace(validation(9), split="test")
    champion = validation(1)
    with pytest.raises(InputError, match="found scores of split 'test', expected validation; never test"):
        promotion._check_same("cxr/2", table, "cxr/1", champion)


def test_a_logged_models_folder_can_be_loaded_by_its_uri(client: MlflowClient, runs: list[str], tmp_path: Path) -> None:
    wish = wished(runs[POOR], tmp_path / "model", "loaded", register=True)
    done = publish(client, new_run(client, runs[POOR], tmp_path), tmp_path / "model", wish)
    logged = client.get_logged_model(done["model"].removeprefix("models:/"))
    found = mlflow.artifacts.download_artifacts(
        artifact_uri=logged.artifact_location, dst_path=str(tmp_path / "there"), tracking_uri=client.tracking_uri
    )
    model = mlflow.pyfunc.load_model(found)
    assert model.metadata.model_id == logged.model_id
    assert model.predict(model.input_example)["status"].tolist() == ["ok"]


def open_for(uri: str, folder: str, tmp_path: Path) -> TrackedRun:
    config = Config(tracking=TrackingConfig(uri=uri, experiment="told"), run=RunConfig(name=Path(folder).name))
    (tmp_path / "journals").mkdir()
    return open_run(
        config,
        run_id=None,
        params={},
        tags={"run_folder": folder},
        storage_dir=str(tmp_path / "journals"),
        folder=folder,
    )


def test_a_model_that_the_server_missed_is_told_later(
    client: MlflowClient, uri: str, runs: list[str], tmp_path: Path
) -> None:
    wish = wished(runs[POOR], tmp_path / "model", "missed", promote=True)
    folder = str(tmp_path / "kept")
    with open_for(uri, folder, tmp_path) as run:
        run.held = False
        assert run.log_model(tmp_path / "model", dataclasses.asdict(wish)) is None
    assert "model missed" in run.missed
    assert client.search_registered_models("name = 'missed'") == []
    shutil.rmtree(tmp_path / "model")  # the machine is gone; what is kept is in the run's folder
    unsent.send(folder, uri, run.run_id)
    version = client.get_model_version_by_alias("missed", "champion")
    assert version.run_id == run.run_id
    with find_model("models:/missed@champion", uri) as model:
        assert model.sha256 == wish.sha256
    assert not unsent.waits(folder)


@pytest.mark.parametrize("promote", [False, True])
def test_a_training_run_ends_with_its_model(
    client: MlflowClient, uri: str, runs: list[str], tmp_path: Path, promote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, manifest = trained(uri, runs[POOR], promote=promote)
    with open_for(uri, runs[POOR], tmp_path) as run:
        done = train_run.log_model(run, job, manifest, {"artifacts": str(tmp_path)})
    assert done is not None
    logged = client.get_logged_model(done["model"].removeprefix("models:/"))
    assert logged.tags["label_set"] == "nih14"
    assert done["version"] == (f"of-run-{promote}/1" if promote else None)
    assert not Path("outputs/models/run0/model").exists()


def test_a_model_that_cannot_be_made_fails_no_run(
    uri: str, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    job, manifest = trained(uri, str(tmp_path / "nothing"), promote=True)
    with open_for(uri, runs[POOR], tmp_path) as run:
        assert train_run.log_model(run, job, manifest, {"artifacts": str(tmp_path)}) is None
    assert run.missed == []
    assert "the model is not logged (" in caplog.text
    assert "jobs/promote.py --run.name run0 does it" in caplog.text


def trained(uri: str, folder: str, *, promote: bool) -> tuple[Any, Any]:
    """What the driver knows of a run that has been evaluated."""
    tracking = TrackingConfig(uri=uri, promote=promote, registered_model=f"of-run-{promote}")
    config = Config(tracking=tracking, run=RunConfig(name="run0", commit="0" * 40))
    plan = SimpleNamespace(sha256="1" * 64)
    job = SimpleNamespace(config=config, folder=folder, plan=plan, world_sizes=(1,))
    return job, SimpleNamespace(label_set="nih14", hash="0" * 64, validation_fraction=0.2, settings={"split_seed": "1"})
