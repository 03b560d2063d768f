"""Who may write to a run: one driver at a time.

Every driver that wants to writes a claim of its own into RUN/lease, numbered one above the highest, and only it writes
there again: its sign of life. The highest number owns the run. Nothing here needs conditional writes, which not every
object store has; it needs that a list shows what was written before it (S3, GCS, MinIO and disks do).

- A driver lists the claims before and after it writes its own. If there is a new one, it withdraws: of two that claim at
  once, the one that lists last sees the other's.
- Whether an owner lives is told by its claim changing while one watches, so clocks need not agree.
- The number is a fence: what a run's owner writes carries it (`train.checkpoint`), so an owner that was only asleep can
  change nothing that its successor reads.
"""

import json
import logging
import os
import random
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cxr_dist import storage
from cxr_dist.errors import ConfigError, InputError, RunError

__all__ = ["Claim", "Lease", "latest_claims", "living_owner"]

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Time between two signs of life."""
STALE_S = 30.0
"""An owner whose claim has not changed for so long is gone."""
LONG_GONE_S = 3600.0
"""A claim that is so old by this machine's clock is not watched any more: no two clocks are so far apart."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A driver's claim to a run."""

    number: int
    token: str
    """Tells apart claims of one number."""
    owner: str
    """Who it is, for people: USER@HOST, process N."""
    machine: str
    """The boot of the machine that the process runs on; empty where that is not known."""
    pid: int
    beat: int
    """Signs of life so far."""
    time: float
    """Of the last one, seconds since 1970 by the owner's clock."""
    released: bool = False
    """Whether its owner has finished with the run."""

    @property
    def name(self) -> str:
        return f"{self.number:09d}-{self.token}.json"

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.time)

    @property
    def surely_gone(self) -> bool:
        """Whether its owner needs no watching: released, of another age, or a process of this machine that is no more."""
        if self.released or self.age_s > LONG_GONE_S:
            return True
        return bool(self.machine) and self.machine == this_machine() and not Path("/proc", str(self.pid)).exists()


def this_machine() -> str:
    """Name of this machine's boot; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def living_owner(
    folder: str, *, stale_s: float = STALE_S, pause: Callable[[float], Any] = time.sleep
) -> tuple[Claim | None, list[Claim]]:
    """The run's owner if it shows a sign of life within `stale_s` seconds, and the latest claims, of which it has one."""
    watched, waited, step = latest_claims(folder), 0.0, min(1.0, stale_s / 4)
    if not all(claim.surely_gone for claim in watched):
        log.info("the run was last written by %s; looking for a sign of life for up to %g s", watched[0].owner, stale_s)
    while waited < stale_s and not all(claim.surely_gone for claim in watched):
        pause(step)
        waited += step
        now, beats = latest_claims(folder), {claim.token: claim.beat for claim in watched}
        for claim in now:
            if not claim.released and claim.beat != beats.get(claim.token, claim.beat):
                return claim, now
        if beats.keys() != {claim.token for claim in now}:
            waited = 0.0  # others come and go
        watched = now
    return None, watched


def latest_claims(folder: str) -> list[Claim]:
    """The claims of the highest number: one, but where drivers claim at once, or one of these died before it withdrew."""
    claims = _claims(folder)
    top = max((claim.number for claim in claims), default=0)
    return sorted((claim for claim in claims if claim.number == top), key=lambda claim: claim.token)


def _names(folder: str) -> list[str]:
    found = storage.list_files(storage.join(folder, "lease"))
    return [name for name, _ in found if re.fullmatch(r"\d{9}-\w+\.json", name)]


def _number(name: str) -> int:
    return int(name[:9])


def _claims(folder: str) -> list[Claim]:
    found = []
    for name in _names(folder):
        where = storage.join(folder, "lease", name)
        try:
            content = json.loads(storage.read_bytes(where))
        except FileNotFoundError:  # withdrawn since
            continue
        if content.pop("format", None) != FORMAT:
            raise InputError(
                f"{storage.shown(where)}: found another format, expected {FORMAT}; use the version that wrote it"
            )
        found.append(Claim(**content))
    return found


class Lease:
    """The right to write to a run; `take` it, hold it in a `with`, which shows signs of life and gives it back at the end.

    If another driver takes the run over, this process gets SIGTERM and `lost` is set.
    """

    def __init__(self, folder: str, claim: Claim, *, beat_s: float = BEAT_S, on_loss: Callable[[], None] | None = None):
        self.folder, self.claim, self.beat_s = folder, claim, beat_s
        self.on_loss = on_loss or _terminate
        self.lost = threading.Event()
        self._over, self._buried = threading.Event(), False
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)

    @property
    def number(self) -> int:
        """The fence: higher than that of every earlier owner of the run."""
        return self.claim.number

    @classmethod
    def take(
        cls,
        folder: str,
        *,
        owner: str,
        stale_s: float = STALE_S,
        beat_s: float = BEAT_S,
        pause: Callable[[float], Any] = time.sleep,
        on_loss: Callable[[], None] | None = None,
    ) -> "Lease":
        """The lease of the run in `folder`, after waiting up to `stale_s` seconds for a sign of life of its owner.

        ConfigError, which names the owner, if there is one.
        """
        while True:
            alive, last = living_owner(folder, stale_s=stale_s, pause=pause)
            if alive is not None:
                raise ConfigError(
                    f"run.name: this run is being written by {alive.owner} (its last sign of life is {alive.age_s:.0f} s "
                    "old); wait for it, stop it, or give another run.name"
                )
            known, number = set(_names(folder)), max((claim.number for claim in last), default=0) + 1
            if not {name for name in known if _number(name) >= number - 1} <= {claim.name for claim in last}:
                continue  # there is a claim that was not watched
            claim = Claim(
                number=number,
                token=uuid.uuid4().hex[:12],
                owner=f"{owner}@{socket.gethostname()}, process {os.getpid()}",
                machine=this_machine(),
                pid=os.getpid(),
                beat=0,
                time=time.time(),
            )
            lease = cls(folder, claim, beat_s=beat_s, on_loss=on_loss)
            lease._write()
            if set(_names(folder)) - known == {claim.name}:
                if last and not all(one.released for one in last):
                    log.warning("run taken over from %s, which shows no sign of life", last[0].owner)
                lease._clear()
                return lease
            storage.delete(lease._where)
            pause(random.uniform(0, 2))  # noqa: S311 - no secret

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if not self.lost.is_set() and not self._buried:
            try:
                self._write(released=True)
            except (InputError, OSError) as failure:
                log.warning("the run's lease could not be given back, it ends by itself: %s", failure)

    def bury(self) -> None:
        """Delete every claim, for the run itself is deleted; the next driver of that name begins at number 1.

        RunError if another driver has taken the run over.
        """
        self._over.set()
        self._thread.join()
        self.check()
        self._clear()
        self._buried = True
        storage.delete(self._where)

    def check(self) -> None:
        """RunError if another driver has taken the run over."""
        if not self.held():
            raise RunError(f"{storage.shown(self.folder)}: another driver has taken this run over; this one ends")

    def held(self) -> bool:
        """Whether nobody has taken the run over; what was known last, where the storage does not answer."""
        try:
            if self._succeeded():
                self.lost.set()
        except (InputError, OSError) as error:
            log.warning("cannot ask whose the run is: %s", error)
        return not self.lost.is_set()

    def _succeeded(self) -> bool:
        names = _names(self.folder)
        if any(_number(name) > self.number for name in names):
            return True
        # a claim that is gone was cleared by a successor, which may have deleted the run and its own claim since
        return self.claim.name not in names and not storage.exists(self._where)

    @property
    def _where(self) -> str:
        return storage.join(self.folder, "lease", self.claim.name)

    def _write(self, *, released: bool = False) -> None:
        content = {"format": FORMAT, **asdict(self.claim), "released": released}
        storage.put_atomic(self._where, json.dumps(content, indent=1).encode())

    def _clear(self) -> None:
        """Delete earlier owners' claims."""
        for name in _names(self.folder):
            if _number(name) < self.number:
                storage.delete(storage.join(self.folder, "lease", name))

    def _live(self) -> None:
        while not self._over.wait(self.beat_s):
            try:
                if self._succeeded():
                    log.error("another driver has taken this run over; this one ends")
                    self.lost.set()
                    self.on_loss()
                    return
                self.claim = Claim(**{**asdict(self.claim), "beat": self.claim.beat + 1, "time": time.time()})
                self._write()
            except Exception as error:  # noqa: BLE001 - whatever it was, a thread that ended would give the run away
                log.warning("no sign of life could be left for the run: %s", error)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
