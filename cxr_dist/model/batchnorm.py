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
    "update_running_statistics",
    "use_fixed_statistics",
    "use_group_statistics",
]


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over groups of `group` images: the batch must be a whole number of groups in training.

    In training the statistics of each group are kept until `update_running_statistics` folds them in.
    """

    group: int = 16
    sums: Tensor | None = None
    """Sums over this step's groups of the mean and the unbiased variance, [2, C]; None before the first."""
    num_groups: int = 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if len(input) % self.group:
            raise ValueError(
                f"batch of {len(input)} images: expected a multiple of the batch-norm group of {self.group}"
            )
        outputs = []
        for images in input.split(self.group):
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            # momentum 1 makes the running buffers hold this group's own mean and unbiased variance
            outputs.append(functional.batch_norm(images, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            stats = torch.stack([mean, var])
            self.sums = stats if self.sums is None else self.sums + stats
            self.num_groups += 1
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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
    norms = [norm for norm in norms if norm.sums is not None]
    if not norms:
        return
    flat = torch.cat([norm.sums.flatten() for norm in norms if norm.sums is not None])
    num_groups = norms[0].num_groups
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
        norm.sums, norm.num_groups = None, 0
