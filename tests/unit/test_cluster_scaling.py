"""What Ray's own autoscaler starts for ray-cluster.yaml: its scheduler and reconciler, without a cluster."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import (
    Instance,
    InstanceUpdateEvent,
    StatusCode,
    UpdateInstanceManagerStateRequest,
)

from cxr_dist.placement import MARKET, ROLE

FILE = Path(__file__).resolve().parents[2] / "ray-cluster.yaml"
RANK, DECODER = {"CPU": 1, "GPU": 1}, {"CPU": 1}
IN, NOT_IN = LabelSelectorOperator.LABEL_OPERATOR_IN, LabelSelectorOperator.LABEL_OPERATOR_NOT_IN
INGEST_FIRST = [[(ROLE, IN, ["ingest"])], []]
"""`placement.decoding()` as the autoscaler is told of it."""
NOT_ON_SPOT = [[(MARKET, NOT_IN, ["spot"])]]

Wanted = tuple[dict[str, int], list | None, int]


@pytest.fixture(scope="module")
def config() -> AutoscalingConfig:
    return AutoscalingConfig(copy.deepcopy(yaml.safe_load(FILE.read_text())), skip_content_hash=True)


def started(
    config: AutoscalingConfig,
    *,
    waiting: list[Wanted] | None = None,
    asked: list[Wanted] | None = None,
    recovered: dict[str, float] | None = None,
) -> dict[str, int]:
    """Node types that are started from nothing, for work that waits or for what `request_resources` asked."""

    def counted(wanted: list[Wanted]) -> list[Any]:
        return [
            ResourceRequestByCount(request=ResourceRequestUtil.make(bundle, label_selectors=where), count=count)
            for bundle, where, count in wanted
        ]

    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=counted(waiting or []),
            cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=counted(asked))] if asked else [],
            recoverable_resource_availabilities=recovered or {},
        )
    )
    return dict(Counter({launch.instance_type: launch.count for launch in reply.to_launch}))


def test_ranks_get_spot_nodes_first_and_on_demand_ones_when_those_are_all_taken(config: AutoscalingConfig) -> None:
    assert started(config, waiting=[(RANK, None, 2)]) == {"gpu-spot": 2}
    assert started(config, waiting=[(RANK, None, 10)]) == {"gpu-spot": 8, "gpu-on-demand": 2}
    assert started(config, asked=[(RANK, None, 1), (RANK, NOT_ON_SPOT, 1)]) == {"gpu-spot": 1, "gpu-on-demand": 1}


def test_decoding_starts_ingest_nodes_and_never_a_gpu(config: AutoscalingConfig) -> None:
    assert started(config, waiting=[(DECODER, INGEST_FIRST, 20)]) == {"cpu-ingest": 2}
    assert started(config, waiting=[(DECODER, None, 8)]) == {"cpu-ingest": 1}  # what an ingest job waits with at first
    # of 8 CPUs of a GPU node a rank takes one: seven decoders for each are there already
    assert started(config, asked=[(RANK, None, 2), (DECODER, None, 14)]) == {"gpu-spot": 2}
    assert started(config, asked=[(RANK, None, 2), (DECODER, None, 15)]) == {"gpu-spot": 2, "cpu-ingest": 1}


def test_a_request_that_no_type_can_fulfil_brings_nothing(config: AutoscalingConfig) -> None:
    """Why `wait_for_room` does not insist on labels to the end."""
    assert started(config, asked=[(RANK, None, 2), (DECODER, [[(ROLE, IN, ["none"])]], 1)]) == {}


def test_the_autoscaler_forgets_a_launch_that_ec2_refused(config: AutoscalingConfig) -> None:
    """Why `wait_for_room` asks for nodes on demand itself. Once this fails, Ray remembers, and that may go."""
    monitor = CloudResourceMonitor()
    manager = InstanceManager(
        instance_storage=InstanceStorage(cluster_id="c", storage=InMemoryStorage()),
        instance_status_update_subscribers=[monitor],
    )
    refused = NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)
    steps: list[tuple[Any, dict[str, Any]]] = [
        (Instance.QUEUED, {"upsert": True, "instance_type": "gpu-spot"}),
        (Instance.REQUESTED, {"launch_request_id": "l", "instance_type": "gpu-spot"}),
        (Instance.ALLOCATION_FAILED, {"details": f"launch failed with {refused}"}),  # Reconciler, on a LaunchNodeError
    ]
    for version, (status, facts) in enumerate(steps):
        event = InstanceUpdateEvent(instance_id="i", new_instance_status=status, **facts)
        reply = manager.update_instance_manager_state(
            UpdateInstanceManagerStateRequest(expected_version=version, updates=[event])
        )
        assert reply.status.code == StatusCode.OK, reply
    recovered = monitor.get_recoverable_resource_availabilities()
    assert started(config, waiting=[(RANK, None, 1)], recovered=recovered) == {"gpu-spot": 1}
    # what it would do if it were told
    assert started(config, waiting=[(RANK, None, 1)], recovered={"gpu-spot": 0.0}) == {"gpu-on-demand": 1}
