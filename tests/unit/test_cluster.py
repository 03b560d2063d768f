"""Room on an autoscaling cluster: what is asked for, how long it is waited for, and that it is given back."""

import pytest
import ray

from cxr_dist import cluster

RANK = {"CPU": 1.0, "GPU": 1.0}


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch) -> list:
    """Requests made; the cluster holds what was asked for at the third look."""
    requests: list = []
    looks = iter([{"CPU": 0.0}, {"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}])
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(looks))
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    return requests


def test_room_is_asked_for_waited_for_and_given_back(autoscaler: list) -> None:
    cluster.wait_for_room([RANK, RANK, {"CPU": 1.0}], wait_s=60)
    assert autoscaler == [[RANK, RANK, {"CPU": 1.0}], []]


def test_room_that_does_not_come_is_given_back(autoscaler: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    clock = iter(range(100))
    monkeypatch.setattr(cluster.time, "monotonic", lambda: float(next(clock)))
    cluster.wait_for_room([RANK], wait_s=5)
    assert autoscaler == [[RANK], []]
    assert next(clock) == 6


def test_nothing_is_asked_for_without_a_wait(autoscaler: list) -> None:
    cluster.wait_for_room([RANK], wait_s=0)
    assert autoscaler == []
