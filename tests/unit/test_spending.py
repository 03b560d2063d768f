"""Node-hours while a job runs, by a clock and a cluster that are told what to be."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr_dist.config import CostConfig
from cxr_dist.cost import sentence
from cxr_dist.errors import DataError
from cxr_dist.spending import Spending, attempts_in

GPU = {"cxr-instance": "g5.2xlarge", "cxr-market": "on-demand"}


class Cluster:
    """Nodes and a clock."""

    def __init__(self) -> None:
        self.now, self.nodes, self.fails = 0.0, {"head": {}}, False

    def __call__(self) -> Sequence[dict[str, Any]]:
        if self.fails:
            raise ConnectionError("no answer")
        return [{"NodeID": name, "Labels": labels} for name, labels in self.nodes.items()]


def spending(cluster: Cluster, config: CostConfig | None = None) -> Spending:
    return Spending(config or CostConfig(), nodes=cluster, clock=lambda: cluster.now, look_s=3600)


def seconds(one: Spending) -> dict[str, float]:
    return {time.node_id: time.seconds for time in one.times()}


def test_nodes_are_counted_from_when_they_join_to_when_they_go() -> None:
    cluster = Cluster()
    with spending(cluster) as one:
        cluster.now = 10
        cluster.nodes["a"] = GPU
        one.look()  # a is there from 10 on
        cluster.now = 40
        cluster.nodes["b"] = GPU
        one.look()
        cluster.now = 100
        del cluster.nodes["a"]  # interrupted; the look that misses it is the end
        one.look()
        cluster.now = 400
        cost = one.cost()
    assert seconds(one) == {"head": 400, "a": 90, "b": 360}
    assert cost.node_hours == pytest.approx((400 + 90 + 360) / 3600)
    [unknown, gpu] = sorted(cost.charges, key=lambda charge: charge.kind.instance or "")
    assert (unknown.price, unknown.hours) == (None, pytest.approx(400 / 3600))
    assert gpu.amount == pytest.approx(1.212 * 450 / 3600)
    assert gpu.nodes == 2


def test_a_node_that_comes_back_under_its_id_is_not_counted_while_it_was_away() -> None:
    cluster = Cluster()
    with spending(cluster) as one:
        cluster.nodes = {}
        cluster.now = 5
        one.look()
        cluster.now = 50
        cluster.nodes = {"head": {}}
        one.look()
        cluster.now = 60
        one.look()
    assert seconds(one) == {"head": 15}


def test_a_cluster_that_does_not_answer_is_asked_again_and_the_time_is_not_lost() -> None:
    cluster = Cluster()
    with spending(cluster) as one:
        cluster.now, cluster.fails = 10, True
        one.look()
        cluster.now, cluster.fails = 30, False
        one.look()
    assert seconds(one) == {"head": 30}


def test_attempts_add_up(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    for number, there in ((1, 100.0), (2, 30.0)):
        cluster = Cluster()
        cluster.nodes = {"head": GPU, f"node{number}": GPU}
        with spending(cluster) as one, one.kept(folder, number):
            cluster.now = there
    cluster = Cluster()
    cluster.nodes = {"head": GPU}
    with spending(cluster) as last, last.kept(folder, 5):  # attempts 3 and 4 never came so far
        cluster.now = 8
        cost = last.cost()
    assert (cost.attempts, cost.nodes) == (3, 3)
    assert cost.node_hours == pytest.approx((2 * 100 + 2 * 30 + 8) / 3600)
    assert cost.amount == pytest.approx(1.212 * 268 / 3600)
    kept, unread = attempts_in(folder)
    assert {number: sum(one.seconds for one in times) for number, times in kept.items()} == {1: 200, 2: 60, 5: 8}
    assert unread == 0


def test_a_driver_that_is_killed_loses_what_it_had_not_written(tmp_path: Path) -> None:
    cluster = Cluster()
    one = spending(cluster)
    one.__enter__()
    keeping = one.kept(str(tmp_path), 1)
    keeping.__enter__()
    cluster.now = 60
    one.look()
    one.save()
    cluster.now = 75  # killed: nobody leaves a block
    [left] = attempts_in(str(tmp_path))[0][1]
    assert left.seconds == 60
    one._over.set()


def test_an_attempt_that_was_taken_over_counts_no_further(tmp_path: Path) -> None:
    """It was only asleep: its successor counts the same nodes."""
    cluster, ours = Cluster(), [True]
    with spending(cluster) as one, one.kept(str(tmp_path), 1, lambda: ours[0]):
        cluster.now = 10
        one.look()
        one.save()
        ours[0] = False
        cluster.now = 500
    [left] = attempts_in(str(tmp_path))[0][1]
    assert left.seconds == 10


def test_what_an_attempt_left_is_read_as_it_was_written(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.nodes = {"a": {**GPU, "ray.io/availability-region": "us-east-1"}}
    with spending(cluster) as one, one.kept(str(tmp_path), 1):
        cluster.now = 12.5
    assert attempts_in(str(tmp_path)) == ({1: one.times()}, 0)
    assert json.loads((tmp_path / "cost" / "000001.json").read_bytes())["nodes"][0] == {
        "node_id": "a",
        "instance": "g5.2xlarge",
        "market": "on-demand",
        "region": "us-east-1",
        "seconds": 12.5,
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "nodes": []}', '{"format": 1, "nodes": [{}]}'])
def test_a_damaged_account_stops_no_run(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost" / "000001.json").write_text(content)
    cluster = Cluster()
    with spending(cluster) as one, one.kept(str(tmp_path), 2):
        cluster.now = 10
        cost = one.cost()
    assert cost.node_hours == pytest.approx(10 / 3600)
    assert (cost.attempts, cost.unread) == (2, 1)
    assert "2 attempts, of which 1 left no account" in sentence(cost)
    assert "000001.json" in caplog.text


def test_a_storage_that_takes_nothing_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    cluster = Cluster()
    with spending(cluster) as one, one.kept(str(tmp_path / "run"), 1):
        cluster.now = 10
    assert "not kept" in caplog.text


def test_a_bad_table_is_said_before_anything_is_counted(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text("format = 1")
    with pytest.raises(DataError, match=r"cost\.prices"):
        spending(Cluster(), CostConfig(prices=str(tmp_path / "prices.toml")))


def test_a_run_is_told_its_cost_at_a_step_for_each_attempt(tmp_path: Path) -> None:
    logged: list[Any] = []
    tracked: Any = SimpleNamespace(
        log_metrics=lambda metrics, step: logged.append((step, metrics)), set_tags=logged.append
    )
    for number in (1, 2):
        cluster = Cluster()
        cluster.nodes = {"a": GPU}
        with spending(cluster) as one, one.kept(str(tmp_path), number):
            cluster.now = 1800
            one.images = 1212
            one.tell(tracked)
    (first, metrics), tags, (second, both), _ = logged
    assert (first, second) == (0, 1)
    assert metrics["cost/usd"] == pytest.approx(0.606)
    assert both == {
        "cost/node_hours": 1.0,
        "cost/unpriced_node_hours": 0.0,
        "cost/usd": pytest.approx(1.212),
        "cost/images_per_usd": pytest.approx(1000),
    }
    assert tags["cost"].startswith("0.606 USD for 0.5 node-hours of 1 node (1 x g5.2xlarge on-demand for 0.5 h)")
    assert "AWS price list" in tags["cost.prices"]
