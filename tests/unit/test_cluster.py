"""Room on an autoscaling cluster: what is asked for, how long it is waited for, and that it is given back."""

import pytest
import ray

from cxr_dist import cluster
from cxr_dist.placement import MARKET

RANK = {"CPU": 1.0, "GPU": 1.0}


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch) -> list:
    """Requests made; the cluster holds what was asked for at the third look."""
    requests: list = []
    looks = iter([{"CPU": 0.0}, {"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}])

    def request(bundles: list, bundle_label_selectors: list | None = None) -> None:
        requests.append(bundles if bundle_label_selectors is None else (bundles, bundle_label_selectors))

    monkeypatch.setattr(cluster, "request_resources", request)
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
    assert [asked if isinstance(asked, list) else asked[1] for asked in autoscaler] == [
        [RANK],
        [{MARKET: "!spot"}],
        [{}],
        [],
    ]
    assert next(clock) == 6


def test_gpus_that_do_not_come_as_spot_are_asked_for_on_demand(
    autoscaler: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = {"CPU": 1.0}
    looks = iter([{}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 3.0}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(looks))
    clock = iter([0.0, 1.0, 3.0, 4.0, 5.0])  # of 9 seconds, the second third begins at 3
    monkeypatch.setattr(cluster.time, "monotonic", lambda: next(clock))
    bundles = [RANK, RANK, RANK, decoder]
    cluster.wait_for_room(bundles, wait_s=9)
    assert autoscaler == [bundles, (bundles, [{}, {MARKET: "!spot"}, {MARKET: "!spot"}, {}]), []]


def test_without_gpus_nothing_is_asked_for_a_second_time(autoscaler: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    clock = iter(range(100))
    monkeypatch.setattr(cluster.time, "monotonic", lambda: float(next(clock)))
    cluster.wait_for_room([{"CPU": 4.0}], wait_s=5)
    assert autoscaler == [[{"CPU": 4.0}], []]


def test_nothing_is_asked_for_without_a_wait(autoscaler: list) -> None:
    cluster.wait_for_room([RANK], wait_s=0)
    assert autoscaler == []
