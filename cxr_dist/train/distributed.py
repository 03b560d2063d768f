"""Small collectives that also work in a single process. Control traffic goes over gloo, gradients over DDP's own group."""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Ranks"]


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
