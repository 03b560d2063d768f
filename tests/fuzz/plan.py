"""How many cases each part of the fuzz runs and from which seed: 10,000 and more together, the same ones every time.

`CXR_FUZZ_SEED=7 pytest tests/fuzz` explores other cases. A fault names its part, seed and number; it comes back with
`python -m tests.fuzz.worker PART SEED NUMBER`.
"""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SEED = int(os.environ.get("CXR_FUZZ_SEED", "0"))

CHILD_CASES = {"images": 5500, "scores": 1000, "archives": 1000, "bombs": 46}
"""Parts that native libraries read, each case in a child process: a crash ends the child and is named."""
PLAIN_CASES = {"labels": 1200, "rows": 500, "lists": 600, "manifests": 900, "side tables": 150, "config": 150}
"""Parts that are Python alone, searched and shrunk by hypothesis."""
LEAST_CASES = 10_000


def explore(part: str, strategy: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check the planned number of examples of a strategy, and that it was so many."""
    ran = 0

    def counted(example: Any) -> None:
        nonlocal ran
        ran += 1
        check(example)

    options = {"max_examples": PLAIN_CASES[part], "deadline": None, "database": None}
    unchecked = [HealthCheck.too_slow, HealthCheck.data_too_large]
    seed(SEED)(settings(**options, suppress_health_check=unchecked)(given(strategy)(counted)))()
    assert ran >= PLAIN_CASES[part]
