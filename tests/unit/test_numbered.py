"""What keeps Ray Data's loop from spinning, and its first tasks from one actor."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cxr_dist.data import numbered
from cxr_dist.data.numbered import PAUSE_S, TOGETHER_S, Rest, Spread


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr(numbered.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(numbered.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def operator(submitted: int = 0, made: int = 0, taken: int = 0) -> Any:
    metrics = SimpleNamespace(num_tasks_submitted=submitted, num_task_outputs_generated=made, num_outputs_taken=taken)
    return SimpleNamespace(metrics=metrics)


@pytest.mark.parametrize(("then", "turn_s", "rests"), [
    (operator(3, 2, 1), 0.001, True),
    (operator(3, 2, 1), 0.1, False),  # it has waited for its tasks
    (operator(4, 2, 1), 0.001, False),  # something was done
    (operator(3, 3, 1), 0.001, False),
    (operator(3, 2, 2), 0.001, False),
])  # fmt: skip
def test_the_loop_rests_where_a_turn_neither_waited_nor_did_anything(monkeypatch, then, turn_s, rests):
    clock = Clock(monkeypatch)
    rest = Rest()
    for operators in ([operator(), operator(3, 2, 1)], [operator(), then]):
        clock.now += turn_s
        clock.slept.clear()
        rest.on_execution_step(cast("Any", SimpleNamespace(_topology=dict.fromkeys(map(Hashed, operators)))))
    assert clock.slept == [PAUSE_S] * rests


class Hashed(SimpleNamespace):
    """An operator as a key of the topology."""

    def __init__(self, operator: Any):
        super().__init__(metrics=operator.metrics)

    __hash__ = object.__hash__


def pool(running: int, pending: int) -> Any:
    actors = SimpleNamespace(num_running_actors=lambda: running, num_pending_actors=lambda: pending)
    return SimpleNamespace(get_autoscaling_actor_pools=lambda: [actors])


def test_tasks_wait_a_moment_for_actors_that_are_not_up(monkeypatch):
    clock = Clock(monkeypatch)
    policy = Spread(cast("Any", None), cast("Any", None), cast("Any", None))
    assert policy.can_add_input(cast("Any", SimpleNamespace(get_autoscaling_actor_pools=list)))
    assert policy.can_add_input(pool(running=0, pending=2))
    clock.now += 60
    assert not policy.can_add_input(pool(running=1, pending=1))
    clock.now += TOGETHER_S * 0.9
    assert not policy.can_add_input(pool(running=1, pending=1))
    assert policy.can_add_input(pool(running=2, pending=0))
    clock.now += TOGETHER_S * 0.2
    assert policy.can_add_input(pool(running=1, pending=1))  # an actor that never comes holds up nobody
