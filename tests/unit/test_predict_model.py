"""Which checkpoint a model's name leads to, in storage and in a real MLflow registry, and where thresholds come from."""

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.errors import ConfigError, DataError, InputError, RunError
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.predict.model import Model, find_model, pack, thresholds_of
from cxr_dist.train.checkpoint import Checkpoints, load_checkpoint
from tests.predicting import NAMES, SIZE, make_model


def validation() -> ScoreTable:
    """Four images: Effusion is best cut at 0.6, Mass at 0.3 by J and 0.2 by F1, Hernia has no positive."""
    probabilities = np.array([[0.6, 0.3, 0.1], [0.7, 0.3, 0.2], [0.2, 0.2, 0.3], [0.1, 0.25, 0.4]])
    labels = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], np.bool_)
    return ScoreTable(
        image_ids=np.array(["a", "b", "c", "d"]),
        patient_ids=np.arange(4),
        split="validation",
        findings=NAMES,
        probabilities_NK=probabilities,
        logits_NK=None,
        labels_NK=labels,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "first", validation=validation())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "other", seed=1)


def found(asked: str, tracking_uri: str = "sqlite:////nowhere/mlflow.db") -> Model:
    with find_model(asked, tracking_uri) as model:
        load_checkpoint(model.uri)
        return model


def test_a_run_and_its_checkpoint_are_the_same_model(run: str) -> None:
    model, exact = found(run), found(f"{run}/checkpoints/000000/000000010.pt")
    assert model.uri == exact.uri == f"{run}/checkpoints/000000/000000010.pt"
    assert (model.findings, model.size, model.name, model.local) == (NAMES, SIZE, "first/000000010", False)
    assert model.version == exact.version == f"first/000000010@{model.sha256[:12]}"


def test_the_hash_is_of_the_frozen_part_too(run: str, tmp_path: Path) -> None:
    before = found(run).sha256
    copy = shutil.copytree(run, tmp_path / "first")
    assert found(str(copy)).sha256 == before
    (copy / "initial.pt").write_bytes((copy / "initial.pt").read_bytes() + b"\0")
    assert found(str(copy)).sha256 != before


def test_what_holds_no_model_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(
        InputError, match=r"found none there, expected RUN/checkpoints/OWNER/STEP\.pt or a run's folder"
    ):
        found(str(tmp_path))
    with pytest.raises(DataError, match=r"found a model of pixels_version 'grey-0', this version makes"):
        found(make_model(tmp_path / "old", pixels_version="grey-0"))
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "initial.pt").unlink()
    with pytest.raises(InputError, match=r"found no .*/copy/initial\.pt, expected the run's starting weights"):
        found(str(copy))


class Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, run: str) -> None:
    mark, run = tmp_path / "executed", str(shutil.copytree(run, tmp_path / "run"))
    for content in (pickle.dumps(Bomb(mark)), saved({"tail": Bomb(mark)})):
        checkpoints = Checkpoints(run)
        [entry] = checkpoints.entries()
        checkpoints._list([checkpoints._put(entry, content, None)])
        with pytest.raises(InputError, match="cannot be read as saved tensors"):
            found(run)
        assert not mark.exists()


def saved(content: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_thresholds_are_the_runs_own(run: str, other: str) -> None:
    youden, best_f1 = thresholds_of(found(run), "youden"), thresholds_of(found(run), "f1")
    assert youden.values == {"Effusion": float(np.float32(0.6)), "Mass": float(np.float32(0.3)), "Hernia": 0.5}
    assert best_f1.values == {"Effusion": float(np.float32(0.6)), "Mass": float(np.float32(0.2)), "Hernia": 0.5}
    assert youden.source == "Youden’s J on the run's validation split, 4 images (0.5 for Hernia: undefined there)"
    assert best_f1.source.startswith("best F1 on the run's validation split, 4 images")
    number = thresholds_of(found(run), "0.1")
    assert number.values == dict.fromkeys(NAMES, float(np.float32(0.1)))
    assert number.source == "0.1 for every finding, as asked"
    none = thresholds_of(found(other), "youden")
    assert none.values == dict.fromkeys(NAMES, 0.5)
    assert none.source == "0.5 for every finding, for the checkpoint has no validation scores with it"
    for rule in ("best", "1.5", "nan"):
        with pytest.raises(
            ConfigError, match=f"--thresholds: found '{rule}', expected youden, f1, or a number from 0 to 1"
        ):
            thresholds_of(found(run), rule)


def test_damaged_validation_scores_are_not_passed_over(run: str, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "first")
    scores = copy / "checkpoints" / "000000" / "000000010.parquet"
    scores.write_bytes(scores.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="found other bytes than were saved"):
        thresholds_of(found(str(copy)), "youden")


def test_a_packed_checkpoint_is_the_same_model(run: str, tmp_path: Path) -> None:
    uri = pack(run, str(tmp_path / "packed"))
    assert found(uri).sha256 == found(run).sha256
    assert thresholds_of(found(uri), "youden") == thresholds_of(found(run), "youden")
    names = sorted(str(path.relative_to(tmp_path / "packed")) for path in (tmp_path / "packed").rglob("*.*"))
    assert names == [f"checkpoints/000000/{name}" for name in ("000000010.parquet", "000000010.pt", "index.json")] + [
        "initial.pt"
    ]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, run: str, other: str) -> str:
    """Versions of the model `cxr` in a real registry: 1 has its run's folder, 2 artifacts of its own, 3 a folder
    `checkpoint` among them, 4 neither, 5 the artifacts of a run that has no folder. Aliases: champion is 2, and dev 3."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("cxr", str(folder / "artifacts"))
    trained, bare = (client.create_run(experiment).info.run_id for _ in range(2))
    client.set_tag(trained, "run_folder", run)
    pack(other, str(folder / "packed"))
    pack(other, str(folder / "inside" / "checkpoint"))
    (folder / "inside" / "MLmodel").write_text("flavors: {}")
    (folder / "empty").mkdir()
    client.log_artifacts(bare, str(folder / "packed"), "model")
    client.create_registered_model("cxr")
    client.create_model_version("cxr", f"runs:/{trained}/model", trained)
    client.create_model_version("cxr", str(folder / "packed"))
    client.create_model_version("cxr", str(folder / "inside"), trained)
    client.create_model_version("cxr", str(folder / "empty"), bare)
    client.create_model_version("cxr", f"runs:/{bare}/model", bare)
    client.set_registered_model_alias("cxr", "champion", "2")
    client.set_registered_model_alias("cxr", "dev", "3")
    client.set_tag(bare, "trained", trained)
    return uri


def test_a_registered_version_leads_to_its_checkpoint(registry: str, run: str, other: str) -> None:
    expected = {"first": found(run).sha256, "other": found(other).sha256}
    assert expected["first"] != expected["other"]
    for asked, name, which in (
        ("models:/cxr/1", "cxr/1", "first"),
        ("models:/cxr/2", "cxr/2", "other"),
        ("models:/cxr@champion", "cxr/2", "other"),
        ("models:/cxr/3", "cxr/3", "other"),
        ("models:/cxr@dev", "cxr/3", "other"),
        ("models:/cxr/5", "cxr/5", "other"),
    ):
        with find_model(asked, registry) as model:
            assert (model.sha256, model.name) == (expected[which], name)
            assert model.local == (which == "other")
            assert storage.exists(model.uri)
        assert storage.exists(model.uri) == (which == "first")  # what was fetched is gone


def test_a_run_leads_to_its_checkpoint(registry: str, run: str, other: str) -> None:
    bare = MlflowClient(registry).get_model_version("cxr", "5").run_id
    trained = MlflowClient(registry).get_run(bare).data.tags["trained"]
    assert found(f"runs:/{trained}", registry).sha256 == found(run).sha256
    with find_model(f"runs:/{bare}/model", registry) as model:
        assert model.sha256 == found(other).sha256
        assert model.name == f"{bare}/model"
    # a path that holds none does not stand for the run's best checkpoint
    for asked in (f"runs:/{trained}/model", f"runs:/{bare}"):
        with pytest.raises(InputError, match=f"model {asked}: found no checkpoint"):
            found(asked, registry)


@pytest.mark.parametrize(("asked", "sentence"), [
    ("models:/cxr/4", "model models:/cxr/4: found no checkpoint, neither initial.pt and checkpoints/ in .*empty nor a run "
     "with the tag run_folder; give the URI of a run's folder or of a checkpoint in one"),
    ("models:/cxr/9", "does not give it .*cxr.*; check name, version and tracking.uri"),
    ("models:/none/1", "does not give it .*; check name, version and tracking.uri"),
    ("models:/cxr@none", "does not give it .*none.*; check name, version and tracking.uri"),
    ("models:/cxr/latest", "expected models:/NAME/VERSION with its number, or models:/NAME@ALIAS"),
    ("models:/cxr", "expected models:/NAME/VERSION with its number, or models:/NAME@ALIAS"),
    ("runs:/0123/model", "does not give it .*0123"),
])  # fmt: skip
def test_a_version_without_a_checkpoint_is_refused(registry: str, asked: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        found(asked, registry)


def test_a_registry_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.uri: found no file .*mlflow\.db, expected MLflow's database"):
        found("models:/cxr/1", f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []
