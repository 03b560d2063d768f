"""The end of a training run: its report knows sex, age and view of the images, and the second source of labels."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cxr_dist.config import Config, EvaluateConfig, RunConfig
from cxr_dist.data import nih
from cxr_dist.evaluate.scores import ScoreTable, encoded
from cxr_dist.train import run


def test_the_report_of_a_run_has_subgroups_and_second_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([f"{n}.png" for n in range(60)])
    positive = np.arange(60)[:, None] % 3 == 0
    validation = ScoreTable(
        image_ids=ids,
        patient_ids=np.arange(60),
        split="validation",
        findings=("Mass",),
        probabilities_NK=np.linspace(0.1, 0.9, 60)[:, None],
        logits_NK=None,
        labels_NK=positive,
    )
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = [f"{n}.png,{'Mass' if n % 3 == 0 else 'No Finding'},0,{n},50,{'MF'[n % 2]},PA" for n in range(60)]
    labels = nih.read_labels((header + "\n".join(rows)).encode(), "labels")
    (tmp_path / "second.csv").write_text("image_id,Mass\n1.png,0\n2.png,1\nother.png,1\n")

    class Checkpoints:
        def __init__(self, folder: str) -> None: ...
        def best(self) -> str:
            return "entry"

        def uri(self, entry: str) -> str:
            return str(tmp_path / entry)

        def read_scores(self, entry: str) -> bytes:
            return encoded(validation)

    monkeypatch.setattr(run, "Checkpoints", Checkpoints)
    monkeypatch.setattr(run, "run_record", lambda *_, **__: None)
    monkeypatch.setattr(run, "with_thumbnails", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    settings = EvaluateConfig(
        test=False, saliency=0, bootstrap=5, second_labels=str(tmp_path / "second.csv"), calibration="isotonic"
    )
    job = SimpleNamespace(config=Config(evaluate=settings, run=RunConfig(name="trial")), folder=str(tmp_path / "run"))
    manifest = SimpleNamespace(uri="", rows=lambda split: labels if split == "validation" else None)
    logged: list[Path] = []
    tracked = SimpleNamespace(log_artifacts=logged.append)
    run.evaluate(tracked, job, manifest, {"steps": 1}, {}, None)  # type: ignore[arg-type]
    evaluation = json.loads((logged[0] / "evaluation.json").read_text())
    assert {name: one["n_images"] for name, one in evaluation["subgroups"]["sex"].items()} == {"M": 30, "F": 30}
    assert evaluation["second_labels"]["findings"]["Mass"]["n_images"] == 2
    assert evaluation["calibration"]["method"] == "isotonic"
    assert evaluation["no_finding"]["definition"] == "none of the fourteen findings is labelled present"
