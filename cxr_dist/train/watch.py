"""Where each rank is, told to the others, so that ranks which wait in vain can say for whom.

A collective that times out knows only that somebody did not come. A thread of each rank tells every TELL_S seconds which
step it is at and what it does there; one that has been at the same place for long looks where the others are.
"""

import json
import logging
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from cxr_dist.errors import RunError
from cxr_dist.train import board
from cxr_dist.train.distributed import Ranks

__all__ = ["Place", "Watch", "who_hangs"]

log = logging.getLogger(__name__)

TELL_S = 2.0
SILENT_S = 15.0
"""A rank that has told nothing for so long does not run at all, seconds; the clocks of the nodes have to agree better."""
PATIENCE = 0.9
"""Part of the collectives' timeout after which a rank looks where the others are."""

Doing = Literal["waits for data", "computes", "waits for the other ranks"]
ORDER: tuple[Doing, ...] = ("waits for data", "computes", "waits for the other ranks")
"""What a rank does in a step, one after the other; gradients are exchanged while it computes."""


class Place(NamedTuple):
    """Where a rank is; times in seconds since 1970."""

    step: int
    """Of the run, scoring steps counted."""
    doing: Doing
    since: float
    told: float
    who: str
    """Its host and process."""


def who_hangs(places: dict[int, Place], world_size: int, now: float) -> str:
    """One sentence on the ranks that the others wait for: those that do not run, else those that are furthest behind."""
    if missing := [rank for rank in range(world_size) if rank not in places]:
        return f"rank {_list(missing)} of {world_size} has not begun"
    silent = [rank for rank, place in places.items() if now - place.told > SILENT_S]
    behind = min((place.step, ORDER.index(place.doing)) for place in places.values())
    late = silent or [rank for rank, place in places.items() if (place.step, ORDER.index(place.doing)) == behind]
    told = []
    for rank in sorted(late):
        place = places[rank]
        told.append(
            f"rank {rank} hangs: it {place.doing} at step {place.step} for {now - place.since:.0f} s "
            f"({place.who}{f', no sign of life for {now - place.told:.0f} s' if rank in silent else ''})"
        )
    waiting = [rank for rank in sorted(places) if rank not in late]
    if waiting:
        place = places[waiting[0]]
        told.append(f"rank {_list(waiting)} {place.doing} at step {place.step}")
    return "; ".join(told)


class Watch:
    """This rank's place, told and watched while its `with` block runs; `at` costs nothing."""

    def __init__(self, name: str, ranks: Ranks, timeout_s: float):
        self.name, self.ranks, self.patience_s = name, ranks, PATIENCE * timeout_s
        self.verdict = ""
        """Who hangs, once this rank has waited for long."""
        self._who = f"{socket.gethostname()}, process {os.getpid()}"
        self._place = (0, ORDER[0], time.time())
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, doing: Doing) -> None:
        """This rank begins to do this."""
        self._place = (step, doing, time.time())

    def __enter__(self) -> Self:
        if self.ranks.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(TELL_S)
        if self.verdict and isinstance(error, Exception):
            raise RunError(self.verdict) from error

    def _watch(self) -> None:
        complained = False
        while not self._over.wait(TELL_S):
            step, doing, since = self._place
            now = time.time()
            try:
                board.put(self._key(self.ranks.rank), json.dumps([step, doing, since, now, self._who]).encode())
                if now - since < self.patience_s:
                    self.verdict = ""
                elif not self.verdict:
                    self.verdict = who_hangs(self._places(), self.ranks.world_size, now)
                    log.error("rank %d has waited for %.0f s: %s", self.ranks.rank, now - since, self.verdict)
            except Exception as error:  # noqa: BLE001 - whatever the cluster's store does, training goes on
                if not complained:
                    log.warning("ranks cannot tell one another where they are: %s", " ".join(str(error).split()))
                complained = True

    def _places(self) -> dict[int, Place]:
        told: dict[int, Any] = {rank: board.get(self._key(rank)) for rank in range(self.ranks.world_size)}
        return {rank: Place(*json.loads(place)) for rank, place in told.items() if place}

    def _key(self, rank: int) -> str:
        return f"{self.name} rank {rank}"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
