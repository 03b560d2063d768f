"""What a device does: times of its phases, FLOPs of a network, the rate of a plain matrix product."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cxr_dist.bench.measure import in_turns

__all__ = ["Clock", "finished", "flops", "matrix_rate"]


class Clock:
    """Times between marks: of the device's own events on a GPU, of the host on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """End the phase of this name, and begin the next."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def ms(self) -> dict[str, float]:
        """Milliseconds of each phase."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        return {
            name: before.elapsed_time(after) if self.on_gpu else 1e3 * (after - before)
            for (_, before), (name, after) in pairs
        }


def finished(work: Callable[[], object], device: torch.device, images: int) -> Callable[[], int]:
    """The work as `in_turns` takes it: done when the device has done it, and counted."""

    def one() -> int:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return images

    return one


def flops(module: nn.Module, example: Tensor) -> dict[str, float]:
    """FLOPs of a forward of each convolution and linear layer under a module, by name, for the first image of the example;
    two for a multiplication and an addition."""
    found: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(layer: nn.Module, _: Any, output: Tensor) -> None:
            found[name] = 2.0 * output[0].numel() * layer.weight[0].numel()

        return count

    layers = {name: one for name, one in module.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        module(example[:1])
    for handle in handles:
        handle.remove()
    return found


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """The best FLOP/s of a matrix product: torch's own, or a 1x1 convolution, which may go to another library."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    pixels = torch.randn(16, side, 8, side // 128, device=device, dtype=dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(side, side, 1, 1, device=device, dtype=dtype)
    work = {"product": lambda: left @ right, "convolution": lambda: functional.conv2d(pixels, kernel)}
    with torch.inference_mode():
        found = in_turns({name: finished(one, device, side) for name, one in work.items()}, repeats)
    return max(2.0 * side**3 / timing.wall_s for timing in found.values())
