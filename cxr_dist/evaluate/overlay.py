"""A radiograph with a heat map over it, as a PNG: for a screen, for print, and for eyes that tell few colours apart."""

import functools
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cxr_dist.data.boxes import Box
from cxr_dist.model.gradcam import upsampled

__all__ = ["OVERLAY", "THUMBNAIL", "overlay", "thumbnail"]

OVERLAY, THUMBNAIL = 384, 160
"""Sides, pixels."""
COLOURS = "plasma"
"""A colour map whose lightness rises evenly, also in grey print, and that red-green blindness leaves in order."""
ALPHA = 0.65
"""How much of the radiograph the greatest heat hides."""


def overlay(image_SS: NDArray[np.uint8], heat_hw: NDArray[np.float32], boxes: Sequence[Box] = ()) -> bytes:
    """PNG of the radiograph, coloured the stronger the more heat there is, and the boxes that are known as white frames.

    Where there is no heat, the radiograph is untouched. The line is at half of the greatest heat (which is 1).
    """
    grey = np.asarray(_resized(image_SS, OVERLAY), np.float32)[..., None]
    heat = upsampled(heat_hw, OVERLAY)
    alpha = (ALPHA * heat)[..., None]
    mixed = (1 - alpha) * grey + alpha * _colours()[np.rint(heat * 255).astype(np.int64)]
    mixed[_line(heat > 0.5)] = 255
    mixed[_line(heat <= 0.5)] = 0  # a dark case: white alone is lost on bone
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        edges = [round(value * (OVERLAY - 1)) for value in (box.left, box.top, box.right, box.bottom)]
        pen.rectangle(edges, outline="black", width=4)
        pen.rectangle([edges[0] + 1, edges[1] + 1, edges[2] - 1, edges[3] - 1], outline="white", width=2)
    return _png(picture)


def thumbnail(image_SS: NDArray[np.uint8]) -> bytes:
    """PNG of the radiograph alone, small."""
    return _png(_resized(image_SS, THUMBNAIL))


def _resized(image_SS: NDArray[np.uint8], side: int) -> Image.Image:
    return Image.fromarray(image_SS).resize((side, side), Image.Resampling.BICUBIC)


def _line(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels of the region."""
    padded = np.pad(inside, 1, mode="edge")
    return inside & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@functools.cache
def _colours() -> NDArray[np.float32]:
    """[256, 3], 0 to 255."""
    return np.asarray(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255, np.float32)
