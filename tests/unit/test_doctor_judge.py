"""Every fault that nodes' and ranks' own words show: its problem by name, and the neighbouring case that is none."""

import dataclasses
from typing import Any

import pytest

from cxr_dist.config import Config, DataConfig
from cxr_dist.doctor import judge
from cxr_dist.doctor.problems import Problem, of_sentence
from cxr_dist.doctor.report import NodeReport, RanksReport

VERSIONS: dict[str, str | None] = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.15.0+cu132",
    "torchvision": "0.29.2",
    "mlflow": "3.17.2",
    "pyarrow": "25.0.1",
    "kornia-rs": "0.2.0",
    "numpy": "2.4.0",
    "cuda": "13.2",
    "driver": "580.95.05",
}


def node(name: str, *, versions: dict[str, str | None] | None = None, **fields: Any) -> NodeReport:
    """A sound GPU node, but for what is given."""
    sound: dict[str, Any] = {
        "node_id": name,
        "cpus": 8.0,
        "gpus": 1,
        "object_store_bytes": 8 << 30,
        "gpu_names": ("NVIDIA A10G",),
        "scratch_free_bytes": 90 << 30,
        "scratch_bytes": 100 << 30,
        "shm_bytes": 8 << 30,
        "clock_skew_s": 0.001,
    }
    return NodeReport(name=name, versions=VERSIONS | (versions or {}), **(sound | fields))


def judged(*nodes: NodeReport, config: Config | None = None) -> list[Problem]:
    return judge.judge_nodes(nodes, config or Config())[0]


def said(problem: Problem) -> str:
    return f"{problem.check}: {problem.sentence()}"


def test_sound_nodes_have_no_problem() -> None:
    assert judge.judge_nodes([node("a"), node("b")], Config()) == ([], [])


@pytest.mark.parametrize(
    "name", ["python", "ray", "torch", "torchvision", "mlflow", "pyarrow", "kornia-rs", "numpy", "cuda"]
)
def test_the_node_of_another_version_is_named(name: str) -> None:
    [problem] = judged(node("a"), node("b"), node("c", versions={name: "0.1"}))
    usual = str(VERSIONS[name]).partition("+")[0]
    assert said(problem) == (
        f"versions: c: found {name} 0.1".replace("found ", "")
        + f", expected {usual} as on the other nodes; give every node the same image, with requirements.lock"
    )


def test_of_two_nodes_the_head_is_what_the_other_should_be() -> None:
    [problem] = judged(node("a", versions={"ray": "2.59.0"}), node("b", is_head=True))
    assert (problem.node, problem.found, problem.expected) == ("a", "ray 2.59.0", "2.60.0 as on the other nodes")


def test_a_package_that_is_missing_is_named() -> None:
    [problem] = judged(node("a"), node("b", versions={"mlflow": None}))
    assert (problem.node, problem.found) == ("b", "no mlflow")
    assert [p.node for p in judged(node("a", versions={"mlflow": None}), node("b", versions={"mlflow": None}))] == [
        "a",
        "b",
    ]


def test_torch_for_cpus_on_an_ingest_node_is_the_same_torch() -> None:
    ingest = node("b", versions={"torch": "2.15.0+cpu", "cuda": None, "driver": None}, gpus=0, gpu_names=())
    assert judged(node("a"), ingest) == []


def test_drivers_that_differ_are_noted_by_node() -> None:
    problems, notes = judge.judge_nodes([node("a"), node("b", versions={"driver": "550.54.15"})], Config())
    assert problems == []
    assert notes == ["NVIDIA drivers differ, which NCCL allows: a 580.95.05, b 550.54.15"]


def test_an_image_without_cuda_is_named() -> None:
    [problem] = judged(node("a", versions={"torch": "2.15.0+cpu", "cuda": None}, gpu_names=()))
    assert said(problem) == (
        "GPUs: a: torch 2.15.0+cpu, built without CUDA, on a node of 1 GPU, expected an image with a CUDA build of torch; "
        "use an image with CUDA (infra/Dockerfile's gpu target, or rayproject/ray:…-gpu) on GPU nodes"
    )


@pytest.mark.parametrize(
    ("driver", "errors", "found", "do"),
    [
        (None, (), "torch computes on 0; CUDA of torch 13.2, driver none", "install NVIDIA's driver"),
        (
            "470.1.1",
            ("The NVIDIA driver on your system is too old",),
            "torch computes on 0 (The NVIDIA driver on your system is too old); CUDA of torch 13.2, driver 470.1.1",
            "pass the GPUs to the container",
        ),
    ],
)
def test_gpus_that_torch_does_not_see(driver: str | None, errors: tuple[str, ...], found: str, do: str) -> None:
    [problem] = judged(node("a", versions={"driver": driver}, gpu_names=(), gpu_errors=errors))
    assert problem.found == f"Ray was told 1 GPU, {found}"
    assert problem.do.startswith(do)


def test_one_of_two_gpus_that_is_broken_and_gpus_that_ray_was_not_told() -> None:
    [problem] = judged(node("a", gpus=2, gpu_errors=("GPU 1: CUDA error: out of memory",)))
    assert problem.found.startswith("Ray was told 2 GPUs, torch computes on 1 (GPU 1: CUDA error: out of memory)")
    problems, notes = judge.judge_nodes([node("a", gpus=0)], Config())
    assert (problems, notes) == ([], ["a: torch computes on 1 GPU, Ray was told 0"])


def test_a_node_that_does_not_answer_is_named_and_asked_nothing_else() -> None:
    silent = NodeReport(node_id="b", name="b", cpus=8.0, gpus=1, error="no answer within 60 s")
    [problem] = judged(node("a"), silent)
    assert said(problem) == (
        "answers: b: no answer within 60 s, expected a worker that starts and says what it is; see that its raylet runs and "
        "that head and workers reach one another on all ports (their security group)"
    )


@pytest.mark.parametrize(
    ("fields", "check", "found"),
    [
        ({"scratch_free_bytes": 4_900_000_000, "scratch_bytes": 100_000_000_000}, "scratch", "4.9 GB of 100.0 GB free"),
        ({"cache_free_bytes": 49_000_000_000}, "scratch", "49.0 GB free in data.cache_dir /cache"),
        ({"object_store_bytes": 200 << 20}, "object store", "210 MB of object store"),
        ({"shm_bytes": 64 << 20}, "object store", "67 MB of shared memory for an object store of 8.6 GB"),
        ({"clock_skew_s": -61.0}, "clock", "its clock is -61 s off the driver's"),
        (
            {"tracking_error": "no MLflow server answers at http://m:5000 (timed out)"},
            "MLflow",
            "no MLflow server answers",
        ),
        ({"dataset_error": "s3://b/x: access was refused; check the role"}, "dataset", "s3://b/x: access was refused"),
        (
            {"store_error": "s3://b/runs: access was refused; check the role"},
            "store",
            "s3://b/runs: access was refused",
        ),
        ({"decode_error": "No module named 'kornia_rs'"}, "decoding", "No module named 'kornia_rs'"),
    ],
)
def test_what_one_node_lacks_is_named_with_it(fields: dict[str, Any], check: str, found: str) -> None:
    config = Config(data=DataConfig(cache_dir="/cache", cache_gb=50.0))
    [problem] = judged(node("a"), node("b", **fields), config=config)
    assert (problem.check, problem.node) == (check, "b")
    assert problem.found.startswith(found)
    assert problem.do


@pytest.mark.parametrize(
    "fields",
    [
        {"scratch_free_bytes": 5_000_000_000, "scratch_bytes": 100_000_000_000},
        {"cache_free_bytes": 50_000_000_000},
        {"object_store_bytes": 256 << 20},
        {"clock_skew_s": 60.0},
    ],
)
def test_what_is_just_enough_is_no_problem(fields: dict[str, Any]) -> None:
    config = Config(data=DataConfig(cache_dir="/cache", cache_gb=50.0))
    assert judged(node("a", **fields), config=config) == []


def test_a_clock_that_is_seconds_off_is_noted() -> None:
    assert judge.judge_nodes([node("a", clock_skew_s=-3.0)], Config())[1] == ["a: its clock is -3.0 s off the driver's"]
    assert judge.judge_clock(None) == ([], ["the store does not tell its time"])
    assert judge.judge_clock(30.0) == ([], [])
    [problem] = judge.judge_clock(-900.0)[0]
    assert said(problem) == (
        "clock: the store's clock is -900 s off the driver's, expected at most 60 s; have NTP (chrony) set the clocks"
    )


DECODING: dict[str, Any] = {"ranks": 2, "gpu": True, "images_per_s": 2300.0, "cpus": 8, "decodes_always": True}
RATES: dict[str, float | None] = {"png": 256.0, "pixels": 11_500.0}


def test_too_few_data_cpus_are_told_as_cores_for_each_encoding() -> None:
    [problem] = judge.judge_decoding(RATES, encoding="png", **DECODING)[0]
    assert said(problem) == (
        "decoding: 2 GPUs need 18 decode cores for raw PNG, 1 for pixel shards; you have 8, expected 18, else the GPUs wait for "
        "data; add CPU nodes (label cxr-role: ingest), or ingest with data.encoding pixels"
    )


def test_enough_data_cpus_are_noted_and_few_where_features_are_kept() -> None:
    sentence = "2 GPUs need 18 decode cores for raw PNG, 1 for pixel shards; you have 8"
    assert judge.judge_decoding(RATES, encoding="pixels", **DECODING) == ([], [sentence])
    assert judge.judge_decoding(RATES, encoding="png", **(DECODING | {"cpus": 18}))[0] == []
    assert len(judge.judge_decoding(RATES, encoding="png", **(DECODING | {"cpus": 17}))[0]) == 1
    once = judge.judge_decoding(RATES, encoding="png", **(DECODING | {"decodes_always": False}))
    assert once == ([], [f"{sentence}, too few for png, which is decoded once where features are kept"])


def test_nothing_is_said_of_cores_without_both_rates() -> None:
    unsaid = ([], ["decoding: the cores that it needs are not known, for not every rate was measured"])
    assert judge.judge_decoding({"png": None, "pixels": None}, encoding="png", **DECODING) == unsaid
    assert judge.judge_decoding(RATES, encoding="png", **(DECODING | {"images_per_s": None})) == unsaid


def test_a_rank_that_the_others_wait_for_is_named() -> None:
    ranks = RanksReport(backend="nccl", hosts=("a", "b"), train_images_per_s=(1000.0, 700.0))
    assert judge.judge_ranks(ranks) == [
        "rank 1 on b trains 700 images/s, the fastest rank 1,000: the others wait for it"
    ]
    assert judge.judge_ranks(dataclasses.replace(ranks, train_images_per_s=(1000.0, 800.0))) == []
    assert judge.judge_ranks(RanksReport(backend="gloo", hosts=("a",))) == ["one rank: no all-reduce to measure"]


@pytest.mark.parametrize(
    ("sentence", "found", "expected", "do"),
    [
        ("a: found x, expected y; do z", "a: found x", "y", "do z"),
        ("a: found x; do z; or w", "a: found x", "", "do z; or w"),
        ("nothing\n at all", "nothing at all", "", ""),
    ],
)
def test_a_sentence_in_its_parts(sentence: str, found: str, expected: str, do: str) -> None:
    problem = of_sentence("x", sentence)
    assert (problem.found, problem.expected, problem.do, problem.node) == (found, expected, do, None)


def test_a_problem_holds_no_secret() -> None:
    assert of_sentence("x", "found postgresql://me:hush@db").found == "found postgresql://***@db"
