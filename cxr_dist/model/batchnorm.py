"""Batch-norm whose statistics belong to fixed groups of images, wherever the groups are computed.

Ordinary batch-norm ties a run's result to how the batch is shared out: two ranks of 16 images are not one rank of 32.
Here a group is `bn_group` consecutive images of the global step, so a step means the same at any world size and under
gradient accumulation. Running statistics move once a step, by the mean over all its groups on all ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = [
    "FixedBatchNorm2d",
    "GroupBatchNorm2d",
    "Normalized",
    "discard_statistics",
    "group_norms",
    "groups_apart",
    "groups_together",
    "normalize",
    "normalize_backward",
    "update_running_statistics",
    "use_fixed_statistics",
    "use_group_statistics",
]


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over groups of `group` images: the batch must be a whole number of groups in training.

    In training the statistics of each group are kept until `update_running_statistics` folds them in.
    """

    group: int = 16
    seen: tuple[Tensor, ...] = ()
    """Mean and unbiased variance of this step's groups so far, each [groups, 2, C]."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        output, statistics_2GC = Normalize.apply(input, self.group, self.eps, self.weight, self.bias)
        self.keep(*statistics_2GC)
        return output

    def keep(self, mean_GC: Tensor, var_GC: Tensor) -> None:
        """Keep the statistics of groups until the step is over; [groups, C] each."""
        self.seen = (*self.seen, torch.stack([mean_GC, var_GC], 1))


class Normalized(NamedTuple):
    """What the backward of a batch-norm over groups needs."""

    given: Tensor
    """Its input; on a GPU with groups side by side."""
    mean: Tensor
    inverse_std: Tensor


class Normalize(torch.autograd.Function):
    """`normalize` for autograd: (batch, group, eps, scale, shift) to (normalised batch, statistics [2, G, C])."""

    @staticmethod
    def forward(
        ctx: Any, batch_BCHW: Tensor, group: int, eps: float, scale_C: Tensor, shift_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        output, saved, statistics_2GC = normalize(batch_BCHW, group, eps, scale_C, shift_C)
        ctx.group, ctx.eps = group, eps
        ctx.save_for_backward(*saved, scale_C)
        ctx.mark_non_differentiable(statistics_2GC)
        return output, statistics_2GC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *saved, scale_C = ctx.saved_tensors
        grad, grad_scale, grad_shift = normalize_backward(grad_BCHW, Normalized(*saved), ctx.group, ctx.eps, scale_C)
        return grad, None, None, grad_scale, grad_shift


def normalize(
    batch_BCHW: Tensor, group: int, eps: float, scale_C: Tensor | None = None, shift_C: Tensor | None = None
) -> tuple[Tensor, Normalized, Tensor]:
    """A batch normalised group by group, what the backward needs, and mean and unbiased variance [2, G, C]."""
    num_groups = count_groups(batch_BCHW, group)
    at_once = all_at_once(batch_BCHW)
    given = groups_apart(batch_BCHW, group) if at_once else batch_BCHW
    scale, shift = (over_groups(values, num_groups) if at_once else values for values in (scale_C, shift_C))
    # in single precision for 16-bit activations; momentum 1 leaves each group's own mean and unbiased variance
    wide_dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    statistics = torch.zeros(2, len(given) // group, given.shape[1], dtype=wide_dtype, device=given.device)
    found = [
        torch.ops.aten.native_batch_norm(images, scale, shift, mean, var, True, 1.0, eps)
        for images, mean, var in zip(given.split(group), *statistics, strict=True)
    ]
    output = together([one[0] for one in found])
    saved = Normalized(given, torch.stack([one[1] for one in found]), torch.stack([one[2] for one in found]))
    return groups_together(output, num_groups) if at_once else output, saved, statistics.view(2, num_groups, -1)


def normalize_backward(
    grad_BCHW: Tensor, saved: Normalized, group: int, eps: float, scale_C: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the batch, and of scale and shift if there is a scale."""
    num_groups = len(grad_BCHW) // group
    at_once, affine = all_at_once(grad_BCHW), scale_C is not None
    grads_BCHW = groups_apart(grad_BCHW, group) if at_once else grad_BCHW
    scale = over_groups(scale_C, num_groups) if at_once else scale_C
    found = [
        torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(memory_format=torch.channels_last),
            images,
            scale,
            None,
            None,
            mean,
            inverse_std,
            True,
            eps,
            [True, affine, affine],
        )
        for grad, images, mean, inverse_std in zip(
            grads_BCHW.split(group), saved.given.split(group), saved.mean, saved.inverse_std, strict=True
        )
    ]
    grad = together([one[0] for one in found])
    if at_once:
        grad = groups_together(grad, num_groups)
    if not affine:
        return grad, None, None
    # sums over the groups, which lie in one tensor or in several
    return grad, *(torch.cat([one[part] for one in found]).view(num_groups, -1).sum(0) for part in (1, 2))


def all_at_once(batch_BCHW: Tensor) -> bool:
    """Whether groups go side by side into one batch-norm, as suits a GPU; for a CPU the copies cost more than the calls."""
    return batch_BCHW.device.type != "cpu"


def over_groups(values_C: Tensor | None, num_groups: int) -> Tensor | None:
    """A channel's value for each group of `groups_apart`."""
    return None if values_C is None else values_C.expand(num_groups, -1).reshape(-1)


def groups_apart(batch_BCHW: Tensor, group: int) -> Tensor:
    """[G * group, C, H, W] as [group, G * C, H, W]: groups side by side as channels, so that one ordinary batch-norm
    gives each its own statistics. A copy with channels innermost in memory, except of a single group."""
    num_groups = count_groups(batch_BCHW, group)
    if num_groups == 1:
        return batch_BCHW
    _, channels, height, width = batch_BCHW.shape
    wide = empty_of(batch_BCHW, group, num_groups * channels)
    wide.view(group, num_groups, channels, height, width).copy_(
        batch_BCHW.view(num_groups, group, channels, height, width).transpose(0, 1)
    )
    return wide


def groups_together(wide: Tensor, num_groups: int) -> Tensor:
    """The reverse of `groups_apart`."""
    if num_groups == 1:
        return wide
    group, wide_channels, height, width = wide.shape
    channels = wide_channels // num_groups
    batch_BCHW = empty_of(wide, num_groups * group, channels)
    batch_BCHW.view(num_groups, group, channels, height, width).copy_(
        wide.view(group, num_groups, channels, height, width).transpose(0, 1)
    )
    return batch_BCHW


def together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def count_groups(batch_BCHW: Tensor, group: int) -> int:
    num_groups, rest = divmod(len(batch_BCHW), group)
    if rest:
        raise ValueError(f"batch of {len(batch_BCHW)} images: expected a multiple of the batch-norm group of {group}")
    return num_groups


def empty_of(given: Tensor, images: int, channels: int) -> Tensor:
    shape = (images, channels, *given.shape[2:])
    return torch.empty(shape, dtype=given.dtype, device=given.device, memory_format=torch.channels_last)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that uses its running statistics in training too, and never moves them; its affine part trains."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def use_fixed_statistics(module: nn.Module) -> None:
    """Turn every BatchNorm2d under `module` into one with fixed statistics, in place."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = FixedBatchNorm2d


def group_norms(module: nn.Module) -> list[GroupBatchNorm2d]:
    """The group batch-norms under `module`, in order."""
    return [child for child in module.modules() if isinstance(child, GroupBatchNorm2d)]


def use_group_statistics(module: nn.Module, group: int) -> None:
    """Turn every BatchNorm2d under `module` into one with group statistics, in place."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GroupBatchNorm2d
            child.group = group


def update_running_statistics(norms: list[GroupBatchNorm2d]) -> None:
    """Move the running statistics by the mean over this step's groups on all ranks; a collective call."""
    norms = [norm for norm in norms if norm.seen]
    if not norms:
        return
    num_groups = sum(len(seen) for seen in norms[0].seen)
    # one tensor of all norms, [groups, 2 * C of the first, 2 * C of the second, …], and one sum over the groups
    flat = torch.cat([torch.cat(norm.seen).flatten(1) for norm in norms], 1).sum(0)
    if dist.is_initialized():
        dist.all_reduce(flat)
        num_groups *= dist.get_world_size()
    flat /= num_groups
    offset = 0
    for norm in norms:
        size = norm.num_features
        norm.running_mean.lerp_(flat[offset : offset + size], norm.momentum)
        norm.running_var.lerp_(flat[offset + size : offset + 2 * size], norm.momentum)
        norm.num_batches_tracked += 1
        offset += 2 * size
    discard_statistics(norms)


def discard_statistics(norms: list[GroupBatchNorm2d]) -> None:
    """Forget the statistics of a step that is not one (a throw-away backward)."""
    for norm in norms:
        norm.seen = ()
