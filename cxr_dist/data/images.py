"""From encoded bytes to grey pixels: `to_grey` is the one way, and every other function here gives its bits.

An image becomes 8-bit grey, then a square of the asked side, whatever its aspect (as the notebooks do; NIH images are
square). What each kind of file becomes:

- 8-bit grey PNG: its own values (kornia_rs; Pillow where that refuses, e.g. interlaced files);
- colour, palette: ITU-R 601 luma, so equal channels keep their value; a transparent colour key is ignored;
- alpha: composited on black, grey * alpha / 255 rounded; an opaque alpha therefore changes nothing;
- 16-bit grey: value / 257 rounded (65535 becomes 255), not clipped; 16-bit colour: its high bytes, as Pillow reads it;
- 1-bit: 0 and 255; JPEG: decoded, then as colour; EXIF orientation is ignored.

The resize is antialiased bilinear (a triangle as wide as the reduction), within one level of torchvision's float32
`resize(antialias=True)`.
"""

import io
import struct
import zlib
from collections.abc import Sequence

import kornia_rs.io
import numpy as np
from PIL import Image

__all__ = ["MAX_PIXELS", "PIXELS_VERSION", "ImageError", "check", "to_grey", "to_grey_many"]

PIXELS_VERSION = "grey-bilinear-1"
"""Names the result of `to_grey`; bump it when any pixel of any image changes."""

MAX_PIXELS = 1 << 26
"""Largest image that is decoded (8192 x 8192); the header is asked first."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PACKED = 4


class ImageError(ValueError):
    """An image that cannot be decoded; `reason` is a few words without its name."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def to_grey(encoded: bytes, size: int) -> np.ndarray:
    """uint8 [size, size] from the bytes of a PNG or JPEG. Raises ImageError."""
    return _resize(_decode(encoded), size)


def to_grey_many(encoded: Sequence[bytes], size: int) -> np.ndarray:
    """uint8 [N, size, size], bit for bit `to_grey` of each; four images of one shape share a resize (a fifth faster)."""
    out = np.empty((len(encoded), size, size), np.uint8)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for index, data in enumerate(encoded):
        grey = _decode(data)
        group = waiting.setdefault(grey.shape, [])
        group.append((index, grey))
        if len(group) == _PACKED:
            for (position, _), plane in zip(group, _resize_packed([grey for _, grey in group], size), strict=True):
                out[position] = plane
            group.clear()
    for group in waiting.values():
        for position, grey in group:
            out[position] = _resize(grey, size)
    return out


def check(encoded: bytes) -> None:
    """Decode wholly and keep nothing. Raises ImageError."""
    _decode(encoded)


def _decode(encoded: bytes) -> np.ndarray:
    """uint8 [height, width]."""
    if not encoded:
        raise ImageError("empty file")
    if encoded[:8] != _PNG:
        return _decode_pillow(encoded)
    if len(encoded) < 33 or encoded[12:16] != b"IHDR":
        raise ImageError("truncated PNG header")
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", encoded[16:29])
    _check_shape(width, height)
    if (depth, colour, interlace) == (8, 0, 0):
        try:
            return kornia_rs.io.decode_image_png_u8(encoded, (height, width), "mono").reshape(height, width)
        except Exception:  # noqa: BLE001, S110  kornia_rs raises bare Exception; Pillow decides and gives the reason
            pass
    _check_chunks(encoded)
    return _decode_pillow(encoded)


def _decode_pillow(encoded: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            _check_shape(*image.size)
            image.load()
            return _grey(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("neither PNG nor JPEG") from None
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
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.uint16)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    grey = np.asarray(image.convert("L"))
    if alpha is None:
        return grey
    return ((grey * alpha + 127) // 255).astype(np.uint8)


def _check_shape(width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise ImageError(f"no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are decoded")


def _check_chunks(encoded: bytes) -> None:
    """Every chunk to IEND is there and has its checksum; Pillow itself skips that of the image data."""
    at = len(_PNG)
    while True:
        if at + 12 > len(encoded):
            raise ImageError("truncated PNG")
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 12 + length
        if end > len(encoded):
            raise ImageError("truncated PNG")
        if zlib.crc32(memoryview(encoded)[at + 4 : end - 4]) != struct.unpack_from(">I", encoded, end - 4)[0]:
            raise ImageError(f"wrong checksum in PNG chunk {kind.decode('latin-1')!r}")
        if kind == b"IEND":
            return
        at = end


def _resize(grey: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR))


def _resize_packed(greys: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Four images as the bands of one; CMYK, because Pillow would multiply RGBA by its alpha."""
    packed = Image.merge("CMYK", [Image.fromarray(grey) for grey in greys])
    return [np.asarray(band) for band in packed.resize((size, size), Image.Resampling.BILINEAR).split()]
