"""How a run ended, beside its checkpoints: true also where the tracking server was away when it did."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from cxr_dist import storage
from cxr_dist.errors import InputError
from cxr_dist.train.lease import Lease

__all__ = ["Outcome", "last_line", "record", "recorded_outcome"]

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one owner's work on a run."""

    owner: int
    """Number of its lease."""
    status: Literal["FINISHED", "FAILED", "KILLED"]
    failure: str = ""
    """Why it failed, in one line."""
    time: float = 0.0
    """Seconds since 1970."""

    def write(self, folder: str) -> None:
        """Keep it in the run's folder."""
        content = {"format": FORMAT, **asdict(self), "time": time.time()}
        storage.put_atomic(_where(folder, self.owner), json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: str, owner: int) -> "Outcome | None":
        """What the run's folder tells of the end of this owner's work; None if it came to none."""
        where = _where(folder, owner)
        try:
            content = json.loads(storage.read_bytes(where))
        except FileNotFoundError:
            return None
        if content.pop("format", None) != FORMAT:
            raise InputError(
                f"{storage.shown(where)}: found another format, expected {FORMAT}; use the version that wrote it"
            )
        return cls(**content)


def _where(folder: str, owner: int) -> str:
    return storage.join(folder, "outcome", f"{owner:06d}.json")


@contextlib.contextmanager
def recorded_outcome(folder: str, lease: Lease) -> Iterator[None]:
    """How the block ends is kept in the run's folder, unless another driver has taken the run over: then RunError."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        lease.check()
        record(folder, Outcome(owner=lease.number, status="KILLED"))
        raise
    except BaseException as error:
        record(folder, Outcome(owner=lease.number, status="FAILED", failure=last_line(error)))
        raise
    record(folder, Outcome(owner=lease.number, status="FINISHED"))


def record(folder: str, outcome: Outcome) -> None:
    """Keep an outcome, if the storage takes it: it may be what failed."""
    try:
        outcome.write(folder)
    except (OSError, InputError) as error:
        log.warning("how the run ended is not kept with it: %s", error)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: what failed, below the remote trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
