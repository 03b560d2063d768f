"""Host arrays to tensors on the device, beside the computation of the batch before."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Transfer"]

DEPTH = 2
"""Page-locked buffers of each shape: one that is being copied from while the other is filled."""


@dataclass(frozen=True)
class Slot:
    """A page-locked buffer, and when the device has read it."""

    pinned: Tensor
    read: Any
    """torch.cuda.Event."""


class Transfer:
    """Copies arrays to a device. On a GPU from page-locked memory in a stream of its own, so that the copy of a batch
    does not wait for the computation of the one before; on a CPU the array is used where it lies."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots: dict[tuple[tuple[int, ...], np.dtype], list[Slot]] = {}

    def __call__(self, array: npt.NDArray[Any]) -> Tensor:
        """The array as a tensor on the device, ready for what the current stream does next."""
        if self.stream is None:
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        slot = self.next_slot(array)
        slot.read.synchronize()
        np.copyto(slot.pinned.numpy(), array)
        with torch.cuda.stream(self.stream):
            tensor = slot.pinned.to(self.device, non_blocking=True)
            slot.read.record(self.stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        tensor.record_stream(current)  # its memory is not used again before the current stream is done with it
        return tensor

    def next_slot(self, array: npt.NDArray[Any]) -> Slot:
        """The buffers of a shape in turns."""
        slots = self.slots.setdefault((array.shape, array.dtype), [])
        if len(slots) < DEPTH:
            kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
            slots.append(Slot(torch.empty(array.shape, dtype=kind, pin_memory=True), torch.cuda.Event()))
        else:
            slots.append(slots.pop(0))
        return slots[-1]
