"""What MLflow shows of a run: tags, recipe, description, the metrics that charts take as x axis, names of nodes."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr_dist.config import Config, EvaluateConfig, TrackingConfig
from cxr_dist.errors import ConfigError
from cxr_dist.scrub import refuse_secrets
from cxr_dist.tracking import commit_tags
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.monitor import Monitor, Spent
from cxr_dist.train.nodes import node_names
from cxr_dist.train.progress import Progress
from cxr_dist.train.shown import description, recipe, tags
from tests.training import make_job

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def replaced(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def manifest() -> Any:
    return SimpleNamespace(
        label_set="nih14",
        hash="a" * 64,
        validation_fraction=0.2,
        settings={"split_seed": 3},
        splits={"train": SimpleNamespace(num_rows=51), "test": SimpleNamespace(num_rows=1234)},
    )


def test_a_recipe_is_the_same_for_runs_that_differ_in_seed_name_data_or_machine_only() -> None:
    config = Config()
    assert recipe(config).startswith(
        "imagenet weights; denseblock4 trained; lse pooling; adam 0.001 at 16 (none), plateau; batch 16; 20 epochs; augmented; #"
    )
    for section, values in {
        "run": {"name": "other", "commit": COMMIT},
        "train": {"seed": 7, "num_workers": 2, "storage_path": "/elsewhere"},
        "data": {"uri": "/elsewhere"},
        "tracking": {"experiment": "other", "tags": ("a=b",)},
    }.items():
        assert recipe(replaced(config, section, **values)) == recipe(config), section
    texts = {
        recipe(config),
        recipe(replaced(config, "optimizer", weight_decay=0.0)),
        recipe(replaced(config, "train", patience=1)),
    }
    assert len(texts) == 3, "a value that the words do not name is in the hash"


def test_tags_are_those_that_runs_are_filtered_by_and_win_over_ones_own(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    config = replaced(job.config, "run", commit=COMMIT)
    config = replaced(config, "tracking", tags=("label_set=mine", "asked by=radiology=2"))
    found = tags(dataclasses.replace(job, config=config, world_sizes=(1, 2)), manifest(), new=True)
    assert found["label_set"] == "nih14"
    assert found["asked by"] == "radiology=2"
    assert found["split"] == "official test list, validation 20% of the patients, seed 3"
    assert found["world_size"] == "1 or 2"
    assert (found["commit"], found["mlflow.source.git.commit"]) == (COMMIT[:12], COMMIT)
    assert "mlflow.note.content" in found
    assert "mlflow.note.content" not in tags(job, manifest(), new=False), "it may have been edited since"


def test_the_description_says_what_a_score_is_worth(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    found = description(job, manifest())
    assert "3 findings" in found
    assert "51 train, 1,234 test" in found
    assert "nothing about radiographs" in found
    assert "not looked at" not in found
    blind = dataclasses.replace(job, config=dataclasses.replace(job.config, evaluate=EvaluateConfig(test=False)))
    assert "The test split is not looked at" in description(blind, manifest())


def test_a_changed_checkout_is_told_from_its_commit() -> None:
    assert commit_tags(f"{COMMIT}-dirty") == {"mlflow.source.git.commit": COMMIT, "commit": f"{COMMIT[:12]}-dirty"}


@pytest.mark.parametrize("tag", ["no value", "=empty", "key=line\nbreak", "ke:y=1", ""])
def test_a_tag_is_a_key_and_a_value(tag: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.tags: found .* expected KEY=VALUE"):
        TrackingConfig(tags=("fine=1", tag))


def test_no_credential_is_taken_in_a_tag() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.tags: found a credential"):
        refuse_secrets({"tracking.tags": ("fine=1", "where=http://me:secret@host/x")})


class Kept:
    """A journal that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.records.append((step, metrics))


def test_every_metric_has_its_epoch_and_images_at_the_same_step(tmp_path: Path, caplog: Any) -> None:
    """The UI draws a metric over another one by their common steps."""
    caplog.set_level(logging.WARNING)
    job = make_job(tmp_path)  # two steps of 24 images an epoch
    monitor = Monitor(job, Ranks(0, 1, None))
    monitor.journal = kept = Kept()  # type: ignore[assignment]
    steps = [job.plan.step(index) for index in range(job.plan.steps_per_epoch)]
    monitor.log_steps(steps[0], [0.5], lr=0.1, wait_s=0.0, spent=[Spent(0.1, 0.0, 0)])
    monitor.log_steps(steps[1], [0.4], lr=0.1, wait_s=0.0, spent=[Spent(0.2, 0.0, 0)])
    validation = SimpleNamespace(loss=0.3, rows_N=[1, 2], mean_auroc=0.5, auroc={"Mass": 0.5, "Hernia": None})
    last = steps[-1]
    assert last.kind == "validation"
    monitor.log_epoch(last, validation, Progress())  # type: ignore[arg-type]
    places = [(step, found["epoch"], found["images_seen"]) for step, found in kept.records]
    assert places == [(1, 0.5, 24.0), (2, 1.0, 48.0), (2, 1.0, 48.0)]
    assert "val/auroc/Mass" in kept.records[-1][1]
    assert "val/auroc/Hernia" not in kept.records[-1][1]


def node(node_id: str, host: str, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": node_id, "NodeManagerHostname": host, "NodeManagerAddress": "10.0.0.1", "Alive": alive}


def test_nodes_are_named_by_their_hosts_and_keep_their_names() -> None:
    first = node_names([node("b", "gpu-1"), node("a", "head.local"), node("c", "gone", alive=False)], {})
    assert first == {"a": "head.local", "b": "gpu-1"}
    later = [node("a0", "gpu-1"), node("b", "gpu-1"), node("d", ""), node("e", "odd:name")]
    assert node_names(later, first) == first | {"a0": "gpu-1-2", "d": "10.0.0.1", "e": "odd_name"}
