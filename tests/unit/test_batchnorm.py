"""Group batch-norm against ordinary batch-norm on each group alone."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxr_dist.model import batchnorm
from cxr_dist.model.batchnorm import (
    FixedBatchNorm2d,
    GroupBatchNorm2d,
    discard_statistics,
    group_norms,
    groups_apart,
    groups_together,
    update_running_statistics,
    use_fixed_statistics,
    use_group_statistics,
)

CHANNELS, GROUP = 3, 4


def ordinary() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)  # type: ignore[union-attr]
    return norm


def grouped() -> GroupBatchNorm2d:
    whole = nn.Sequential(ordinary())
    use_group_statistics(whole, GROUP)
    norm = whole[0]
    assert isinstance(norm, GroupBatchNorm2d)
    return norm


def images(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # in the layout of the network: the kernel for another one sums in another order
    batch = torch.randn(num, CHANNELS, 2, 5, generator=generator) * 3 + 1
    return batch.contiguous(memory_format=torch.channels_last)


def moved(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def test_one_group_is_ordinary_batch_norm() -> None:
    expected, found = ordinary(), grouped()
    one, other = (images(GROUP).requires_grad_() for _ in range(2))
    out, out_found = expected(one), found(other)
    assert torch.equal(out_found, out)
    out.pow(3).sum().backward()
    out_found.pow(3).sum().backward()
    for left, right in (
        (one.grad, other.grad),
        *zip((e.grad for e in expected.parameters()), (f.grad for f in found.parameters()), strict=True),
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    update_running_statistics([found])
    for left, right in zip(moved(expected), moved(found), strict=True):
        torch.testing.assert_close(left, right)
    assert found.num_batches_tracked == expected.num_batches_tracked == 1


def test_running_statistics_by_hand() -> None:
    norm = grouped()
    with torch.no_grad():
        norm.running_mean.zero_()  # type: ignore[union-attr]
        norm.running_var.fill_(1.0)  # type: ignore[union-attr]
    pixels = torch.arange(GROUP, dtype=torch.float32)[:, None, None, None].expand(GROUP, CHANNELS, 1, 1)
    norm(pixels)
    update_running_statistics([norm])
    # 0, 1, 2, 3: mean 1.5, unbiased variance 5/3, momentum 0.1
    mean, var = moved(norm)
    torch.testing.assert_close(mean, torch.full((CHANNELS,), 0.15))
    torch.testing.assert_close(var, torch.full((CHANNELS,), 0.9 + 0.1 * 5 / 3))


@pytest.fixture(params=["cpu", "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups one after the other, as on a CPU, and side by side, as on a GPU."""
    monkeypatch.setattr(batchnorm, "all_at_once", lambda batch: request.param == "gpu")


@pytest.mark.usefixtures("way")
def test_two_groups_are_two_batches_and_move_by_their_mean() -> None:
    norm, batch = grouped(), images(2 * GROUP)
    before = [value.clone() for value in moved(norm)]
    out = norm(batch)
    steps = []
    for half, found in zip(batch.split(GROUP), out.split(GROUP), strict=True):
        alone = ordinary()
        assert torch.equal(alone(half), found)
        steps.append([after - start for after, start in zip(moved(alone), before, strict=True)])
    assert [torch.equal(value, start) for value, start in zip(moved(norm), before, strict=True)] == [True, True]
    update_running_statistics([norm])
    for value, start, one, other in zip(moved(norm), before, *steps, strict=True):
        torch.testing.assert_close(value - start, (one + other) / 2)
    assert norm.num_batches_tracked == 1


@pytest.mark.usefixtures("way")
def test_gradients_of_two_groups_are_those_of_two_batches() -> None:
    norm, batch = grouped(), images(2 * GROUP).requires_grad_()
    weight = images(2 * GROUP, seed=1)
    (norm(batch).pow(3) * weight).sum().backward()
    alone, halves = ordinary(), [half.clone().requires_grad_() for half in batch.detach().split(GROUP)]
    for half, part in zip(halves, weight.split(GROUP), strict=True):
        (alone(half).pow(3) * part).sum().backward()
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad, torch.cat([half.grad for half in halves]))  # type: ignore[arg-type]
    for found, expected in zip(norm.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_groups_lie_side_by_side_as_channels(layout: torch.memory_format) -> None:
    batch = (
        torch.arange(3 * GROUP * CHANNELS * 2 * 5.0).reshape(3 * GROUP, CHANNELS, 2, 5).contiguous(memory_format=layout)
    )
    wide = groups_apart(batch, GROUP)
    assert wide.shape == (GROUP, 3 * CHANNELS, 2, 5)
    assert wide.is_contiguous(memory_format=torch.channels_last)
    for number in range(3):
        mine = slice(number * CHANNELS, (number + 1) * CHANNELS)
        assert torch.equal(wide[:, mine], batch[number * GROUP : (number + 1) * GROUP])
    assert torch.equal(groups_together(wide, 3), batch)


def test_one_group_is_not_copied() -> None:
    batch = images(GROUP)
    assert groups_apart(batch, GROUP) is batch
    assert groups_together(batch, 1) is batch


def test_accumulated_micro_batches_are_one_step() -> None:
    whole, parts, batch = grouped(), grouped(), images(3 * GROUP)
    whole(batch)
    for part in batch.split(GROUP):
        parts(part)
    update_running_statistics([whole])
    update_running_statistics([parts])
    for left, right in zip(moved(whole), moved(parts), strict=True):
        assert torch.equal(left, right)


def test_statistics_of_a_step_are_forgotten_afterwards() -> None:
    norm, fresh = grouped(), grouped()
    norm(images(GROUP, seed=1))
    discard_statistics([norm])
    for both in (norm, fresh):
        both(images(GROUP, seed=2))
        update_running_statistics([both])
    assert torch.equal(moved(norm)[0], moved(fresh)[0])
    before = moved(norm)[0].clone()
    update_running_statistics([norm])
    assert torch.equal(moved(norm)[0], before)


def test_evaluation_uses_and_keeps_the_running_statistics() -> None:
    norm, expected, batch = grouped().eval(), ordinary().eval(), images(5)
    assert torch.equal(norm(batch), expected(batch))
    assert norm.seen == ()


def test_batch_of_broken_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 6 images: expected a multiple of the batch-norm group of 4"):
        grouped()(images(6))


def test_fixed_statistics_never_move_but_the_affine_part_trains() -> None:
    whole = nn.Sequential(ordinary())
    use_fixed_statistics(whole)
    norm, batch = whole[0].train(), images(6)
    assert isinstance(norm, FixedBatchNorm2d)
    before = [value.clone() for value in moved(norm)]
    out = norm(batch)
    assert torch.equal(out, ordinary().eval()(batch))
    out.sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().min() > 0
    assert [torch.equal(value, start) for value, start in zip(moved(norm), before, strict=True)] == [True, True]
    assert norm.num_batches_tracked == 0


def test_group_norms_are_found_in_order() -> None:
    whole = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.BatchNorm2d(2)), nn.BatchNorm2d(3))
    use_group_statistics(whole, GROUP)
    assert [norm.num_features for norm in group_norms(whole)] == [1, 2, 3]


def _rank(store: str, rank: int, pipe: multiprocessing.connection.Connection) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    norms = [grouped(), grouped()]
    for number, norm in enumerate(norms):
        norm(images(2 * GROUP, seed=number)[rank * GROUP : (rank + 1) * GROUP])
    update_running_statistics(norms)
    pipe.send([value.tolist() for norm in norms for value in moved(norm)])
    dist.destroy_process_group()


def test_two_ranks_with_a_group_each_are_one_with_both(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    store = f"file://{tmp_path}/store"
    processes = [context.Process(target=_rank, args=(store, rank, pipes[rank][1]), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    norms = [grouped(), grouped()]
    for number, norm in enumerate(norms):
        norm(images(2 * GROUP, seed=number))
    update_running_statistics(norms)
    try:
        for pipe, _ in pipes:
            assert pipe.poll(60)
            for found, expected in zip(pipe.recv(), (v for norm in norms for v in moved(norm)), strict=True):
                torch.testing.assert_close(torch.tensor(found), expected)
    finally:
        for process in processes:
            process.terminate()
            process.join()
