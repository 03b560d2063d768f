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
from cxr_dist.data.png import END, SIGNATURE
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
    """32 to 2: a pixel's weights fall off over 16 pixels, 6/7 in its own half and 1/7 in the other."""
    pixels = np.kron(np.array([[10, 20], [30, 40]], np.uint8), np.ones((16, 16), np.uint8))
    # (6 * (6 * 10 + 20) + (6 * 30 + 40)) / 49 = 14.29, then 21.43, 28.57, 35.71
    assert to_grey(png(pixels), 2).tolist() == [[14, 21], [29, 36]]


def triangles(num_in: int, num_out: int) -> np.ndarray:
    """float64 [num_out, num_in], from the definition: a triangle about each centre, made to add up to one."""
    scale = num_in / num_out
    centres = (np.arange(num_out)[:, None] + 0.5) * scale
    heights = np.clip(1 - np.abs(np.arange(num_in) + 0.5 - centres) / max(scale, 1), 0, None)
    return heights / heights.sum(axis=1, keepdims=True)


def dense(num_in: int, num_out: int, bits: int) -> np.ndarray:
    """int64 [num_out, num_in], the weights that the resize uses."""
    matrix = np.zeros((num_out, num_in), np.int64)
    for line in range(num_out):
        first, whole = images._weights(num_in, num_out, line, bits)
        matrix[line, first : first + len(whole)] = whole
    return matrix


sides = st.integers(1, 90)


@given(st.integers(1, 3000), st.integers(1, 300), st.sampled_from([13, 16]))
def test_weights_are_the_triangle_in_whole_numbers_that_add_up(num_in, num_out, bits):
    matrix = dense(num_in, num_out, bits)
    assert (matrix >= 0).all()
    assert (matrix.sum(axis=1) == 1 << bits).all()
    assert np.abs(matrix / (1 << bits) - triangles(num_in, num_out)).max() <= 1.001 / (1 << bits)


def test_what_rounding_down_leaves_goes_to_the_largest_remainder():
    """Three pixels to two: 5 / 8 and 3 / 8 of the first two, in halves and in quarters."""
    assert images._weights(3, 2, 0, 1)[1].tolist() == [1, 1, 0]
    assert images._weights(3, 2, 0, 3)[1].tolist() == [5, 3, 0]
    assert images._weights(3, 2, 1, 3)[1].tolist() == [0, 3, 5]


@settings(deadline=None)
@given(sides, sides, sides, st.integers(0, 1000))
def test_the_resize_is_whole_number_arithmetic(height, width, size, seed):
    """Bit for bit what int64 gives, so no sum was ever rounded and its order cannot matter."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    between = np.rint(dense(height, size, 16) @ pixels.astype(np.int64) / 2**13).astype(np.int64)
    exact = np.rint(between @ dense(width, size, 13).T / 2**16)
    assert (images.resize(pixels, size) == exact).all()


@settings(deadline=None)
@given(sides, sides, sides, st.integers(0, 255))
def test_one_level_everywhere_stays_so(height, width, size, level):
    assert (images.resize(np.full((height, width), level, np.uint8), size) == level).all()


@pytest.mark.parametrize(
    "shape", [(1024, 1024), (1000, 1024), (2048, 2500), (777, 1023), (224, 224), (150, 300), (3056, 1)]
)
def test_any_shape_is_within_a_level_of_the_exact_value(shape):
    """Of black and white noise, the worst there is for weights of few bits."""
    pixels = np.random.default_rng(shape[0]).integers(0, 2, shape, dtype=np.uint8) * 255
    exact = triangles(shape[0], 224) @ pixels @ triangles(shape[1], 224).T
    assert np.abs(images.resize(pixels, 224) - exact).max() <= 0.75


def test_a_view_with_strides_is_resized_as_its_copy():
    pixels = noise(8, 64)[::2, 1::2]
    assert (images.resize(pixels, 24) == images.resize(pixels.copy(), 24)).all()


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


def test_colours_and_alpha_are_the_same_by_either_decoder():
    pixels = np.random.default_rng(7).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        luma = np.asarray(image.convert("RGB").convert("L")).astype(int)
    expected = (luma * pixels[..., 3] + 127) // 255
    assert (same_size(png(pixels), 32) == expected).all()
    assert (images._decode_pillow(png(pixels)) == expected).all()


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([0, 128, 129, 257, 32768, 65534, 65535], np.uint16)
    pixels = np.zeros((16, 16), np.uint16)
    pixels[0, :7] = values
    assert same_size(png(pixels), 16)[0, :7].tolist() == [0, 0, 1, 1, 128, 255, 255]


def test_one_bit_is_black_and_white():
    pixels = np.eye(16, dtype=np.uint8) * 255
    assert (same_size(png(pixels, "1"), 16) == pixels).all()


def flat_png(colour: int, *before: bytes, methods: bytes = bytes(3)) -> bytes:
    """4 x 4 pixels of value 2, and chunks before their data."""
    header = struct.pack(">IIBB", 4, 4, 8, colour) + methods
    lines = zlib.compress((b"\0" + b"\2" * 4) * 4)
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", lines) + END


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (flat_png(3), r"palettes of \[\] bytes"),
        (flat_png(3, chunk(b"PLTE", bytes(8))), r"palettes of \[8\] bytes"),
        (flat_png(3, chunk(b"PLTE", bytes(9)), chunk(b"PLTE", bytes(9))), r"palettes of \[9, 9\] bytes"),
        (flat_png(3, chunk(b"PLTE", bytes(6))), "a pixel of colour 2 in a palette of 2"),
        (flat_png(0, methods=b"\1\0\0"), r"unknown PNG methods \(compression 1"),
        (flat_png(0, methods=b"\0\0\2"), "unknown PNG methods .*interlace 2"),
        (flat_png(5), "broken PNG header"),
    ],
)
def test_what_a_decoder_would_make_up_is_refused(data, reason):
    assert (images.decode(flat_png(3, chunk(b"PLTE", b"\7" * 9))) == 7).all()
    with pytest.raises(ImageError, match=reason):
        images.decode(data)


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB", "P", "1", "I;16", "interlaced"])
def test_lines_that_are_missing_are_not_black(mode):
    """The header says a line more than there is; Pillow alone gives a black one."""
    pixels = noise(9, 17)
    data = bytearray(raw_png(pixels, interlaced=True) if mode == "interlaced" else png(pixels, mode))
    assert images.decode(bytes(data)).shape == (17, 17)
    data[20:24] = (18).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(ImageError, match=r"bytes of pixels are missing|broken pixels"):
        images.decode(bytes(data))


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_every_cut_within_the_end_mark_is_refused(mode):
    data = png(noise(9, 16), mode)
    for length in range(len(data) - 12, len(data)):
        with pytest.raises(ImageError, match="truncated PNG"):
            images.decode(data[:length])


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
        (bomb(100_000, 8), "100000 x 8 pixels, a side longer than the 32768"),
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
    for data in (png(noise(6, 24)), png(noise(6, 24), "RGBA")):
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
    modes, worst = set(), 0.0
    for grey, data in zip(many, encoded, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            modes.add(image.mode)
            pixels = np.asarray(image.convert("L"))
        reference = functional.resize(torch.from_numpy(pixels.astype(np.float32))[None], [224, 224], antialias=True)[0]
        worst = max(worst, np.abs(grey - reference.numpy()).max())
    assert worst <= 0.75
    assert modes == {"L", "RGBA"}
    assert (to_grey(encoded[5], 224) == many[5]).all()
