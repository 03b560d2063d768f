"""A part of the fuzz in a child process, so that what kills it is a failed test with the case's number."""

import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.plan import CHILD_CASES, SEED

ROOT = Path(__file__).resolve().parents[2]


def run(part: str, folder: Path) -> None:
    """Run every planned case of a part; assert that all ran, none faulted, and that some were taken and some refused."""
    cases, said = CHILD_CASES[part], folder / "said"
    command = [sys.executable, "-m", "tests.fuzz.worker", part, str(SEED), "0", str(cases)]
    with said.open("w") as out:
        try:
            env = os.environ | {"TMPDIR": str(folder)}  # the bombs are 160 MB on disk, and go with the test's folder
            child = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        finally:
            lines = said.read_text().splitlines()
            print(f"part {part}, seed {SEED}: the last line was {lines[-1:]}")  # of a hang, which pytest-timeout ends
    assert child.returncode == 0, (
        f"{part}: ended with {child.returncode} in {lines[-1:]}, seed {SEED}; {child.stderr[-2000:]}"
    )
    faults = [line for line in lines if line.startswith("fault ")]
    assert not faults, f"{part}, seed {SEED}: {len(faults)} faults, such as\n" + "\n".join(faults[:20])
    assert sum(line.startswith("case ") for line in lines) == cases
    word, ran, _, taken = lines[-1].split()
    assert (word, int(ran)) == ("done", cases)
    assert 0 < int(taken) < cases
