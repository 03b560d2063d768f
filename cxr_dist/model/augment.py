"""From uint8 grey pixels to the network's input, on the device: random affine, flip, normalisation, channels.

The distribution is that of torchvision's RandomAffine(5, translate=0.02, scale=(0.95, 1.05), shear=5) followed by
RandomHorizontalFlip(0.5), with bilinear sampling, black outside, and shifts that are not rounded to whole pixels. The
random numbers come with the batch (`data.plan.draws`); nothing random happens here.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AUGMENTATION", "IMAGENET", "XRV", "Normalization", "affine_coefficients", "to_grey", "to_input", "warp"]

AUGMENTATION = {"rotation_deg": 5.0, "shift": 0.02, "scale": 0.05, "shear_deg": 5.0, "flip": 0.5}
"""Largest change each way; shift is a part of the side. Part of every feature cache's key."""


@dataclass(frozen=True)
class Normalization:
    """How grey levels 0-255 become the input: each channel is level * scale + shift."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Normalization(
    tuple(1 / (255 * std) for std in _STD), tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True))
)
"""Three equal channels, /255, ImageNet mean and standard deviation."""

XRV = Normalization((2 * 1024 / 255,), (-1024.0,))
"""One channel in [-1024, 1024], as TorchXRayVision's weights expect."""


def affine_coefficients(draws_B6: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Inverse affine maps [B, 6] in pixels about the centre: x_in = a x + b y + c, y_in = d x + e y + f.

    `draws_B6` in [0, 1): rotation, shift x, shift y, scale, shear, flip. Worked out row by row with scalar
    arithmetic, so that a row's numbers cannot depend on its neighbours in the batch.
    """
    result = np.empty((len(draws_B6), 6), dtype=np.float32)
    for row, (rotation, shift_x, shift_y, scale, shear, flip) in enumerate(draws_B6.tolist()):
        angle = math.radians((2 * rotation - 1) * AUGMENTATION["rotation_deg"])
        lean = math.tan(math.radians((2 * shear - 1) * AUGMENTATION["shear_deg"]))
        grow = 1 + (2 * scale - 1) * AUGMENTATION["scale"]
        dx = (2 * shift_x - 1) * AUGMENTATION["shift"] * size
        dy = (2 * shift_y - 1) * AUGMENTATION["shift"] * size
        # forward map: rotation times shear along x, times scale, then shift; its inverse in closed form
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = (cos - sin * lean) / grow, (cos * lean + sin) / grow
        d, e = -sin / grow, cos / grow
        mirror = -1.0 if flip < AUGMENTATION["flip"] else 1.0
        result[row] = (a * mirror, b, -(a * dx + b * dy), d * mirror, e, -(d * dx + e * dy))
    return result


def warp(images_B1SS: Tensor, coefficients_B6: Tensor) -> Tensor:
    """Sample each image through its inverse affine map; bilinear, black outside."""
    batch, _, _, size = images_B1SS.shape
    dtype, device = images_B1SS.dtype, images_B1SS.device
    line = torch.arange(size, dtype=dtype, device=device) - (size - 1) / 2
    # grid_sample counts from -1 to 1 over the image; a point is a part of its column plus a part of its row
    a, b, c, d, e, f = (column[:, None] for column in (coefficients_B6.to(dtype) * (2 / size)).unbind(1))
    grid = torch.empty(batch, size, size, 2, dtype=dtype, device=device)
    torch.add((a * line)[:, None, :], (b * line + c)[:, :, None], out=grid[..., 0])
    torch.add((d * line)[:, None, :], (e * line + f)[:, :, None], out=grid[..., 1])
    return functional.grid_sample(images_B1SS, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def to_grey(images_BSS: Tensor, dtype: torch.dtype, coefficients_B6: Tensor | None = None) -> Tensor:
    """Grey uint8 images as levels 0-255 [B, 1, S, S] of a floating type; augmented if coefficients are given."""
    images_B1SS = images_BSS[:, None].to(dtype)
    return images_B1SS if coefficients_B6 is None else warp(images_B1SS, coefficients_B6)


def to_input(
    images_BSS: Tensor,
    normalization: Normalization,
    *,
    dtype: torch.dtype = torch.float32,
    coefficients_B6: Tensor | None = None,
) -> Tensor:
    """Grey uint8 images to the network's input [B, C, S, S]; augmented if coefficients are given."""
    images_B1SS = to_grey(images_BSS, dtype, coefficients_B6)
    scale = torch.tensor(normalization.scale, dtype=dtype, device=images_BSS.device).view(1, -1, 1, 1)
    shift = torch.tensor(normalization.shift, dtype=dtype, device=images_BSS.device).view(1, -1, 1, 1)
    return images_B1SS * scale + shift
