"""Images that kill the process that decodes them, found out.

A task notes in a small file what it is decoding. If its process dies, the next attempt reads there which images are
suspect, tries each alone in a child process, and marks the one that kills that too.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from cxr_dist.data import images

__all__ = ["DecodeOne", "Journal", "decode_isolated", "sweep"]

Pixels = npt.NDArray[np.uint8]

DecodeOne = Callable[[bytes, int], Pixels | str]
"""One encoded image and a size to pixels [size, size], or why it has none."""

ISOLATED_TIMEOUT_S = 60

STALE_S = 86400.0
"""Age, by its last write, at which a task's file is of a run that was killed: one that decodes writes all the time."""

ISOLATED_PROGRAM = (
    "from cxr_dist.data.images import to_grey; "
    "sys.stdout.buffer.write(to_grey(sys.stdin.buffer.read(), int(sys.argv[1])).tobytes())"
)
"""What the child process of `decode_isolated` runs: an image on stdin, its size as argument, pixels on stdout."""


def decode_isolated(encoded: bytes, size: int, program: str = ISOLATED_PROGRAM) -> Pixels | str:
    """Decode one suspicious image in a child process; a reason if that process dies, hangs or refuses."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}", str(size)]
    try:
        # S603: the image comes on stdin; of the words none is the user's
        child = subprocess.run(command, input=encoded, capture_output=True, timeout=ISOLATED_TIMEOUT_S)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"decoder hung for {ISOLATED_TIMEOUT_S} s"
    if child.returncode < 0:
        return f"decoder killed by signal {-child.returncode}"
    if child.returncode or len(child.stdout) != size * size:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return last.removeprefix(f"{images.__name__}.ImageError: ") or f"decoder ended with {child.returncode}"
    return np.frombuffer(child.stdout, dtype=np.uint8).reshape(size, size)


class Journal:
    """What a task is decoding, in a file that outlives its process: the next attempt reads it as suspects.

    A page-cache write of a few dozen bytes for every few images, about a microsecond beside milliseconds of decoding. On a
    disk that takes no more nothing is noted, and an image that kills its process ends the task after its retries.
    """

    def __init__(self, token: str, number: int):
        self.path = Path(tempfile.gettempdir()) / f"cxr-dist-{token}-{number}"
        self.suspects: frozenset[str] = frozenset()
        if self.path.exists():
            self.suspects = frozenset(unquote(line) for line in self.path.read_text().split("\n") if line)
        self.file: int | None = None
        with contextlib.suppress(OSError):
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            self.base = os.fstat(self.file).st_size

    def mark(self, image_ids: Sequence[str]) -> None:
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, self.base)
            # quoted, for a path may hold a line's end
            os.write(self.file, "".join(f"{quote(image_id)}\n" for image_id in image_ids).encode())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            os.close(self.file)
        self.path.unlink(missing_ok=True)


def sweep() -> None:
    """Remove the files of this node's tasks that were killed with their run; who goes on with that run uses others."""
    for path in Path(tempfile.gettempdir()).glob("cxr-dist-*"):
        if re.fullmatch(r"cxr-dist-[0-9a-f]{32}-\d+", path.name):
            with contextlib.suppress(OSError):  # another decoder's sweep was first, or it is another user's
                if time.time() - path.lstat().st_mtime > STALE_S:
                    path.unlink()
