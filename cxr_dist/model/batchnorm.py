"""Batch-norm whose statistics belong to fixed groups of images, wherever the groups are computed.

Ordinary batch-norm ties a run's result to how the batch is shared out: two ranks of 16 images are not one rank of 32.
Here a group is `bn_group` consecutive images of the global step, so a step means the same at any world size and under
gradient accumulation. Running statistics move once a step, by the mean over all its groups on all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "FixedBatchNorm2d",
    "GroupBatchNorm2d",
    "discard_statistics",
    "group_norms",
    "groups_apart",
    "groups_together",
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
        wide = groups_apart(input, self.group)
        num_groups = len(input) // self.group
        # momentum 1 makes the running buffers hold the groups' own mean and unbiased variance
        mean, var = self.running_mean.new_zeros(2, wide.shape[1]).unbind()
        weight, bias = (value.expand(num_groups, -1).reshape(-1) for value in (self.weight, self.bias))
        output = functional.batch_norm(wide, mean, var, weight, bias, True, 1.0, self.eps)
        self.keep(mean, var)
        return groups_together(output, num_groups)

    def keep(self, mean: Tensor, var: Tensor) -> None:
        """Keep the statistics of groups until the step is over; each [groups * C], group by group."""
        self.seen = (*self.seen, torch.stack([mean.view(-1, self.num_features), var.view(-1, self.num_features)], 1))


def groups_apart(batch_BCHW: Tensor, group: int) -> Tensor:
    """[G * group, C, H, W] as [group, G * C, H, W]: groups side by side as channels, so that one ordinary batch-norm
    gives each its own statistics. No copy of a single group; channels stay innermost in memory."""
    num_groups, rest = divmod(len(batch_BCHW), group)
    if rest:
        raise ValueError(f"batch of {len(batch_BCHW)} images: expected a multiple of the batch-norm group of {group}")
    if num_groups == 1:
        return batch_BCHW
    _, channels, height, width = batch_BCHW.shape
    apart_gHWGC = (
        batch_BCHW.permute(0, 2, 3, 1).reshape(num_groups, group, height, width, channels).permute(1, 2, 3, 0, 4)
    )
    return apart_gHWGC.reshape(group, height, width, num_groups * channels).permute(0, 3, 1, 2)


def groups_together(wide: Tensor, num_groups: int) -> Tensor:
    """The reverse of `groups_apart`."""
    if num_groups == 1:
        return wide
    group, channels, height, width = wide.shape
    apart_gHWGC = wide.permute(0, 2, 3, 1).reshape(group, height, width, num_groups, channels // num_groups)
    return apart_gHWGC.permute(3, 0, 1, 2, 4).reshape(-1, height, width, channels // num_groups).permute(0, 3, 1, 2)


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
