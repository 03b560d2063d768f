"""A dense block trained as one operation against its layers one after the other."""

import pytest
import torch
from torch import Tensor

from cxr_dist.model import batchnorm, densenet
from cxr_dist.model.batchnorm import group_norms, update_running_statistics, use_group_statistics
from cxr_dist.model.block import train_block
from cxr_dist.model.densenet import DenseBlock

CHANNELS, LAYERS, GROUP = 24, 3, 4


def block(dtype: torch.dtype = torch.float64) -> DenseBlock:
    torch.set_num_threads(1)
    found = DenseBlock(CHANNELS, LAYERS).to(dtype).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in found.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.5 if value.dim() == 1 else 0.1))
    use_group_statistics(found, GROUP)
    return found.train()


def batch(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(num, CHANNELS, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def outcome(found: DenseBlock, features: Tensor, *, plain: bool, mixed: bool = False) -> dict[str, Tensor]:
    """Output, gradients and moved running statistics after one step of a random loss."""
    found.as_one = not plain
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        # asked for directly: a CPU in mixed precision goes layer by layer by itself
        output = found(features) if plain else train_block(list(found.children()), features)  # type: ignore[arg-type]
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (output * weight.to(output.dtype)).sum().backward()
    update_running_statistics(group_norms(found))
    result = {"output": output.detach(), **{name: value.grad for name, value in found.named_parameters()}}
    if features.grad is not None:
        result["features"] = features.grad
    return result | {name: value for name, value in found.named_buffers() if "running" in name}  # type: ignore[return-value]


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_one_operation_is_its_layers(monkeypatch: pytest.MonkeyPatch, num_groups: int, wanted: bool, way: str) -> None:
    expected = outcome(block(), batch(num_groups * GROUP).requires_grad_(wanted), plain=True)
    monkeypatch.setattr(batchnorm, "all_at_once", lambda batch: way == "gpu")
    found = outcome(block(), batch(num_groups * GROUP).requires_grad_(wanted), plain=False)
    assert found.keys() == expected.keys()
    assert ("features" in found) == wanted
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_mixed_precision_is_as_near_to_the_truth_as_the_layers_are() -> None:
    exact = outcome(block(torch.float32), batch(8, torch.float32).requires_grad_(), plain=True)
    found, layers = (
        outcome(block(torch.float32), batch(8, torch.float32).requires_grad_(), plain=plain, mixed=True)
        for plain in (False, True)
    )
    assert found["output"].dtype == torch.bfloat16
    assert {value.dtype for name, value in found.items() if name != "output"} == {torch.float32}
    for name in exact:
        error, usual = ((result[name] - exact[name]).norm() for result in (found, layers))
        # the block's input is rounded to 16 bits before its statistics are taken
        assert error < 2 * usual + 2**-8 * exact[name].norm(), name


@pytest.mark.parametrize(("mixed", "as_one"), [(False, True), (True, False)])
def test_a_cpu_trains_as_one_operation_in_full_precision_only(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, as_one: bool
) -> None:
    calls = []
    monkeypatch.setattr(densenet, "train_block", lambda layers, features: calls.append(1) or features)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        block(torch.float32)(batch(GROUP, torch.float32))
    assert bool(calls) == as_one


def test_frozen_parameters_get_no_gradient() -> None:
    found = block()
    found.denselayer2.norm1.requires_grad_(False)
    found.denselayer2.conv2.requires_grad_(False)
    found(batch(GROUP)).sum().backward()
    without = {name for name, value in found.named_parameters() if value.grad is None}
    assert without == {"denselayer2.norm1.weight", "denselayer2.norm1.bias", "denselayer2.conv2.weight"}


def test_same_step_twice_is_the_same_bits() -> None:
    first, second = (outcome(block(torch.float32), batch(8, torch.float32), plain=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluation_goes_layer_by_layer_with_running_statistics() -> None:
    found = block().eval()
    features = batch(3)
    output = found(features)
    found.as_one = False
    assert torch.equal(found(features), output)
    assert all(norm.seen == () for norm in group_norms(found))


def test_a_broken_group_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 6 images: expected a multiple of the batch-norm group of 4"):
        block()(batch(6))


def test_changed_weights_before_the_backward_are_noticed() -> None:
    found = block()
    output = found(batch(GROUP))
    with torch.no_grad():
        found.denselayer1.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
