"""Calls in background threads; one that takes unusually long is made a second time, and the first answer wins.

A read of an object store sometimes hangs for many seconds while its neighbours take milliseconds (Dean and Barroso,
The Tail at Scale, 2013). Who waits for it waits for a multiple of the usual time instead. The thread of a call that was
overtaken is given up: another takes its place, it ends when its call does, and keeps no process alive.
"""

import atexit
import ctypes
import functools
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pyarrow import fs as pafs

__all__ = ["Attempt", "Pending", "Pool", "shared_pool"]

T = TypeVar("T")

THREADS = 16
"""Calls at the same time in a process: 16 ranges of 0.4 MB at 30 ms each are 200 MB/s."""
MULTIPLE = 4.0
"""A call is made again after so many times the 95th percentile of the recent ones."""
LEAST_S = 1.0
"""Shortest wait before a call is made again, seconds: a pause of the process itself is no stall of the store."""
UNKNOWN_S = 3.0
"""That wait while too few calls have ended to know what is usual (first connections, credentials), seconds."""
KNOWN = 16
RECENT = 128
LEAVE_S = 1.0
"""Time that calls under way have to end when the process does, seconds."""
MAX_HEDGES = 4
"""Calls that may be made twice at the same time: where all of them are slow, twice the load makes nothing faster."""


class Attempt:
    """One making of a call, handed to it: `number` is 0, or 1 for the second."""

    def __init__(self, pending: "Pending", number: int):
        self.pending, self.number = pending, number
        self.began: float | None = None
        self.replaced = False

    @property
    def needless(self) -> bool:
        """Whether nobody waits for this attempt any more."""
        return self.pending.done

    def restart(self) -> None:
        """The time of this attempt counts from now."""
        self.began = time.monotonic()

    def pause(self) -> None:
        """This attempt waits on purpose: until `restart` it is not taken for stalled."""
        self.began = None


class Pending(Generic[T]):
    """The answer to come of one call."""

    def __init__(self, call: Callable[[Attempt], T], hedged: bool):
        self.call, self.hedged = call, hedged
        self.done = False
        self._settled = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self.attempts = 1
        """Attempts made so far that have not failed."""

    def result(self, timeout_s: float | None = None) -> T:
        """The answer; what the call raised, if no attempt is left that could still answer; else TimeoutError."""
        if not self._settled.wait(timeout_s):
            self.done = True
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def cancel(self) -> None:
        """Nobody will ask: the call is not begun if it was not yet."""
        self.done = True


class Pool:
    """`threads` daemon threads that make calls in the order submitted, and one that watches for stalled ones.

    `on_hedge` is told of each call that is made a second time.
    """

    def __init__(
        self,
        *,
        threads: int = THREADS,
        least_s: float = LEAST_S,
        unknown_s: float = UNKNOWN_S,
        multiple: float = MULTIPLE,
        on_hedge: Callable[[], None] = lambda: None,
    ):
        self.threads, self.on_hedge = threads, on_hedge
        self.least_s, self.unknown_s, self.multiple = least_s, unknown_s, multiple
        self._queue: queue.SimpleQueue[Attempt] = queue.SimpleQueue()
        mutex = threading.Lock()
        self._lock = threading.Condition(mutex)
        self._idle = threading.Condition(mutex)
        self._running: set[Attempt] = set()
        """First attempts under way of calls that may be made twice."""
        self._hedges = 0
        self._under_way = 0
        """Attempts under way of calls that may be made twice, given up or not."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._started = 0
        self._names = itertools.count()

    def submit(self, call: Callable[[Attempt], T], *, hedged: bool) -> Pending[T]:
        """Make the call in a thread of the pool."""
        pending = Pending(call, hedged)
        self._queue.put(Attempt(pending, 0))
        if self._started < self.threads:
            with self._lock:
                if self._started == 0:
                    self._spawn(self._watch)
                if self._started < self.threads:
                    self._started += 1
                    self._spawn(self._work)
        return pending

    def patience_s(self) -> float:
        """Seconds after which a call is made again."""
        recent = sorted(self._recent)
        if len(recent) < KNOWN:
            return self.unknown_s
        return max(self.least_s, self.multiple * recent[len(recent) * 95 // 100])

    def settles(self, timeout_s: float) -> bool:
        """Wait until no call that may be made twice is under way; False if some still are."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._under_way, timeout_s)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, name=f"read-{next(self._names)}", daemon=True).start()

    def _work(self, attempt: Attempt | None = None) -> None:
        while True:
            attempt = attempt or self._queue.get()
            if not attempt.needless:
                self._make(attempt)
            if attempt.replaced:
                return
            attempt = None

    def _make(self, attempt: Attempt) -> None:
        pending = attempt.pending
        attempt.restart()
        began = time.monotonic()
        if pending.hedged:
            with self._lock:
                self._under_way += 1
                if attempt.number == 0:
                    self._running.add(attempt)
                    if len(self._running) == 1:
                        self._lock.notify()
        value, error = None, None
        try:
            value = pending.call(attempt)
        except BaseException as raised:  # noqa: BLE001 (raised where the answer is waited for)
            error = raised
        with self._lock:
            self._running.discard(attempt)
            self._hedges -= attempt.number
            self._under_way -= pending.hedged
            if not self._under_way:
                self._idle.notify_all()
            if error is not None:
                pending.attempts -= 1
            elif not pending.done:
                self._recent.append(time.monotonic() - began)
            if pending.done or (error is not None and pending.attempts):
                return
            pending._value, pending._error, pending.done = value, error, True
        pending._settled.set()

    def _watch(self) -> None:
        with self._lock:
            while True:
                self._lock.wait(self._hedge_stalled())

    def _hedge_stalled(self) -> float | None:
        """Make the stalled calls again; seconds until the next one may be, None while there is none to watch."""
        now, patience = time.monotonic(), self.patience_s()
        for attempt in [a for a in self._running if a.began is not None and now - a.began >= patience]:
            if attempt.needless:
                self._running.discard(attempt)
            elif self._hedges < MAX_HEDGES:
                self._running.discard(attempt)
                self._hedges += 1
                attempt.replaced = True
                attempt.pending.attempts += 1
                self.on_hedge()
                self._spawn(self._work, Attempt(attempt.pending, 1))
        if not self._running:
            return None
        return max(0.05, min((a.began or now) + patience - now for a in self._running))


def shared_pool(on_hedge: Callable[[], None]) -> Pool:
    """This process's pool; a forked child makes its own, for threads do not survive a fork."""
    return _pool_of(os.getpid(), on_hedge)


@functools.cache
def _pool_of(process: int, on_hedge: Callable[[], None]) -> Pool:
    pool = Pool(on_hedge=on_hedge)
    atexit.register(_leave, pool)
    return pool


def _leave(pool: Pool) -> None:
    """Let the process end though a read hangs: before it ends, pyarrow waits for every request under way, for minutes.

    Then pyarrow's clean-up is left out, and so are the destructors of static C++ objects that need it: the last that the
    process does is `_exit`, with the status it ends with. Where libc has no `on_exit` (macOS), it waits.
    """
    if pool.settles(LEAVE_S):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        atexit.unregister(pafs.ensure_s3_finalized)
        libc.on_exit(libc._exit, None)
