"""The folded prefix against the plain one, in double precision, where folding shows no rounding."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cxr_dist.config import ModelConfig, Trainable
from cxr_dist.model import weights
from cxr_dist.model.augment import IMAGENET, XRV, Normalization, to_grey, to_input
from cxr_dist.model.densenet import Prefix, build, run_prefix
from cxr_dist.model.fold import Stem, before_convolution, fold, stem
from tests.releases import noise

SIZES = (63, 64)
IMAGES = {size: torch.from_numpy(np.stack([noise(seed, size) for seed in range(4)])) for size in SIZES}


def hard_state(normalization: Normalization = IMAGENET) -> dict[str, Tensor]:
    """Weights whose norms have scales of both signs, zeros and next to nothing, and means far from zero."""
    torch.set_num_threads(1)
    state = weights.initial("random", num_findings=2, seed=0).state
    if normalization is XRV:
        state = {**state, "features.conv0.weight": state["features.conv0.weight"][:, :1].clone()}
    generator = torch.Generator().manual_seed(3)
    for name, value in state.items():
        if "norm" in name and name.endswith(("weight", "bias")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5 + (0.6 if name.endswith("weight") else 0.1))
        if "norm" in name and name.endswith("weight"):
            value[3], value[5], value[6], value[7] = 0.0, 1e-30, -1e-30, 1e-39
    if normalization is XRV:
        return state
    return weights.calibrate(state, to_input(IMAGES[64], normalization))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return hard_state()


def prefix_of(state: dict[str, Tensor], trainable: Trainable, dtype: torch.dtype = torch.float64) -> Prefix:
    return build(state, ModelConfig(trainable=trainable), 2)[0].to(dtype)


def test_the_hard_state_is_hard(state: dict[str, Tensor]) -> None:
    prefix = prefix_of(state, "denseblock4")
    activations = [
        layer.activation
        for part in fold(prefix.features, IMAGENET, torch.float64).parts
        for layer in getattr(part, "layers", ())
    ]
    assert all(activation.high is not None for activation in activations)
    assert any(torch.isinf(activation.low).any() for activation in activations)


@pytest.mark.parametrize("trainable", ["denseblock2", "denseblock3", "denseblock4", "head"])
@pytest.mark.parametrize("size", SIZES)
def test_every_cut_is_the_plain_prefix(state: dict[str, Tensor], trainable: Trainable, size: int) -> None:
    prefix = prefix_of(state, trainable)
    expected = prefix(to_input(IMAGES[size], IMAGENET, dtype=torch.float64))
    found = fold(prefix.features, IMAGENET, torch.float64)(to_grey(IMAGES[size], torch.float64))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_one_channel_weights_fold_too() -> None:
    prefix = prefix_of(hard_state(XRV), "denseblock3")
    expected = prefix(to_input(IMAGES[64], XRV, dtype=torch.float64))
    found = fold(prefix.features, XRV, torch.float64)(to_grey(IMAGES[64], torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalization", [IMAGENET, Normalization((1.0, 2.0, 3.0), (5.0, -7.0, 11.0))])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_convolution_is_exact_at_the_border(
    state: dict[str, Tensor], normalization: Normalization, size: int
) -> None:
    """Zero padding is zero after normalisation: a shift folded as one number a channel would be wrong there."""
    modules = dict(prefix_of(state, "denseblock2").features.named_children())
    expected = modules["norm0"](modules["conv0"](to_input(IMAGES[size], normalization, dtype=torch.float64)))
    first = stem(modules, torch.zeros(64, dtype=torch.float64), normalization, torch.float64)
    grey = to_grey(IMAGES[size], torch.float64) - first.middle
    found = nn.functional.conv2d(grey, first.kernel, stride=2, padding=3) + first.border_map(size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inside, constant = first.border_map(size)[0, :, 2:-2, 2:-2], first.border_map(size)[0, :, 3, 3]
    torch.testing.assert_close(inside, constant[:, None, None].expand_as(inside))
    assert (first.border_map(size)[0, :, 0, 0] - constant).abs().max() > 0.1


def test_first_levels_are_taken_near_their_middle(state: dict[str, Tensor]) -> None:
    modules = dict(prefix_of(state, "denseblock2").features.named_children())
    first = stem(modules, torch.zeros(64, dtype=torch.float64), IMAGENET, torch.float32)
    # the mean of ImageNet's channel means, 0.449 of 255
    assert first.middle == 115.0 or first.middle == 114.0


def activation_of(scale: float, shift: float, dtype: torch.dtype = torch.float64) -> tuple[nn.BatchNorm2d, nn.Conv2d]:
    norm, conv = nn.BatchNorm2d(1, eps=0.0).to(dtype).eval(), nn.Conv2d(1, 1, 1, bias=False).to(dtype)
    with torch.no_grad():
        norm.weight.fill_(scale)  # type: ignore[union-attr]
        norm.bias.fill_(shift)  # type: ignore[union-attr]
        conv.weight.fill_(2.0)
    return norm, conv


@pytest.mark.parametrize(
    ("scale", "shift", "expected"),
    [
        # 2 relu(scale x + shift) at x = -3, 0, 1, 4
        (1.0, -1.0, (0.0, 0.0, 0.0, 6.0)),
        (0.5, 1.0, (0.0, 2.0, 3.0, 6.0)),
        (-1.0, 2.0, (10.0, 4.0, 2.0, 0.0)),
        (-2.0, -2.0, (8.0, 0.0, 0.0, 0.0)),
        (0.0, 3.0, (6.0, 6.0, 6.0, 6.0)),
        (0.0, -3.0, (0.0, 0.0, 0.0, 0.0)),
        (0.0, 0.0, (0.0, 0.0, 0.0, 0.0)),
        (1.0, 0.0, (0.0, 0.0, 2.0, 8.0)),
        # thresholds beyond any activation
        (1e-30, 3.0, (6.0, 6.0, 6.0, 6.0)),
        (-1e-30, 3.0, (6.0, 6.0, 6.0, 6.0)),
        (1e-30, -3.0, (0.0, 0.0, 0.0, 0.0)),
        (-1e-30, -3.0, (0.0, 0.0, 0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_activation_by_hand(scale: float, shift: float, expected: tuple[float, ...], dtype: torch.dtype) -> None:
    norm, conv = activation_of(scale, shift)
    x = torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=dtype).view(4, 1, 1, 1)
    center = torch.tensor([0.5], dtype=torch.float64)
    activation, kernel, bias = before_convolution(norm, conv, center, dtype)
    found = activation(x - 0.5).double() * kernel + bias
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-9)


def test_single_precision_is_no_less_exact_than_the_plain_form(state: dict[str, Tensor]) -> None:
    """Rounding is measured against double precision; without centring the folded form's would be half as large again."""
    exact = prefix_of(state, "denseblock4")(to_input(IMAGES[64], IMAGENET, dtype=torch.float64))
    single = prefix_of(state, "denseblock4", torch.float32)
    plain = single(to_input(IMAGES[64], IMAGENET))
    folded = fold(single.features, IMAGENET, torch.float32)(to_grey(IMAGES[64], torch.float32))
    assert (folded - exact).norm() < 1.1 * (plain - exact).norm()
    assert (plain - exact).norm() < 1e-5 * exact.norm()


def test_an_image_has_the_same_bits_in_any_place_and_company(state: dict[str, Tensor]) -> None:
    folded = fold(prefix_of(state, "denseblock4", torch.float32).features, IMAGENET, torch.float32)
    grey = to_grey(torch.cat([IMAGES[64], IMAGES[64].flip(1)]), torch.float32)
    together = run_prefix(folded, grey, 4)
    assert not together.is_inference()
    for row in range(8):
        assert torch.equal(run_prefix(folded, grey[row : row + 1], 4)[0], together[row])
    order = torch.tensor([5, 2, 7, 0, 1, 6])
    assert torch.equal(run_prefix(folded, grey[order], 4), together[order])


def test_levels_are_not_changed_by_running(state: dict[str, Tensor]) -> None:
    folded = fold(prefix_of(state, "denseblock2", torch.float32).features, IMAGENET, torch.float32)
    assert isinstance(folded.parts[0], Stem)
    grey = to_grey(IMAGES[64], torch.float32)
    kept, first = grey.clone(), folded(grey)
    assert torch.equal(grey, kept)
    assert torch.equal(folded(grey), first)
