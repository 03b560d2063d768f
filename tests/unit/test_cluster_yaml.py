"""ray-cluster.yaml: Ray's launcher accepts it, and it says what the design needs."""

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).resolve().parents[2] / "ray-cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def accept(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    accept(cluster)


def test_the_launcher_refuses_a_misspelt_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu-spot"]["max_worker"] = 8
    with pytest.raises(Exception, match="max_worker"):
        accept(cluster)


def test_the_head_runs_no_tasks_and_workers_come_by_demand(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert {name: kind["min_workers"] for name, kind in types.items()} == {"gpu-spot": 0, "cpu-ingest": 0}
    assert sum(kind["max_workers"] for kind in types.values()) <= cluster["max_workers"]


def test_gpus_are_spot_and_ingest_nodes_are_labelled(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu-spot"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu-ingest"]["resources"]
    assert types["cpu-ingest"]["labels"] == {"cxr-role": "ingest"}


def test_every_node_reaches_the_bucket_by_its_profile_and_no_key_is_written(cluster: dict[str, Any]) -> None:
    for name, kind in cluster["available_node_types"].items():
        role = "head" if name == cluster["head_node_type"] else "worker"  # workers start no instances
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": f"cxr-dist-{role}"}
    assert not re.search(r"AKIA|aws_secret|password|RAY_AUTH_TOKEN|auth_token: *[^~ ]", FILE.read_text(), re.IGNORECASE)


def test_ray_asks_for_the_token_on_every_node_and_its_dashboard_stays_on_the_heads_loopback(
    cluster: dict[str, Any],
) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]  # node types have no options of their own
    assert not [kind for kind in cluster["available_node_types"].values() if "docker" in kind]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        line for kind in ("head", "worker") for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    assert not [line for line in starts if "RAY_AUTH" in line]
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_the_image_has_the_ray_that_is_tested(cluster: dict[str, Any]) -> None:
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{version('ray')}-")
