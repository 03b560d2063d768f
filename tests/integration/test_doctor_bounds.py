"""What the doctor asks of a real Ray is bounded: work that never starts, hangs, fails or dies is named, and gives back what it held."""

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from cxr_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from cxr_dist.doctor import ranks
from cxr_dist.doctor.ask import answers, ask_nodes
from cxr_dist.doctor.problems import Problem
from cxr_dist.errors import InputError

CONFIG = Config(
    data=DataConfig(size=32, row_group=8),
    model=ModelConfig(weights="random", bn_group=8),
    train=TrainConfig(num_workers=2, use_gpu="no", global_batch=16, cpus_per_worker=1.0),
)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def free_cpus() -> float:
    """CPUs that nobody holds, once Ray has heard of all that were given back."""
    deadline = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0.0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return free


class CannotBegin:
    """Stands for a probe on a node whose image lacks what it needs."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    def where(self) -> None: ...


def test_each_kind_of_answer() -> None:
    def fails() -> None:
        raise InputError("s3://b: access was refused; check the role")

    tasks = {
        "says": ray.remote(num_cpus=0)(lambda: 7).remote(),
        "fails": ray.remote(num_cpus=0)(fails).remote(),
        "dies": ray.remote(num_cpus=0, max_retries=0)(lambda: os._exit(1)).remote(),
        "cannot begin": ray.remote(num_cpus=0)(CannotBegin).remote().where.remote(),
    }
    found = answers(tasks, 120)
    assert (found["says"].value, found["says"].error) == (7, None)
    assert found["fails"].error == "s3://b: access was refused; check the role"
    assert "died" in str(found["dies"].error)
    assert found["cannot begin"].error == "ModuleNotFoundError: No module named 'torch'"
    assert not any(answer.silent for answer in found.values())
    never = ray.remote(resources={"nowhere": 1})(lambda: 7).remote()
    assert (answers({0: never}, 0.5)[0].error, answers({0: never}, 0.0)[0].silent) == ("no answer within 0.5 s", True)
    ray.cancel(never)
    assert answers({}, 1) == {}


def test_ranks_that_find_no_room_are_named_and_take_none() -> None:
    job = ranks.rehearsal(
        Config(train=TrainConfig(num_workers=4, use_gpu="no", global_batch=64)),
        world_size=4,
        use_gpu=False,
        row_group=8,
    )
    report, problems = ranks.measure(job, b"", {}, timeout_s=0.5)
    assert problems == [
        Problem(
            check="placement",
            found="no room for 4 ranks of 1 CPU within 0.5 s",
            expected="that they can be placed",
            do="see who holds it (ray status), end that job, lower train.num_workers, or run with --wait SECONDS where nodes "
            "come by demand",
        )
    ]
    assert report.train_images_per_s == ()
    assert free_cpus() == 2


class Hangs:
    """Stands for a rank on a node that is reached, and does not get to its work."""

    def where(self) -> dict[str, str]:
        threading.Event().wait()
        return {}


class Fails:
    """Stands for a rank whose step fails, after it was placed."""

    def where(self) -> dict[str, str]:
        return {"node_id": ray.get_runtime_context().get_node_id(), "address": "tcp://127.0.0.1:1"}

    def rehearse(self, *_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("stand_in", "timeout_s", "told"),
    [
        (Hangs, 1.0, ["rank 0: no answer within 1 s", "rank 1: no answer within 1 s"]),
        (Fails, 120.0, ["rank 0: CUDA out of memory. Tried to allocate 2.00 GiB"]),
    ],
)
def test_ranks_that_hang_or_fail_are_named_and_ended(
    monkeypatch: pytest.MonkeyPatch, stand_in: type, timeout_s: float, told: list[str]
) -> None:
    monkeypatch.setattr(ranks, "Rank", stand_in)
    job = ranks.rehearsal(CONFIG, world_size=2, use_gpu=False, row_group=8)
    hosts = {node["NodeID"]: "the-node" for node in ray.nodes()}
    report, problems = ranks.measure(job, b"", hosts, timeout_s=timeout_s)
    assert [problem.found for problem in problems] == told
    assert {problem.node for problem in problems} == ({None} if stand_in is Hangs else {"the-node"})
    assert report.allreduce_bytes_per_s is None
    assert free_cpus() == 2


def test_a_node_whose_raylet_gives_no_worker_is_silent_and_the_rest_is_not_waited_for() -> None:
    gone = ray.nodes()[0] | {"NodeID": "ab" * 28, "NodeManagerHostname": "gone"}
    [report] = ask_nodes(CONFIG, [gone], prefix_of=None, store_bytes=0, images=[], timeout_s=1.0)
    assert (report.name, report.versions) == ("gone", {})
    assert report.error
