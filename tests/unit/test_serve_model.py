"""The logged model in this process: the evaluation's numbers, whatever comes together; and the code that it carries."""

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch

from cxr_dist.data.images import to_grey_many
from cxr_dist.errors import InputError, RunError
from cxr_dist.evaluate import scores
from cxr_dist.evaluate.calibrate import fit_calibration
from cxr_dist.evaluate.inference import load_network
from cxr_dist.evaluate.thresholds import fit
from cxr_dist.predict.model import find_model
from cxr_dist.registry import carry
from cxr_dist.registry.package import REQUIREMENTS, contents, write_model
from cxr_dist.serve.model import Served
from tests.predicting import NAMES, SIDE, SIZE, make_model
from tests.releases import noise, png
from tests.unit.test_predict_model import validation

COUNT = 37
IMAGES = [png(noise(row, SIDE)) for row in range(COUNT)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "first", validation=validation())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run: str) -> Path:
    return write_model(run, contents(run), "# a card\n", tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module")
def logits(run: str) -> np.ndarray:
    """The evaluation's: the network that jobs/evaluate.py scores with, and the pixels that it is given."""
    torch.set_num_threads(1)
    return load_network(run, torch.device("cpu")).score(to_grey_many(IMAGES, SIZE))


def numbers(table: pd.DataFrame, kind: str) -> np.ndarray:
    return table[[f"{kind}_{name}" for name in NAMES]].to_numpy(np.float64)


def test_raw_is_the_evaluations_probability_and_calibrated_its_calibration(
    model: mlflow.pyfunc.PyFuncModel, logits: np.ndarray
) -> None:
    table = model.predict(pd.DataFrame({"image": IMAGES}))
    raw = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert np.abs(numbers(table, "raw") - raw).max() <= 1e-5
    calibrated = fit_calibration(validation()).apply(logits)
    assert np.abs(numbers(table, "calibrated") - calibrated).max() <= 1e-5
    assert np.abs(calibrated - raw).max() > 0.1


def test_an_image_does_not_depend_on_what_comes_with_it(model: mlflow.pyfunc.PyFuncModel) -> None:
    whole = numbers(model.predict({"image": IMAGES}), "raw")
    alone = np.concatenate([numbers(model.predict({"image": [image]}), "raw") for image in IMAGES[:9]])
    assert np.array_equal(whole[:9], alone)
    back = numbers(model.predict({"image": [*IMAGES[::-1], None]}), "raw")[-2::-1]
    assert np.array_equal(whole, back)


def test_flags_are_those_of_the_validation_thresholds_on_raw(
    model: mlflow.pyfunc.PyFuncModel, logits: np.ndarray
) -> None:
    raw = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for rule in ("youden", "f1", "corner", "sensitivity_90", "specificity_90"):
        table = model.predict({"image": IMAGES}, params={"rule": rule})
        for k, name in enumerate(NAMES):
            threshold = fit(validation())[name][rule]
            expected = [None] * COUNT if threshold is None else (raw[:, k] >= threshold).tolist()
            assert table[f"flag_{name}"].tolist() == expected


def test_a_threshold_that_is_an_images_own_score_flags_it(folder: Path, tmp_path: Path, logits: np.ndarray) -> None:
    copy = shutil.copytree(folder / "data" / "checkpoint", tmp_path / "copy")
    raw = 1 / (1 + np.exp(-logits.astype(np.float64)))
    facts = json.loads((copy / "model.json").read_text())
    facts["thresholds"]["youden"] = {name: float(np.sort(raw[:, k])[20]) for k, name in enumerate(NAMES)}
    (copy / "model.json").write_text(json.dumps(facts))
    table = Served(copy, "cpu").predict(IMAGES)
    assert [int(table[f"flag_{name}"].sum()) for name in NAMES] == [COUNT - 20] * 3


def test_no_image_no_row_and_no_readable_one_no_number(model: mlflow.pyfunc.PyFuncModel) -> None:
    empty = model.predict(pd.DataFrame({"image": pd.Series([], dtype=object)}))
    assert (len(empty), list(empty.columns)[:2]) == (0, ["status", "reason"])
    [row] = model.predict({"image": [b"no image!"]}).to_dict("records")
    assert (row["status"], row["raw_Mass"], row["flag_Mass"]) == ("unreadable", None, None)
    assert row["reason"] == "neither PNG nor JPEG"


def test_without_validation_scores_there_are_no_flags_and_no_calibration(tmp_path: Path) -> None:
    run = make_model(tmp_path / "bare", seed=1)
    table = mlflow.pyfunc.load_model(str(write_model(run, contents(run), "", tmp_path / "model"))).predict(
        {"image": IMAGES[:2]}
    )
    assert np.array_equal(numbers(table, "raw"), numbers(table, "calibrated"))
    assert set(table["flag_Mass"]) == {None}


def test_the_folder_holds_what_predict_packs(run: str, folder: Path, tmp_path: Path) -> None:
    with find_model(str(folder / "data" / "checkpoint"), "") as packed, find_model(run, "") as own:
        assert packed.sha256 == own.sha256
        assert contents(run).facts["model_version"] == own.version
    assert scores.read(next(folder.glob("data/checkpoint/checkpoints/*/*.parquet"))).split == "validation"


def test_nothing_in_the_folder_is_a_pickle(folder: Path) -> None:
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".cloudpickle"))]
    assert {name for name in names if name.endswith(".pt")} == {"initial.pt", "000000010.pt"}


def test_requirements_are_few_and_pinned(folder: Path) -> None:
    lines = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in lines] == list(REQUIREMENTS)
    assert all("==" in line and "+" not in line for line in lines)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"format": "cxr-dist/model/9"}, r"found format 'cxr-dist/model/9', expected 'cxr-dist/model/1'; use the version that wrote"),
    ({"pixels_version": "grey-0"}, r"found pixels_version 'grey-0', expected 'grey-"),
])  # fmt: skip
def test_another_formats_model_is_refused(folder: Path, tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    copy = shutil.copytree(folder / "data" / "checkpoint", tmp_path / "copy")
    (copy / "model.json").write_text(json.dumps(json.loads((copy / "model.json").read_text()) | change))
    with pytest.raises(InputError, match=sentence):
        Served(copy)


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "data" / "checkpoint", tmp_path / "copy")
    path = copy / "checkpoints" / "000000" / "000000010.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"000000010.pt: found other bytes than were saved, expected SHA-256"):
        Served(copy)


def test_the_carried_package_has_a_name_of_its_own_and_imports_nothing_of_the_project(folder: Path) -> None:
    [package] = (folder / "code").iterdir()
    assert package.name.startswith(carry.PREFIX)
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("cxr_dist", "ray", "pyarrow", "sklearn")], path


def test_carried_code_is_what_this_project_runs_but_for_the_name(folder: Path) -> None:
    [package] = (folder / "code").iterdir()
    found = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    assert {path: text.replace(package.name, "cxr_dist") for path, text in found.items()} == carry.carried()
    assert {"serve/model.py", "serve/dicom.py", "data/images.py", "model/fold.py", "__init__.py"} <= set(found)


def test_loading_a_model_leaves_the_projects_own_package_alone(model: mlflow.pyfunc.PyFuncModel) -> None:
    assert type(model._model_impl).__module__.startswith(carry.PREFIX)
    assert importlib.import_module("cxr_dist.evaluate.report").__file__ == str(
        Path(str(sys.modules["cxr_dist"].__file__)).parent / "evaluate" / "report.py"
    )


@pytest.mark.parametrize(("line", "sentence"), [
    ("import ray", "found an import of ray, expected none in what a model carries"),
    ("from pyarrow import fs", "found an import of pyarrow, expected none"),
    ("import cxr_dist.config", "found 'import cxr_dist.config', expected 'from … import …', which can be renamed"),
])  # fmt: skip
def test_an_import_that_cannot_go_along_is_found_when_the_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "model.py").write_text(f"def late():\n    {line}\n")
    monkeypatch.setattr(carry, "_root", lambda: tmp_path)
    with pytest.raises(RunError, match=sentence):
        carry.carried()
