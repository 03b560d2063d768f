"""The first pass over tar archives, which cannot be read at random: decode each image once and stage what a shard needs.

One task an archive. Images pile up in memory to a run of `run_bytes`, are sorted by their place in the dataset, and go to
one staged object; the second pass takes contiguous byte ranges out of the runs. The index of an archive (every image name
in it, kept or not and why) is written last: an archive with its index is not read again. An archive is read to its end
mark and checksum, so that a cut one is an error and never a few images fewer.
"""

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data import images
from cxr_dist.data.release import different_copies
from cxr_dist.data.tables import read_table
from cxr_dist.errors import DataError

INDEX = "index.parquet"
MAX_MEMBER_BYTES = 64 << 20
"""Largest member of an archive that is believed to be a radiograph."""
MAX_HEADER_BYTES = 1 << 20
"""Longest extended header (a long name, pax records) that is read: tarfile takes each into memory whole."""
MAX_MEMBERS = 1 << 18
"""Most members of an archive; the whole release has 112,120 images. Each costs memory and, empty, only a few packed bytes."""
MAX_GROWTH = 16
"""Most that a packed archive grows by, for radiographs are compressed already (1.01 in NIH's): else a few MB are hours of
reading, and of staging the same image again and again."""
FREE_BYTES = 1 << 30
"""Unpacked bytes of an archive that are not counted: small ones may grow by more."""
MAX_PADDING_BYTES = 1 << 20
"""Most zeros behind an archive's end mark; tar rounds up to 10 KiB."""

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("reason", pa.string()),
        ("run", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("file_bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""One row a member; `reason` is null for an image that was staged. `length` is what is staged, `file_bytes` the file's."""


@dataclass(frozen=True, kw_only=True)
class ScatterSpec:
    """What the first pass needs to know of the dataset."""

    release: str
    staging: str
    encoding: str
    size: int
    run_bytes: int
    key: str
    """Identity of the settings; an index with another one is not used."""


def scatter(spec: ScatterSpec, path: str, file_bytes: int, wanted: pa.Table, refused: pa.Table) -> pa.Table:
    """Stage the wanted images of one archive; give its index (INDEX_SCHEMA).

    `wanted`: image_id, place (uint64, ascending in the dataset's order). `refused`: image_id, reason, for images that have
    labels and are left out all the same. Raises DataError for an archive that is broken or whose members are not what a
    release holds.
    """
    folder = storage.join(spec.staging, hashlib.sha256(path.encode()).hexdigest()[:16])
    index_uri = storage.join(folder, INDEX)
    key = json.dumps([spec.key, path, file_bytes, storage.modified_ns(storage.join(spec.release, path))])
    try:
        index = read_table(storage.read_bytes(index_uri))
        if (index.schema.metadata or {}).get(b"key") == key.encode():
            return index.replace_schema_metadata(None)
    except (FileNotFoundError, pa.ArrowException):  # one that cannot be read is made again
        pass
    places = dict(zip(wanted["image_id"].to_pylist(), wanted["place"].to_pylist(), strict=True))
    reasons = dict(zip(refused["image_id"].to_pylist(), refused["reason"].to_pylist(), strict=True))
    rows: list[dict] = []
    run: list[tuple[int, bytes, dict]] = []
    num_runs = held = 0
    for name, data in members(spec.release, path):
        row: dict = {"image_id": name, "file_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rows.append(row)
        if name not in places:
            row["reason"] = reasons.get(name, "no label row")
            continue
        try:
            payload = encode(data, spec.encoding, spec.size)
        except images.ImageError as error:
            row["reason"] = error.reason
            continue
        run.append((places[name], payload, row))
        held += len(payload)
        if held >= spec.run_bytes:
            _put_run(folder, num_runs, run)
            num_runs, run, held = num_runs + 1, [], 0
    if run:
        _put_run(folder, num_runs, run)
    index = pa.Table.from_pylist(rows, INDEX_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(index.replace_schema_metadata({"key": key}), sink)
    storage.put_atomic(index_uri, sink.getvalue())
    return index


def encode(data: bytes, encoding: str, size: int) -> bytes:
    """What a shard row holds of an image file: its own bytes, decoded once to be sure, or grey pixels. Raises ImageError."""
    if encoding == "png":
        images.check(data)
        return data
    return images.to_grey(data, size).tobytes()


def members(release: str, path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every PNG in an archive, in its order; other plain files are passed over.

    Raises DataError for a member that leaves the folder, is a link or a device, or is absurdly large, and for an archive
    that is cut or damaged, unpacks to absurdly much or many, or has anything but zeros behind its end mark, where tarfile
    looks no further.
    """
    uri = storage.join(release, path)
    where = storage.shown(uri)
    try:
        with (
            storage.open_stream(uri) as stream,
            _Bounded(_unpacked(stream), FREE_BYTES + MAX_GROWTH * storage.size(uri)) as plain,
            tarfile.open(fileobj=cast(IO[bytes], plain), mode="r|", tarinfo=_Member) as tar,
        ):
            for number, member in enumerate(tar, start=1):
                _check_member(where, member)
                if number > MAX_MEMBERS:
                    raise EOFError(f"more than {MAX_MEMBERS} members")
                name = member.name.rsplit("/", 1)[-1]
                if not member.isfile() or not name.lower().endswith(".png") or name.startswith("."):
                    continue
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise EOFError(f"{member.name} is cut")
                yield name, data
            _check_padding(cast(IO[bytes], tar.fileobj))  # not `plain`: tarfile has read ahead of itself
    # RecursionError: tarfile takes an extended header that follows another by calling itself
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as error:
        raise DataError(f"{where}: found a broken archive ({error}); fetch it again") from None


class _Member(tarfile.TarInfo):
    """A tar header that must be there: tarfile takes a cut or broken one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the zeros that end an archive
                raise
            raise EOFError(f"{error}, expected the next member or the end mark") from None
        if member.type in _EXTENDED and not 0 <= member.size <= MAX_HEADER_BYTES:
            raise EOFError(f"an extended header of {member.size} bytes, expected at most {MAX_HEADER_BYTES}")
        return member


_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _check_padding(rest: IO[bytes]) -> None:
    """Zeros to the end of the file; gzip checks its own end mark and checksum when it gets there."""
    read = 0
    while block := rest.read(1 << 16):
        read += len(block)
        if any(block):
            raise EOFError("data behind the end mark, as of two archives in one file")
        if read > MAX_PADDING_BYTES:
            raise EOFError(f"more than {MAX_PADDING_BYTES} zeros behind the end mark")


def _unpacked(stream: pa.NativeFile) -> IO[bytes]:
    """The tar itself, of a file that may be gzipped whatever its name."""
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
    if buffered.peek(2)[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    return buffered


class _Bounded:
    """A tar that is read from its beginning, up to so many bytes: whatever they are, images, names or nothing."""

    def __init__(self, plain: IO[bytes], most: int):
        self.plain, self.most, self.read_bytes = plain, most, 0

    def read(self, size: int) -> bytes:
        data = self.plain.read(size)
        self.read_bytes += len(data)
        if self.read_bytes > self.most:
            raise EOFError(f"more than {self.most} bytes when unpacked, as of no radiographs")
        return data

    def __enter__(self) -> "_Bounded":
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()


def merge(paths: list[str], indexes: list[pa.Table]) -> tuple[dict[str, dict], int]:
    """One index row an image name, the first in the archives' order, and the number of further, equal copies.

    Raises DataError for two different images of one name.
    """
    index: dict[str, dict] = {}
    holders: dict[str, str] = {}
    duplicates = 0
    for path, table in zip(paths, indexes, strict=True):
        for row in table.to_pylist():
            name = row["image_id"]
            if name not in index:
                index[name], holders[name] = row, path
            elif index[name]["sha256"] != row["sha256"]:
                raise different_copies(name, holders[name], path)
            else:
                duplicates += 1
    return index, duplicates


def _check_member(where: str, member: tarfile.TarInfo) -> None:
    wrong = ""
    if member.name.startswith("/") or ".." in member.name.split("/") or "\\" in member.name:
        wrong = "a path that leaves the folder"
    elif not member.name.isprintable():
        wrong = "a name of other characters than text"
    elif not (member.isfile() or member.isdir()) or member.issparse():
        wrong = "a link or device or sparse file"
    elif not 0 <= member.size <= MAX_MEMBER_BYTES:
        wrong = f"{member.size} bytes, expected at most the {MAX_MEMBER_BYTES} of any radiograph"
    if wrong:
        raise DataError(
            f"{where}: member {member.name!r}: found {wrong}, expected images/NAME.png; this is no NIH archive"
        )


def _put_run(folder: str, number: int, run: list[tuple[int, bytes, dict]]) -> None:
    uri = storage.join(folder, f"{number:05d}.bin")
    run.sort(key=lambda entry: entry[0])
    offset = 0
    for _, payload, row in run:
        row.update(run=uri, offset=offset, length=len(payload))
        offset += len(payload)
    storage.put_atomic(uri, b"".join(payload for _, payload, _ in run))
