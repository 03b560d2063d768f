"""Files by URI: a local path, `file://`, `s3://` (any endpoint, by `AWS_ENDPOINT_URL`) or `gs://`, through pyarrow.fs.

Credentials come from the environment or the machine's role, never from the URI. Writes are atomic: a reader sees the
whole object or none. A transient fault is tried again with growing, jittered pauses; what a person must mend (no such
bucket, wrong key, server down) is an `InputError` in one sentence that names the URI. A missing object stays a
`FileNotFoundError`, for the caller knows what it means.
"""

import contextlib
import functools
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from cxr_dist.errors import InputError
from cxr_dist.store_errors import (
    GOOGLE,
    LOST_UPLOADS,
    MISSING,
    NO_BUCKET,
    REFUSED,
    TRANSIENT,
    advice,
    mentions,
    shown,
)

T = TypeVar("T")

ATTEMPTS = 4
"""Times that an operation with a transient fault is tried; pyarrow tries each S3 request a few times by itself."""
MAX_PAUSE_S = 8.0
"""Longest pause between two tries, seconds."""
GOOGLE_RETRY_S = 10
"""Time in which Google's client tries one request again, seconds; its own default is 15 minutes, also where it finds no
credentials."""


def resolve(uri: str, connection: int = 0) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI (one per bucket and process) and the path in it.

    Another `connection` is a filesystem of its own, which shares no network connection with the others.
    """
    if not uri:
        raise InputError("found an empty URI, expected a path, file://, s3://BUCKET/… or gs://BUCKET/…")
    parts = urlsplit(uri)
    if "://" not in uri:
        return _filesystem("file", ""), os.path.abspath(uri)
    if parts.scheme == "file":
        return _filesystem("file", ""), unquote(parts.path)
    if parts.scheme not in ("s3", "gs"):
        raise InputError(f"{shown(uri)}: found scheme {parts.scheme!r}, expected a path, file://, s3:// or gs://")
    if "@" in parts.netloc:
        raise InputError(f"{shown(uri)}: found credentials in the URI; put them in the environment and take them out")
    if not parts.netloc:
        raise InputError(f"{uri}: found no bucket, expected {parts.scheme}://BUCKET/…")
    key = uri.split("://", 1)[1].split("?", 1)[0]
    return retry(lambda: _filesystem(parts.scheme, parts.netloc, parts.query, connection), uri), key.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended; a query (`?region=…`) stays at the end."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts if part)]) + mark + query


def absolute(uri: str) -> str:
    """The URI as it means the same from any working directory and machine that shares the disk."""
    return resolve(uri)[1] if is_local(uri) else uri


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine's own filesystem tree."""
    return "://" not in uri or uri.startswith("file://")


def exists(uri: str) -> bool:
    """Whether there is an object, file, folder or non-empty prefix."""
    if _info(uri).type != pafs.FileType.NotFound:
        return True
    _check_bucket(uri)
    return False


def size(uri: str) -> int:
    """Bytes of a file; FileNotFoundError if there is none."""
    info = _info(uri)
    if info.type != pafs.FileType.File:
        _check_bucket(uri)
        raise FileNotFoundError(shown(uri))
    return info.size


def modified_ns(uri: str) -> int:
    """When a file was last written, nanoseconds since 1970; 0 where there is none or the store does not say."""
    return _info(uri).mtime_ns or 0


def open_input(uri: str, connection: int = 0) -> pa.NativeFile:
    """Random access file; its `read_at(nbytes, offset)` may be called from several threads."""
    fs, path = resolve(uri, connection)
    return retry(lambda: fs.open_input_file(path), uri)


def open_stream(uri: str) -> pa.NativeFile:
    """Sequential, buffered reader, as it lies (a .gz is not unpacked)."""
    fs, path = resolve(uri)
    return retry(lambda: fs.open_input_stream(path, compression=None, buffer_size=4 << 20), uri)


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    fs, path = resolve(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            return file.read()

    return retry(read, uri)


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer at the end of the file."""
    fs, path = resolve(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            return file.read_at(length, offset)

    return retry(read, uri)


def list_files(uri: str, recursive: bool = True) -> list[tuple[str, int]]:
    """Files under a folder or prefix as (path relative to it, bytes), sorted; empty if there are none.

    Keys that stand for a folder (ending in `/`) are left out. A missing bucket is an InputError.
    """
    return [(path, size) for path, size, _ in scan(uri, recursive)]


def scan(uri: str, recursive: bool = True) -> list[tuple[str, int, float]]:
    """Files as `list_files` gives them, with when each was last written: seconds since 1970, 0 if the store does not say."""
    path, infos = _children(uri, recursive)
    found = [
        (info.path[len(path) :].lstrip("/"), info.size, (info.mtime_ns or 0) / 1e9)
        for info in infos
        if info.type == pafs.FileType.File and not info.path.endswith("/")
    ]
    if not found:
        _check_bucket(uri)
    return sorted(entry for entry in found if entry[0])


def list_folders(uri: str) -> list[str]:
    """Names of the folders right under a folder or prefix, sorted; in an object store those of keys with more parts."""
    if uri.startswith("gs:"):  # there pyarrow knows only folders that an empty object stands for
        return sorted({path.partition("/")[0] for path, _ in list_files(uri) if "/" in path})
    _, infos = _children(uri, recursive=False)
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


def put_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write an object in one piece, over an older one if there is any."""
    if is_local(uri):
        _replace_local(resolve(uri)[1], lambda file: file.write(data))
    else:
        _put_object(uri, pa.py_buffer(data))


def upload_atomic(local_path: str | Path, uri: str) -> None:
    """Copy a local file to `uri` in one piece, over an older one if there is any."""
    if is_local(uri):
        with open(local_path, "rb") as source:
            _replace_local(resolve(uri)[1], lambda file: shutil.copyfileobj(source, file, 4 << 20))
    elif os.path.getsize(local_path) == 0:
        _put_object(uri, pa.py_buffer(b""))
    else:
        with pa.memory_map(str(local_path)) as source:
            _put_object(uri, source.read_buffer())


def delete(uri: str) -> None:
    """Remove a file; nothing happens if there is none.

    In S3 pyarrow puts an empty `FOLDER/` object where the file was; `list_files` and `exists` of a file never see it,
    `delete_dir` of a folder above takes it away.
    """
    fs, path = resolve(uri)
    try:
        retry(lambda: fs.delete_file(path), uri)
    except FileNotFoundError:
        return


def delete_dir(uri: str) -> None:
    """Remove a folder or prefix with everything under it; nothing happens if there is none.

    In an object store one by one, for not every S3 server takes pyarrow's bulk request; then the empty objects that
    stand for folders, deepest first.
    """
    if is_local(uri):
        shutil.rmtree(resolve(uri)[1], ignore_errors=not exists(uri))
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: delete(join(uri, entry[0])), list_files(uri)))
    _delete_folders(uri)


def delete_empty(uri: str) -> bool:
    """Remove a folder, and those in it, if there is no file in any of them; whether there was none.

    What appears there in this very moment stays on a disk, but may be lost in an object store.
    """
    if list_files(uri):
        return False
    if not is_local(uri):
        _delete_folders(uri)
        return True
    for folder, _, _ in os.walk(resolve(uri)[1], topdown=False):
        try:
            os.rmdir(folder)
        except OSError:  # no longer empty, or gone
            return not exists(uri)
    return True


def free_bytes(uri: str) -> int | None:
    """Free space of the disk that holds a local URI; None for an object store."""
    if not is_local(uri):
        return None
    folder = Path(resolve(uri)[1])
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def forget_filesystems() -> None:
    """Drop the cached connections, so that a changed endpoint or credential is seen."""
    _filesystem.cache_clear()
    _bucket.cache_clear()


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, query: str = "", connection: int = 0) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs" and "retry_limit_seconds" not in query:
        query = f"retry_limit_seconds={GOOGLE_RETRY_S}" + (f"&{query}" if query else "")
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}" + (f"?{query}" if query else ""))[0]


@functools.lru_cache(maxsize=64)
def _bucket(scheme: str, netloc: str, query: str) -> str:
    """The name of a bucket that exists; asked once a process. Raises InputError."""
    uri = f"{scheme}://{netloc}"

    def known() -> bool:
        try:
            return bool(_filesystem(scheme, netloc, query).get_file_info(netloc).type != pafs.FileType.NotFound)
        except PermissionError:
            # Google's roles for objects cannot look at their bucket; of one that is not there it says so to anybody
            if scheme != "gs":
                raise
            return True

    if not retry(known, uri):
        raise InputError(advice(uri, "NO_SUCH_BUCKET"))
    return netloc


def _check_bucket(uri: str) -> None:
    """Where nothing was found: InputError if that is for want of the bucket."""
    if not is_local(uri):
        parts = urlsplit(uri)
        _bucket(parts.scheme, parts.netloc, parts.query)


def _children(uri: str, recursive: bool) -> tuple[str, list[pafs.FileInfo]]:
    """The path of a folder or prefix, and what is in it."""
    fs, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)

    def listed() -> list[pafs.FileInfo]:
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):  # a folder that somebody removes while it is listed
                return fs.get_file_info(selector)
        return fs.get_file_info(selector)

    return path, retry(listed, uri)


def _info(uri: str) -> pafs.FileInfo:
    fs, path = resolve(uri)
    return retry(lambda: fs.get_file_info(path), uri)


def _delete_folders(uri: str) -> None:
    """Remove the empty objects that stand for a prefix and the folders in it."""
    fs = resolve(uri)[0]
    path, infos = _children(uri, recursive=True)
    for folder in (*sorted((info.path for info in infos), key=lambda name: name.count("/"), reverse=True), path):
        if "/" in folder:  # else the bucket
            with contextlib.suppress(FileNotFoundError):
                retry(functools.partial(fs.delete_dir, folder), uri)


def _put_object(uri: str, buffer: pa.Buffer) -> None:
    fs, path = resolve(uri)

    def put() -> None:
        with fs.open_output_stream(path, compression=None) as out:
            out.write(buffer)
        if (written := fs.get_file_info(path).size) != buffer.size:
            raise OSError(f"Incomplete write: {written} of {buffer.size} bytes")

    retry(put, uri)


def _replace_local(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write under a temporary name beside `path`, flush to the disk, rename, and make the rename durable."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retry(operation: Callable[[], T], uri: str, pause: Callable[[float], None] = time.sleep) -> T:
    """The operation's result, after as many tries as transient faults of the store at `uri` ask for."""
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            if not is_local(uri) and (isinstance(error, PermissionError) or mentions(str(error), NO_BUCKET)):
                raise InputError(advice(uri, str(error))) from None
            if not (mentions(str(error), LOST_UPLOADS) and attempt < ATTEMPTS - 1):
                if isinstance(error, FileNotFoundError):
                    _check_bucket(uri)
                raise
        except (OSError, pa.ArrowException) as error:
            text = str(error)
            if is_local(uri) or not (isinstance(error, OSError) or GOOGLE in text):
                raise
            if mentions(text, NO_BUCKET) or mentions(text, REFUSED):
                raise InputError(advice(uri, text)) from None
            if mentions(text, MISSING):
                _check_bucket(uri)
                raise FileNotFoundError(shown(uri)) from None
            if not mentions(text, TRANSIENT) or attempt == ATTEMPTS - 1:
                raise InputError(advice(uri, text)) from None
        pause(min(MAX_PAUSE_S, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
    raise AssertionError("unreachable")
