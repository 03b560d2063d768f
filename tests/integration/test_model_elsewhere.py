"""The logged model where this project is not installed: loaded by MLflow, and served over HTTP, in processes of their own."""

import base64
import io
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_dist.data.images import to_grey_many
from cxr_dist.evaluate.inference import load_network
from cxr_dist.registry.package import contents, write_model
from tests.elsewhere import make_elsewhere, run_elsewhere, served
from tests.predicting import NAMES, SIDE, SIZE, make_model
from tests.releases import noise, png
from tests.unit.test_predict_model import validation

COUNT = 5

LOAD = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
table = model.predict(pd.read_parquet(sys.argv[2]))
code = sorted({name.split(".")[0] for name in sys.modules if name.startswith("cxr")})
absent = [name for name in ("cxr_dist", "ray", "torchvision", "sklearn") if name in sys.modules]
print(json.dumps({"rows": table.to_dict("records"), "code": code, "absent": absent}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "first", validation=validation())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, run: str) -> Path:
    return write_model(run, contents(run), "# a card\n", tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_elsewhere(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path, model: Path):
    with served(elsewhere, model, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def raw(run: str) -> np.ndarray:
    """The evaluation's probabilities of the same images: its network, its decoding."""
    torch.set_num_threads(1)
    logits = load_network(run, torch.device("cpu")).score(to_grey_many(images(), SIZE))
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def images() -> list[bytes]:
    return [png(noise(row, SIDE)) for row in range(COUNT)]


def numbers(rows: list[dict[str, Any]], kind: str) -> np.ndarray:
    return np.array([[row[f"{kind}_{name}"] for name in NAMES] for row in rows])


def post(address: str, body: bytes, kind: str = "application/json") -> list[dict[str, Any]]:
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["predictions"]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_it_loads_without_this_project_and_gives_the_evaluations_probabilities(
    elsewhere: Path, model: Path, raw: np.ndarray, tmp_path: Path
) -> None:
    pd.DataFrame({"image": images()}).to_parquet(tmp_path / "images.parquet")
    found = json.loads(run_elsewhere(elsewhere, LOAD, str(model), str(tmp_path / "images.parquet")).splitlines()[-1])
    assert found["absent"] == []
    [package] = found["code"]
    assert package.startswith("cxr_model_")
    assert np.abs(numbers(found["rows"], "raw") - raw).max() <= 1e-5
    assert {row["model_version"] for row in found["rows"]} == {contents_version(model)}


def contents_version(model: Path) -> str:
    return json.loads((model / "data/checkpoint/model.json").read_text())["model_version"]


@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "inputs", "instances"])
def test_base64_in_every_form_of_request(server: str, raw: np.ndarray, form: str) -> None:
    texts = [encoded(data) for data in images()]
    body: Any = {
        "dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]},
        "dataframe_records": [{"image": text} for text in texts],
        "inputs": {"image": texts},
        "instances": [{"image": text} for text in texts],
    }[form]
    assert np.abs(numbers(post(server, json.dumps({form: body}).encode()), "raw") - raw).max() <= 1e-5


def test_parquet_takes_the_bytes_as_they_are(server: str, raw: np.ndarray) -> None:
    buffer = io.BytesIO()
    pd.DataFrame({"image": images()}).to_parquet(buffer)
    rows = post(server, buffer.getvalue(), "application/vnd.apache.parquet")
    assert np.abs(numbers(rows, "raw") - raw).max() <= 1e-5


def test_arrays_go_as_npy_or_as_lists(server: str, raw: np.ndarray) -> None:
    arrays = [noise(row, SIDE) for row in range(COUNT)]
    listed = {"inputs": {"image": [array.tolist() for array in arrays]}}
    files = {"dataframe_records": [{"image": encoded(npy(array))} for array in arrays]}
    for body in (listed, files):
        assert np.abs(numbers(post(server, json.dumps(body).encode()), "raw") - raw).max() <= 1e-5


def test_an_unreadable_image_has_a_row_with_the_reason_and_harms_no_other(server: str, raw: np.ndarray) -> None:
    broken = [images()[0], images()[1][:-20], b"", images()[2]]
    body = {"dataframe_records": [{"image": encoded(data)} for data in broken]}
    rows = post(server, json.dumps(body).encode())
    assert [row["status"] for row in rows] == ["ok", "unreadable", "unreadable", "ok"]
    assert [row["reason"] for row in rows] == [None, "truncated PNG", "empty file", None]
    assert {rows[1][f"{kind}_{name}"] for kind in ("raw", "calibrated", "flag") for name in NAMES} == {None}
    assert np.abs(numbers([rows[0], rows[3]], "raw") - raw[[0, 2]]).max() <= 1e-5


def test_flags_are_of_the_rule_that_is_asked_for(server: str, raw: np.ndarray) -> None:
    body = {"dataframe_records": [{"image": encoded(data)} for data in images()]}
    for rule, threshold in (("youden", 0.3), ("f1", 0.2)):
        rows = post(server, json.dumps(body | {"params": {"rule": rule}}).encode())
        assert [row["flag_Mass"] for row in rows] == (raw[:, 1] >= threshold).tolist()
        assert [row["flag_Hernia"] for row in rows] == [None] * COUNT  # validation has no positive of it
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, json.dumps(body | {"params": {"rule": "best"}}).encode())
    assert refused.value.code == 400
    assert "expected one of youden, f1, corner" in refused.value.read().decode()


def test_the_example_that_is_logged_is_a_request_that_works(server: str, model: Path) -> None:
    [row] = post(server, (model / "serving_input_example.json").read_bytes())
    assert row["status"] == "ok"
