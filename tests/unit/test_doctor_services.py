"""What the doctor tries from the driver, and its arithmetic on what there is room for. No Ray, no server."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import ray

from cxr_dist import storage
from cxr_dist.config import Config, DataConfig, ModelConfig, TrackingConfig, TrainConfig
from cxr_dist.data.images import to_grey
from cxr_dist.data.manifest import Manifest
from cxr_dist.doctor import run, services
from cxr_dist.doctor.problems import Problem
from cxr_dist.model.initial import restore
from tests.unit.test_manifest import make_dataset


def test_the_stores_clock_and_that_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Problem] = []
    assert services.check_store(str(tmp_path / "runs"), problems) == pytest.approx(0.0, abs=1.0)
    assert os.listdir(tmp_path / "runs") == []
    modified = storage.modified_ns
    monkeypatch.setattr(storage, "modified_ns", lambda uri: modified(uri) - 900 * 10**9)
    assert services.check_store(str(tmp_path / "runs"), problems) == pytest.approx(-899.5, abs=1.0)
    monkeypatch.setattr(storage, "modified_ns", lambda uri: 0)
    assert services.check_store(str(tmp_path / "runs"), problems) is None
    assert problems == []


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    problems: list[Problem] = []
    assert services.check_store(str(tmp_path / "file" / "runs"), problems) is None
    [problem] = problems
    assert (problem.check, problem.node) == ("store", None)
    assert problem.found.startswith(f"train.storage_path: {tmp_path}/file/runs: ")


def nobody() -> str:
    """An address where no server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_tracking_server_that_does_not_answer_is_a_problem_or_a_note() -> None:
    uri, problems, notes = nobody(), list[Problem](), list[str]()
    services.check_runs(Config(tracking=TrackingConfig(uri=uri)), problems, notes)
    assert [problem.check for problem in problems] == ["MLflow"]
    assert problems[0].found.startswith(f"tracking.uri: no MLflow server answers at {uri}")
    assert problems[0].do == "start it (mlflow server) or correct tracking.uri"
    problems.clear()
    services.check_runs(Config(tracking=TrackingConfig(uri=uri, required=False)), problems, notes)
    assert problems == []
    [note] = notes
    assert note.startswith(f"MLflow: tracking.uri: no MLflow server answers at {uri}")
    assert note.endswith("(a run begins all the same: tracking.required is false)")


def test_no_database_is_made_for_a_look(tmp_path: Path) -> None:
    problems, notes = list[Problem](), list[str]()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    services.check_runs(Config(tracking=TrackingConfig(uri=uri)), problems, notes)
    assert (problems, notes) == ([], [f"MLflow: {tmp_path}/mlflow.db will be made by the first run"])
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_there_are_named_and_random_ones_stand_in(tmp_path: Path) -> None:
    problems: list[Problem] = []
    config = Config(model=ModelConfig(weights=str(tmp_path / "none.pt")))
    state = restore(services.starting_weights(config, 8, problems), "x")
    assert (state.random, state.state["classifier.bias"].shape) == (False, (8,))
    assert [(problem.check, problem.found) for problem in problems] == [
        ("weights", f"model.weights: found nothing at {tmp_path}/none.pt")
    ]


def test_weights_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from cxr_dist.model import weights

    loads = weights.initial
    stuck = threading.Event()
    monkeypatch.setattr(
        weights, "initial", lambda name, **more: stuck.wait() if name == "imagenet" else loads(name, **more)
    )
    monkeypatch.setattr(services, "WEIGHTS_S", 0.1)
    problems: list[Problem] = []
    services.starting_weights(Config(), 14, problems)
    stuck.set()
    assert problems == [
        Problem(
            check="weights",
            found="model.weights: found no answer within 0.1 s from imagenet",
            expected="the weights",
            do="put the file in the bucket and give its URI",
        )
    ]


def test_a_dataset_is_looked_at_if_there_is_one(tmp_path: Path) -> None:
    problems, notes = list[Problem](), list[str]()
    assert services.check_data(Config(), problems, notes) is None
    assert (problems, notes) == ([], ["dataset: data.uri is empty, so none was looked at"])
    services.check_data(Config(data=DataConfig(uri=str(tmp_path))), problems, notes)
    assert [problem.check for problem in problems] == ["dataset"]


def test_images_to_decode_are_the_datasets_own_where_it_holds_any(tmp_path: Path) -> None:
    manifest, files = make_dataset(tmp_path, "png")
    images, whose = services.sample_images(Manifest.load(manifest.uri), Config())
    assert whose == "the dataset's"
    assert len(images) == services.NUM_IMAGES
    assert set(images) <= set(files.values())


def test_images_are_drawn_where_there_are_none() -> None:
    images, whose = services.sample_images(None, Config())
    assert whose == "drawn"
    assert 2 <= len(images) <= services.NUM_IMAGES
    assert to_grey(images[0], 224).shape == (224, 224)


def nodes(*sizes: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"NodeID": str(n), "Alive": True, "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": cpus, "GPU": gpus}}
        for n, (cpus, gpus) in enumerate(sizes)
    ]


def find_room(
    monkeypatch: pytest.MonkeyPatch,
    listed: list[dict[str, Any]],
    train: dict[str, Any],
    *,
    sizes: tuple[int, ...],
    held: float = 0.0,
) -> tuple[int | None, list[Problem]]:
    total = {name: sum(node["Resources"][name] for node in listed) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "available_resources", lambda: total | {"CPU": total["CPU"] - held})
    problems: list[Problem] = []
    config = Config(train=TrainConfig(**train), tracking=TrackingConfig(uri="http://mlflow:5000"))
    return run.room(config, sizes, listed, problems), problems


def test_as_many_ranks_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = {"num_workers": (1, 4), "use_gpu": "yes"}
    assert find_room(monkeypatch, nodes((4, 0), (8, 1), (8, 1)), elastic, sizes=(1, 2, 4)) == (2, [])
    assert find_room(monkeypatch, nodes((8, 4)), elastic, sizes=(1, 2, 4)) == (4, [])


def test_rays_own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"num_workers": 2, "use_gpu": "no", "cpus_per_worker": 1.5}
    assert find_room(monkeypatch, nodes((4, 0)), train, sizes=(2,)) == (2, [])
    world, [problem] = find_room(monkeypatch, nodes((2, 0), (2, 0)), train, sizes=(2,))  # half a CPU is left on each
    assert world is None
    assert problem.found == (
        "train.cpus_per_worker: 2 workers x 1.5 CPUs on nodes of 2, 2 CPUs leave 0 whole CPUs for decoding"
    )


def test_a_cluster_that_starts_from_no_nodes_is_told_how_to_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"num_workers": 2, "use_gpu": "yes"}
    world, [problem] = find_room(monkeypatch, nodes((0, 0)), gpus, sizes=(2,))
    assert world is None
    assert problem.check == "resources"
    assert problem.found == "train.num_workers: found 2 workers with a GPU each, the cluster has 0 GPUs"
    assert problem.do.endswith(
        "0 of 1 node can run ranks or decode now; where nodes come by demand, --wait 900 asks for them"
    )
    waited = gpus | {"wait_for_nodes_s": 900}
    [problem] = find_room(monkeypatch, nodes((0, 0)), waited, sizes=(2,))[1]
    assert problem.do.endswith("no more came within 900 s, see ray status")


def test_what_other_jobs_hold_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"num_workers": 2, "use_gpu": "no", "cpus_per_worker": 1.0}
    assert find_room(monkeypatch, nodes((4, 0)), train, sizes=(2,), held=1.0) == (2, [])
    world, [problem] = find_room(monkeypatch, nodes((4, 0)), train, sizes=(2,), held=2.0)
    assert world is None
    assert problem.sentence() == (
        "of what is free, train.cpus_per_worker: cluster has 2 CPUs, 2 workers x 1 CPU leave 0 for decoding, expected room "
        "for the run; wait for the jobs that hold the rest (ray status, ray job list)"
    )


def test_nodes_that_are_gone_are_noted() -> None:
    listed = nodes((4, 0), (4, 0))
    listed[1] |= {"Alive": False, "NodeManagerHostname": "spot-1"}
    assert run.gone(listed) == ["1 nodes have left the cluster since it began: spot-1"]
    assert run.gone(listed[:1]) == []
