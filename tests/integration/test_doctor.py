"""The doctor on a real cluster of two raylets, sound and hurt: submitted as users do it, and what it says."""

from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist import storage
from infra.local.stack import Stack
from tests.nodes import Node
from tests.submitting import Submitted, run

DOCTOR = (
    "python jobs/doctor.py --config jobs/configs/nih14.yaml --data.size 64 --model.weights random --train.use_gpu no"
    " --train.num_workers 2 --train.cpus_per_worker 2 --train.global_batch 32 --train.storage_path s3://cxr/doctor"
    " --tracking.experiment doctor --store-mb 4"
)


@pytest.fixture(scope="module")
def doctor(full_stack: Stack) -> str:
    return f"{DOCTOR} --tracking.uri {full_stack.env['MLFLOW_TRACKING_URI']}"


@pytest.fixture(scope="module")
def second_node(full_stack: Stack) -> Iterator[Node]:
    """A raylet that was told of a GPU, which is not there, and of what it is by labels."""
    with Node(full_stack, 3) as node:
        yield node


@pytest.fixture(scope="module")
def examined(jobs: JobSubmissionClient, doctor: str, second_node: Node) -> Submitted:
    return run(jobs, doctor)


def test_two_sound_nodes_are_ready(examined: Submitted, second_node: Node) -> None:
    assert examined.status == JobStatus.SUCCEEDED, examined.logs[-6000:]
    result = examined.result
    assert (result["format"], result["verdict"], result["problems"]) == ("cxr-dist/doctor/1", "ready", [])
    head, other = result["nodes"]
    assert (head["cpus"], other["cpus"], other["node_id"]) == (4.0, 3.0, second_node.node_id)
    assert head["versions"] == other["versions"]
    assert head["versions"]["ray"] == "2.60.0"
    for node in result["nodes"]:
        assert node["store_read_bytes_per_s"] > 0
        assert node["store_write_bytes_per_s"] > 0
        assert abs(node["clock_skew_s"]) < 1
        assert node["decode_images_per_s"].keys() == {"png", "pixels"}
    rates = result["rates"]
    assert rates["backend"] == "gloo"
    assert rates["workers"] == 2
    assert rates["images_per_step_per_worker"] == 16
    for name in ("train", "prefix", "tail"):
        assert rates[f"{name}_images_per_s_per_worker"] > 0
    assert rates["allreduce_bytes_per_s"] > 0
    assert "\nREADY\n" in examined.logs
    assert any(note.startswith("2 ranks need ") for note in result["notes"])


def test_nothing_of_it_is_left(examined: Submitted, client: MlflowClient) -> None:
    assert storage.list_files("s3://cxr/doctor") == []
    experiment = client.get_experiment_by_name("doctor")
    assert client.search_runs([experiment.experiment_id]) == []
    [deleted] = client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert client.list_artifacts(deleted.info.run_id) == []
