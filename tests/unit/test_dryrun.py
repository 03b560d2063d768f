"""Which nodes a dry run goes by: those that are up, none yet, those of a doctor's report; and what it refuses."""

from typing import Any

import pytest

from cxr_dist.config import Config, TrainConfig
from cxr_dist.errors import ConfigError
from cxr_dist.measured import MeasuredNode, Measurements
from cxr_dist.train import dryrun
from cxr_dist.train.dryrun import look

HEAD = {"Alive": True, "NodeManagerAddress": "h", "Labels": {"cxr-instance": "m6i.xlarge"}, "Resources": {}}


def config(**train: Any) -> Config:
    return Config(train=TrainConfig(num_workers=2, use_gpu="yes", **train))


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The nodes of a cluster that is there: a head without CPUs, unless the test says otherwise."""
    nodes = [HEAD]
    monkeypatch.setattr(dryrun.cluster, "join", lambda: True)
    monkeypatch.setattr(dryrun.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(
        dryrun.ray,
        "cluster_resources",
        lambda: {key: sum(n["Resources"].get(key, 0.0) for n in nodes) for key in ("CPU", "GPU")},
    )
    return nodes


def report(verdict: str = "ready", *nodes: MeasuredNode) -> Measurements:
    return Measurements(where="d", when="today", verdict=verdict, nodes=nodes, decode={})


def test_a_cluster_without_a_gpu_node_yet_is_planned_for_where_the_run_would_wait(up: list[dict[str, Any]]) -> None:
    nodes, resources, [note] = look(config(wait_for_nodes_s=900), None)
    assert nodes == [MeasuredNode(instance="m6i.xlarge")]
    assert resources["GPU"] == 0
    assert "the cluster has 0 GPUs" in note
    assert "ask the cluster for 3 bundles and wait 900 s" in note


def test_where_the_run_would_not_wait_it_is_refused_as_the_run_would_be(up: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="the cluster has 0 GPUs"):
        look(config(), None)
    up.append({**HEAD, "Resources": {"CPU": 8.0, "GPU": 2.0}})
    assert look(config(), None)[2] == []
    up.append({**HEAD, "Alive": False, "Resources": {"CPU": 8.0}})
    assert len(look(config(), None)[0] or []) == 2  # a node that is gone is none


def test_the_nodes_of_a_doctors_report_come_before_those_that_are_up(up: list[dict[str, Any]]) -> None:
    gpu = MeasuredNode(instance="g5.2xlarge", cpus=8.0, gpus=1.0)
    nodes, resources, notes = look(config(wait_for_nodes_s=900), report("ready", gpu))
    assert (nodes, resources["GPU"], len(notes)) == ([gpu], 1.0, 1)
    assert "verdict of today was 'not ready'" in look(config(wait_for_nodes_s=900), report("not ready", gpu))[2][-1]


def test_without_a_cluster_none_is_started_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    nodes, resources, [note] = look(config(), None)
    assert (nodes, dict(resources)) == (None, {})
    assert note.startswith("no cluster was asked")
    assert not dryrun.ray.is_initialized()
