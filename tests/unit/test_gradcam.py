"""Grad-CAM against a network worked by hand, against class activation maps, and that a map is the image's own."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cxr_dist.errors import RunError
from cxr_dist.model.gradcam import cams, upsampled
from tests.releases import noise
from tests.unit.test_network import network

IMAGES = np.stack([noise(seed, 96) for seed in range(5)])
"""Maps of 3 x 3."""


class Tiny(nn.Module):
    """Two feature maps of 2 x 2, averaged, and two findings of weights (2, -1) and (-1, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(2, 2, bias=False)
        self.classifier.weight.data = torch.tensor([[2.0, -1.0], [-1.0, 3.0]])

    def forward(self, features_B2HW: Tensor) -> Tensor:
        return self.classifier(self.relu(features_B2HW).mean((2, 3)))


def tiny(maps_B2HW: list) -> Any:
    maps = torch.tensor(maps_B2HW)
    return SimpleNamespace(
        device=torch.device("cpu"), tail=Tiny(), features=lambda images: maps[: len(images)], mixed=nullcontext
    )


def test_by_hand() -> None:
    # after the ReLU: A = [[1, 0], [0, 3]] and B = [[0, 2], [2, 0]]; the logit of finding 0 is 2 mean(A) - mean(B), so the
    # gradients are 2/4 and -1/4 everywhere, and the map is relu(A/2 - B/4) = [[0.5, 0], [0, 1.5]]
    net = tiny([[[[1.0, -5.0], [-1.0, 3.0]], [[-2.0, 2.0], [2.0, -7.0]]]])
    images = np.zeros((1, 64, 64), np.uint8)
    np.testing.assert_allclose(cams(net, images, np.array([0])), [[[1 / 3, 0], [0, 1]]], atol=1e-7)
    # finding 1: relu(-A/4 + 3 B/4) = [[0, 1.5], [1.5, 0]]
    np.testing.assert_allclose(cams(net, images, np.array([1])), [[[0, 1], [1, 0]]], atol=1e-7)


def test_nothing_that_speaks_for_a_finding_is_a_map_of_zeros() -> None:
    net = tiny([[[[1.0, 2.0], [3.0, 4.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])
    assert not cams(net, np.zeros((1, 64, 64), np.uint8), np.array([1])).any()


def test_values_that_are_no_numbers_are_an_error() -> None:
    net = tiny([[[[np.nan, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    with pytest.raises(RunError, match="no numbers"):
        cams(net, np.zeros((1, 64, 64), np.uint8), np.array([0]))


@pytest.mark.parametrize("trainable", ["denseblock4", "head", "all"])
@pytest.mark.parametrize("pooling", ["avg", "lse"])
def test_it_is_the_class_activation_map_for_both_kinds_of_pooling(pooling: str, trainable: str) -> None:
    """The sum over a map of the gradient of its mean or log-sum-exp is one: the weights are the classifier's."""
    net = network(pooling=pooling, trainable=trainable, precision="fp64")
    columns = np.array([0, 1, 1, 0, 1])
    found = cams(net, IMAGES, columns)
    with torch.no_grad():
        maps = net.tail.eval().features(net.features(IMAGES)).relu()
        weights = net.tail.classifier.weight[torch.from_numpy(columns)]
        expected = (weights[:, :, None, None] * maps).sum(1).relu().numpy()
    assert found.shape == (5, 3, 3)
    assert found.dtype == np.float32
    assert (found.max(axis=(1, 2)) == 1).all()
    assert found.min() >= 0
    np.testing.assert_allclose(found, expected / expected.max(axis=(1, 2), keepdims=True), atol=1e-6)


@pytest.mark.parametrize("pooling", ["avg", "lse"])
def test_a_map_is_the_same_whoever_else_is_asked_for(pooling: str) -> None:
    net = network(pooling=pooling)
    columns = np.array([0, 1, 1, 0, 1])
    together = cams(net, IMAGES, columns)
    for row in range(5):
        alone = cams(net, IMAGES[row : row + 1], columns[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-6)
    many = np.tile(np.arange(5), 5)  # more than a chunk of the tail
    np.testing.assert_allclose(cams(net, IMAGES[many], columns[many]), together[many], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(cams(net, IMAGES, columns), together)


def test_the_network_is_left_as_it_was() -> None:
    net = network()
    net.tail.train()
    kept = {name: value.clone() for name, value in net.tail.state_dict().items()}
    cams(net, IMAGES, np.zeros(5, np.int64))
    assert net.tail.training
    assert all(torch.equal(value, kept[name]) for name, value in net.tail.state_dict().items())
    assert all(parameter.grad is None for parameter in net.tail.parameters())
    assert not net.tail.relu._forward_hooks


@pytest.mark.parametrize("side", [2, 3, 7, 10, 64])
def test_enlarging_is_torch_s_bilinear(side: int) -> None:
    heat = np.random.default_rng(0).random((3, 4), np.float32)
    expected = nn.functional.interpolate(torch.from_numpy(heat)[None, None], (side, side), mode="bilinear")
    np.testing.assert_allclose(upsampled(heat, side), expected[0, 0].numpy(), atol=1e-6)
