"""What every drill leaves: a line of JSON (`CXR_DRILLS`, a file) that docs/reliability.md's table is made from."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Drill:
    """A fault, and what was promised and seen."""

    name: str
    fault: str
    promise: str
    outcome: str = ""
    recovery_s: float | None = None
    """From the fault to the first step that is new."""
    hurt_at: float = 0.0

    def hurt(self) -> None:
        """The fault happens now."""
        self.hurt_at = time.time()

    def recovered(self, at: float | None) -> None:
        """The first sign of new work, seconds since 1970; None if all was done before the fault took effect."""
        self.recovery_s = None if at is None else round(at - self.hurt_at, 1)


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Iterator[Drill]:
    """The drill of a test, by its mark `drill(fault, promise)`; recorded if the test passes."""
    mark = request.node.get_closest_marker("drill")
    found = Drill(name=request.node.name.removeprefix("test_"), fault=mark.args[0], promise=mark.args[1])
    yield found
    report = getattr(request.node, "report", None)
    where = os.environ.get("CXR_DRILLS")
    if where and report is not None and report.passed:
        line = {
            "drill": found.name,
            "fault": found.fault,
            "promise": found.promise,
            "outcome": found.outcome,
            "recovery_s": found.recovery_s,
            "date": time.strftime("%Y-%m-%d"),
        }
        with Path(where).open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    report = yield
    if report.when == "call":
        item.report = report
    return report
