"""A lock that goes to the lowest number."""

import threading

import pytest

from cxr_dist.data.turns import Turns


def test_the_lowest_number_goes_first():
    turns, order = Turns(), []

    def take(number: int) -> None:
        with turns.turn(number):
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in (5, 2, 9, 3)]
    with turns.turn(7):
        for thread in threads:
            thread.start()
        while len(turns._waiting) < len(threads):
            pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [2, 3, 5, 9]


def test_an_error_gives_the_turn_up():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn(0):
        raise ZeroDivisionError
    with turns.turn(0):
        pass
