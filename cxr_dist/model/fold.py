"""The frozen prefix as the same function of grey levels in fewer operations, for inference alone.

Equal to the plain network to rounding, by these identities:

- Grey levels g become the input by scale_c g + shift_c in each channel c, so the first convolution is one of a single
  channel, conv(g, sum_c W_c scale_c), plus a constant map, conv(1, sum_c W_c shift_c). The map is not one number a
  channel: zero padding leaves the shift out at the border.
- A batch-norm that follows a convolution (norm0, every norm2) goes into its kernel and bias.
- A batch-norm before a ReLU and a 1x1 convolution (every norm1, the transitions' norm): relu(a x + b) = a max(x, -b/a) + b
  for a > 0, and with min for a < 0. So the activation is one maximum with a constant of each channel, and a and b go
  into the convolution.
- The average pooling of a transition commutes with its 1x1 convolution, which then has a quarter of the pixels.
- ReLU commutes with maximum pooling.

A dense block writes into one buffer of its final width instead of copying all channels before each layer. Grey levels and
the channels of a block are kept less a constant near their mean, which costs nothing either: otherwise b would cancel
most of a x, and rounding weigh two to three times as much. Folding is done in double precision; the folded tensors are
no part of any state dict.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cxr_dist.model.augment import Normalization

__all__ = ["FoldedPrefix", "fold"]

FORM = "folded-1"
"""Version of the arithmetic below: part of every feature cache's key."""

FAR = 1e9
"""No activation of a network whose norms work is larger."""


@dataclass(frozen=True, kw_only=True)
class Stem:
    """conv0, norm0, ReLU, pool0: grey levels [B, 1, S, S] to channels less their centre."""

    middle: float
    """Grey level that is taken off."""
    kernel: Tensor
    shift_kernel: Tensor
    """Kernel of the constant map, double precision, [C, 1, 7, 7]."""
    bias: Tensor
    """Double precision, [C, 1, 1]."""
    floor: Tensor
    """What a closed ReLU gives, [1, C, 1, 1]."""
    maps: dict[int, Tensor]
    """The constant map [1, C, S/2, S/2] for each side seen so far."""

    def __call__(self, grey_B1SS: Tensor) -> Tensor:
        batch, _, side, _ = grey_B1SS.shape
        # one channel has no layout of its own; given as [B, S, S, 1] the result has channels innermost
        grey = (grey_B1SS - self.middle).to(self.kernel.dtype).reshape(batch, side, side, 1).permute(0, 3, 1, 2)
        maps = convolve(grey, self.kernel, None, stride=2, padding=3).add_(self.border_map(side))
        return torch.maximum(functional.max_pool2d(maps, kernel_size=3, stride=2, padding=1), self.floor)

    def border_map(self, side: int) -> Tensor:
        if side not in self.maps:
            ones = torch.ones(1, 1, side, side, dtype=torch.float64, device=self.kernel.device)
            found = functional.conv2d(ones, self.shift_kernel, stride=2, padding=3) + self.bias
            self.maps[side] = laid_out(found, self.kernel.dtype)
        return self.maps[side]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """max(x, low), and then min with `high` if there is one; [1, C, 1, 1] each."""

    low: Tensor
    high: Tensor | None

    def __call__(self, features_BCHW: Tensor) -> Tensor:
        if self.high is None:
            return torch.maximum(features_BCHW, self.low)
        return torch.clamp(features_BCHW, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense layer: activation, 1x1 convolution, ReLU, 3x3 convolution."""

    activation: Activation
    kernel1: Tensor
    bias1: Tensor
    kernel2: Tensor
    bias2: Tensor

    def __call__(self, features_BCHW: Tensor) -> Tensor:
        narrow = convolve(self.activation(features_BCHW), self.kernel1, self.bias1).relu_()
        return convolve(narrow, self.kernel2, self.bias2, padding=1)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A dense block: what each layer adds is written behind what it read."""

    layers: tuple[Layer, ...]

    def __call__(self, features_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = features_BCHW.shape
        added = len(self.layers[0].bias2)
        final = channels + added * len(self.layers)
        grown = features_BCHW.new_empty(batch, height, width, final).permute(0, 3, 1, 2)
        grown[:, :channels] = features_BCHW
        for layer in self.layers:
            grown[:, channels : channels + added] = layer(grown[:, :channels])
            channels += added
        return grown


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Activation, average pooling, 1x1 convolution."""

    activation: Activation
    kernel: Tensor
    bias: Tensor

    def __call__(self, features_BCHW: Tensor) -> Tensor:
        return convolve(functional.avg_pool2d(self.activation(features_BCHW), 2), self.kernel, self.bias)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """The last norm, where the prefix is the whole network; [1, C, 1, 1] each."""

    scale: Tensor
    shift: Tensor

    def __call__(self, features_BCHW: Tensor) -> Tensor:
        return torch.addcmul(self.shift, features_BCHW, self.scale)


@dataclass(frozen=True, kw_only=True)
class FoldedPrefix:
    """Grey levels 0-255 [B, 1, S, S], of any floating type, to the prefix's features in type `dtype`."""

    parts: tuple[Stem | Block | Transition | Affine, ...]
    dtype: torch.dtype
    form: str = FORM

    def __call__(self, grey_B1SS: Tensor) -> Tensor:
        features = grey_B1SS
        for part in self.parts:
            features = part(features)
        return features


def fold(features: nn.Sequential, normalization: Normalization, dtype: torch.dtype) -> FoldedPrefix:
    """The folded form of a prefix that begins with the images, on its device, computing in `dtype`."""
    modules = dict(features.named_children())
    names = list(modules)
    centers = {name: center(modules[names[place + 1]], dtype) for place, name in enumerate(names) if "block" in name}
    parts: list[Stem | Block | Transition | Affine] = [stem(modules, centers["denseblock1"], normalization, dtype)]
    for place, name in enumerate(names):
        module, before = modules[name], centers.get(names[place - 1])
        if name.startswith("denseblock"):
            layers = list(module.children())
            parts.append(Block(layers=tuple(dense_layer(layer, centers[name], dtype) for layer in layers)))
        elif name.startswith("transition"):
            after = None if place + 1 == len(names) else centers[names[place + 1]]
            parts.append(transition(module, before, after, dtype))
        elif name == "norm5":
            scale, shift = affine(module, before)
            parts.append(Affine(scale=by_channel(scale).to(dtype), shift=by_channel(shift).to(dtype)))
    return FoldedPrefix(parts=tuple(parts), dtype=dtype)


def center(following: nn.Module, dtype: torch.dtype) -> Tensor:
    """What is taken off a block's channels: their mean in the norm that reads all of them, as `dtype` holds it."""
    norm = following if isinstance(following, nn.BatchNorm2d) else following.norm
    return norm.running_mean.to(dtype).double()


def stem(modules: Mapping[str, nn.Module], center_C: Tensor, normalization: Normalization, dtype: torch.dtype) -> Stem:
    scale, shift = affine(modules["norm0"])
    kernel = modules["conv0"].weight.double() * scale.view(-1, 1, 1, 1)
    to_level = kernel.new_tensor(normalization.scale).view(1, -1, 1, 1)
    offset = kernel.new_tensor(normalization.shift).view(1, -1, 1, 1)
    middle = float(torch.round(-(offset / to_level).mean()))
    center_C = center_C[: len(scale)]
    return Stem(
        middle=middle,
        # one channel innermost, as the images are given
        kernel=(kernel * to_level).sum(1).to(dtype)[..., None].permute(0, 3, 1, 2),
        shift_kernel=(kernel * (offset + to_level * middle)).sum(1, keepdim=True),
        bias=(shift - center_C).view(-1, 1, 1),
        floor=by_channel(-center_C).to(dtype),
        maps={},
    )


def dense_layer(layer: nn.Module, center_C: Tensor, dtype: torch.dtype) -> Layer:
    channels, added = layer.norm1.num_features, layer.conv2.out_channels
    activation, kernel1, bias1 = before_convolution(layer.norm1, layer.conv1, center_C[:channels], dtype)
    scale, shift = affine(layer.norm2)
    return Layer(
        activation=activation,
        kernel1=laid_out(kernel1 * scale.view(-1, 1, 1, 1), dtype),
        bias1=(bias1 * scale + shift).to(dtype),
        kernel2=laid_out(layer.conv2.weight, dtype),
        bias2=-center_C[channels : channels + added].to(dtype),
    )


def transition(module: nn.Module, before_C: Tensor, after_C: Tensor | None, dtype: torch.dtype) -> Transition:
    activation, kernel, bias = before_convolution(module.norm, module.conv, before_C, dtype)
    if after_C is not None:
        bias = bias - after_C[: len(bias)]
    return Transition(activation=activation, kernel=laid_out(kernel, dtype), bias=bias.to(dtype))


def before_convolution(
    norm: nn.Module, conv: nn.Module, center_C: Tensor, dtype: torch.dtype
) -> tuple[Activation, Tensor, Tensor]:
    """The activation that stands for norm and ReLU, and kernel and bias (double) of the 1x1 convolution after it."""
    scale, shift = affine(norm, center_C)
    # a threshold that no activation reaches makes a channel constant (its ReLU never opens) or affine (it never closes)
    threshold, far = -shift / scale, min(FAR, torch.finfo(dtype).max / 4)
    beyond = threshold.abs() > far
    constant = (scale == 0) | (beyond & (threshold.sign() == scale.sign()))
    open_always = beyond & ~constant
    low = torch.where(open_always | (scale < 0), -torch.inf, threshold)
    high = torch.where(open_always | (scale > 0), torch.inf, threshold)
    low, high = torch.where(constant, 0.0, low), torch.where(constant, torch.inf, high)
    level = torch.where(scale == 0, shift.clamp(min=0), 0.0)
    scale, shift = torch.where(constant, 0.0, scale), torch.where(constant, level, shift)
    activation = Activation(
        low=by_channel(low).to(dtype), high=None if torch.isinf(high).all() else by_channel(high).to(dtype)
    )
    kernel = conv.weight.double()
    return activation, kernel * scale.view(1, -1, 1, 1), kernel.flatten(1) @ shift


def affine(norm: nn.Module, center_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift, double precision, of a batch-norm with its running statistics on channels less their centre."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    mean = norm.running_mean.double() if center_C is None else norm.running_mean.double() - center_C
    return scale, norm.bias.double() - mean * scale


def by_channel(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def laid_out(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel.to(dtype).contiguous(memory_format=torch.channels_last)


def convolve(
    features_BCHW: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    on_cpu = features_BCHW.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and features_BCHW.dtype == torch.float32:
        # torch gives a 1x1 convolution of fewer than 16 images on one thread to a kernel of half the speed
        strides, paddings = [stride] * 2, [padding] * 2
        return torch.mkldnn_convolution(features_BCHW, kernel, bias, paddings, strides, dilation=[1, 1], groups=1)
    return functional.conv2d(features_BCHW, kernel, bias, stride=stride, padding=padding)
