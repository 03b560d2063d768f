"""How fast a node decodes when all its CPUs do: processes that begin together, as the stream's actors do.

One process alone would flatter: two hardware threads share a core, and Ray may have been told more CPUs than there are.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cxr_dist.errors import RunError

__all__ = ["main", "rates"]

SECONDS = 1.0
"""Time that each kind is measured for."""
PIXEL_ROWS = 512
"""Rows of the shard of pixels that is read, or fewer of large images."""
PIXEL_BYTES = 32 << 20


def rates(encoded: Sequence[bytes], *, size: int, row_group: int, processes: int) -> dict[str, float]:
    """Images a second of all processes together: {"png": …, "pixels": …}."""
    with tempfile.TemporaryDirectory(prefix="cxr-doctor-") as folder:
        for number, data in enumerate(encoded):
            Path(folder, f"{number}.png").write_bytes(data)
        program = f"import sys; sys.path[:] = {sys.path!r}; from cxr_dist.doctor.decode import main; main()"
        command = [sys.executable, "-c", program, folder, str(size), str(row_group)]
        children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - fixed words
            for _ in range(processes)
        ]
        try:
            return {kind: _together(children, kind) for kind in ("png", "pixels")}
        finally:
            for child in children:
                child.kill()
                child.communicate()


def _together(children: Sequence["subprocess.Popen[str]"], kind: str) -> float:
    """All are told to begin once all are ready; the sum of their rates."""
    answers = [_line(child) for child in children]
    if set(answers) != {"ready"}:
        raise RunError(f"a decoding process said {answers[0]!r}, expected it to be ready")
    for child in children:
        assert child.stdin is not None
        child.stdin.write(f"{kind}\n")
        child.stdin.flush()
    return sum(float(_line(child)) for child in children)


def _line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def main() -> None:
    """A decoding process: says that it is ready, is told what to decode, says its rate; until it is ended."""
    folder, size, row_group = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    work = {"png": _png(folder, size), "pixels": _pixels(size, row_group)}
    for one in work.values():
        one()
    while True:
        print("ready", flush=True)
        kind = sys.stdin.readline().strip()
        if not kind:
            return
        print(_rate(work[kind]), flush=True)


def _rate(work: Callable[[], int]) -> float:
    began, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS:
        images += work()
    return images / passed


def _png(folder: str, size: int) -> Callable[[], int]:
    from cxr_dist.data.images import to_grey_many

    encoded = [path.read_bytes() for path in sorted(Path(folder).glob("*.png"))]
    return lambda: len(to_grey_many(encoded, size))


def _pixels(size: int, row_group: int) -> Callable[[], int]:
    import numpy as np

    from cxr_dist.bench.decode import pixel_shard

    rows = max(1, min(PIXEL_ROWS, PIXEL_BYTES // size**2))
    return pixel_shard(np.zeros((rows, size, size), np.uint8), row_group)
