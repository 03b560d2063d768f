"""Damaged tar archives: an error in a line, or every image of the archive, each its own or found to be broken."""

import gzip
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from cxr_dist.data import images
from cxr_dist.data.archives import members
from cxr_dist.errors import InputError
from tests.fuzz import mutate
from tests.fuzz.errors import sentence
from tests.fuzz.mutate import Rng
from tests.releases import noise, png

FILES = {f"{number:08d}_000.png": png(noise(number, 24)) for number in range(1, 5)}
NAME = "images_001.tar.gz"
CHECKSUM = slice(148, 156)


def prepare() -> Callable[[int, Rng], bool]:
    """The function that makes a case and judges what comes of it."""
    plain = _tar()
    packed = gzip.compress(plain, mtime=0)
    folder = Path(tempfile.mkdtemp(prefix="cxr-fuzz-"))

    def check(number: int, rng: Rng) -> bool:
        kind = number % 3
        data = gzip.compress(_other_header(rng, plain)) if kind == 2 else mutate.damaged(rng, (plain, packed)[kind])
        (folder / NAME).write_bytes(data)
        try:
            found = list(members(str(folder), NAME))
        except InputError as error:
            return sentence(error, NAME)
        if kind == 1:
            assert found == list(FILES.items())
        elif kind == 0:
            _whole_or_broken(found)
        return True

    return check


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(f"images/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _other_header(rng: Rng, plain: bytes) -> bytes:
    """Another field in the header of any member, under a right checksum: who wrote it meant it."""
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        starts = [member.offset for member in archive.getmembers()]
    start = starts[int(rng.integers(len(starts)))]
    header = bytearray(mutate.damaged(rng, plain[start : start + 512])[:512].ljust(512, b"\0"))
    if rng.random() < 0.5:
        header[156] = int(rng.choice(list(b"01234567xgLKSVDMNX\0")))
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return plain[:start] + bytes(header) + plain[start + 512 :]


def _whole_or_broken(found: list[tuple[str, bytes]]) -> None:
    assert [name for name, _ in found] == list(FILES)
    for name, data in found:
        try:
            pixels = images.decode(data)
        except images.ImageError:
            continue
        assert (pixels == images.decode(FILES[name])).all()
