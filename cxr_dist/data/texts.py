"""The text files of a release out of their bytes: unpacked, bounded, decoded, and as rows of CSV."""

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator

from cxr_dist.errors import DataError

__all__ = ["MAX_BYTES", "csv_rows", "decode", "image_name", "shown", "unpack"]

MAX_BYTES = 128 << 20
"""Largest text file, unpacked, that is believed; NIH's label CSV is 9 MB, the scores of all its images 40 MB."""

_NOT_IN_NAMES = frozenset('/\\,|"')


def unpack(data: bytes, name: str) -> bytes:
    """The bytes of a file that may be gzipped whatever its name. `name` is what errors call it. Raises DataError."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: found a broken gzip file ({error}); fetch it again") from None
    if len(unpacked) > MAX_BYTES:
        raise DataError(
            f"{name}: found more than {MAX_BYTES >> 20} MiB in a gzip file, expected a table; fetch it again"
        )
    return unpacked


def decode(data: bytes, name: str) -> tuple[str, str]:
    """The unpacked text and the SHA-256 of the unpacked bytes. Raises DataError for an empty file or other bytes."""
    data = unpack(data, name)
    if not data.strip():
        raise DataError(f"{name}: found an empty file; fetch it again")
    try:
        return data.decode("utf-8-sig"), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: found bytes that are not UTF-8 at {error.start}, expected text") from None


def csv_rows(text: str, name: str) -> Iterator[list[str]]:
    """The rows of a CSV; `strict`, for a quote that stays open would swallow the rows after it."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}: line {line}: found a row that is no CSV ({error}), expected closed quotes; "
                "mend the line or fetch the file again"
            ) from None
        if row is None:
            return
        yield row


def image_name(cell: str, where: str) -> str:
    """The cell without blanks around it, if a file may be called so: else the name would match no image, silently."""
    name = cell.strip()
    if not name:
        raise DataError(f"{where}: found no image name, expected e.g. 00000001_000.png")
    if not name.isprintable() or _NOT_IN_NAMES & set(name):
        raise DataError(f"{where}: found {shown(name)}, expected an image name such as 00000001_000.png")
    return name


def shown(cell: str) -> str:
    """A cell as errors show it: on one line, and of a long one the beginning."""
    return repr(cell) if len(cell) <= 60 else f"{cell[:60]!r}…"
