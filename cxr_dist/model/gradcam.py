"""Grad-CAM: where in an image the evidence for a finding lies, as the tail's last feature map sees it.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017. The map of
a finding is the ReLU of the feature maps that are pooled, each weighed by the mean over the map of the gradient of the
finding's logit. Adding a constant to a map adds the same to its average and to its log-sum-exp, so that for both kinds
of pooling that gradient adds up to the classifier's weight: here Grad-CAM is the class activation map (Zhou et al., 2016)
after a ReLU, up to a factor. No random numbers.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerGradCam

from cxr_dist.errors import RunError
from cxr_dist.model.network import TAIL_CHUNK, Network

__all__ = ["cams", "upsampled"]

Floats = npt.NDArray[np.float32]


def cams(network: Network, images_NSS: npt.NDArray[np.uint8], columns_N: npt.NDArray[np.int64]) -> Floats:
    """Heat maps [N, h, w] of image i for the finding of column i, 0 to 1: each over its own maximum (0 where that is 0).

    h and w are those of the last feature map, S / 32 rounded down (7 at 224 pixels). Computed in fixed chunks as scores
    are, the tail in eval mode, so that a map does not depend on its neighbours. RunError for values that are no numbers.
    """
    chunk = TAIL_CHUNK[network.device.type]
    columns = torch.from_numpy(np.asarray(columns_N, np.int64)).to(network.device)
    was_training = network.tail.training
    network.tail.eval()
    method = LayerGradCam(network.tail, network.tail.relu)
    maps = []
    try:
        for part, targets in zip(network.features(images_NSS).split(chunk), columns.split(chunk), strict=True):
            missing = chunk - len(part)
            if missing:
                part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
                targets = torch.cat([targets, targets.new_zeros(missing)])
            with network.mixed(), torch.enable_grad():
                found = method.attribute(part, target=targets, relu_attributions=True)
            maps.append(found[: chunk - missing, 0].detach().float())
    finally:
        network.tail.train(was_training)
    heat_Nhw = torch.cat(maps).cpu().numpy()
    if not np.isfinite(heat_Nhw).all():
        raise RunError("Grad-CAM: found values that are no numbers; look at the model's weights and precision")
    peak_N11 = heat_Nhw.max(axis=(1, 2), keepdims=True)
    return np.divide(heat_Nhw, peak_N11, out=np.zeros_like(heat_Nhw), where=peak_N11 > 0)


def upsampled(heat_hw: Floats, side: int) -> Floats:
    """The map at [side, side], bilinear between the centres of its cells and constant beyond the outermost ones.

    Nothing exceeds the map's own maximum, which lies at the centre of its cell.
    """
    height, width = heat_hw.shape
    return np.asarray(_weights(height, side) @ heat_hw @ _weights(width, side).T, np.float32)


@functools.lru_cache(maxsize=16)
def _weights(num_in: int, num_out: int) -> Floats:
    """[num_out, num_in]: what each input cell adds to each output pixel."""
    at = np.clip((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0, num_in - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(num_in)[None, :]))
    return np.asarray(weights, np.float32)
