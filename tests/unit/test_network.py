"""From grey pixels to logits: precision, chunks, and a score that is the image's own."""

import numpy as np
import pytest
import torch

from cxr_dist.config import ModelConfig
from cxr_dist.model import weights
from cxr_dist.model.augment import IMAGENET, XRV, Normalization, affine_coefficients, to_input
from cxr_dist.model.network import Network, precision_of
from cxr_dist.model.weights import Initial
from tests.releases import noise

CPU = torch.device("cpu")
IMAGES = np.stack([noise(seed, 64) for seed in range(7)])


def network(normalization: Normalization = IMAGENET, precision: str = "fp32") -> Network:
    torch.set_num_threads(1)
    state = weights.initial("random", num_findings=2, seed=0).state
    if normalization is XRV:
        state = {**state, "features.conv0.weight": state["features.conv0.weight"][:, :1] / 1024}
    config = ModelConfig(bn_group=2, prefix_chunk=4)
    initial = Initial(state=state, normalization=normalization, origin="random")
    return Network.build(initial, config, num_findings=2, precision=precision, device=CPU)


@pytest.fixture(scope="module")
def plain() -> Network:
    return network()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", (torch.float32, None)),
        ("fp64", (torch.float64, None)),
        ("bf16", (torch.float32, torch.bfloat16)),
        ("fp16", (torch.float32, torch.float16)),
        ("auto", (torch.float32, None)),
    ],
)
def test_precision_on_cpu(name: str, expected: tuple[torch.dtype, torch.dtype | None]) -> None:
    assert precision_of(name, CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_precision_is_bf16_where_the_gpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_of("auto", torch.device("cuda")) == (torch.float32, expected)


def test_a_score_is_the_same_bits_whoever_else_is_scored(plain: Network) -> None:
    together = plain.score(IMAGES)
    assert (together.shape, together.dtype) == ((7, 2), np.float32)
    for row in range(7):
        np.testing.assert_array_equal(plain.score(IMAGES[row : row + 1])[0], together[row])
    order = [6, 1, 0, 4, 3]
    np.testing.assert_array_equal(plain.score(IMAGES[order]), together[order])


def test_scoring_is_the_eval_network_and_leaves_training_as_it_was(plain: Network) -> None:
    plain.tail.train()
    kept = {name: value.clone() for name, value in plain.tail.state_dict().items()}
    found = plain.score(IMAGES)
    assert plain.tail.training
    assert all(torch.equal(value, kept[name]) for name, value in plain.tail.state_dict().items())
    with torch.no_grad():
        inputs = to_input(torch.from_numpy(IMAGES), IMAGENET)
        expected = plain.tail.eval()(plain.prefix(inputs))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)
    plain.score(IMAGES)
    assert not plain.tail.training


def test_draws_augment_the_features(plain: Network) -> None:
    draws = np.random.default_rng(0).random((7, 6), dtype=np.float32)
    coefficients = torch.from_numpy(affine_coefficients(draws, 64))
    expected = plain.prefix(to_input(torch.from_numpy(IMAGES[:4]), IMAGENET, coefficients_B6=coefficients[:4]))
    assert torch.equal(plain.features(IMAGES, draws)[:4], expected)
    assert not torch.equal(plain.features(IMAGES)[:4], expected)


def test_features_take_part_in_autograd(plain: Network) -> None:
    features = plain.features(IMAGES[:4])
    plain.tail.train()(features).sum().backward()
    assert plain.tail.classifier.weight.grad is not None


def test_one_channel_weights_see_their_own_normalisation() -> None:
    grey = network(XRV)
    inputs = to_input(torch.from_numpy(IMAGES[:4]), XRV)
    assert torch.equal(grey.features(IMAGES[:4]), grey.prefix(inputs))


def test_bf16_scores_are_near_and_come_as_float32(plain: Network) -> None:
    found = network(precision="bf16").score(IMAGES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain.score(IMAGES), atol=0.05)
    assert not np.array_equal(found, plain.score(IMAGES))


def test_double_precision_is_near_single(plain: Network) -> None:
    np.testing.assert_allclose(network(precision="fp64").score(IMAGES), plain.score(IMAGES), rtol=1e-3, atol=1e-4)
