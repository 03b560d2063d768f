"""Images in every form that the logged model takes: the same pixels, or a reason."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest

from cxr_dist.data import images
from cxr_dist.data.images import ImageError, to_grey
from cxr_dist.serve.pixels import to_pixels
from tests.releases import noise, png

SIDE, SIZE = 48, 32
ARRAY = noise(0, SIDE)
PNG = png(ARRAY)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [
    PNG, bytearray(PNG), memoryview(PNG), base64.b64encode(PNG), base64.encodebytes(PNG), base64.b64encode(PNG).decode(),
    ARRAY, ARRAY.tolist(), tuple(map(tuple, ARRAY.tolist())), np.asfortranarray(ARRAY),
    np.array(ARRAY.tolist(), np.bytes_).tolist(),
    npy(ARRAY), npy(np.asfortranarray(ARRAY)), npy(ARRAY, (2, 0)), base64.b64encode(npy(ARRAY)),
])  # fmt: skip
def test_every_form_gives_the_one_ways_pixels(form: Any) -> None:
    assert np.array_equal(to_pixels(form, SIZE), to_grey(PNG, SIZE))


def test_an_array_of_the_models_own_size_is_taken_as_it_is() -> None:
    assert np.array_equal(to_pixels(ARRAY, SIDE), ARRAY)


@pytest.mark.parametrize(("form", "reason"), [
    (None, "no image"), (float("nan"), "no image"), (3, "a int, expected encoded bytes or a uint8 array"),
    (b"", "empty file"), (b"GIF89a\x01", "neither PNG nor JPEG"), ("text", "neither PNG nor JPEG"), (PNG[:-20], "truncated PNG"),
    (b"AAA", "broken base64 (Incorrect padding)"),
    (ARRAY.astype(np.float32) / 255, "an array of float32, expected uint8: grey levels from 0 to 255"),
    (ARRAY.astype(np.int64), "an array of int64, expected uint8: grey levels from 0 to 255"),
    ([[0, 256]], "an array of int64, expected uint8: grey levels from 0 to 255"),
    ([[0, -1]], "an array of int64, expected uint8: grey levels from 0 to 255"),
    ([[0.5, 1.0]], "an array of float64, expected uint8: grey levels from 0 to 255"),
    ([[1, 2], [3]], "no array of grey levels (setting an array element with a sequence."),
    ([["a", "b"]], "no array of grey levels (invalid literal for int()"),
    (np.stack([ARRAY] * 3), "an array of shape (3, 48, 48), expected [height, width], grey"),
    (np.zeros((0, 5), np.uint8), "no pixels (5 x 0)"),
    (np.broadcast_to(np.uint8(0), (1, images.MAX_SIDE + 1)), "32769 x 1 pixels, a side longer than"),
    (npy(ARRAY.astype(np.uint16)), "an NPY file of uint16, expected uint8"),
    (npy(np.array([{}], object)), "an NPY file of object, expected uint8"),
    (npy(ARRAY)[:-1], "an NPY file of shape (48, 48) with 2303 bytes of pixels"),
    (npy(ARRAY)[:40], "broken NPY header"),
    (b"\x93NUMPY\x09\x00" + npy(ARRAY)[8:], "an NPY file of version (9, 0), expected 1.0 or 2.0"),
])  # fmt: skip
def test_what_is_no_image_has_a_reason(form: Any, reason: str) -> None:
    with pytest.raises(ImageError, match="^" + re.escape(reason)):
        to_pixels(form, SIZE)


def test_an_npy_header_asks_for_no_memory() -> None:
    header = npy(np.zeros((10, 10), np.uint8)).replace(b"(10, 10)", b"(1, 9999999999)"[:15])
    with pytest.raises(ImageError, match="NPY"):
        to_pixels(header, SIZE)
