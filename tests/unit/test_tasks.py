"""Independent calls on a cluster: enough are submitted for one that grows, and progress is told while they run. No Ray."""

import logging
from types import SimpleNamespace

import pytest
import ray

from cxr_dist.data import tasks


class Cluster:
    """Stands for `ray`: it has `cpus[i]` CPUs at the i-th wait, which ends the oldest `ends[i]` calls."""

    exceptions = ray.exceptions

    def __init__(self, cpus: list[int], ends: list[int]):
        self.cpus, self.ends = cpus, ends
        self.waits = 0
        self.submitted: list[int] = []
        """Calls that were under way at each wait."""

    def cluster_resources(self) -> dict[str, float]:
        at = min(self.waits, len(self.cpus) - 1)
        return {"CPU": float(self.cpus[at])} if self.cpus[at] else {}

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda *args: (function, args))

    def wait(self, running: list, timeout: float, num_returns: int = 1):
        assert timeout <= tasks.PROGRESS_S
        self.submitted.append(len(running))
        ends = self.ends[min(self.waits, len(self.ends) - 1)]
        self.waits += 1
        return running[:ends], running[ends:]

    def get(self, reference):
        function, args = reference
        return function(*args)


@pytest.fixture
def ray_of(monkeypatch):
    def install(cpus: list[int], ends: list[int]) -> Cluster:
        cluster = Cluster(cpus, ends)
        monkeypatch.setattr(tasks, "ray", cluster)
        monkeypatch.setattr(tasks, "connect", lambda: None)
        monkeypatch.setattr(tasks, "decoding", dict)
        return cluster

    return install


def double(number: int) -> int:
    return 2 * number


def test_results_are_in_the_order_of_the_arguments(ray_of):
    ray_of([4], [1])
    assert tasks.run(double, [(n,) for n in range(20)], [1] * 20, "images") == [2 * n for n in range(20)]


def test_a_cluster_without_cpus_sees_demand_and_one_that_grew_is_filled(ray_of):
    cluster = ray_of([0, 0, 16, 64], [0, 0, 1, 1, 500])
    tasks.run(double, [(n,) for n in range(500)], [1] * 500, "images")
    assert cluster.submitted[:4] == [8, 8, 32, 128]


def test_progress_is_told_while_nothing_ends(ray_of, monkeypatch, caplog):
    monkeypatch.setattr(tasks, "PROGRESS_S", 0.0)
    ray_of([2], [0, 0, 10])
    with caplog.at_level(logging.INFO, logger=tasks.log.name):
        tasks.run(double, [(n,) for n in range(8)], [3] * 8, "images")
    assert [message.split(" (")[0] for message in caplog.messages] == ["0 of 24 images"] * 2 + ["24 of 24 images"]
    assert caplog.messages[0].endswith("unknown left, 2 CPUs")


def test_progress_by_hand():
    assert tasks.progress(500, 2000, 10.0, "images") == "500 of 2,000 images (50/s), 30 s left"
    assert tasks.progress(0, 2000, 10.0, "images") == "0 of 2,000 images (0/s), unknown left"
