"""Byte ranges of files in storage: few, large, several in flight, ahead of who reads them, and counted.

Pieces that touch in a file are read as one range, others side by side; nothing between them is read. A range that has
not come after a multiple of the usual time is asked for again over another connection (`hedge`). A cache on the node's
disk (`nodecache`) is asked first, if there is one.
"""

import dataclasses
import functools
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.data.hedge import Attempt, Pending, shared_pool
from cxr_dist.data.nodecache import NodeCache, read_buffer
from cxr_dist.data.places import Lookup
from cxr_dist.errors import DataError, RunError

__all__ = ["AHEAD_BYTES", "TIMEOUT_S", "ByteRanges", "ReadCounters", "counters"]

AHEAD_BYTES = 32 << 20
"""Bytes of later runs that are in flight, or wait in memory, while one is worked on: 0.3 s of a core decoding PNG.
More hides no more of a wait and costs fresh memory (64 MiB: 4 % of the decoding)."""
MAX_RANGE = 8 << 20
"""Longest range that touching pieces are joined to: longer ones would leave the other connections idle."""
TIMEOUT_S = 120.0
"""Longest wait for a range, however often it is asked for, seconds."""
OPEN_FILES = 1024
"""Objects that a process keeps open: each was asked for its size once."""

Numbers = npt.NDArray[np.int64]
Pieces = list[memoryview]


@dataclass(frozen=True, kw_only=True)
class ReadCounters:
    """What this process has read from storage so far; the difference of two is what was read between them."""

    bytes_read: int = 0
    """Bytes that storage was asked for; those of a hedged range count twice."""
    requests: int = 0
    """Requests to storage: ranges, and sizes of objects when they are opened."""
    hedged: int = 0
    """Ranges that were asked for a second time because the answer did not come."""
    cache_hits: int = 0
    """Row groups found in the node-local cache."""
    cache_misses: int = 0
    """Row groups looked for there in vain."""
    wait_s: float = 0.0
    """Seconds that readers waited for bytes."""

    def __sub__(self, earlier: "ReadCounters") -> "ReadCounters":
        names = [field.name for field in dataclasses.fields(self)]
        return ReadCounters(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


NO_SUCH_RANGE = ("HTTP status 416", "HTTP status code: 416")
"""In the text of pyarrow's error for a range past an object's end. Where an object became shorter but the range begins in
it, pyarrow gives bytes that were never written for the rest: page checksums find those."""
_NOTHING = pa.py_buffer(b"")

_lock = threading.Lock()
_counted: dict[str, Any] = dataclasses.asdict(ReadCounters())


def counters() -> ReadCounters:
    """What this process has read so far."""
    with _lock:
        return ReadCounters(**_counted)


def _count(**more: float) -> None:
    with _lock:
        for name, number in more.items():
            _counted[name] += number


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteRanges:
    """Where numbered pieces (row groups, or whole files) lie. F files, G pieces; small, so that it can be sent about."""

    root: str
    """URI that the paths are relative to."""
    paths: pa.StringArray
    """Files [F]."""
    file_bytes: npt.NDArray[np.int64]
    """Size that each file must have [F]."""
    file_sha256: pa.StringArray | None
    """SHA-256, hex, of each file [F], by which the cache knows its bytes; None: by `identity` and the path."""
    identity: str = ""
    """SHA-256, hex, of the manifest that names files whose own is not known."""
    file_index: Lookup
    """File of each piece [G]."""
    offset: Lookup
    """First byte of each piece [G]."""
    length: Lookup
    """Bytes of each piece [G]."""
    missing: str
    """What a person is told where a file is missing: what was expected, and what to do; `{uri}` stands for it."""
    mend: str
    """What a person does about a file that is not the one it should be; `{uri}` stands for it."""
    cache: NodeCache | None = None
    timeout_s: float = TIMEOUT_S

    def stream(self, runs: Iterable[npt.ArrayLike], ahead_bytes: int = AHEAD_BYTES) -> Iterator[tuple[Numbers, Pieces]]:
        """The numbers of each run and the bytes of their pieces, in order, while those of the next runs are in flight.

        In memory are the run in hand and later ones of `ahead_bytes`, the last of which may be longer. Raises DataError
        for a file that is missing or has another size, InputError and RunError for a storage that refuses or is silent.
        """
        for connection in (0, 1):
            # both now: pyarrow makes a connection only when no request of the process is under way, stalled or not
            storage.resolve(self.root, connection)
        runs, ahead, held = iter(runs), deque[_Run](), 0

        def fill() -> None:
            nonlocal held
            while not ahead or held < ahead_bytes:
                numbers = next(runs, None)
                if numbers is None:
                    return
                ahead.append(self._start(np.asarray(numbers, np.int64)))
                held += ahead[-1].num_bytes

        try:
            fill()
            while ahead:
                run = ahead.popleft()
                held -= run.num_bytes
                fill()
                yield run.numbers, self._finish(run)
        finally:
            for run in ahead:
                run.cancel()

    def uri(self, file: int) -> str:
        return storage.join(self.root, self.paths[file].as_py())

    def forget(self, number: int) -> None:
        """A piece turned out to be broken: drop it from the cache, and ask for sizes again, to see if files changed."""
        _opened.cache_clear()
        if self.cache is not None:
            self.cache.drop(self._sha256(int(self.file_index[number])), int(self.offset[number]))

    def _sha256(self, file: int) -> str:
        if self.file_sha256 is not None:
            return self.file_sha256[file].as_py()
        return hashlib.sha256(f"{self.identity} {self.paths[file].as_py()}".encode()).hexdigest()

    def _start(self, numbers: Numbers) -> "_Run":
        if numbers.size == 0:
            raise ValueError("found no row groups to read, expected at least one")
        unique = np.unique(numbers)
        order = unique[np.lexsort((self.offset[unique], self.file_index[unique]))]
        pool = shared_pool(_count_hedge)
        hedged = not storage.is_local(self.root)
        reads = []
        for span in self._spans(order):
            reads.append((span, pool.submit(functools.partial(self._read_span, span), hedged=hedged)))
        return _Run(numbers=numbers, num_bytes=int(self.length[unique].sum()), reads=reads)

    def _spans(self, order: Numbers) -> list[list[int]]:
        """Pieces, ordered by place, cut wherever the next does not touch or the range would be too long."""
        spans: list[list[int]] = []
        file, end, room = -1, -1, 0
        places = zip(
            order.tolist(), *(a[order].tolist() for a in (self.file_index, self.offset, self.length)), strict=True
        )
        for number, its_file, offset, length in places:
            if its_file == file and offset == end and length <= room:
                spans[-1].append(number)
            else:
                spans.append([number])
                room = MAX_RANGE
            file, end, room = its_file, offset + length, room - length
        return spans

    def _finish(self, run: "_Run") -> Pieces:
        pieces: dict[int, memoryview] = {}
        began = time.perf_counter()
        for span, pending in run.reads:
            try:
                pieces.update(pending.result(max(0.0, began + self.timeout_s - time.perf_counter())))
            except TimeoutError:
                run.cancel()
                raise RunError(
                    f"{storage.shown(self.uri(int(self.file_index[span[0]])))}: storage gave no answer for "
                    f"{self.timeout_s:g} s to a request for {int(self.length[span].sum())} bytes; "
                    "check it and the network, or raise data.read_timeout_s"
                ) from None
            except BaseException:
                run.cancel()
                raise
        _count(wait_s=time.perf_counter() - began)
        return [pieces[number] for number in run.numbers.tolist()]

    def _read_span(self, span: list[int], attempt: Attempt) -> dict[int, memoryview]:
        """The pieces of one span, from the cache or storage."""
        file = int(self.file_index[span[0]])
        if self.cache is None:
            return self._read_pieces(file, span, attempt)
        key = self._sha256(file)
        found: dict[int, memoryview] = {}
        for number in span:
            data = self.cache.get(key, int(self.offset[number]), int(self.length[number]))
            if data is not None:
                found[number] = memoryview(data)
        missing = [number for number in span if number not in found]
        _count(cache_hits=len(found), cache_misses=len(missing))
        for part in self._spans(np.array(missing, np.int64)):
            read = self._read_pieces(file, part, attempt)
            for number, piece in read.items():
                if not attempt.needless:
                    self.cache.put(key, int(self.offset[number]), piece)
            found.update(read)
        return found

    def _read_pieces(self, file: int, span: list[int], attempt: Attempt) -> dict[int, memoryview]:
        first = int(self.offset[span[0]])
        data = memoryview(self._read(file, first, int(self.length[span].sum()), attempt))
        starts = (self.offset[span] - first).tolist()
        return {n: data[at : at + size] for n, at, size in zip(span, starts, self.length[span].tolist(), strict=True)}

    def _read(self, file: int, offset: int, length: int, attempt: Attempt) -> pa.Buffer:
        uri, size = self.uri(file), int(self.file_bytes[file])

        def read() -> tuple[int, pa.Buffer]:
            attempt.restart()
            if attempt.needless:
                raise RunError("nobody waits for this range any more")
            if storage.is_local(uri):
                return _read_local(storage.resolve(uri)[1], offset, length)
            # a file that is read whole is read once; its size is asked for each time
            source = (_opened if length < size else _open)(uri, attempt.number)
            if source.size() != size:
                return source.size(), _NOTHING
            _count(bytes_read=length, requests=1)
            try:
                # into Arrow's memory, which it keeps for the next range: fresh memory costs a quarter of the reading.
                # What is read whole is read as it was opened, for there Google's client has begun to already.
                part = source if length == size else source.get_stream(offset, length)
                return size, part.read_buffer(length)
            except (OSError, pa.ArrowInvalid) as error:  # S3's, Google's
                if not any(mark in str(error) for mark in NO_SUCH_RANGE):
                    raise
                return storage.size(uri), _NOTHING

        def pause(seconds: float) -> None:
            attempt.pause()
            time.sleep(seconds)

        try:
            found, data = storage.retry(read, uri, pause)
        except FileNotFoundError:
            raise DataError(
                f"{storage.shown(uri)}: found no file, {self.missing.format(uri=storage.shown(uri))}"
            ) from None
        if found != size or len(data) != length:
            _opened.cache_clear()
            raise DataError(
                f"{storage.shown(uri)}: found {found} bytes, the manifest says {size}; "
                + self.mend.format(uri=storage.shown(uri))
            )
        return data


@dataclass(kw_only=True, eq=False)
class _Run:
    """The reads of one run, under way."""

    numbers: Numbers
    num_bytes: int
    reads: list[tuple[list[int], Pending[dict[int, memoryview]]]]

    def cancel(self) -> None:
        for _, pending in self.reads:
            pending.cancel()


def _open(uri: str, connection: int) -> pa.NativeFile:
    _count(requests=1)
    return storage.open_input(uri, connection)


_opened = functools.lru_cache(maxsize=OPEN_FILES)(_open)


def _read_local(path: str, offset: int, length: int) -> tuple[int, pa.Buffer]:
    """Size of the file, and the bytes of a range: fewer at its end."""
    with open(path, "rb", buffering=0) as file:
        _count(bytes_read=length, requests=1)
        return os.fstat(file.fileno()).st_size, read_buffer(file.fileno(), offset, length)


def _count_hedge() -> None:
    _count(hedged=1)
