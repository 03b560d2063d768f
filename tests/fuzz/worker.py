"""The child process that runs cases of a part: little memory, and the number of each case said before it begins.

`python -m tests.fuzz.worker PART SEED FIRST [END]`. Lines on stdout: `case N`, `fault N: what`, and `done COUNT taken COUNT`.
"""

import importlib
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

MEMORY_BYTES = 1536 << 20
"""What a case may need beside what the process has when it begins; two whole 8192 x 8192 RGBA images and a bit."""


def main(part: str, seed: int, first: int, end: int) -> None:
    """Run the cases [first, end) of the module `tests.fuzz.part_<part>`, whose `prepare` gives the function of a case.

    That function says whether the file was taken, and raises whatever is a fault.
    """
    warnings.simplefilter("ignore")  # Pillow's, of broken files
    check = importlib.import_module(f"tests.fuzz.part_{part}").prepare()
    limit = _virtual_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    taken = 0
    for number in range(first, end):
        say(f"case {number}")
        try:
            taken += check(number, np.random.default_rng([seed, number]))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            say(f"fault {number}: {' '.join(what.split())[:400]}")
    say(f"done {end - first} taken {taken}")


def say(line: str) -> None:
    """Unbuffered: it must be out before the next case can kill the process."""
    os.write(1, line.encode(errors="replace") + b"\n")


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _part, _seed, _first, *_end = sys.argv[1:]
    main(_part, int(_seed), int(_first), int(_end[0]) if _end else int(_first) + 1)
