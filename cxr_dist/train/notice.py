"""Reasons to save a checkpoint at once: a node that is about to be taken away, a driver that was told to stop, a worker
group that is to become another.

A request from outside the ranks goes through the cluster (`board`).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from cxr_dist.train import board
from cxr_dist.train.distributed import Ranks

__all__ = ["Notice", "Request", "Wish"]

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""About the time between two looks of the ranks, which cost a small collective call."""
PREEMPTION_LOOKS = 4
"""Looks for each question to Ray Train about preemption, which costs its ranks a barrier; it learns of one every 5 s itself."""
POLL_S = 0.2
"""Time between two looks of rank 0 at the key-value store."""


@dataclass(frozen=True)
class Request:
    """A checkpoint that the ranks of a run are asked for from outside, and their answer; the same name is the same request."""

    name: str
    reason: str

    def ask(self) -> None:
        """Ask for a checkpoint, now."""
        board.delete(self._stored)
        board.put(self._asked, b"1")

    def asked(self) -> bool:
        """Whether someone asks and has no answer."""
        return board.get(self._asked) is not None

    def answer(self) -> None:
        """Say that the checkpoint is stored; called by rank 0."""
        board.put(self._stored, b"1")
        board.delete(self._asked)

    def answered(self) -> bool:
        return board.get(self._stored) is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether the answer came in so many seconds."""
        ends = time.monotonic() + timeout_s
        while not self.answered():
            if time.monotonic() > ends:
                return False
            time.sleep(0.05)
        return True

    @property
    def _asked(self) -> str:
        return f"{self.name} asked"

    @property
    def _stored(self) -> str:
        return f"{self.name} stored"


class Wish(NamedTuple):
    """A checkpoint that someone wants."""

    reason: str
    then: Callable[[], None] | None = None
    """Tells who waits that it is stored; called by rank 0."""


class Notice:
    """Tells every rank after the same step that a checkpoint is wanted; use it in a `with`.

    A thread of rank 0 looks for `requests`; `preemption` is a collective call of all ranks (`ray.train.get_preemption_info`).
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        requests: Sequence[Request] = (),
        preemption: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.ranks, self.requests, self.preemption, self.clock = ranks, requests, preemption, clock
        self._asked = [threading.Event() for _ in requests]
        self._given: set[int] = set()
        """Requests that a checkpoint is on its way for."""
        self._over = threading.Event()
        self._known: set[int] = set()
        """Ranks whose preemption was told of; its deadline may change."""
        self._looked = clock()
        self._every = self._left = 1
        self._looks = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.requests and self.ranks.rank == 0:
            self._thread = threading.Thread(target=self._listen, name="requests", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _listen(self) -> None:
        complained = False
        while not self._over.wait(POLL_S):
            for number, request in enumerate(self.requests):
                try:
                    asked = request.asked()
                except Exception as error:  # noqa: BLE001 - whatever the cluster's store does, it is asked again
                    if not complained:
                        log.warning("cannot look for requests of a checkpoint: %s", " ".join(str(error).split()))
                    complained = True
                    continue
                if not asked:
                    self._given.discard(number)
                elif number not in self._given:
                    self._asked[number].set()

    def wanted(self) -> Wish | None:
        """A checkpoint that is wanted after this step, the same on every rank; None if none is.

        A collective call that every rank makes after every step. It looks only once in about LOOK_S seconds' steps,
        however long a step takes, and each reason is given once.
        """
        self._left -= 1
        if self._left > 0:
            return None
        now = self.clock()
        passed, *asked = self.ranks.sum([now - self._looked, *(float(event.is_set()) for event in self._asked)])
        passed /= self.ranks.world_size
        # the same number on every rank, for the sums are
        self._every = max(1, min(2 * self._every, round(self._every * LOOK_S / max(passed, 1e-9))))
        self._left, self._looked = self._every, now
        self._looks += 1
        for number, request in enumerate(self.requests):
            if asked[number]:
                self._given.add(number)
                self._asked[number].clear()
                return Wish(request.reason, request.answer)
        if self.preemption is not None and self._looks % PREEMPTION_LOOKS == 0:
            info = self.preemption()
            if info is not None and not self._known.issuperset(info.preempted_ranks):
                self._known.update(info.preempted_ranks)
                ranks = ", ".join(map(str, info.preempted_ranks))
                return Wish(f"the node of rank {ranks} is about to be taken away")
        return None
