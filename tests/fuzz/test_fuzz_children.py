"""What native libraries read, damaged: images, score tables, archives and bombs, each case in a child of little memory."""

from pathlib import Path

import pytest

from tests.fuzz import children, plan


@pytest.mark.parametrize("part", list(plan.CHILD_CASES))
def test_no_file_is_a_crash_or_taken_for_what_it_is_not(part: str, tmp_path: Path) -> None:
    children.run(part, tmp_path)


def test_the_plan_is_of_ten_thousand_cases() -> None:
    assert sum(plan.CHILD_CASES.values()) + sum(plan.PLAIN_CASES.values()) >= plan.LEAST_CASES
