"""Comparisons out of real parts: a published model's scores, a checkpoint scored now, TorchXRayVision over our stream."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from mlflow import MlflowClient

from cxr_dist.compare.run import compare_models
from cxr_dist.config import Config, DataConfig, EvaluateConfig, TrackingConfig
from cxr_dist.data.images import to_grey
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.errors import DataError
from cxr_dist.evaluate.inference import score_split
from cxr_dist.evaluate.scores import read
from cxr_dist.evaluate.xrv import XrvNetwork, score_xrv
from cxr_dist.experiment import create_run
from cxr_dist.predict.model import pack
from tests.comparing import table
from tests.conftest import ROOT
from tests.ingesting import config_of
from tests.predicting import SIZE, make_model
from tests.releases import write_release

NAME = "densenet121-res224-nih"
NOISED = ("Effusion", "Mass", "Pneumothorax")


def test_a_published_models_scores_against_copies_with_known_answers(real_data: Path, tmp_path: Path) -> None:
    """22,433 images of a real DenseNet121: a copy ties, so does a rising function of it, and noise loses where it is."""
    source = real_data / "reference_predictions/preds.csv"
    frame = pd.read_csv(source)
    columns = [column for column in frame if column.startswith("prob_")]
    frame.assign(**{column: frame[column] ** 0.5 for column in columns}).to_csv(tmp_path / "root.csv", index=False)
    noise = np.random.default_rng(0)
    for column in (f"prob_{finding}" for finding in NOISED):
        logit = np.log(frame[column] / (1 - frame[column])) + noise.normal(0, 1.5, len(frame))
        frame[column] = 1 / (1 + np.exp(-logit))
    frame.to_csv(tmp_path / "noisy.csv", index=False)
    config = Config(
        data=DataConfig(labels=str(real_data / "Data_Entry_2017_v2020.csv.gz")), evaluate=EvaluateConfig(bootstrap=600)
    )
    models = [str(source), f"copy={source}", str(tmp_path / "root.csv"), str(tmp_path / "noisy.csv")]
    result = compare_models(config, models, out=tmp_path / "out")
    assert (result["n_images"], result["labels"]["label_version"]) == (22_433, "v2020")
    for name in ("copy", "root"):
        differences = result["differences"][name]["auroc"]
        assert {one["difference"]["value"] for one in differences.values()} == {0.0}, name
        assert {one["p"] for one in differences.values()} == {1.0}, name
        assert result["differences"][name]["auroc_counts"] == {"win": 0, "loss": 0, "tie": 14, "undecided": 0}
    decided = {finding: one["decision"] for finding, one in result["differences"]["noisy"]["auroc"].items()}
    assert {finding for finding, decision in decided.items() if decision == "loss"} == {*NOISED, "mean"}
    assert set(decided.values()) == {"loss", "tie"}
    published = pd.read_csv(real_data / "reference_predictions/aucs.csv").set_index("label")["auc"]
    for finding, value in published.items():  # of labels of 2017: 181 rows are others in v2020
        assert result["discrimination"]["preds"][finding]["auroc"]["value"] == pytest.approx(value, abs=0.03), finding
    out = tmp_path / "again"
    reverse = compare_models(config, models[::-1], reference="preds", out=out)
    assert reverse["differences"]["noisy"] == result["differences"]["noisy"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def dataset(folder: Path, size: int) -> tuple[dict[str, bytes], Config]:
    files = write_release(folder / "nih", num_patients=30, per_patient=2, side=48)
    config = config_of(folder / "nih", folder / "uri", size=size)
    ingest(config)
    return files, dataclasses.replace(
        config, data=DataConfig(uri=str(folder / "uri"), size=size), evaluate=EvaluateConfig(bootstrap=100)
    )


def test_checkpoints_are_scored_now_with_the_validation_scores_that_lie_with_them(cluster, tmp_path: Path) -> None:
    _, config = dataset(tmp_path, SIZE)
    validation = table(60, split="validation", first=8000, findings=("Effusion", "Mass", "Hernia"))
    manifest = Manifest.load(config.data.uri)
    first, second = (
        make_model(tmp_path / f"runs/{seed}", seed=seed, manifest_sha256=manifest.hash, validation=validation)
        for seed in (0, 1)
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    client.create_registered_model("cxr")
    pack(second, str(tmp_path / "packed"))
    run_id = create_run(client, uri, "ours", "second")
    client.create_model_version("cxr", str(tmp_path / "packed"), run_id=run_id)
    config = dataclasses.replace(config, tracking=TrackingConfig(uri=uri))
    result = compare_models(config, [first, f"again={second}", "models:/cxr/1"], out=tmp_path / "out")
    assert result["findings"] == ["Effusion", "Mass", "Hernia"]
    assert result["n_images"] == manifest.splits["test"].num_rows
    assert [one["n_validation"] for one in result["models"].values()] == [60, 60, 60]
    assert result["models"]["cxr/1"]["same_scores_as"] == ["again"]
    assert result["models"]["0"]["same_scores_as"] == []
    assert "scored now, a test evaluation that is not counted: the checkpoint" in result["models"]["0"]["origin"]
    assert result["models"]["cxr/1"]["origin"].endswith("scored now, test evaluation number 1")
    counted = client.get_experiment(client.get_run(run_id).info.experiment_id).tags
    assert counted["test_evaluations"] == "1"
    expected = score_split(config, first, "test")[0]
    for k, finding in enumerate(expected.findings):
        assert result["discrimination"]["0"][finding]["positives"] == int(expected.labels_NK[:, k].sum())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A state dict of a TorchXRayVision network with random weights."""
    with warnings.catch_warnings():
        library = pytest.importorskip("torchxrayvision", reason="the extra xrv is not installed")
    torch.manual_seed(0)
    model = library.models.DenseNet()
    where = tmp_path_factory.mktemp("xrv") / "weights.pt"
    torch.save(model.state_dict(), where)
    return str(where)


def test_torchxrayvision_is_scored_over_the_stream_and_compared(
    cluster, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files, config = dataset(tmp_path, 224)
    spec = importlib.util.spec_from_file_location("evaluate_job", ROOT / "jobs/evaluate.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    out = tmp_path / "xrv"
    nothing = dict.fromkeys(("scores", "checkpoint", "validation_scores", "run_folder"))
    args = argparse.Namespace(xrv=NAME, xrv_weights=weights, split="test", out=str(out), **nothing)
    report = job.main(config, args)
    json.dumps(report, allow_nan=False)
    assert "it may have seen the images judged here" in capsys.readouterr().out

    scores = read(out / "scores.parquet")
    assert scores.findings == LABEL_SETS["nih14"]
    assert scores.logits_NK is None
    assert scores.note.startswith(f"TorchXRayVision {NAME}")
    assert report["n_scored"] == Manifest.load(config.data.uri).splits["test"].num_rows
    network = XrvNetwork(NAME, weights, scores.findings, torch.device("cpu"))
    pixels = np.stack([to_grey(files[name], 224) for name in scores.image_ids.tolist()])
    np.testing.assert_allclose(
        scores.probabilities_NK, network.score(pixels), atol=1e-5
    )  # other neighbours: other sums

    result = compare_models(config, [str(out), f"again={out}"], out=tmp_path / "out")
    assert set(LABEL_SETS["nih8"]) <= set(result["findings"])
    assert result["models"]["xrv"]["n_validation"] == len(read(out / "validation_scores.parquet"))
    assert f"xrv: {scores.note}" in result["cautions"]


def test_torchxrayvision_wants_images_of_224_pixels(cluster, weights: str, tmp_path: Path) -> None:
    _, config = dataset(tmp_path, SIZE)
    with pytest.raises(DataError, match="found images of 32 pixels, expected 224"):
        score_xrv(config, NAME, weights, "test")
