"""From grey pixels to logits: precision, chunks, forms of the prefix, and a score that is the image's own."""

from typing import Any

import numpy as np
import pytest
import torch

from cxr_dist.config import ModelConfig
from cxr_dist.model import weights
from cxr_dist.model.augment import IMAGENET, XRV, Normalization, affine_coefficients, to_input
from cxr_dist.model.network import Network, fix_arithmetic, precision_of
from cxr_dist.model.weights import Initial
from tests.releases import noise

CPU = torch.device("cpu")
IMAGES = np.stack([noise(seed, 64) for seed in range(7)])


def network(normalization: Normalization = IMAGENET, precision: str = "fp32", **model: Any) -> Network:
    torch.set_num_threads(1)
    state = weights.initial("random", num_findings=2, seed=0).state
    if normalization is XRV:
        state = {**state, "features.conv0.weight": state["features.conv0.weight"][:, :1] / 1024}
    config = ModelConfig(**{"bn_group": 2, "prefix_chunk": 4, **model})
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


def test_draws_augment_the_features() -> None:
    plain = network(prefix_form="plain")
    draws = np.random.default_rng(0).random((7, 6), dtype=np.float32)
    coefficients = torch.from_numpy(affine_coefficients(draws, 64))
    expected = plain.prefix(to_input(torch.from_numpy(IMAGES[:4]), IMAGENET, coefficients_B6=coefficients[:4]))
    assert torch.equal(plain.features(IMAGES, draws)[:4], expected)
    assert not torch.equal(plain.features(IMAGES)[:4], expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("augmented", [False, True])
def test_both_forms_of_the_prefix_give_the_same_features(precision: str, augmented: bool) -> None:
    draws = np.random.default_rng(0).random((7, 6), dtype=np.float32) if augmented else None
    folded, plain = (
        network(precision=precision, prefix_form=form).features(IMAGES, draws) for form in ("folded", "plain")
    )
    assert (folded.dtype, folded.shape) == (plain.dtype, plain.shape)
    bound = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 0.1}[precision]
    assert (folded - plain).float().norm() < bound * plain.float().norm()
    assert not torch.equal(folded, plain)


def test_the_form_is_named_for_the_key() -> None:
    assert network().prefix.form == "folded-1"
    assert network(prefix_form="plain").prefix.form == "plain-1"


def test_a_folded_prefix_is_still_the_weights_it_was_made_from() -> None:
    folded, plain = (network(prefix_form=form).prefix for form in ("folded", "plain"))
    assert folded.folded is not None
    assert weights.sha256(folded.state_dict()) == weights.sha256(plain.state_dict())


@pytest.mark.parametrize("form", ["folded", "plain"])
def test_features_do_not_depend_on_the_number_of_threads(form: str) -> None:
    found = network(prefix_form=form, prefix_chunk=0)
    try:
        features = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            features.append(found.features(IMAGES))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*features)


@pytest.mark.parametrize("form", ["folded", "plain"])
def test_a_network_without_a_prefix_sees_normalised_images(form: str) -> None:
    whole = network(prefix_form=form, trainable="all")
    assert torch.equal(whole.features(IMAGES), to_input(torch.from_numpy(IMAGES), IMAGENET))


def test_chunks_suit_the_device_unless_they_are_given() -> None:
    found = {form: network(prefix_form=form, prefix_chunk=0).chunk for form in ("folded", "plain")}
    assert found == {"folded": 4, "plain": 16}
    assert network(prefix_chunk=3).chunk == 3


def test_gpu_arithmetic_is_fixed_on_demand() -> None:
    fix_arithmetic()
    cudnn = torch.backends.cudnn
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_features_take_part_in_autograd(plain: Network) -> None:
    features = plain.features(IMAGES[:4])
    plain.tail.train()(features).sum().backward()
    assert plain.tail.classifier.weight.grad is not None


def test_one_channel_weights_see_their_own_normalisation() -> None:
    grey = network(XRV, prefix_form="plain")
    inputs = to_input(torch.from_numpy(IMAGES[:4]), XRV)
    expected = grey.prefix(inputs)
    assert torch.equal(grey.features(IMAGES[:4]), expected)
    torch.testing.assert_close(network(XRV).features(IMAGES[:4]), expected, rtol=1e-3, atol=1e-4)


def test_bf16_scores_are_near_and_come_as_float32(plain: Network) -> None:
    found = network(precision="bf16").score(IMAGES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain.score(IMAGES), atol=0.05)
    assert not np.array_equal(found, plain.score(IMAGES))


def test_double_precision_is_near_single(plain: Network) -> None:
    np.testing.assert_allclose(network(precision="fp64").score(IMAGES), plain.score(IMAGES), rtol=1e-3, atol=1e-4)
