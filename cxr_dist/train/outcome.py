"""How a run ended, beside its checkpoints: true also where the tracking server was away when it did."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Literal

from cxr_dist import storage
from cxr_dist.errors import InputError

__all__ = ["Outcome"]

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
