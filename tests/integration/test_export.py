"""ONNX: the same probabilities as the logged model's, for any number of images, from a file of its own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed: pip install 'cxr-dist[onnx]'")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="the extra [onnx] is not installed: pip install 'cxr-dist[onnx]'"
)
pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed: pip install 'cxr-dist[onnx]'")

from cxr_dist.data.images import to_grey_many  # noqa: E402
from cxr_dist.errors import ConfigError, InputError  # noqa: E402
from cxr_dist.registry import export as module  # noqa: E402
from cxr_dist.registry.export import export  # noqa: E402
from cxr_dist.registry.package import contents, write_model  # noqa: E402
from cxr_dist.serve.model import Served  # noqa: E402
from tests.predicting import NAMES, SIDE, SIZE, make_model  # noqa: E402
from tests.releases import noise, png  # noqa: E402
from tests.unit.test_predict_model import validation  # noqa: E402

IMAGES = [png(noise(row, SIDE)) for row in range(7)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "first", validation=validation())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: str) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export(run, path)


def test_its_probabilities_are_the_logged_models(exported: tuple[Path, dict], run: str, tmp_path: Path) -> None:
    path, told = exported
    folder = write_model(run, contents(run), "", tmp_path / "model")
    table = Served(folder / "data" / "checkpoint", "cpu").predict(IMAGES)
    session = onnxruntime.InferenceSession(str(path))
    for count in (7, 1, 4):
        found = session.run(["raw", "calibrated"], {"pixels": to_grey_many(IMAGES[:count], SIZE)})
        for kind, values in zip(("raw", "calibrated"), found, strict=True):
            expected = table[[f"{kind}_{name}" for name in NAMES]].to_numpy(np.float64)[:count]
            assert 0.02 < expected.min() < expected.max() < 0.98  # else anything would agree
            assert np.abs(values - expected).max() <= 1e-4
    assert told["largest_difference"] <= 1e-4
    assert sorted(path.parent.iterdir()) == [path]


def test_the_file_says_what_it_is(exported: tuple[Path, dict], run: str) -> None:
    model = onnx.load(str(exported[0]))
    onnx.checker.check_model(model)
    [entry] = [entry for entry in model.metadata_props if entry.key == "cxr_dist"]
    assert json.loads(entry.value) == contents(run).facts
    [pixels] = model.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sides = pixels.type.tensor_type.shape.dim
    assert (sides[0].dim_param != "", sides[1].dim_value, sides[2].dim_value) == (True, SIZE, SIZE)


def test_a_difference_from_torch_is_no_export(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    with pytest.raises(InputError, match=r"found probabilities that differ by .* between torch and onnxruntime"):
        export(run, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_step_has_no_tolerance(run: str) -> None:
    facts = contents(run, method="isotonic").facts
    with pytest.raises(ConfigError, match="found a calibration by isotonic, expected platt"):
        module._calibration(facts)


def test_without_the_extra_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, run: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"found no onnxruntime, expected the extra \[onnx\]"):
        export(run, tmp_path / "model.onnx")
