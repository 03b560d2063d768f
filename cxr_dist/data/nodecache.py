"""Row groups on a node's own disk, so that later epochs read nothing from storage.

An entry is a file named by the SHA-256 of the file it comes from and its offset there: another dataset, or another
shard under the same name, never matches. Every read is verified by a checksum over that name and the bytes; a damaged
entry is dropped, and read from storage again. Entries appear by a rename, so the processes of a node share the folder
without locks, and one that is killed leaves a temporary file at worst.

The cache stops taking entries when it is full; it does not evict. An epoch reads every row group once, in a random
order of its own. Where a part p of the dataset fits, what stays is found again: p of the reads, and nothing is written
after the first epoch. Evicting the least recently used would find p + (1 - p) ln(1 - p) of them (15 % instead of 50 %
where half fits), and write all the others anew in every epoch.
"""

import functools
import logging
import os
import shutil
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

__all__ = ["NodeCache"]

log = logging.getLogger(__name__)

VERSION = "cxr-dist-cache-1"
"""Folder of the entries in the cache's folder: another format would have another."""
_HEADER = struct.Struct("<8sII")
_MAGIC = b"cxrcache"
BLOCK = 4096
"""Bytes that a file system gives at once: an entry is counted in whole ones."""
SHARE = 16
"""A process writes a 16th of what was free before it looks again at what others have written."""
FULL = 64
"""The cache is full when less than a 64th of its size is free, so that it is not looked through for every entry."""
SPARE = 0.05
"""Part of the disk that is left free: on a fuller one Ray refuses to spill objects."""
LEFTOVER_S = 3600
"""Age of a temporary file that nobody writes any more, seconds."""


@dataclass(frozen=True, kw_only=True)
class NodeCache:
    """A folder on a local disk that holds at most `max_bytes` of row groups; small, so that every reader has a copy.

    No method raises for a fault of the disk: reading goes on from storage, and the log says why once a process.
    """

    folder: str
    max_bytes: int

    def get(self, sha256: str, offset: int, length: int) -> pa.Buffer | None:
        """The bytes from `offset` of the file with this SHA-256, verified; None if they are not there."""
        path = self._path(sha256, offset)
        try:
            with open(path, "rb", buffering=0) as file:
                header = file.read(_HEADER.size)
                data = read_buffer(file.fileno(), _HEADER.size, length)
                whole = os.fstat(file.fileno()).st_size == _HEADER.size + length
        except FileNotFoundError:
            return None
        except OSError as error:
            _state(self).give_up(f"cannot read {path} ({error.strerror})")
            return None
        if whole and header == _header(sha256, offset, data):
            return data
        log.warning("node-local cache: found a damaged entry, read it from storage again: %s", path)
        self.drop(sha256, offset)
        return None

    def put(self, sha256: str, offset: int, data: bytes | memoryview | pa.Buffer) -> None:
        """Keep these bytes, if there is room."""
        size = -(-(len(data) + _HEADER.size) // BLOCK) * BLOCK
        path = self._path(sha256, offset)
        temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            if not _state(self).takes(size):
                return
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            try:
                with open(temporary, "xb", buffering=0) as file:
                    _write(file.fileno(), _header(sha256, offset, data))
                    _write(file.fileno(), data)
                # not flushed to the disk: what a crash of the machine leaves is found out by its checksum
                os.rename(temporary, path)
            except OSError:
                _unlink(temporary)
                raise
        except OSError as error:
            _state(self).give_up(f"cannot write {path} ({error.strerror})")

    def drop(self, sha256: str, offset: int) -> None:
        """Forget an entry."""
        try:
            _unlink(self._path(sha256, offset))
        except OSError as error:
            _state(self).give_up(f"cannot delete an entry ({error.strerror})")

    def _path(self, sha256: str, offset: int) -> str:
        return f"{self.folder}/{VERSION}/{sha256[:2]}/{sha256}-{offset}"


class _State:
    """What one process knows of how full the cache is."""

    def __init__(self, cache: NodeCache):
        self.cache = cache
        self.root = f"{cache.folder}/{VERSION}"
        self.allowance = 0
        """Bytes this process may write before it looks again."""
        self.stopped = False
        self.lock = threading.Lock()

    def takes(self, size: int) -> bool:
        """Whether there is room for an entry of so many bytes; counted as taken."""
        with self.lock:
            if self.stopped:
                return False
            if self.allowance < size:
                self.allowance = self._room(size)
            self.allowance -= size
            return not self.stopped

    def _room(self, size: int) -> int:
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        used = sum(_sizes(self.root))
        free = self.cache.max_bytes - used
        if free < max(size, self.cache.max_bytes // FULL):
            self.give_up(
                f"full: {used / 1e9:.2f} GB lie in {self.root}; delete that folder's oldest, or raise data.cache_gb"
            )
        disk = shutil.disk_usage(self.cache.folder)
        spare = int(disk.free - SPARE * disk.total)
        if spare < size:
            self.give_up(f"the disk of {self.root} is nearly full; free some of it, or lower data.cache_gb")
        return max(size, min(free, spare) // SHARE)

    def give_up(self, reason: str) -> None:
        if not self.stopped:
            self.stopped = True
            log.warning("node-local cache: nothing more is kept: %s", reason)


@functools.lru_cache(maxsize=8)
def _state(cache: NodeCache) -> _State:
    return _State(cache)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _header(sha256: str, offset: int, data: bytes | memoryview | pa.Buffer) -> bytes:
    return _HEADER.pack(_MAGIC, zlib.crc32(data, zlib.crc32(f"{sha256} {offset}".encode())), 0)


def read_buffer(descriptor: int, offset: int, length: int) -> pa.Buffer:
    """`length` bytes of a file from `offset`, in Arrow's memory; fewer at its end."""
    buffer = pa.allocate_buffer(length)
    view, done = memoryview(buffer), 0
    while done < length and (read := os.preadv(descriptor, [view[done:]], offset + done)):
        done += read
    return buffer.slice(0, done)


def _write(descriptor: int, data: bytes | memoryview | pa.Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sizes(root: str) -> Iterator[int]:
    """Bytes on disk of every file in the cache; leftovers of killed processes are deleted."""
    try:
        folders = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".tmp") and time.time() - found.st_mtime > LEFTOVER_S:
                        _unlink(entry.path)
                    else:
                        yield -(-found.st_size // BLOCK) * BLOCK
        except FileNotFoundError:
            continue
