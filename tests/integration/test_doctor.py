"""The doctor on a real cluster, sound and hurt: submitted as users do it, and what it says."""

import os
import signal
from collections.abc import Iterator

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import ViewType
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist import storage
from cxr_dist.doctor import services, upload
from cxr_dist.doctor.node import NodeProbe
from cxr_dist.doctor.problems import Problem
from infra.local.stack import Stack
from tests.conftest import ROOT
from tests.faultproxy import FaultProxy, fault_proxy
from tests.nodes import Node
from tests.policy import REFUSED, documented, held_to, needs, refused
from tests.submitting import Submitted, run, submit, wait

DOCTOR = (
    "python jobs/doctor.py --config jobs/configs/nih14.yaml --data.size 64 --model.weights random --train.use_gpu no"
    " --train.num_workers 2 --train.cpus_per_worker 2 --train.global_batch 32 --train.storage_path s3://cxr/doctor"
    " --tracking.experiment doctor --store-mb 4"
)


@pytest.fixture(scope="module")
def doctor(full_stack: Stack) -> str:
    return f"{DOCTOR} --tracking.uri {full_stack.env['MLFLOW_TRACKING_URI']}"


@pytest.fixture(scope="module")
def examined(full_stack: Stack, jobs: JobSubmissionClient, doctor: str) -> Submitted:
    """Two nodes that are as they should be: each has room for one rank and one decoder."""
    with Node(full_stack, 3, labels="cxr-role=ingest,cxr-instance=c6i.4xlarge,cxr-market=spot"):
        return run(jobs, f"{doctor} --train.cpus_per_worker 3 --json s3://cxr/doctor.json")


def test_two_sound_nodes_are_ready(examined: Submitted) -> None:
    assert examined.status == JobStatus.SUCCEEDED, examined.logs[-6000:]
    result = examined.result
    assert (result["format"], result["verdict"], result["problems"]) == ("cxr-dist/doctor/1", "ready", [])
    head, other = result["nodes"]
    assert (head["cpus"], head["role"], other["cpus"]) == (4.0, None, 3.0)
    assert (other["role"], other["instance_type"], other["market"]) == ("ingest", "c6i.4xlarge", "spot")
    assert head["versions"] == other["versions"]
    assert head["versions"]["ray"] == "2.60.0"
    for node in result["nodes"]:
        assert node["store_read_bytes_per_s"] > 0
        assert node["store_write_bytes_per_s"] > 0
        assert abs(node["clock_skew_s"]) < 60
        assert node["decode_images_per_s"].keys() == {"png", "pixels"}
    rates = result["rates"]
    assert (rates["backend"], rates["workers"], rates["images_per_step_per_worker"]) == ("gloo", 2, 16)
    for name in ("train", "prefix", "tail"):
        assert rates[f"{name}_images_per_s_per_worker"] > 0
    assert rates["allreduce_bytes_per_s"] > 0
    assert rates["gradient_bytes"] > 4 * 2_000_000  # denseblock4's two million parameters
    assert "2 ranks (1 on " in examined.logs
    assert "\nREADY\n" in examined.logs


def test_its_result_is_kept_where_it_was_asked_and_nothing_else_is_left(
    examined: Submitted, s3_env_of_full_stack: None, client: MlflowClient
) -> None:
    assert storage.read_bytes("s3://cxr/doctor.json").decode().strip() == examined.logs.splitlines()[-1]
    assert storage.list_files("s3://cxr/doctor") == []
    experiment = client.get_experiment_by_name("doctor")
    assert client.search_runs([experiment.experiment_id]) == []
    [deleted] = client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert deleted.data.metrics == {"doctor": 1.0}


@pytest.fixture
def s3_env_of_full_stack(full_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in full_stack.env.items():
        monkeypatch.setenv(name, value)
    storage.forget_filesystems()
    yield
    storage.forget_filesystems()


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_hangs_and_one_without_the_gpu_that_ray_was_told_are_named(
    full_stack: Stack, jobs: JobSubmissionClient, doctor: str
) -> None:
    with Node(full_stack, 1, num_gpus=1) as without, Node(full_stack, 3) as hung:
        hung_id, without_id = hung.node_id, without.node_id
        flags = "--train.use_gpu yes --train.num_workers 1 --train.cpus_per_worker 1 --timeout 20"
        job_id = submit(jobs, f"{doctor} {flags}")
        # not before: Ray's health check gives a node up after half a minute or more, and then it is no longer asked
        wait(jobs, job_id, until=lambda: "looking at dataset" in jobs.get_job_logs(job_id))
        os.kill(hung.raylet, signal.SIGSTOP)
        job = wait(jobs, job_id)
        assert (job.status, job.exit_code) == (JobStatus.FAILED, 1), job.logs[-6000:]
        nodes = {node["node_id"]: node["host"] for node in job.result["nodes"]}
        silent = {problem["node"]: problem for problem in job.result["problems"] if problem["check"] == "answers"}
        assert list(silent) == [nodes[hung_id]]
        assert silent[nodes[hung_id]]["found"] == "no answer within 20 s"
        blind = {problem["node"]: problem for problem in job.result["problems"] if problem["check"] == "GPUs"}
        assert list(blind) == [nodes[without_id]]
        assert job.result["rates"]["train_images_per_s_per_worker"] is None
        assert "\nNOT READY: 2 problems\n" in job.logs


@pytest.fixture
def proxy(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(s3_env["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.forget_filesystems()
        yield proxy
    storage.forget_filesystems()


def test_the_store_is_tried_with_no_more_rights_than_a_run_has(proxy: FaultProxy) -> None:
    proxy.rule = held_to(documented(ROOT / "docs" / "security.md", {"BUCKET": "cxr", "dataset": "nih"}))
    prefix, problems, notes = "s3://cxr/runs/.doctor-x", list[Problem](), list[str]()
    assert services.check_store(prefix, problems) is not None
    assert NodeProbe().store(storage.join(prefix, "node"), 1 << 20).keys() == {"read", "write"}
    services.remove(prefix, notes)
    assert (problems, notes) == ([], [])
    assert {action for request in proxy.seen for action, _, _ in needs(request)} >= {"s3:PutObject", "s3:DeleteObject"}
    assert refused(proxy.seen) == []
    assert storage.list_files("s3://cxr/runs") == []


def test_a_node_without_the_role_that_writes_says_so(proxy: FaultProxy) -> None:
    proxy.rule = lambda request: REFUSED if request.method in ("PUT", "POST") else None
    told = NodeProbe().store("s3://cxr/runs/.doctor-x/node", 1 << 20)["error"]
    assert told.startswith("s3://cxr/runs/.doctor-x/node/first: access was refused; check the credentials")
    problems = list[Problem]()
    assert services.check_store("s3://cxr/runs/.doctor-x", problems) is None
    assert [problem.check for problem in problems] == ["store"]


def test_rays_job_server_takes_as_much_as_is_said_and_no_byte_more(full_stack: Stack) -> None:
    where = f"{full_stack.addresses['ray']}/api/packages/gcs/_ray_pkg_{{}}.zip"
    much = bytes(upload.LIMIT_BYTES + 1)
    assert requests.put(where.format("more"), data=much).status_code == 413
    assert requests.put(where.format("most"), data=memoryview(much)[:-1]).status_code == 200
