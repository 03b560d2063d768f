"""How large a run's network is: parameters, checkpoints, and the tensors that a step holds, without computing anything.

The network is run on torch's fake tensors, which have shapes and no values; what is alive at the same time is counted as it would
be made, the frozen prefix layer by layer. Weights, gradients, optimizer state and checkpoints are exact. The peak of a step is that of
the tensors alone: what cuDNN, a communicator and the allocator take beside them is not in it, and 16-bit arithmetic is counted
as half of what fp32 takes.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cxr_dist.config import Config
from cxr_dist.model.densenet import DenseNet121, build
from cxr_dist.model.network import PREFIX_CHUNK

__all__ = ["Footprint", "footprint"]

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1}
"""Numbers that the optimizer keeps for each parameter."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a run's network on one worker."""

    prefix_bytes: int
    tail_bytes: int
    """Parameters and running statistics."""
    gradient_bytes: int
    """What one step exchanges between the ranks, too."""
    optimizer_bytes: int
    feature_shape: tuple[int, int, int]
    """The prefix's output of an image: channels, height, width."""
    prefix_peak_bytes: int
    """Of one call of the prefix, weights not counted."""
    step_peak_bytes: int
    """Of forward and backward of one micro-batch, weights and gradients not counted."""

    @property
    def weights_bytes(self) -> int:
        """All that stays from step to step."""
        return self.prefix_bytes + self.tail_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """Most at once: the prefix and the step take turns."""
        return self.weights_bytes + max(self.prefix_peak_bytes, self.step_peak_bytes)

    @property
    def checkpoint_bytes(self) -> int:
        """Of the tensors in a checkpoint."""
        return self.tail_bytes + self.optimizer_bytes


def footprint(config: Config, *, num_findings: int, size: int, share: int, use_gpu: bool) -> Footprint:
    """The footprint of a worker that takes `share` images of a step, of `size` pixels a side."""
    prefix, tail = build(DenseNet121(num_findings).state_dict(), config.model, num_findings)
    trained = [parameter for parameter in tail.train().parameters() if parameter.requires_grad]
    micro = config.train.micro_batch or share
    chunk = config.model.prefix_chunk or PREFIX_CHUNK["cuda" if use_gpu else "cpu", config.model.prefix_form]
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(chunk, 3, size, size)
        with torch.no_grad():
            prefix_peak, features = _peak(lambda: prefix(images) if len(prefix.features) else images)
        batch = torch.empty(micro, *features.shape[1:]).contiguous(memory_format=torch.channels_last)
        step_peak, _ = _peak(lambda: tail(batch).sum().backward())
    gradients = _bytes(trained)
    wide = 2 if config.train.precision == "fp64" else 1
    shrink = 2 if _halves(config.train.precision, use_gpu=use_gpu) else 1
    features_held = share * features[0].numel() * features.element_size()
    return Footprint(
        prefix_bytes=wide * _bytes([*prefix.parameters(), *prefix.buffers()]),
        tail_bytes=wide * _bytes([*tail.parameters(), *tail.buffers()]),
        gradient_bytes=wide * gradients,
        optimizer_bytes=wide * MOMENTS[config.optimizer.name] * gradients,
        feature_shape=(features.shape[1], features.shape[2], features.shape[3]),
        prefix_peak_bytes=wide * (prefix_peak + features_held) // shrink,
        step_peak_bytes=wide * max(0, step_peak - gradients + features_held) // shrink,
    )


def _halves(precision: str, *, use_gpu: bool) -> bool:
    """Whether activations take 16 bits: `auto` is bf16 or fp16 on a GPU, fp32 on CPU."""
    return precision in ("bf16", "fp16") or (precision == "auto" and use_gpu)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes of new tensors that were alive at once while `work` ran, and what it gave."""
    with _Alive() as alive:
        found = work()
    return alive.peak, found


class _Alive(TorchDispatchMode):
    """Counts the storage of every tensor that an operation makes, until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.note(leaf.untyped_storage(), given)
        return found

    def note(self, storage: Any, given: set[int]) -> None:
        if storage in self.known or id(storage) in given:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.freed, size)

    def freed(self, size: int) -> None:
        self.now -= size
