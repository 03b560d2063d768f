"""DenseNet121 cut in two: a frozen prefix that runs once an image, and a trained tail with a multi-label head.

Both halves keep torchvision's parameter names (`features.denseblock4…`, `classifier…`), so a prefix's and a tail's
state dicts together are a DenseNet121 state dict.
"""

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from cxr_dist.config import ModelConfig
from cxr_dist.model.batchnorm import use_fixed_statistics, use_group_statistics

__all__ = ["Prefix", "Tail", "build", "log_sum_exp_pool", "run_prefix"]

StateDict = dict[str, Tensor]


class Prefix(nn.Module):
    """The frozen part: images [B, C, S, S] to features. Always in eval mode, never with gradients."""

    form = "plain-1"
    """Names all in the way of computing that can change its values; part of every feature cache's key."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features
        self.requires_grad_(False)
        super().train(False)

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
        self.classifier = nn.Linear(1024, num_findings)
        self.pooling = config.pooling
        self.lse_r = config.lse_r

    def forward(self, features_BCHW: Tensor) -> Tensor:
        maps_BCHW = functional.relu(self.features(features_BCHW))
        pooled_BC = log_sum_exp_pool(maps_BCHW, self.lse_r) if self.pooling == "lse" else maps_BCHW.mean((2, 3))
        return self.classifier(pooled_BC)


def log_sum_exp_pool(maps_BCHW: Tensor, r: float) -> Tensor:
    """Log-sum-exp pooling, (1/r) log mean exp(r x) over the map: between the mean (r to 0) and the maximum (r large).

    Pinheiro and Collobert, From Image-level to Pixel-level Labeling with Convolutional Networks, 2015.
    """
    flat_BCN = maps_BCHW.flatten(2)
    if flat_BCN.dtype != torch.float64:
        flat_BCN = flat_BCN.float()  # r times a 16-bit activation would keep two or three digits
    count = torch.tensor(float(flat_BCN.shape[2]), dtype=flat_BCN.dtype, device=flat_BCN.device)
    return (torch.logsumexp(r * flat_BCN, dim=2) - torch.log(count)) / r


def build(state: StateDict, config: ModelConfig, num_findings: int) -> tuple[Prefix, Tail]:
    """Prefix and tail from a whole model's state dict (torchvision names; `classifier` of num_findings outputs)."""
    in_channels = state["features.conv0.weight"].shape[1]
    whole = torchvision.models.densenet121(weights=None, num_classes=num_findings).features
    if in_channels != 3:
        whole.conv0 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
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


def run_prefix(prefix: Prefix, images_BCSS: Tensor, chunk: int) -> Tensor:
    """Features of a batch, computed in calls of exactly `chunk` images (the last one padded).

    Kernels may choose another way to sum for another batch size, so a fixed one makes an image's features the same
    bits whoever asks: training, evaluation or the feature cache.
    """
    if len(prefix.features) == 0:
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
