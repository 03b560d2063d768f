"""When ranks look whether a checkpoint is wanted, and that they agree."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from cxr_dist.train.distributed import Ranks
from cxr_dist.train.notice import LOOK_S, PREEMPTION_LOOKS, Notice


@dataclass(frozen=True)
class Info:
    """What Ray Train gives."""

    preempted_ranks: list[int]
    deadline_ms: int | None = None


class Clock:
    """Time that passes by a step's length before every step's end."""

    def __init__(self, step_s: float):
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        return self.now


class Counting(Ranks):
    """One rank of several that all see the same; counts the collective calls."""

    calls: ClassVar[list[list[float]]] = []

    def sum(self, values: list[float]) -> list[float]:
        self.calls.append(values)
        return [self.world_size * value for value in values]


def steps(notice: Notice, clock: Clock, count: int) -> list[str | None]:
    """Reasons of the checkpoints that are wanted after so many steps; who waits for one is told that it is stored."""
    found = []
    for _ in range(count):
        clock.now += clock.step_s
        wish = notice.wanted()
        found.append(wish.reason if wish else None)
        if wish and wish.then:
            wish.then()
    return found


def looks(step_s: float, count: int) -> list[list[float]]:
    Counting.calls = []
    clock = Clock(step_s)
    assert steps(Notice(Counting(0, 3, None), clock=clock), clock, count) == [None] * count
    return Counting.calls


def test_looks_are_half_a_second_apart_however_long_a_step_takes() -> None:
    for step_s in (0.001, 0.02, 0.3):
        passed = [seconds for (seconds,) in looks(step_s, 4000)]
        assert abs(passed[-1] - LOOK_S) < step_s + 1e-9
        # it starts with every step, and looks twice as seldom each time
        assert passed[0] == step_s
        assert all(later < 2.01 * earlier + 1e-9 for earlier, later in itertools.pairwise(passed))
    assert len(looks(2.0, 10)) == 10


def test_a_step_that_becomes_long_is_looked_at_more_often() -> None:
    clock = Clock(0.001)
    Counting.calls = []
    notice = Notice(Counting(0, 2, None), clock=clock)
    steps(notice, clock, 4000)
    clock.step_s = 1.0
    steps(notice, clock, 1000)
    Counting.calls = []
    steps(notice, clock, 10)
    assert len(Counting.calls) == 10


class Asked:
    """A request that someone makes at some moment, and whether the ranks have seen that it is answered."""

    def __init__(self, reason: str = "why") -> None:
        self.reason, self.asks, self.answers, self.looks = reason, False, 0, 0
        self.looked = threading.Condition()

    def asked(self) -> bool:
        with self.looked:
            self.looks += 1
            self.looked.notify_all()
            return self.asks

    def answer(self) -> None:
        self.asks, self.answers = False, self.answers + 1

    def wait_for_two_looks(self) -> None:
        """What was so before the first of them is known after the second."""
        with self.looked:
            enough = self.looks + 2
            assert self.looked.wait_for(lambda: self.looks >= enough, 60)


def notice_of(*requests: Any, preemption: Callable[[], Any] | None = None) -> tuple[Notice, Clock]:
    clock = Clock(LOOK_S)
    return Notice(Ranks(0, 1, None), requests=requests, preemption=preemption, clock=clock), clock


def test_a_request_is_heard_once_and_answered_when_stored() -> None:
    stop, resize = Asked("stop"), Asked("resize")
    notice, clock = notice_of(stop, resize)
    with notice:
        assert steps(notice, clock, 3) == [None] * 3
        resize.asks = True
        assert notice._asked[1].wait(60)
        assert resize.answers == 0
        assert steps(notice, clock, 3) == ["resize", None, None]
        assert (stop.answers, resize.answers) == (0, 1)


def test_a_request_that_waits_for_its_checkpoint_is_no_new_one() -> None:
    request = Asked()
    notice, clock = notice_of(request)
    with notice:
        request.asks = True
        assert notice._asked[0].wait(60)
        clock.now += clock.step_s
        wish = notice.wanted()
        request.wait_for_two_looks()
        assert steps(notice, clock, 3) == [None] * 3
        wish.then()
        request.wait_for_two_looks()
        request.asks = True  # and later another
        assert notice._asked[0].wait(60)
        assert steps(notice, clock, 2) == ["why", None]
        assert request.answers == 2


def test_a_store_that_fails_for_a_while_is_asked_again() -> None:
    class Failing(Asked):
        calls = 0

        def asked(self) -> bool:
            self.calls += 1
            if self.calls < 3:
                raise RuntimeError("connection lost")
            return True

    notice, clock = notice_of(Failing())
    with notice:
        assert notice._asked[0].wait(60)
        assert steps(notice, clock, 1) == ["why"]


def test_a_preemption_is_told_once() -> None:
    told: list[Info | None] = [None]
    request = Asked()
    notice, clock = notice_of(request, preemption=lambda: told[0])
    assert steps(notice, clock, 2 * PREEMPTION_LOOKS) == [None] * 2 * PREEMPTION_LOOKS
    told[0] = Info([1, 3])
    found = steps(notice, clock, 3 * PREEMPTION_LOOKS)
    assert [reason for reason in found if reason] == ["the node of rank 1, 3 is about to be taken away"]
    told[0] = Info([1, 3], deadline_ms=7)  # the same, told more exactly
    assert steps(notice, clock, 3 * PREEMPTION_LOOKS) == [None] * 3 * PREEMPTION_LOOKS
    told[0] = Info([0])
    found = steps(notice, clock, 3 * PREEMPTION_LOOKS)
    assert [reason for reason in found if reason] == ["the node of rank 0 is about to be taken away"]
    assert request.answers == 0
