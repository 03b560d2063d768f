"""The model card: what it must say of a model, and how it is cut to what MLflow keeps."""

from typing import Any

import numpy as np
import pytest

from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.registry.card import LONGEST, About, model_card, recipe, shortened
from cxr_dist.registry.package import Contents

ABOUT = About(run="first", run_id="0123", label_set="nih8", split="official", commit="f" * 40, recipe="a recipe")


def contents(origin: str = "imagenet", validation: bool = True) -> Contents:
    facts: dict[str, Any] = {
        "model_version": "first/000000010@0123456789ab",
        "findings": ["Mass", "Pleural_Thickening"],
        "size": 224,
        "pixels_version": "grey-1",
        "thresholds": {"youden": {"Mass": 0.25, "Pleural_Thickening": None}},
        "calibration": {"fitted_on": "validation split, 2 images", "findings": {}},
    }
    facts["calibration"]["findings"] = {name: {"kind": "platt"} for name in facts["findings"]}
    table = ScoreTable(
        image_ids=np.array(["a", "b"]),
        patient_ids=np.arange(2),
        split="validation",
        findings=("Mass", "Pleural_Thickening"),
        probabilities_NK=np.full((2, 2), 0.5),
        logits_NK=None,
        labels_NK=np.eye(2, dtype=np.bool_),
    )
    return Contents(
        facts=facts,
        origin=origin,
        epoch=3,
        score=0.8125,
        manifest_sha256="ab" * 32,
        config={"trainable": "denseblock4"},
        validation=table if validation else None,
    )


def value(number: float | None, lower: float | None = None, upper: float | None = None) -> dict[str, float | None]:
    return {"value": number, "lower": lower, "upper": upper}


def evaluation(split: str = "test") -> dict[str, Any]:
    mass = {"auroc": value(0.81234, 0.8, 0.82), "average_precision": value(0.3), "positives": 1748}
    flags = {"sensitivity": value(0.7, 0.6, 0.8), "specificity": value(None)}
    return {
        "split": split,
        "n_images": 25596,
        "n_patients": 2797,
        "discrimination": {"Mass": mass, "Pleural_Thickening": {"auroc": None, "positives": 0}, "mean": mass},
        "operating_points": {"youden": {"findings": {"Mass": flags}, "mean": {}}},
    }


def test_figures_are_the_evaluations_with_their_intervals() -> None:
    card = model_card("cxr", contents(), ABOUT, evaluation())
    assert "Test split: 25,596 images of 2,797 patients." in card
    assert "| Mass | 1,748 | 0.812 [0.800, 0.820] | 0.300 | 0.700 [0.600, 0.800] | – |" in card
    assert "| Pleural Thickening | 0 | – | – | – | – |" in card
    assert "| Mass | 0.25 | platt |" in card
    assert "| Pleural Thickening | – | platt |" in card
    assert "epoch 3, chosen by validation mean AUROC (0.8125)" in card
    assert "run first (0123); commit ffffffffffff" in card


def test_what_one_must_know_is_said() -> None:
    card = model_card("cxr", contents(), ABOUT, None)
    for sentence in (
        "not for diagnosis, triage or any decision about a patient",
        "mined from radiology reports",
        "Not evaluated: no report",
        "Starting weights: imagenet",
        "label set nih8",
        "Flags cut the network's own probability (raw)",
    ):
        assert sentence in card
    assert "RANDOM" not in card
    assert "optimistic" in model_card("cxr", contents(), ABOUT, evaluation("validation"))
    assert "no validation scores" in model_card("cxr", contents(validation=False), About(), None)


def test_random_weights_are_said_before_anything_else() -> None:
    card = model_card("cxr", contents("random"), ABOUT, evaluation())
    assert card.index("RANDOM WEIGHTS") < card.index("##")
    assert "Its outputs mean nothing about radiographs" in card


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_a_description_is_what_mlflow_keeps(extra: int) -> None:
    card = "line of ten\n" * 1000
    card = card[: LONGEST + extra]
    short = shortened(card)
    assert len(short) <= LONGEST
    assert (short == card) == (extra == 0)
    assert extra == 0 or short.endswith("MODEL_CARD.md among the model's artifacts.\n")


def test_a_recipe_is_one_line_of_the_config() -> None:
    config = {"model.trainable": "head", "model.batch_norm": "frozen", "model.pooling": "avg", "optimizer.name": "sgd"}
    config |= {"optimizer.lr": 0.1, "train.global_batch": 64, "train.epochs": 5, "train.seed": 7}
    assert recipe(config) == (
        "head trained, batch-norm frozen, avg pooling; sgd 0.1, batch 64, at most 5 epochs, seed 7"
    )
