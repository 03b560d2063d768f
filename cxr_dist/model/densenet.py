"""DenseNet121, and its cut in two: a frozen prefix that runs once an image, and a trained tail with a multi-label head.

Huang et al., Densely Connected Convolutional Networks, 2017. Parameters carry torchvision's names (`features.conv0…`,
`classifier…`) in the whole network and in both halves, so a prefix's and a tail's state dicts together are a DenseNet121
state dict. The network is written out here because torchvision imports the whole of torch's compiler (1.1 CPU seconds
and 170 MB in every process) to offer it.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cxr_dist.config import ModelConfig
from cxr_dist.model.batchnorm import GroupBatchNorm2d, use_fixed_statistics, use_group_statistics
from cxr_dist.model.block import train_block
from cxr_dist.model.fold import FoldedPrefix

__all__ = ["DenseBlock", "DenseLayer", "DenseNet121", "Prefix", "Tail", "Transition", "build", "run_prefix"]

StateDict = dict[str, Tensor]

STEM, GROWTH, LAYERS = 64, 32, (6, 12, 24, 16)
"""Channels out of the first convolution, channels that a dense layer adds, and layers of each dense block."""
WIDTH = 1024
"""Channels of the last feature map."""


class DenseLayer(nn.Module):
    """The channels [B, 32, H, W] that one layer adds to all before it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * GROWTH, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, kernel_size=3, padding=1, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        narrow = self.conv1(functional.relu(self.norm1(features_BCHW), inplace=True))
        return self.conv2(functional.relu(self.norm2(narrow), inplace=True))


class DenseBlock(nn.Module):
    """Layers that each see the block's input and what every layer before them added; all of it is the output."""

    as_one = True
    """Train on group statistics as one operation (`model.block`) where that is faster; else layer by layer."""

    def __init__(self, channels: int, num_layers: int):
        super().__init__()
        for number in range(num_layers):
            self.add_module(f"denselayer{number + 1}", DenseLayer(channels + number * GROWTH))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        layers = list(self.children())
        # a CPU's elementwise kernels are slower in 16 bits than its batch-norm: no gain there
        slower = features_BCHW.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if self.as_one and self.training and isinstance(layers[0].norm1, GroupBatchNorm2d) and not slower:
            return train_block(layers, features_BCHW)
        parts = [features_BCHW]
        for layer in layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1)


class Transition(nn.Module):
    """Half the channels and half the side, between two dense blocks."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, kernel_size=1, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(features_BCHW), inplace=True)), 2)


class DenseNet121(nn.Module):
    """The whole network: images [B, C, S, S] to logits [B, K]; average pooling, as torchvision's."""

    def __init__(self, num_findings: int, in_channels: int = 3):
        super().__init__()
        parts: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(in_channels, STEM, kernel_size=7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(STEM),
            "relu0": nn.ReLU(inplace=True),
            "pool0": nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        }
        channels = STEM
        for number, num_layers in enumerate(LAYERS, start=1):
            parts[f"denseblock{number}"] = DenseBlock(channels, num_layers)
            channels += num_layers * GROWTH
            if number < len(LAYERS):
                parts[f"transition{number}"] = Transition(channels)
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(OrderedDict(parts))
        self.classifier = nn.Linear(channels, num_findings)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # He et al., 2015
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        return self.classifier(functional.relu(self.features(images_BCSS)).mean((2, 3)))


class Prefix(nn.Module):
    """The frozen part: images [B, C, S, S] to features. Always in eval mode, never with gradients."""

    folded: FoldedPrefix | None = None
    """The same function of grey levels in fewer operations; no part of the state dict."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features
        self.requires_grad_(False)
        super().train(False)

    @property
    def form(self) -> str:
        """Names all in the way of computing that can change its values; part of every feature cache's key."""
        return "plain-1" if self.folded is None else self.folded.form

    def train(self, mode: bool = True) -> "Prefix":
        """Stay in eval mode whatever is asked: a frozen batch-norm must not move its running statistics."""
        return self

    def forward(self, images_BCSS: Tensor) -> Tensor:
        return self.features(images_BCSS)


class Tail(nn.Module):
    """The trained part and the head: features to logits [B, K]; ReLU, pooling and one linear layer come last."""

    def __init__(self, features: nn.Sequential, num_findings: int, config: ModelConfig):
        super().__init__()
        self.features = features
        self.relu = nn.ReLU()  # a module of its own, whose output Grad-CAM takes
        self.classifier = nn.Linear(WIDTH, num_findings)
        self.pooling = config.pooling
        self.lse_r = config.lse_r

    def forward(self, features_BCHW: Tensor) -> Tensor:
        maps_BCHW = self.relu(self.features(features_BCHW.contiguous(memory_format=torch.channels_last)))
        pooled_BC = log_sum_exp_pool(maps_BCHW, self.lse_r) if self.pooling == "lse" else maps_BCHW.mean((2, 3))
        return self.classifier(pooled_BC)


def log_sum_exp_pool(maps_BCHW: Tensor, r: float) -> Tensor:
    """Log-sum-exp pooling, (1/r) log mean exp(r x) over the map: between the mean (r to 0) and the maximum (r large).

    Pinheiro and Collobert, From Image-level to Pixel-level Labeling with Convolutional Networks, 2015.
    """
    if maps_BCHW.dtype != torch.float64:
        maps_BCHW = maps_BCHW.float()  # r times a 16-bit activation would keep two or three digits
    count = torch.tensor(float(maps_BCHW[0, 0].numel()), dtype=maps_BCHW.dtype, device=maps_BCHW.device)
    return (torch.logsumexp(r * maps_BCHW, dim=(2, 3)) - torch.log(count)) / r


def build(state: StateDict, config: ModelConfig, num_findings: int) -> tuple[Prefix, Tail]:
    """Prefix and tail from a whole model's state dict (torchvision names; `classifier` of num_findings outputs)."""
    whole = DenseNet121(num_findings, in_channels=state["features.conv0.weight"].shape[1]).features
    names = [name for name, _ in whole.named_children()]
    cut = {"head": len(names), "all": 0}.get(config.trainable)
    if cut is None:
        cut = names.index(config.trainable)
    modules = dict(whole.named_children())
    prefix = Prefix(nn.Sequential(OrderedDict((name, modules[name]) for name in names[:cut])))
    tail = Tail(nn.Sequential(OrderedDict((name, modules[name]) for name in names[cut:])), num_findings, config)
    for half in (prefix, tail):
        half.load_state_dict({name: state[name] for name in half.state_dict()})
    if config.batch_norm == "group":
        use_group_statistics(tail, config.bn_group)
    else:
        use_fixed_statistics(tail)
    if not config.train_final_norm and "norm5" in dict(tail.features.named_children()):
        tail.features.norm5.requires_grad_(False)
    return prefix.to(memory_format=torch.channels_last), tail.to(memory_format=torch.channels_last)


def run_prefix(prefix: Callable[[Tensor], Tensor], images_BCSS: Tensor, chunk: int) -> Tensor:
    """Features of a batch, computed in calls of exactly `chunk` images (the last one padded).

    Kernels may choose another way to sum for another batch size, so a fixed one makes an image's features the same
    bits whoever asks: training, evaluation or the feature cache.
    """
    if isinstance(prefix, Prefix) and len(prefix.features) == 0:
        return images_BCSS
    features = []
    with torch.inference_mode():
        for images in images_BCSS.split(chunk):
            missing = chunk - len(images)
            if missing:
                images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
            features.append(prefix(images.contiguous(memory_format=torch.channels_last))[: chunk - missing])
    # a tensor made in inference mode cannot enter autograd; this one is made outside
    return torch.cat(features)
