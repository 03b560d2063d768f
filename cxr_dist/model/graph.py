"""A function of one tensor as a CUDA graph: its hundreds of kernels started by one call."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["graphed"]

log = logging.getLogger(__name__)

WARM_UP = 3
"""Calls before the capture: libraries choose kernels and allocate what they keep."""


def graphed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, in inference, replayed from a CUDA graph that is captured at the first call with each shape and layout.

    The kernels, and so the values, are the function's own. What cannot be captured runs as it is, with a warning.
    """
    captured: dict[tuple[object, ...], Callable[[Tensor], Tensor]] = {}

    def call(batch: Tensor) -> Tensor:
        kind = (batch.device, batch.shape, batch.stride(), batch.dtype)
        if kind not in captured:
            captured[kind] = capture(function, batch) if batch.device.type == "cuda" else function
        return captured[kind](batch)

    return call


def capture(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    given = example.clone()
    side = torch.cuda.Stream(example.device)
    try:
        with torch.inference_mode(), torch.cuda.device(example.device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(given)
    except RuntimeError as error:
        log.warning("no CUDA graph of the frozen prefix (%s); it runs kernel by kernel", str(error).splitlines()[0])
        return function

    def replay(batch: Tensor) -> Tensor:
        given.copy_(batch)
        graph.replay()
        return result.clone()  # the next replay writes over it

    return replay
