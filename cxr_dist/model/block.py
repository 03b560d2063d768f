"""A dense block in training as one differentiable operation, with each channel normalised once.

Every layer of a dense block starts with a batch-norm over all channels before it. The statistics of a channel are the
same in each of them, so here a channel is normalised once, when it is made, and a layer only scales and shifts what it
reads. In `denseblock4` that is 1,024 channels normalised in place of 12,032, a quarter of the work on groups, no copy of
the growing feature map a layer, and no gradient to features that need none. Values are those of the plain layers to
rounding; running statistics are kept by each norm as before.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cxr_dist.model.batchnorm import GroupBatchNorm2d, Normalized, normalize, normalize_backward

__all__ = ["Layer", "train_block"]


class Layer(Protocol):
    """A dense layer: norm1, ReLU, conv1 (1x1), norm2, ReLU, conv2 (3x3)."""

    norm1: GroupBatchNorm2d
    conv1: torch.nn.Conv2d
    norm2: GroupBatchNorm2d
    conv2: torch.nn.Conv2d


def train_block(layers: Sequence[Layer], features_BCHW: Tensor) -> Tensor:
    """The block's input and what each layer adds to it, [B, C + 32 * layers, H, W]; the norms keep their statistics."""
    parameters = [
        parameter
        for layer in layers
        for parameter in (
            layer.norm1.weight,
            layer.norm1.bias,
            layer.conv1.weight,
            layer.norm2.weight,
            layer.norm2.bias,
            layer.conv2.weight,
        )
    ]
    first = layers[0].norm1
    output, wide_2GC, *narrow_2GC = Block.apply(features_BCHW, first.group, first.eps, *parameters)
    for layer, narrow in zip(layers, narrow_2GC, strict=True):
        layer.norm1.keep(*wide_2GC[:, :, : layer.norm1.num_features])
        layer.norm2.keep(*narrow)
    return output


NUM_PARAMETERS = 6
NUM_SAVED = 3 + 3 + 2
"""Tensors of a layer for its backward: both norms' `Normalized`, and the inputs of both convolutions."""


class Block(torch.autograd.Function):
    """(features, group, eps, six parameters a layer) to (output, statistics of all channels, statistics of each norm2).

    Statistics are mean and unbiased variance of each group, [2, G, C].
    """

    @staticmethod
    def forward(ctx: Any, features_BCHW: Tensor, group: int, eps: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        dtype, device = features_BCHW.dtype, features_BCHW.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            parts = [features_BCHW.to(dtype)]
            batch, channels, height, width = features_BCHW.shape
            added = parameters[-1].shape[0]
            num_layers = len(parameters) // NUM_PARAMETERS
            normal = parts[0].new_empty(batch, height, width, channels + num_layers * added).permute(0, 3, 1, 2)
            normal[:, :channels], saved_input, statistics = normalize(parts[0], group, eps)
            of_channels, of_narrow, saved = [statistics], list[Tensor](), list[Tensor]()
            for number in range(num_layers):
                scale1, shift1, kernel1, scale2, shift2, kernel2 = of_layer(parameters, number, dtype)
                wide = torch.addcmul(by_channel(shift1), normal[:, :channels], by_channel(scale1)).relu_()
                narrow, saved_narrow, statistics = normalize(convolve(wide, kernel1), group, eps, scale2, shift2)
                of_narrow.append(statistics)
                narrow.relu_()
                parts.append(convolve(narrow, kernel2))
                normal[:, channels : channels + added], saved_added, statistics = normalize(parts[-1], group, eps)
                of_channels.append(statistics)
                channels += added
                saved += [*saved_narrow, *saved_added, wide, narrow]
        ctx.group, ctx.eps = group, eps
        ctx.save_for_backward(normal, *saved_input, *saved, *parameters)
        statistics_2GC = torch.cat(of_channels, 2)
        ctx.mark_non_differentiable(statistics_2GC, *of_narrow)
        return torch.cat(parts, 1), statistics_2GC, *of_narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        group, eps = ctx.group, ctx.eps
        normal, *rest = ctx.saved_tensors
        num_layers = (len(rest) - 3) // (NUM_SAVED + NUM_PARAMETERS)
        saved_input, saved = Normalized(*rest[:3]), rest[3 : 3 + NUM_SAVED * num_layers]
        parameters = rest[3 + NUM_SAVED * num_layers :]
        added = parameters[-1].shape[0]
        channels = normal.shape[1]
        # gradients of normalised channels gather here; those of the block's input only if somebody wants them
        start = 0 if ctx.needs_input_grad[0] else channels - num_layers * added
        gathered = torch.zeros_like(normal[:, start:], memory_format=torch.channels_last)
        grads: list[Any] = []
        for number in reversed(range(num_layers)):
            channels -= added
            scale1, _, kernel1, scale2, _, kernel2 = of_layer(parameters, number, normal.dtype)
            tensors = saved[NUM_SAVED * number : NUM_SAVED * (number + 1)]
            saved_narrow, saved_added = Normalized(*tensors[:3]), Normalized(*tensors[3:6])
            wide, narrow = tensors[6:]
            own = slice(channels, channels + added)
            grad = normalize_backward(gathered[:, channels - start : own.stop - start], saved_added, group, eps)[0]
            grad_narrow, grad_kernel2 = convolve_backward(grad + grad_BCHW[:, own], narrow, kernel2)
            where_positive(grad_narrow, narrow)
            grad_narrow, grad_scale2, grad_shift2 = normalize_backward(grad_narrow, saved_narrow, group, eps, scale2)
            grad_wide, grad_kernel1 = convolve_backward(grad_narrow, wide, kernel1)
            where_positive(grad_wide, wide)
            grad_shift1 = grad_wide.sum((0, 2, 3), dtype=scale2.dtype)
            if channels > start:
                gathered[:, : channels - start].addcmul_(grad_wide[:, start:], by_channel(scale1[start:]))
            grad_scale1 = grad_wide.mul_(normal[:, :channels]).sum((0, 2, 3), dtype=scale2.dtype)
            grads = [grad_scale1, grad_shift1, grad_kernel1, grad_scale2, grad_shift2, grad_kernel2, *grads]
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = (
                normalize_backward(gathered[:, :channels], saved_input, group, eps)[0] + grad_BCHW[:, :channels]
            )
        found = (grad.to(value.dtype) for grad, value in zip(grads, parameters, strict=True))
        return grad_input, None, None, *found


def of_layer(parameters: Sequence[Tensor], number: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A layer's six parameters; those that meet activations outside a batch-norm in the type of the activations."""
    scale1, shift1, kernel1, scale2, shift2, kernel2 = parameters[
        NUM_PARAMETERS * number : NUM_PARAMETERS * (number + 1)
    ]
    return scale1.to(dtype), shift1.to(dtype), kernel1.to(dtype), scale2, shift2, kernel2.to(dtype)


def by_channel(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def where_positive(grad_BCHW: Tensor, rectified_BCHW: Tensor) -> None:
    """The backward of a ReLU, in place."""
    torch.ops.aten.threshold_backward.grad_input(grad_BCHW, rectified_BCHW, 0, grad_input=grad_BCHW)


def convolve(batch_BCHW: Tensor, kernel: Tensor) -> Tensor:
    padding = kernel.shape[-1] // 2
    return torch.nn.functional.conv2d(batch_BCHW, kernel, padding=padding)


def convolve_backward(grad_BCHW: Tensor, batch_BCHW: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    padding = [kernel.shape[-1] // 2] * 2
    grad, grad_kernel, _ = torch.ops.aten.convolution_backward(
        grad_BCHW, batch_BCHW, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return grad, grad_kernel
