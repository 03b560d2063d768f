"""Which size a worker group gets, without a cluster."""

from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from cxr_dist.errors import RunError
from cxr_dist.train import elastic
from cxr_dist.train.elastic import WholeShares


class Asked:
    """A request for a checkpoint that counts how often it is made."""

    def __init__(self) -> None:
        self.asks, self.stored = 0, False

    def ask(self) -> None:
        self.asks += 1

    def answered(self) -> bool:
        return self.stored


def policy(sizes: tuple[int, ...] = (1, 2, 4)) -> WholeShares:
    scaling = ScalingConfig(num_workers=(sizes[0], sizes[-1]), resources_per_worker={"CPU": 2})
    return WholeShares(scaling, sizes, Asked(), patience_s=100.0)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("cpus", "size"), [([8], 4), ([7], 2), ([2, 2, 2], 2), ([3], 1), ([1, 1], 0), ([8, 8], 4)])
def test_a_group_has_a_size_that_is_allowed(monkeypatch: pytest.MonkeyPatch, cpus: list[int], size: int) -> None:
    nodes = [{"NodeID": f"{number}", "Alive": True} for number in range(len(cpus))]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    reserved = {f"{number}": {"CPU": float(count)} for number, count in enumerate(cpus)}
    assert policy()._count_possible_workers(reserved) == size


def test_a_node_that_is_gone_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}])
    assert policy()._count_possible_workers({"a": {"CPU": 4.0}, "b": {"CPU": 4.0}, "c": {"CPU": 4.0}}) == 2


def test_a_running_group_stores_a_checkpoint_before_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    decided: list[Any] = [NoopDecision()]
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: decided[0])
    ours, wanted = policy(), ResizeDecision(num_workers=4, resources_per_worker={"CPU": 2})
    assert isinstance(ours.make_decision_for_running_worker_group(None, None), NoopDecision)
    assert ours.before_resize.asks == 0
    decided[0] = wanted
    assert isinstance(ours.make_decision_for_running_worker_group(None, None), NoopDecision)
    decided[0] = NoopDecision()  # what Ray's policy says between two looks
    assert isinstance(ours.make_decision_for_running_worker_group(None, None), NoopDecision)
    assert ours.before_resize.asks == 1
    ours.before_resize.stored = True
    assert ours.make_decision_for_running_worker_group(None, None) is wanted
    assert isinstance(ours.make_decision_for_running_worker_group(None, None), NoopDecision)


def test_a_checkpoint_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    wanted = ResizeDecision(num_workers=4, resources_per_worker={"CPU": 2})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: wanted)
    ours = policy()
    assert isinstance(ours.make_decision_for_running_worker_group(None, None), NoopDecision)
    clock[0] += elastic.CHECKPOINT_S + 1
    assert ours.make_decision_for_running_worker_group(None, None) is wanted


def test_a_group_that_ends_meanwhile_forgets_its_next_size(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    wanted = ResizeDecision(num_workers=4, resources_per_worker={"CPU": 2})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: wanted)
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda *_: wanted)
    ours = policy()
    ours.make_decision_for_running_worker_group(None, None)
    assert ours.make_decision_for_non_running_worker_group() is wanted
    assert ours.next is None


def test_a_run_without_room_ends(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    decided: list[Any] = [NoopDecision()]
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda *_: decided[0])
    ours = policy((2, 4))
    ours.make_decision_for_non_running_worker_group()
    clock[0] += 99
    ours.make_decision_for_non_running_worker_group()
    decided[0] = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 2})
    ours.make_decision_for_non_running_worker_group()
    decided[0] = NoopDecision()
    clock[0] += 99
    ours.make_decision_for_non_running_worker_group()
    clock[0] += 101
    with pytest.raises(RunError, match="found no room for 2 ranks in 100 s"):
        ours.make_decision_for_non_running_worker_group()
