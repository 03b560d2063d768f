"""From encoded bytes to grey pixels: `to_grey` is the one way, and every other function here gives its bits.

An image becomes 8-bit grey, then a square of the asked side, whatever its aspect (as the notebooks do; NIH images are
square). What each kind of file becomes:

- 8-bit grey PNG: its own values;
- colour, palette: ITU-R 601 luma, so equal channels keep their value; a transparent colour key is ignored;
- alpha: composited on black, grey * alpha / 255 rounded; an opaque alpha therefore changes nothing;
- 16-bit grey: value / 257 rounded (65535 becomes 255), not clipped; 16-bit colour: its high bytes, as Pillow reads it;
- 1-bit: 0 and 255; JPEG: decoded, then as colour; EXIF orientation is ignored.

8-bit grey and RGBA PNG (all of NIH) are decoded by kornia_rs, everything else, and what that refuses, by Pillow.

What a PNG is held to: it is whole to its end mark, the checksum of every chunk that pixels come from is right, and each
pixel is there. The checksum inside the compressed stream is not looked at (it would cost a second inflate): chunks that
are whole but were lost, repeated or put in another order are found out only where the stream breaks, as it mostly does.
JPEG has no checksums: one that is cut is refused, one that is damaged within may not be.
"""

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import kornia_rs.io
import numpy as np
from PIL import Image

from cxr_dist.data import png

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "PIXELS_VERSION",
    "ImageError",
    "check",
    "check_shape",
    "decode",
    "resize",
    "to_grey",
    "to_grey_many",
]

PIXELS_VERSION = "grey-bilinear-2"
"""Names the result of `to_grey`; bump it when any pixel of any image changes."""

MAX_PIXELS = 1 << 26
"""Largest image that is decoded (8192 x 8192); the header is asked first."""
MAX_SIDE = 1 << 15
"""Longest side that is decoded: the matrices of the resize grow with it."""

_FAST = {0: "mono", 6: "rgba"}
"""PNG colour types that kornia_rs decodes (2.5 and 1.7 times as fast as Pillow), and its names for them."""


class ImageError(ValueError):
    """An image that cannot be decoded; `reason` is a few words without its name."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def to_grey(encoded: bytes, size: int) -> np.ndarray:
    """uint8 [size, size] from the bytes of a PNG or JPEG. Raises ImageError."""
    return resize(decode(encoded), size)


def to_grey_many(encoded: Sequence[bytes], size: int) -> np.ndarray:
    """uint8 [N, size, size]: `to_grey` of each."""
    out = np.empty((len(encoded), size, size), np.uint8)
    for place, data in zip(out, encoded, strict=True):
        place[...] = to_grey(data, size)
    return out


def check(encoded: bytes) -> None:
    """Decode wholly and keep nothing. Raises ImageError."""
    decode(encoded)


def check_shape(width: int, height: int) -> None:
    """Whether an image of this shape is decoded at all: raises ImageError if not."""
    if width == 0 or height == 0:
        raise ImageError(f"no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are decoded")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels, a side longer than the {MAX_SIDE} that are decoded")


def decode(encoded: bytes) -> np.ndarray:
    """uint8 [height, width], at the image's own size. Raises ImageError."""
    if not encoded:
        raise ImageError("empty file")
    if not encoded.startswith(png.SIGNATURE):
        return _decode_pillow(encoded)
    try:
        return _decode_png(encoded)
    except png.PngError as error:
        raise ImageError(str(error)) from None


class _Group(NamedTuple):
    """Neighbouring lines of a resized image: which they are, the lines they are made of, and the matrix between."""

    outs: slice
    ins: slice
    weights: np.ndarray


_EXACT_BITS = 24
"""Whole numbers up to 2**24 are exact in float32, and so are their sums in any order."""
_BETWEEN_BITS = 3
"""Bits behind the point that are kept between the passes: errors of 1/16 level at most, beside 1/2 at the end."""
_ROWS, _COLUMNS, _BAND = 4, 8, 4
"""Lines in a group of either pass, groups whose pixels are made float32 at once: what was fastest at 1024 to 224. Every
product is small enough for OpenBLAS to stay in its thread."""


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size]: a banded matrix over the lines, then one over the columns, in small matrix products.

    Half the time of Pillow's resize, and closer to the exact value, for Pillow rounds to whole levels in between.
    """
    height, width = grey.shape
    between = np.empty((size, width), np.float32)
    rows = _groups(height, size, _ROWS, _EXACT_BITS - 8, _BETWEEN_BITS)
    for start in range(0, len(rows), _BAND):
        band = rows[start : start + _BAND]
        top = band[0].ins.start
        lines = grey[top : band[-1].ins.stop].astype(np.float32)
        for outs, ins, weights in band:
            np.matmul(weights, lines[ins.start - top : ins.stop - top], out=between[outs])
    np.rint(between, out=between)
    out = np.empty((size, size), np.float32)
    for outs, ins, weights in _groups(width, size, _COLUMNS, _EXACT_BITS - 8 - _BETWEEN_BITS, -_BETWEEN_BITS):
        np.matmul(between[:, ins], weights.T, out=out[:, outs])
    return np.rint(out, out=out).astype(np.uint8)


def _decode_png(encoded: bytes) -> np.ndarray:
    head = png.header(encoded)
    check_shape(head.width, head.height)
    if (head.depth, head.interlace) == (8, 0) and head.colour in _FAST:
        try:
            pixels = kornia_rs.io.decode_image_png_u8(encoded, (head.height, head.width), _FAST[head.colour])
        except Exception:  # noqa: BLE001, S110  kornia_rs raises bare Exception; Pillow decides and gives the reason
            pass
        else:
            if not encoded.endswith(png.END):  # rare: bytes behind it, so the chunks are walked to find it
                png.chunks(encoded)
            return pixels.reshape(head.height, head.width) if head.colour == 0 else _grey(Image.fromarray(pixels))
    chunks = png.chunks(encoded)
    png.check_pixels(head, chunks)
    return _decode_pillow(encoded, png.palette_colours(chunks) if head.colour == 3 else 256)


def _decode_pillow(encoded: bytes, num_colours: int = 256) -> np.ndarray:
    """`num_colours`: of the palette; Pillow makes up the colours that are missing."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            check_shape(*image.size)
            image.load()
            if image.mode == "P" and (colour := int(np.asarray(image).max())) >= num_colours:
                raise ImageError(f"a pixel of colour {colour} in a palette of {num_colours}")
            return _grey(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("broken PNG header" if encoded.startswith(png.SIGNATURE) else "neither PNG nor JPEG") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ImageError(f"cannot be decoded: {error}") from None


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"grey values outside 16 bits ({values.min()} to {values.max()})")
        return ((values + 128) // 257).astype(np.uint8)
    alpha = None
    palette_alpha = image.mode == "P" and isinstance(image.info.get("transparency"), bytes)
    if palette_alpha or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    if image.mode not in ("1", "L", "RGBA"):
        image = image.convert("RGB")
    grey = np.asarray(image.convert("L"))
    if alpha is None or alpha.min() == 255:
        return grey
    return ((grey * alpha.astype(np.uint16) + 127) // 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _groups(num_in: int, num_out: int, per_group: int, bits: int, shift: int) -> list[_Group]:
    """The matrix from num_in to num_out lines, times 2**shift. Weights are multiples of 2**-bits that add up to one."""
    rows = [_weights(num_in, num_out, line, bits) for line in range(num_out)]
    groups = []
    for start in range(0, num_out, per_group):
        part = rows[start : start + per_group]
        first, last = part[0][0], part[-1][0] + len(part[-1][1])
        matrix = np.zeros((len(part), last - first), np.float32)
        for line, (at, whole) in zip(matrix, part, strict=True):
            line[at - first : at - first + len(whole)] = whole * 2.0 ** (shift - bits)
        groups.append(_Group(slice(start, start + len(part)), slice(first, last), matrix))
    return groups


def _weights(num_in: int, num_out: int, line: int, bits: int) -> tuple[int, np.ndarray]:
    """First input line and whole weights, 2**bits together, of one output line.

    The triangle about the line's centre reaches one output line (one input line where there are fewer) to either side;
    in units of 1 / (2 num_in num_out) it is whole. What rounding down leaves goes to the largest remainders.
    """
    reach = 2 * max(num_in, num_out)
    centre = (2 * line + 1) * num_in
    first, last = max(0, (centre - reach) // (2 * num_out)), min(num_in, (centre + reach) // (2 * num_out) + 1)
    heights = np.maximum(0, reach - np.abs((2 * np.arange(first, last) + 1) * num_out - centre))
    whole, left = np.divmod(heights << bits, heights.sum())
    whole[np.argsort(-left, kind="stable")[: (1 << bits) - whole.sum()]] += 1
    return first, whole
