"""A lock that goes to the lowest number."""

import threading

import pytest

from cxr_dist.data import turns as module
from cxr_dist.data.turns import Turns


def start(turns: Turns, order: list[int], numbers: tuple[int, ...]) -> list[threading.Thread]:
    """A thread for each number, which is ready at once and notes that it had its turn."""

    def work(number: int) -> None:
        with turns.task(number) as turn, turn:
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    return threads


def await_ready(turns: Turns, numbers: set[int]) -> None:
    with turns._changed:
        while turns._ready != numbers:
            turns._changed.wait(0.001)


def test_the_lowest_number_goes_first():
    turns, order = Turns(), []
    with turns.task(0) as turn, turn:
        threads = start(turns, order, (5, 2, 9, 3))
        await_ready(turns, {5, 2, 9, 3})
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [2, 3, 5, 9]


def test_who_is_ready_waits_for_a_lower_number_that_is_not_yet(monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 60)
    turns, order = Turns(), []
    with turns.task(1) as turn:
        threads = start(turns, order, (4,))
        await_ready(turns, {4})
        with turn:
            order.append(1)
        assert order == [1]
    threads[0].join()
    assert order == [1, 4]


def test_who_is_ready_does_not_wait_for_ever(monkeypatch):
    """A read that has stalled holds up its own task only."""
    monkeypatch.setattr(module, "GRACE_S", 0.01)
    turns, order = Turns(), []
    with turns.task(1) as turn:
        for thread in start(turns, order, (4, 3)):
            thread.join()
        with turn:
            order.append(1)
    assert sorted(order[:2]) == [3, 4]
    assert order[2] == 1


def test_an_error_gives_the_turn_up():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.task(0) as turn, turn:
        raise ZeroDivisionError
    with turns.task(1) as turn, turn:
        pass
