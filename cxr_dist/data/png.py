"""What a PNG says of itself: its header, its chunks with their checksums, its palette, and whether all pixels are there.

Decoders differ in what they make up: Pillow skips the checksums of pixels, fills lines that are missing with black and
colours that are missing with grey. Source: PNG specification, third edition.
"""

import struct
import zlib
from dataclasses import dataclass

__all__ = ["END", "SIGNATURE", "Header", "PngError", "check_pixels", "chunks", "header", "palette_colours"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last chunk of every PNG."""

Chunk = tuple[bytes, memoryview]

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First line and column of each pass of an interlaced image, and the steps between its lines and columns."""
_PIECE = 1 << 20


class PngError(ValueError):
    """What is wrong with a PNG, in a few words."""


@dataclass(frozen=True)
class Header:
    """IHDR. `colour`: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filter: int
    interlace: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines as they are compressed, each with the byte of its filter."""
        passes = _ADAM7 if self.interlace else ((0, 0, 1, 1),)
        bits = self.depth * _CHANNELS.get(self.colour, 1)
        total = 0
        for top, left, down, right in passes:
            lines, columns = -(-max(0, self.height - top) // down), -(-max(0, self.width - left) // right)
            total += lines * (1 + (columns * bits + 7) // 8) if columns else 0
        return total


def header(encoded: bytes) -> Header:
    """The header of a PNG of a known kind. Raises PngError."""
    if len(encoded) < 33 or encoded[8:16] != b"\0\0\0\rIHDR":
        raise PngError("truncated PNG header")
    found = Header(*struct.unpack(">IIBBBBB", encoded[16:29]))
    if found.compression or found.filter or found.interlace > 1:
        methods = f"compression {found.compression}, filter {found.filter}, interlace {found.interlace}"
        raise PngError(f"unknown PNG methods ({methods})")
    return found


def chunks(encoded: bytes) -> list[Chunk]:
    """Kind and content of every chunk to IEND, each there and with its checksum. Raises PngError."""
    view, at, found = memoryview(encoded), len(SIGNATURE), []
    while True:
        if at + 12 > len(encoded):
            raise PngError("truncated PNG")
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 12 + length
        if end > len(encoded):
            raise PngError("truncated PNG")
        if zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", encoded, end - 4)[0]:
            raise PngError(f"wrong checksum in PNG chunk {kind.decode('latin-1')!r}")
        found.append((kind, view[at + 8 : end - 4]))
        if kind == b"IEND":
            return found
        at = end


def palette_colours(found: list[Chunk]) -> int:
    """Colours of the one palette. Raises PngError."""
    lengths = [len(content) for kind, content in found if kind == b"PLTE"]
    if len(lengths) != 1 or lengths[0] % 3 or not 3 <= lengths[0] <= 768:
        raise PngError(f"palettes of {lengths} bytes, expected one of 3 to 768")
    return lengths[0] // 3


def check_pixels(head: Header, found: list[Chunk]) -> None:
    """As many bytes as the header says are compressed in the chunks; none is kept. Raises PngError."""
    unpacker, missing = zlib.decompressobj(), head.num_bytes
    for kind, content in found:
        packed: bytes | memoryview = content if kind == b"IDAT" else b""
        while packed and missing > 0:
            try:
                missing -= len(unpacker.decompress(packed, _PIECE))
            except zlib.error as error:
                raise PngError(f"broken pixels ({error})") from None
            packed = unpacker.unconsumed_tail
    if missing > 0:
        raise PngError(f"truncated PNG: {missing} of the {head.num_bytes} bytes of pixels are missing")
