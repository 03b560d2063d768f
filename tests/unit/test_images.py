"""Pixels: every path gives the same bits, within a level of the float32 reference; every kind of file has one outcome."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_dist.data import images
from cxr_dist.data.images import ImageError, to_grey, to_grey_many
from tests.releases import bomb, noise, png


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(pixels: np.ndarray, *, interlaced: bool = False) -> bytes:
    """A PNG written by hand, unfiltered; interlaced in Adam7's seven passes."""
    height, width = pixels.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [pixels]
    lines = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def same_size(data: bytes, side: int) -> np.ndarray:
    """Pixels without a resize: the asked side is the image's own."""
    return to_grey(data, side)


def test_a_grey_image_of_its_own_size_keeps_its_values():
    pixels = noise(1, 32)
    assert (same_size(png(pixels), 32) == pixels).all()


def test_triangle_filter_by_hand():
    """32 to 2: a pixel's weights fall off over 16 pixels, 6/7 in its own half and 1/7 in the other, rounded per pass."""
    pixels = np.kron(np.array([[10, 20], [30, 40]], np.uint8), np.ones((16, 16), np.uint8))
    assert to_grey(png(pixels), 2).tolist() == [[14, 22], [28, 36]]
    assert to_grey(png(np.full((40, 40), 77, np.uint8)), 16).tolist() == [[77] * 16] * 16


def test_not_square_becomes_square():
    assert to_grey(png(noise(1, 40)[:20]), 16).shape == (16, 16)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([24, 33, 64]), min_size=1, max_size=11), st.sampled_from([16, 24, 50]))
def test_many_is_bit_for_bit_one_by_one(sides, size):
    encoded = [png(noise(i, side)[: side - i % 2]) for i, side in enumerate(sides)]
    assert (to_grey_many(encoded, size) == np.stack([to_grey(data, size) for data in encoded])).all()


def test_colour_palette_and_opaque_alpha_of_a_grey_image_keep_its_values():
    pixels = noise(2, 32)
    for mode in ("RGB", "RGBA", "LA", "P"):
        assert (same_size(png(pixels, mode), 32) == pixels).all(), mode


def test_palette_entries_and_not_their_numbers():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(pixels, "P")
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    plain, clear = io.BytesIO(), io.BytesIO()
    image.save(plain, "png")
    image.save(clear, "png", transparency=bytes([51] + [255] * 255))
    assert plain.getvalue()[24:26] == bytes([8, 3])
    assert (same_size(plain.getvalue(), 16) == 255 - pixels).all()
    assert same_size(clear.getvalue(), 16)[0, :2].tolist() == [51, 254]


def test_colour_is_luma_and_alpha_is_composited_on_black():
    red = np.zeros((16, 16, 4), np.uint8)
    red[..., 0] = 255
    red[..., 3] = 255
    assert same_size(png(red), 16)[0, 0] == 76
    red[..., 3] = 51
    assert same_size(png(red), 16)[0, 0] == 15
    red[..., 3] = 0
    assert same_size(png(red), 16)[0, 0] == 0


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([0, 128, 129, 257, 32768, 65534, 65535], np.uint16)
    pixels = np.zeros((16, 16), np.uint16)
    pixels[0, :7] = values
    assert same_size(png(pixels), 16)[0, :7].tolist() == [0, 0, 1, 1, 128, 255, 255]


def test_one_bit_is_black_and_white():
    pixels = np.eye(16, dtype=np.uint8) * 255
    assert (same_size(png(pixels, "1"), 16) == pixels).all()


def test_jpeg_is_read():
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(out, "jpeg")
    assert same_size(out.getvalue(), 16)[3, 3] == 90


def test_interlaced_and_trailing_bytes_are_read():
    pixels = noise(3, 32)
    assert (same_size(raw_png(pixels), 32) == pixels).all()
    assert (same_size(raw_png(pixels, interlaced=True), 32) == pixels).all()
    assert (same_size(png(pixels) + b"junk" * 9, 32) == pixels).all()
    assert (same_size(raw_png(pixels, interlaced=True) + b"junk", 32) == pixels).all()


@pytest.mark.parametrize("write", [lambda p: png(p), lambda p: png(p, "RGBA"), lambda p: raw_png(p, interlaced=True)])
def test_a_flipped_bit_or_a_cut_anywhere_is_an_image_error(write):
    data = write(noise(4, 32))
    for at in range(8, len(data), 37):
        with pytest.raises(ImageError):
            to_grey(data[:at], 16)
        flipped = bytearray(data)
        flipped[at] ^= 16
        with pytest.raises(ImageError):
            to_grey(bytes(flipped), 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "neither PNG nor JPEG"),
        (png(noise(5, 32))[:20], "truncated PNG header"),
        (png(noise(5, 32))[:300], "truncated PNG"),
        (bomb(), "100000 x 100000 pixels"),
        (bomb(0), "no pixels"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(ImageError, match=reason):
        to_grey(data, 16)
    with pytest.raises(ImageError, match=reason):
        to_grey_many([png(noise(1, 32)), data], 16)
    with pytest.raises(ImageError, match=reason):
        images.check(data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 400))
def test_no_bytes_crash_it(junk, at):
    data = png(noise(6, 24))
    for candidate in (junk, data[:at] + junk, data[:at] + junk + data[at + len(junk) :]):
        with contextlib.suppress(ImageError):
            assert to_grey(candidate, 16).shape == (16, 16)


def test_module_needs_no_torch_and_no_ray():
    program = "import sys, cxr_dist.data.images, cxr_dist.data.nih, cxr_dist.data.manifest, cxr_dist.data.shards; print([m for m in ('torch', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_real_images_are_within_a_level_of_the_float32_reference(real_data):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    files = sorted((real_data / "nih_sample" / "images").iterdir())
    encoded = [file.read_bytes() for file in files]
    many = to_grey_many(encoded, 224)
    modes = set()
    for grey, data in zip(many, encoded, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            modes.add(image.mode)
            pixels = np.asarray(image.convert("L"))
        reference = functional.resize(torch.from_numpy(pixels.astype(np.float32))[None], [224, 224], antialias=True)[0]
        assert np.abs(grey - reference.numpy()).max() <= 1.0
    assert modes == {"L", "RGBA"}
    assert (to_grey(encoded[5], 224) == many[5]).all()
