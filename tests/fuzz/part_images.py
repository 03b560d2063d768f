"""Mutated PNG and JPEG files through `cxr_dist.data.images`: an error in a line, or the right pixels."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_dist.data import images
from tests.fuzz import mutate, pngs
from tests.fuzz.mutate import Rng
from tests.fuzz.pngs import Base, Case
from tests.releases import noise, png
from tests.unit.test_images import raw_png

REAL_FILES = 8
REAL_EVERY = 12
"""Every so many cases a file of NIH's, where they are at hand: a hundred times the bytes of a made one."""
JPEG_EVERY = 50
SIZE = 16


def prepare() -> Callable[[int, Rng], bool]:
    """The function that makes a case and judges what comes of it."""
    made, real, jpeg = _made(), _real(), _jpeg()

    def check(number: int, rng: Rng) -> bool:
        if number % JPEG_EVERY == JPEG_EVERY - 1:
            return _taken(jpeg, _damaged_jpeg(rng, jpeg))
        bases = real if real and number % REAL_EVERY == 0 else made
        base = bases[int(rng.integers(len(bases)))]
        return _taken(base, pngs.MUTATIONS[int(rng.integers(len(pngs.MUTATIONS)))](rng, base))

    return check


def _taken(base: Base, case: Case) -> bool:
    """Whether the file gave pixels, which are then the right ones; an error has a reason for a person."""
    where = f"{base.name}, {case.name}, expected {case.expected}"
    found = _decoded(case.data)
    if isinstance(found, str):
        assert case.expected != pngs.SAME, f"{where}: {found}"
        assert found.isprintable(), where
        assert 0 < len(found) < 200, where
        return False
    assert case.expected != pngs.REFUSED, f"{where}: taken for {found.shape}"
    expected = _expected(base, case, found)
    assert (found.dtype, found.shape) == (np.uint8, expected.shape), f"{where}: {found.dtype} {found.shape}"
    assert (found == expected).all(), f"{where}: other pixels"
    assert (images.to_grey(case.data, SIZE) == images.resize(expected, SIZE)).all(), where
    return True


def _decoded(data: bytes) -> np.ndarray | str:
    try:
        return images.decode(data)
    except images.ImageError as error:
        return error.reason


def _expected(base: Base, case: Case, found: np.ndarray) -> np.ndarray:
    if case.expected == pngs.JUDGED:
        return pngs.judge(case.data)
    if case.expected == pngs.SHAPE and found.shape == base.pixels.shape:
        return found
    return base.pixels


def _made() -> list[Base]:
    """Every kind of PNG, in one IDAT and in several, with text and a physical size as real ones have."""
    grey = noise(3, 48)[:40]
    colours = np.random.default_rng(3).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    files = {
        "grey": png(grey),
        "rgba": png(colours),
        "opaque": png(grey, "RGBA"),
        "rgb": png(colours[..., :3]),
        "grey with alpha": png(grey, "LA"),
        "palette": png(grey, "P"),
        "one bit": png(grey, "1"),
        "16 bits": png(grey.astype(np.uint16) * 257 + 1),
        "interlaced": raw_png(grey, interlaced=True),
        "smooth": png(np.full((200, 300), 7, np.uint8)),
        "one pixel": png(grey[:1, :1]),
    }
    for name in ("grey", "rgba", "16 bits"):
        chunks = pngs.split(files[name])
        several = pngs.with_stream(chunks, pngs.stream(chunks), 7)
        extra = [(b"pHYs", bytes(9)), (b"tEXt", b"Comment\0none"), (b"tIME", bytes([7, 230, 1, 1, 1, 1, 1]))]
        files[f"{name} in parts"] = pngs.join([several[0], *extra, *several[1:]])
    return [Base(name, data, pngs.judge(data)) for name, data in files.items()]


def _real() -> list[Base]:
    folder = Path(os.environ.get("CXR_REAL_DATA", "")) / "nih_sample" / "images"
    files = sorted(folder.glob("*.png")) if os.environ.get("CXR_REAL_DATA") else []
    kinds = {kind: [file for file in files if file.read_bytes()[25] == kind] for kind in (0, 6)}
    chosen = [*kinds[0][: REAL_FILES - 2], *kinds[6][:2]]
    return [Base(file.name, data, pngs.judge(data)) for file in chosen for data in [file.read_bytes()]]


def _jpeg() -> Base:
    out = io.BytesIO()
    Image.fromarray(noise(5, 64)).save(out, "jpeg", quality=90)
    with Image.open(io.BytesIO(out.getvalue())) as image:
        return Base("jpeg", out.getvalue(), np.asarray(image))


def _damaged_jpeg(rng: Rng, base: Base) -> Case:
    """A JPEG that is cut is an error; one that is damaged within has nothing to tell it by."""
    if rng.random() < 0.5:
        return Case("cut short", mutate.cut(rng, base.data[:-2]), pngs.REFUSED)
    body = mutate.flip_bit(rng, base.data[-800:-2])
    return Case("bit flipped", base.data[:-800] + body + base.data[-2:], pngs.SHAPE)
