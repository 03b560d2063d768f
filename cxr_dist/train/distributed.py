"""Small collectives that also work in a single process. Control traffic goes over gloo, gradients over DDP's own group."""

import datetime
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "parallel"]

BUCKET_MB = 2
"""Gradients that travel together: the tail's 9 MB in torch's 25 would wait for the last of them, and overlap nothing."""


@dataclass(frozen=True)
class Ranks:
    """This rank among the others, and the gloo group for everything that is not a gradient."""

    rank: int
    world_size: int
    group: Any

    @classmethod
    def join(cls, timeout_s: int) -> "Ranks":
        """A collective call: every rank makes it once, after the process group is up."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks, in float64."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


def parallel(tail: nn.Module, ranks: Ranks) -> nn.Module:
    """The tail with its gradients averaged over the ranks while the backward runs; itself where there is one rank.

    Buffers do not travel: group batch-norm keeps them equal on all ranks.
    """
    if ranks.world_size == 1:
        return tail
    with warnings.catch_warnings():
        # an argument's new name is not in the oldest torch that is supported
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            tail,
            broadcast_buffers=False,
            bucket_cap_mb=BUCKET_MB,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
