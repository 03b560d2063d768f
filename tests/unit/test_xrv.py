"""TorchXRayVision's models: the library's own outputs on the same pixels, ours by name, and weights that are refused."""

import hashlib
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.evaluate import xrv
from tests.conftest import ROOT
from tests.releases import noise

NAME = "densenet121-res224-nih"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library() -> ModuleType:
    with warnings.catch_warnings():
        return pytest.importorskip("torchxrayvision", reason="the extra xrv is not installed")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([noise(seed, 224) for seed in range(3)])


@pytest.fixture(scope="module")
def state(library: ModuleType, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """Random weights whose batch-norm statistics fit the pixels: the outputs of others are all the same."""
    torch.manual_seed(0)
    model = library.models.DenseNet()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    images = torch.from_numpy(library.utils.normalize(pixels, 255)[:, None])
    with torch.no_grad():
        model.train()(images)
        features = model.eval().features2(images)
        spread = (features - features.mean(axis=0)) @ model.classifier.weight.T
        model.classifier.weight.div_(spread.std(axis=0)[:, None])
        model.classifier.bias.copy_(-(model.classifier.weight @ features.mean(axis=0)))
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def weights(state: dict[str, torch.Tensor], tmp_path: Path) -> str:
    torch.save(state, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def own(library: ModuleType, state: dict[str, torch.Tensor], name: str, pixels: np.ndarray) -> np.ndarray:
    """What the library itself makes of the images, [N, 18]."""
    model = library.models.DenseNet()
    model.load_state_dict(state)
    model.op_threshs = torch.tensor(library.models.model_urls[name]["op_threshs"])
    model.eval()
    with torch.no_grad():
        images = [library.utils.normalize(one, 255, reshape=True) for one in pixels]
        return model(torch.from_numpy(np.stack(images))).numpy()


@pytest.mark.parametrize("name", [NAME, "densenet121-res224-all", "densenet121-res224-chex"])
def test_scores_are_the_librarys_own_mapped_by_name(
    name: str, library: ModuleType, state: dict[str, torch.Tensor], weights: str, pixels: np.ndarray
) -> None:
    expected, targets = own(library, state, name, pixels), library.models.model_urls[name]["labels"]
    findings = tuple(finding for finding in LABEL_SETS["nih14"] if finding in targets)
    found = xrv.XrvNetwork(name, weights, findings, CPU).score(pixels)
    assert found.shape == (3, len(findings))
    for k, finding in enumerate(findings):
        np.testing.assert_allclose(found[:, k], expected[:, targets.index(finding)], atol=1e-6, rtol=0)
    assert np.ptp(found, axis=0).min() > 1e-3  # scores that differ


def test_all_eight_findings_have_an_output(library: ModuleType, weights: str, pixels: np.ndarray) -> None:
    for name in (NAME, "densenet121-res224-all"):
        assert set(LABEL_SETS["nih8"]) <= set(xrv._targets(name))
    found = xrv.XrvNetwork(NAME, weights, LABEL_SETS["nih8"], CPU).score(pixels)
    assert found.shape == (3, 8)
    assert ((found >= 0) & (found <= 1)).all()


def test_grey_levels_go_from_minus_to_plus_1024(library: ModuleType, weights: str) -> None:
    network = xrv.XrvNetwork(NAME, weights, ("Mass",), CPU)
    scaled = network.normalize(np.array([[0, 255]], np.uint8), 255)
    assert scaled.tolist() == [[-1024.0, 1024.0]]
    assert network.score(np.zeros((0, 224, 224), np.uint8)).shape == (0, 1)


def test_many_images_are_scored_in_chunks_and_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, library: ModuleType, weights: str, pixels: np.ndarray
) -> None:
    network = xrv.XrvNetwork(NAME, weights, ("Mass", "Hernia"), CPU)
    whole = network.score(pixels)
    monkeypatch.setattr(xrv, "CHUNK", 2)
    np.testing.assert_allclose(network.score(pixels), whole, atol=1e-5)  # other sums inside the convolutions


def test_the_converters_file_loads_for_its_own_model_alone(
    library: ModuleType, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    points = torch.tensor(library.models.model_urls[NAME]["op_threshs"])
    torch.save({**state, "op_threshs": points}, tmp_path / "nih.pt")
    xrv.XrvNetwork(NAME, str(tmp_path / "nih.pt"), ("Mass",), CPU)
    with pytest.raises(
        InputError, match="the operating points of another model, expected those of densenet121-res224-pc"
    ):
        xrv.XrvNetwork("densenet121-res224-pc", str(tmp_path / "nih.pt"), ("Mass",), CPU)


def test_the_converter_makes_a_state_dict_of_a_release_file(
    library: ModuleType, state: dict[str, torch.Tensor], pixels: np.ndarray, tmp_path: Path
) -> None:
    """By the library's own loader, offline: the release file lies where the library keeps its downloads."""
    model = library.models.DenseNet()
    model.load_state_dict(state)
    release = tmp_path / ".torchxrayvision/models_data" / Path(library.models.model_urls[NAME]["weights_url"]).name
    release.parent.mkdir(parents=True)
    torch.save(model, release)
    out = tmp_path / "nih.pt"
    command = [sys.executable, str(ROOT / "infra/xrv_state_dict.py"), NAME, str(out)]
    done = subprocess.run(
        command, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [hashlib.sha256(out.read_bytes()).hexdigest(), str(out)]
    found = xrv.XrvNetwork(NAME, str(out), LABEL_SETS["nih8"], CPU).score(pixels)
    targets = library.models.model_urls[NAME]["labels"]
    columns = [targets.index(finding) for finding in LABEL_SETS["nih8"]]
    np.testing.assert_allclose(found, own(library, state, NAME, pixels)[:, columns], atol=1e-6, rtol=0)


def test_a_release_file_is_not_unpickled(library: ModuleType, tmp_path: Path) -> None:
    torch.save(library.models.DenseNet(), tmp_path / "release.pt")
    with pytest.raises(
        InputError, match=r"--xrv-weights .*infra/xrv_state_dict.py makes a state dict of a release file"
    ):
        xrv.XrvNetwork(NAME, str(tmp_path / "release.pt"), ("Mass",), CPU)


def test_other_weights_are_refused(library: ModuleType, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    where = tmp_path / "weights.pt"
    with pytest.raises(InputError, match="found no file, expected a state dict"):
        xrv.XrvNetwork(NAME, str(where), ("Mass",), CPU)
    for wrong in (
        {name: value for name, value in state.items() if name != "features.norm5.bias"},
        {**state, "classifier.weight": state["classifier.weight"][:14]},
        {"epoch": 3},
    ):
        torch.save(wrong, where)
        with pytest.raises(InputError, match=f"found no state dict of {NAME}"):
            xrv.XrvNetwork(NAME, str(where), ("Mass",), CPU)
    with pytest.raises(ConfigError, match="--xrv: found 'resnet50-res512-all', expected one of densenet121-res224-all"):
        xrv.XrvNetwork("resnet50-res512-all", str(where), ("Mass",), CPU)


def test_the_caller_keeps_its_warnings_and_random_numbers(library: ModuleType, weights: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchxrayvision"]:
        sys.modules.pop(name)
    xrv._library.cache_clear()
    before = list(warnings.filters)
    xrv.XrvNetwork(NAME, weights, ("Mass",), CPU)
    assert warnings.filters == before
    assert torch.rand(1) == expected


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    xrv._library.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'cxr-dist\[xrv\]'"):
        xrv._targets(NAME)
    xrv._library.cache_clear()
    importlib.invalidate_caches()


def test_the_note_says_what_the_model_may_have_seen() -> None:
    for name in (NAME, "densenet121-res224-all", "densenet121-res224-rsna", "densenet121-res224-new"):
        assert "it may have seen the images judged here" in xrv.note(name)
    assert xrv.note("densenet121-res224-pc").endswith("trained on PadChest, by its name")
    assert "neither logits nor calibrated probabilities" in xrv.note(NAME)
