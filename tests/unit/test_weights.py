"""Starting weights from every kind of file a person may hold, and from none."""

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cxr_dist.errors import InputError
from cxr_dist.model.augment import IMAGENET, XRV
from cxr_dist.model.initial import FORMAT
from cxr_dist.model.weights import Initial, calibrate, initial, load, restore, save, sha256

FINDINGS = 3
StateDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> StateDict:
    """A DenseNet121 with the three outputs of the tests."""
    return initial("random", num_findings=FINDINGS, seed=7).state


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Any], str]:
    """Stores an object with torch.save and gives its file URI."""
    numbers = itertools.count()

    def store(content: Any) -> str:
        path = tmp_path / f"weights{next(numbers)}.pt"
        torch.save(content, path)
        return path.as_uri()

    return store


def as_old_torchvision(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


@pytest.mark.parametrize(
    "pack",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"state": state, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {as_old_torchvision(name): value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{as_old_torchvision(k)}": v for k, v in state.items()}},
    ],
    ids=["plain", "state_dict", "state", "module prefix", "old names", "all at once"],
)
def test_a_state_dict_comes_back_under_torchvisions_names(
    state: StateDict, stored: Callable[[Any], str], pack: Callable[[StateDict], Any]
) -> None:
    uri = stored(pack(state))
    found = initial(uri, num_findings=FINDINGS, seed=0)
    assert sha256(found.state) == sha256(state)
    assert (found.normalization, found.origin, found.random) == (IMAGENET, uri, False)


def test_old_names_in_this_test_are_really_other_names(state: StateDict) -> None:
    assert len({as_old_torchvision(name) for name in state} - set(state)) == 58 * 12


def test_a_classifier_of_other_size_is_replaced_by_a_seeded_one(state: StateDict, stored: Callable[[Any], str]) -> None:
    uri = stored(state)
    found = initial(uri, num_findings=5, seed=1).state
    assert found["classifier.weight"].shape == (5, 1024)
    fresh = initial("random", num_findings=5, seed=1).state
    assert torch.equal(found["classifier.weight"], fresh["classifier.weight"])
    assert not torch.equal(found["classifier.weight"], initial(uri, num_findings=5, seed=2).state["classifier.weight"])
    features = {name: value for name, value in found.items() if name.startswith("features.")}
    assert sha256(features) == sha256({name: state[name] for name in features})


def test_torchxrayvision_weights_bring_their_normalisation(state: StateDict, stored: Callable[[Any], str]) -> None:
    grey = {**state, "features.conv0.weight": torch.rand(64, 1, 7, 7), "op_threshs": torch.rand(18)}
    grey |= {"classifier.weight": torch.rand(18, 1024), "classifier.bias": torch.rand(18)}
    found = initial(stored(grey), num_findings=FINDINGS, seed=0)
    assert found.normalization == XRV
    assert torch.equal(found.state["features.conv0.weight"], grey["features.conv0.weight"])
    assert found.state["classifier.weight"].shape == (FINDINGS, 1024)
    assert set(found.state) == set(state)


def test_another_architecture_is_refused_by_a_tensor_it_lacks(stored: Callable[[Any], str]) -> None:
    uri = stored(torchvision.models.resnet18(weights=None).state_dict())
    with pytest.raises(InputError, match=r"found no features\.conv0\.weight \(725 of DenseNet121's tensors missing\)"):
        initial(uri, num_findings=FINDINGS, seed=0)


def test_a_wider_network_is_refused_by_a_shape(state: StateDict, stored: Callable[[Any], str]) -> None:
    wide = {**state, "features.norm5.weight": torch.rand(1920)}
    with pytest.raises(InputError, match=r"found features\.norm5\.weight of shape \(1920,\), expected \(1024,\)"):
        initial(stored(wide), num_findings=FINDINGS, seed=0)


def test_a_pickled_module_is_refused_without_running_it(stored: Callable[[Any], str]) -> None:
    with pytest.raises(InputError, match=r"cannot be read as saved tensors .* without pickled modules"):
        load(stored(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "found a list, expected a state dict"), ({"epoch": 3}, "found no tensors")],
)
def test_a_file_of_other_things_is_refused(stored: Callable[[Any], str], content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(stored(content))


def test_a_file_that_is_no_torch_file_or_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.pt: cannot be read as saved tensors"):
        load(str(tmp_path / "page.pt"))
    with pytest.raises(InputError, match=r"none\.pt: found no file; give imagenet, random or a URI"):
        load(str(tmp_path / "none.pt"))
    with pytest.raises(
        InputError, match=r"cannot be read \(.*directory.*\); give imagenet, random or the URI of a file"
    ):
        load(str(tmp_path))


def test_a_runs_checkpoint_is_joined_with_its_frozen_prefix(state: StateDict, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    start = Initial(state=state, normalization=IMAGENET, origin="random")
    (tmp_path / "initial.pt").write_bytes(save(start))
    tail = {name: value + 1 for name, value in state.items() if name.startswith(("features.norm5", "classifier"))}
    torch.save({"format": 1, "tail": tail, "progress": {"epochs": 2}}, tmp_path / "checkpoints" / "000000010.pt")
    found = load(str(tmp_path / "checkpoints" / "000000010.pt"))
    assert sha256(found) == sha256({**state, **tail}) != sha256(state)
    (tmp_path / "initial.pt").unlink()
    with pytest.raises(InputError, match=r"initial\.pt: found no file, expected the run's starting weights"):
        load(str(tmp_path / "checkpoints" / "000000010.pt"))


def test_imagenet_is_torchvisions_checked_download(state: StateDict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(url: str, **options: Any) -> StateDict:
        asked.update(options, url=url)
        published = {as_old_torchvision(name): value for name, value in state.items()}
        return published | {"classifier.weight": torch.rand(1000, 1024), "classifier.bias": torch.rand(1000)}

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    found = initial("imagenet", num_findings=FINDINGS, seed=0)
    assert re.search(r"/densenet121-\w+\.pth$", asked["url"])
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True
    assert (found.normalization, found.origin, found.random) == (IMAGENET, "imagenet", False)
    features = {name: value for name, value in found.state.items() if name.startswith("features.")}
    assert sha256(features) == sha256({name: state[name] for name in features})
    assert found.state["classifier.weight"].shape == (FINDINGS, 1024)


def test_random_weights_depend_on_the_seed_alone(state: StateDict) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = initial("random", num_findings=FINDINGS, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.random
    assert sha256(again.state) == sha256(state)
    assert sha256(initial("random", num_findings=FINDINGS, seed=8).state) != sha256(state)


def test_calibration_gives_the_statistics_of_the_images(state: StateDict) -> None:
    torch.set_num_threads(1)
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    before = sha256(state)
    found = calibrate(state, images)
    assert sha256(state) == before
    first = nn.functional.conv2d(images, state["features.conv0.weight"], stride=2, padding=3)
    torch.testing.assert_close(found["features.norm0.running_mean"], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["features.norm0.running_var"], first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    moving = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(found[name], value) for name, value in state.items() if not name.endswith(moving))
    # the last norm's output over these images has mean 0 and variance 1 in eval mode, but for unbiased variances
    model = torchvision.models.densenet121(num_classes=FINDINGS).eval()
    with torch.no_grad():
        model.load_state_dict(found)
        spread = model.features(images).var((0, 2, 3)).mean()
        model.load_state_dict(state)
        before_spread = model.features(images).var((0, 2, 3)).mean()
    assert 0.8 < spread < 1.2
    assert not 0.8 < before_spread < 1.2
    assert sha256(calibrate(state, images)) == sha256(found)


def test_save_and_restore_round_trip(state: StateDict) -> None:
    start = Initial(state=state, normalization=XRV, origin="s3://bucket/xrv.pt")
    found = restore(save(start), "initial.pt")
    assert (found.normalization, found.origin, found.random) == (XRV, "s3://bucket/xrv.pt", False)
    assert list(found.state) == list(state)
    assert sha256(found.state) == sha256(state)


def test_unknown_format_is_refused() -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT + 1, "state": {}}, buffer)
    with pytest.raises(InputError, match=r"initial\.pt: found format 2, expected 1; use the version that wrote it"):
        restore(buffer.getvalue(), "initial.pt")


def test_hash_changes_with_any_value_name_type_or_shape() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    others = [
        {**base, "a": torch.tensor([1.0, torch.tensor(2.0).nextafter(torch.tensor(3.0))])},
        {**base, "b": torch.tensor(4)},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"][None]},
        {"a": base["a"]},
    ]
    assert len({sha256(state) for state in [base, *others]}) == 7


def test_hash_is_of_values_not_of_layout() -> None:
    plain = torch.rand(2, 3, 4, 5)
    assert sha256({"w": plain, "v": plain}) == sha256({"v": plain, "w": plain.to(memory_format=torch.channels_last)})
