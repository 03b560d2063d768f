"""Config values that cannot be right, and the promise that every field is explained."""

import ast
import dataclasses
import inspect
import json
from typing import Any

import pytest

from cxr_dist import config
from cxr_dist.config import Config, flatten
from cxr_dist.errors import ConfigError

SECTIONS = {part.name: part.type for part in dataclasses.fields(Config)}


def test_defaults_are_possible_and_sections_cannot_be_changed() -> None:
    whole = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.train.epochs = 3  # type: ignore[misc]


def test_every_field_is_followed_by_its_meaning() -> None:
    tree = ast.parse(inspect.getsource(config))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Config"]
    assert {node.name for node in classes} == {kind.__name__ for kind in SECTIONS.values()}  # type: ignore[union-attr]
    for node in classes:
        for line, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign):
                text = following.value if isinstance(following, ast.Expr) else None
                assert isinstance(text, ast.Constant), f"{node.name}: {ast.unparse(line)} has no string after it"
                assert len(str(text.value)) > 10


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"size": 8}, "data.size: found 8, expected 16 to 1024 pixels"),
        ("data", {"row_group": 0}, "data.row_group: found 0, expected 1 to 4096 images"),
        ("data", {"shard_mb": 0}, "data.shard_mb: found 0, expected 1 to 4096 MiB"),
        ("data", {"validation_fraction": 1.0}, "data.validation_fraction: found 1.0, expected between 0 and 1"),
        ("data", {"max_corrupt": 1.5}, "data.max_corrupt: found 1.5, expected 0 to 1"),
        ("data", {"decode_workers": -1}, "data.decode_workers: found -1, expected 0 or more processes"),
        ("data", {"task_images": -1}, "data.task_images: found -1, expected 0 or more images"),
        (
            "data",
            {"cache_dir": "s3://b/c"},
            "data.cache_dir: found 's3://b/c', expected a folder on the nodes' own disks",
        ),
        ("data", {"cache_gb": 0}, "data.cache_gb: found 0, expected a positive number of GB"),
        ("data", {"read_timeout_s": 0}, "data.read_timeout_s: found 0, expected 1 or more seconds"),
        ("model", {"weights": ""}, "model.weights: found '', expected imagenet, random, or the URI of a state dict"),
        ("model", {"lse_r": 0.0}, "model.lse_r: found 0.0, expected a positive number"),
        ("model", {"bn_group": 1}, "model.bn_group: found 1, expected 2 or more images"),
        ("model", {"prefix_chunk": -1}, "model.prefix_chunk: found -1, expected 0 or more images"),
        ("optimizer", {"lr": 0.0}, "optimizer.lr: found 0.0, expected a positive number"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr: found nan, expected a positive number"),
        ("optimizer", {"weight_decay": -1.0}, "optimizer.weight_decay: found -1.0, expected 0 or more"),
        ("optimizer", {"lr_reference_batch": 0}, "optimizer.lr_reference_batch: found 0, expected 1 or more"),
        ("optimizer", {"plateau_patience": -1}, "optimizer.plateau_patience: found -1, expected 0 or more epochs"),
        (
            "optimizer",
            {"warmup_epochs": 1.0},
            "optimizer.warmup_epochs: found 1.0, expected 0 with the plateau schedule; use cosine or constant",
        ),
        (
            "train",
            {"num_workers": (2, 1)},
            "train.num_workers: found (2, 1), expected 1 or more, or [MIN, MAX] of them",
        ),
        ("train", {"num_workers": 0}, "train.num_workers: found 0, expected 1 or more, or [MIN, MAX] of them"),
        ("train", {"global_batch": 0}, "train.global_batch: found 0, expected 1 or more"),
        ("train", {"epochs": 0}, "train.epochs: found 0, expected 1 or more"),
        ("train", {"views": -1}, "train.views: found -1, expected 0 or more"),
        ("train", {"seed": -1}, "train.seed: found -1, expected 0 or more"),
        ("train", {"cpus_per_worker": 0.0}, "train.cpus_per_worker: found 0.0, expected a positive number of CPUs"),
        (
            "train",
            {"process_group_timeout_s": 1},
            "train.process_group_timeout_s: found 1, expected 10 or more seconds",
        ),
        ("optimizer", {"lr": float("inf")}, "optimizer.lr: found inf, expected a finite number"),
        ("data", {"cache_gb": float("inf")}, "data.cache_gb: found inf, expected a finite number"),
        ("train", {"seed": 1 << 63}, f"train.seed: found {1 << 63}, expected a number of at most 63 bits"),
        ("data", {"uri": "a\0b"}, r"data.uri: found 'a\x00b', expected text of one line"),
        ("evaluate", {"bootstrap_seed": -1}, "evaluate.bootstrap_seed: found -1, expected 0 or more"),
        ("evaluate", {"saliency": -1}, "evaluate.saliency: found -1, expected 0 to 100 images"),
        ("evaluate", {"box_side": 8}, "evaluate.box_side: found 8, expected 16 to 32768 pixels"),
        ("evaluate", {"bootstrap": -1}, "evaluate.bootstrap: found -1, expected 0 or more resamples"),
        (
            "run",
            {"name": "a/b"},
            "run.name: found 'a/b', expected up to 100 letters, digits, dots, dashes and underscores",
        ),
        ("tracking", {"experiment": ""}, "tracking.experiment: found '', expected a name"),
    ],
)
def test_an_impossible_value_is_named(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SECTIONS[section](**values)  # type: ignore[operator]
    assert str(caught.value) == message


@pytest.mark.parametrize("uri", ["file:///runs", "runs", "./mlruns"])
def test_mlflow_files_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: found .*, expected a database or a server"):
        config.TrackingConfig(uri=uri)


@pytest.mark.parametrize("name", ["nih8", "A.b-c_9", "x" * 100, ""])
def test_good_run_names(name: str) -> None:
    assert config.RunConfig(name=name).name == name


@pytest.mark.parametrize("name", [".hidden", "-flag", "../up", "with space", "x" * 101, "line\n"])
def test_run_names_that_are_not_folders(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        config.RunConfig(name=name)


def test_flatten_gives_plain_dotted_keys() -> None:
    flat = flatten(Config(train=config.TrainConfig(epochs=7, skip_findings=("Hernia",))))
    assert (flat["train.epochs"], flat["train.skip_findings"], flat["data.size"]) == (7, ("Hernia",), 224)
    assert len(flat) == sum(len(dataclasses.fields(kind)) for kind in SECTIONS.values())  # type: ignore[arg-type]
    json.dumps(flat)
