"""Tar archives: what is in them is what was put, and one that is cut or damaged anywhere is an error, not fewer images."""

import gzip
import io
import os
import tarfile
import zlib

import pyarrow as pa
import pytest

from cxr_dist.data import archives
from cxr_dist.data.archives import ScatterSpec, members, scatter
from cxr_dist.errors import DataError
from tests.releases import noise, png

FILES = {f"images/{number:08d}_000.png": png(noise(number, 40)) for number in range(4)}
EXPECTED = [(name.split("/")[1], data) for name, data in FILES.items()]


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def starts() -> list[int]:
    """First byte of each member's header, and of the end mark."""
    with tarfile.open(fileobj=io.BytesIO(tar())) as archive:
        last = archive.getmembers()[-1]
        ends = last.offset_data + -(-last.size // 512) * 512
        return [member.offset for member in archive.getmembers()] + [ends]


def read(tmp_path, data: bytes, name: str = "images_001.tar.gz") -> list[tuple[str, bytes]]:
    (tmp_path / name).write_bytes(data)
    return list(members(str(tmp_path), name))


@pytest.mark.parametrize("name", ["images_001.tar.gz", "images_001.tar"])
def test_members_of_either_kind_whatever_the_name(tmp_path, name):
    assert read(tmp_path, tar(), name) == EXPECTED
    assert read(tmp_path, gzip.compress(tar()), name) == EXPECTED


def test_a_plain_archive_cut_anywhere_before_its_end_mark_is_broken(tmp_path):
    data, places = tar(), starts()
    cuts = [at + more for at in places for more in (0, 1, 100, 511)] + [at + 600 for at in places[:-1]]
    for cut in cuts:
        with pytest.raises(DataError, match=r"images_001\.tar\.gz: found a broken archive .*fetch it again"):
            read(tmp_path, data[:cut])
    assert read(tmp_path, data[: places[-1] + 512]) == EXPECTED


def test_a_damaged_header_is_broken(tmp_path):
    data = bytearray(tar())
    data[starts()[2] + 5] ^= 1
    with pytest.raises(DataError, match="broken archive"):
        read(tmp_path, bytes(data))


def flushed(data: bytes) -> bytes:
    """A gzip stream that stops at a flushed boundary: all of its bytes are there, its end mark and checksum are not."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    "packed",
    [
        flushed(tar()),
        flushed(tar()[: starts()[2]]),
        gzip.compress(tar())[:-8],
        gzip.compress(tar())[:-1],
        gzip.compress(tar())[:-8] + bytes(4) + gzip.compress(tar())[-4:],
        gzip.compress(tar())[:-4] + bytes(4),
        gzip.compress(tar()[: starts()[2]]),
    ],
    ids=["flushed at the end", "flushed between members", "no checksum", "cut length", "crc", "length", "tar cut"],
)
def test_a_gzip_stream_without_its_end_or_checksum_is_broken(tmp_path, packed):
    with pytest.raises(DataError, match=r"images_001\.tar\.gz: found a broken archive .*fetch it again"):
        read(tmp_path, packed)


def test_an_empty_file_is_broken(tmp_path):
    with pytest.raises(DataError, match="broken archive"):
        read(tmp_path, b"")


def test_an_archive_replaced_by_another_of_its_size_is_read_again_and_the_same_one_is_not(tmp_path, monkeypatch):
    wanted = pa.table({"image_id": [name for name, _ in EXPECTED], "place": range(len(EXPECTED))})
    refused = pa.table({"image_id": pa.array([], pa.string()), "reason": pa.array([], pa.string())})
    staging = str(tmp_path / "staging")
    spec = ScatterSpec(release=str(tmp_path), staging=staging, encoding="png", size=16, run_bytes=1 << 20, key="k")
    data = tar()
    path = tmp_path / "images_001.tar"

    def staged() -> list[str]:
        return scatter(spec, path.name, len(data), wanted, refused)["image_id"].to_pylist()

    path.write_bytes(data)
    names = staged()
    assert names == [name for name, _ in EXPECTED]
    with monkeypatch.context() as patch:
        patch.setattr(archives, "members", pytest.fail)
        assert staged() == names
    with tarfile.open(path, "w") as archive:
        for name, image in reversed(FILES.items()):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
    os.utime(path, ns=(0, 1))
    assert path.stat().st_size == len(data)
    assert staged() == names[::-1]


def member(name: bytes = b"images/a.png", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """A tar header by hand, with its checksum."""
    header = name.ljust(100, b"\0") + b"0000644\0" + bytes(16) + size + bytes(12) + b" " * 8 + kind
    header = header.ljust(257, b"\0") + b"ustar\x0000"
    header = header.ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tar() + tar(), "broken archive .*data behind the end mark"),
        (tar()[: starts()[2]] + bytes(512) + tar()[starts()[2] + 512 :], "broken archive .*data behind the end mark"),
        (tar() + bytes(2 << 20), "broken archive .*more than 1048576 zeros"),
        (member(size=b"77777777777\0", kind=b"x"), "broken archive .*extended header of 8589934591 bytes"),
        (member(size=b"77777777777\0", kind=b"L"), "broken archive .*extended header of 8589934591 bytes"),
        (member(size=b"\xff" * 12), "found -1 bytes, expected at most"),
        (member(kind=b"S") + bytes(1024), "found a link or device or sparse file"),
        (member(b"images/\xe9.png") + bytes(1024), "found a name of other characters than text"),
    ],
    ids=["two in one", "header lost", "zeros", "pax", "long name", "negative", "sparse", "latin-1"],
)
def test_what_would_be_lost_or_fill_the_memory_is_refused(tmp_path, data, words):
    for packed in (data, gzip.compress(data)):
        with pytest.raises(DataError, match=words):
            read(tmp_path, packed)
