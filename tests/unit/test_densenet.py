"""The cut network against torchvision's own, and the prefix's independence of its company."""

import math
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor

from cxr_dist.config import ModelConfig, Trainable
from cxr_dist.model import weights
from cxr_dist.model.batchnorm import FixedBatchNorm2d, GroupBatchNorm2d
from cxr_dist.model.densenet import DenseNet121, Prefix, Tail, build, log_sum_exp_pool, run_prefix

CUTS: tuple[Trainable, ...] = ("head", "denseblock4", "denseblock3", "denseblock2", "all")
FINDINGS = 3


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.set_num_threads(1)
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def state(images: Tensor) -> dict[str, Tensor]:
    return weights.calibrate(weights.initial("random", num_findings=FINDINGS, seed=0).state, images)


def halves(state: dict[str, Tensor], **config: object) -> tuple[Prefix, Tail]:
    return build(state, ModelConfig(**{"bn_group": 4, **config}), FINDINGS)  # type: ignore[arg-type]


def test_the_network_is_torchvisions_to_the_bit(state: dict[str, Tensor], images: Tensor) -> None:
    ours, theirs = DenseNet121(FINDINGS), torchvision.models.densenet121(num_classes=FINDINGS)
    for network in (ours, theirs):
        network.load_state_dict(state)
    for mode in (False, True):
        found, expected = (network.train(mode)(images) for network in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # ours averages the map in another order
        assert torch.equal(ours.features(images), theirs.features(images))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_one_seed_starts_our_network_and_torchvisions_alike() -> None:
    states = []
    for make in (lambda: DenseNet121(FINDINGS), lambda: torchvision.models.densenet121(num_classes=FINDINGS)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            states.append(make().state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_network_needs_neither_torchvision_nor_torchs_compiler() -> None:
    code = (
        "import sys, torch, cxr_dist.model.network; "
        "print([name for name in ('torchvision', 'torch._dynamo', 'ray', 'mlflow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("trainable", CUTS)
def test_prefix_then_tail_is_torchvisions_network(
    state: dict[str, Tensor], images: Tensor, trainable: Trainable
) -> None:
    whole = torchvision.models.densenet121(num_classes=FINDINGS).eval()
    whole.load_state_dict(state)
    prefix, tail = halves(state, trainable=trainable, pooling="avg")
    tail.eval()
    with torch.no_grad():
        expected, found = whole(images), tail(prefix(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", CUTS)
def test_halves_share_out_torchvisions_names(state: dict[str, Tensor], trainable: Trainable) -> None:
    prefix, tail = halves(state, trainable=trainable)
    names, others = set(prefix.state_dict()), set(tail.state_dict())
    assert names | others == set(state)
    assert names & others == set()
    first = {"head": "classifier.", "all": "features.conv0."}.get(trainable, f"features.{trainable}.")
    assert next(iter(tail.state_dict())).startswith(first)


def test_batch_norms_of_the_tail_are_the_named_kind(state: dict[str, Tensor]) -> None:
    for kind, expected in (("group", GroupBatchNorm2d), ("frozen", FixedBatchNorm2d)):
        prefix, tail = halves(state, batch_norm=kind)
        found = [module for module in tail.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert len(found) == 2 * 16 + 1
        assert {type(module) for module in found} == {expected}
        assert {type(module) for module in prefix.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {
            torch.nn.BatchNorm2d
        }


@pytest.mark.parametrize("trained", [True, False])
def test_final_norm_trains_only_on_demand(state: dict[str, Tensor], trained: bool) -> None:
    _, tail = halves(state, train_final_norm=trained)
    frozen = {name for name, value in tail.named_parameters() if not value.requires_grad}
    assert frozen == (set() if trained else {"features.norm5.weight", "features.norm5.bias"})


def test_prefix_is_the_same_bits_whoever_asks(state: dict[str, Tensor], images: Tensor) -> None:
    prefix, _ = halves(state)
    together = run_prefix(prefix, images, 4)
    assert together.shape == (8, 512, 2, 2)
    assert not together.is_inference()
    for row in range(8):
        assert torch.equal(run_prefix(prefix, images[row : row + 1], 4)[0], together[row])
    order = torch.tensor([5, 2, 7, 0, 1, 6])
    assert torch.equal(run_prefix(prefix, images[order], 4), together[order])
    assert torch.equal(run_prefix(prefix, images[1:6], 4), together[1:6])


def test_prefix_is_only_called_with_whole_chunks(state: dict[str, Tensor], images: Tensor) -> None:
    prefix, _ = halves(state)
    sizes = []
    handle = prefix.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert len(run_prefix(prefix, images[:7], 3)) == 7
    handle.remove()
    assert sizes == [3, 3, 3]


def test_no_prefix_leaves_the_images_as_they_are(state: dict[str, Tensor], images: Tensor) -> None:
    prefix, _ = halves(state, trainable="all")
    assert run_prefix(prefix, images, 4) is images


def test_training_the_tail_leaves_the_prefix_alone(state: dict[str, Tensor], images: Tensor) -> None:
    prefix, tail = halves(state)
    prefix.train()
    tail.train()
    assert not prefix.training
    assert not any(module.training for module in prefix.modules())
    kept = {name: value.clone() for name, value in prefix.state_dict().items()}
    before = tail.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD([value for value in tail.parameters() if value.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tail(run_prefix(prefix, images, 4)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(tail.classifier.weight, before)
    for name, value in prefix.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert all(value.grad is None for value in prefix.parameters())


def test_one_channel_weights_make_a_one_channel_prefix(state: dict[str, Tensor], images: Tensor) -> None:
    grey = {**state, "features.conv0.weight": state["features.conv0.weight"].sum(1, keepdim=True)}
    prefix, _ = halves(grey)
    expected, _ = halves(state)
    one = images[:, :1]
    torch.testing.assert_close(prefix(one), expected(one.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_log_sum_exp_pool_by_hand() -> None:
    maps = torch.tensor([[[[0.0, math.log(3.0)]], [[2.0, 2.0]]]])
    # log((1 + 3) / 2) = log 2; a constant map pools to the constant
    torch.testing.assert_close(log_sum_exp_pool(maps, 1.0), torch.tensor([[math.log(2.0), 2.0]]))
    # half of log((1 + 9) / 2)
    torch.testing.assert_close(log_sum_exp_pool(maps, 2.0)[0, 0], torch.tensor(math.log(5.0) / 2))


def test_log_sum_exp_pool_lies_between_mean_and_maximum() -> None:
    maps = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, largest = maps.mean((2, 3)), maps.amax((2, 3))
    torch.testing.assert_close(log_sum_exp_pool(maps, 1e-6), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_sum_exp_pool(maps, 1e5), largest, rtol=0, atol=1e-4)
    pooled = log_sum_exp_pool(maps, 10.0)
    assert ((mean < pooled) & (pooled < largest)).all()


def test_log_sum_exp_pool_of_large_values_has_finite_gradients() -> None:
    maps = torch.tensor([[[[1e4, 1e4], [0.0, -1e4]]]], dtype=torch.float64, requires_grad=True)
    pooled = log_sum_exp_pool(maps, 10.0)
    pooled.sum().backward()
    # two of four at the maximum: log(2 / 4) / 10 below it
    assert pooled.item() == pytest.approx(1e4 - math.log(2.0) / 10, abs=1e-6)
    assert maps.grad is not None
    assert maps.grad.flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=1e-9)
