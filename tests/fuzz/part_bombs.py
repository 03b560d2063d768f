"""Small files that unpack without end: each is refused, or taken for what it is, within the memory of the child."""

import gzip
import io
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_dist import runfile
from cxr_dist.data import images, nih
from cxr_dist.data.archives import members
from cxr_dist.data.manifest import Manifest
from cxr_dist.errors import InputError
from cxr_dist.evaluate import external, scores
from tests.fuzz import pngs
from tests.fuzz.errors import sentence
from tests.fuzz.mutate import Rng
from tests.releases import noise, png

GREY, DEEP = png(noise(1, 32)), png(noise(1, 32).astype(np.uint16) * 257)
ENDLESS_MIB = 4096
"""What the bombs unpack to; far more than the child may have."""

Bomb = tuple[bytes, bool]
"""A file, and whether it must be refused; else it may also be taken."""


def prepare() -> Callable[[int, Rng], bool]:
    """The function that opens one of the bombs; they are made small, and before memory is."""
    folder = Path(tempfile.mkdtemp(prefix="cxr-fuzz-"))
    labels = nih.read_labels(
        b"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\na,Mass,0,1,1,M,PA",
        "l",
    )

    def tar(path: str) -> object:
        return list(members(str(folder), path))

    def score_table(path: str) -> object:
        return external.read_external(folder / path, labels, nih.FINDINGS)

    def own_scores(path: str) -> object:
        return scores.read(folder / path)

    def label_file(path: str) -> object:
        return nih.read_labels((folder / path).read_bytes(), path)

    def list_file(path: str) -> object:
        return nih.read_list((folder / path).read_bytes(), path)

    def manifest(path: str) -> object:
        return Manifest.from_json((folder / path).read_bytes(), path)

    def config(path: str) -> None:
        runfile.check(str(folder / path), ("data",))

    bombs: list[tuple[Callable[[str], object], Bomb]] = [
        *((_image(folder), bomb) for bomb in _images()),
        *((tar, bomb) for bomb in _archives()),
        (score_table, (_gzip(), True)),
        (score_table, (_rows(), True)),
        (own_scores, (_rows(), True)),
        (label_file, (_gzip(), True)),
        (label_file, (b'"' + b"x" * (50 << 20) + b'"', True)),
        (list_file, (_gzip(), True)),
        (manifest, (b"[" * (1 << 20), True)),
        (manifest, (b'{"format": 1, "size": ' + b"9" * (1 << 20) + b"}", True)),
        (config, (_laughs(), True)),
        (config, (b"data: " + b"[" * (1 << 19), True)),
        (config, (b"data: {uri: " + b"x" * (1 << 19) + b"}", True)),
        (config, (b"".join(b" " * level + b"a:\n" for level in range(1000)), True)),
    ]
    for number, (_, (data, _refused)) in enumerate(bombs):
        (folder / f"bomb{number}").write_bytes(data)

    def check(number: int, rng: Rng) -> bool:
        opened, (_, refused) = bombs[number]
        try:
            opened(f"bomb{number}")
        except InputError as error:
            return sentence(error, f"bomb{number}", "data")
        except images.ImageError as error:
            return sentence(error, error.reason)
        assert not refused
        return True

    return check


def _image(folder: Path) -> Callable[[str], object]:
    return lambda path: images.to_grey((folder / path).read_bytes(), 224)


def _images() -> list[Bomb]:
    def header(data: bytes, width: int, height: int) -> bytes:
        return pngs.join(pngs.with_header(pngs.split(data), width=width, height=height))

    def before_pixels(data: bytes, kind: bytes, body: bytes) -> bytes:
        chunks = pngs.split(data)
        return pngs.join([chunks[0], (kind, body), *chunks[1:]])

    def endless(data: bytes) -> bytes:
        return pngs.join(pngs.with_stream(pngs.split(data), _deflated(ENDLESS_MIB)))

    bombs = []
    for data in (GREY, DEEP, png(noise(1, 32), "RGBA"), png(noise(1, 32), "P")):
        bombs += [(header(data, 60_000, 60_000), True), (header(data, 8192, 8192), True), (endless(data), False)]
        for kind, front in ((b"zTXt", b"x\0\0"), (b"iCCP", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
            bombs.append((before_pixels(data, kind, front + _deflated(ENDLESS_MIB)), False))
    # what they say they are, and as large as is taken
    for colour, depth in ((0, 8), (6, 8), (0, 16)):
        chunks = pngs.with_header(pngs.split(GREY), width=8192, height=8192, depth=depth, colour=colour)
        bombs.append((pngs.join(pngs.with_stream(chunks, _deflated(1024))), False))
    return bombs


def _archives() -> list[Bomb]:
    def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    endless = ENDLESS_MIB << 20
    starts = [
        b"",
        header("images/a.png", endless),
        header("notes.txt", endless),
        header("images/a.png", endless, tarfile.XHDTYPE),
        header("images/a.png", endless, tarfile.XGLTYPE),
        header("images/a.png", endless, tarfile.GNUTYPE_LONGNAME),
        header("images/a.png", endless, tarfile.GNUTYPE_SPARSE),
    ]
    return [(gzip.compress(start) + _gzip(), True) for start in starts]


def _deflated(mib: int) -> bytes:
    """A zlib stream of so many MiB of zeros, made of one flushed MiB again and again."""
    packer = zlib.compressobj(9)
    start = packer.compress(b"\0") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * mib


def _gzip() -> bytes:
    """Gzip members one after another."""
    return gzip.compress(bytes(64 << 20)) * (ENDLESS_MIB // 64)


def _rows() -> bytes:
    """A Parquet file of 20 million rows in a few hundred bytes each million."""
    out = io.BytesIO()
    pd.DataFrame({"image_id": pd.Categorical.from_codes(np.zeros(20_000_000, np.int8), ["a"])}).to_parquet(out)
    return out.getvalue()


def _laughs() -> bytes:
    """A billion values out of ten lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()
