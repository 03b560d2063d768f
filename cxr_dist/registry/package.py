"""A checkpoint as an MLflow model's folder: what it predicts with, the code it carries, signature, example, requirements.

    MLmodel, requirements.txt, …       as MLflow writes them
    MODEL_CARD.md
    code/cxr_model_<hash>/…            the carried modules (`carry`)
    data/checkpoint/model.json         findings, operating points, calibration, versions
    data/checkpoint/initial.pt, checkpoints/…   a run's folder in small (`predict.model.pack`)

Its input is one column `image` of bytes. MLflow decodes the base64 of JSON for it, passes the bytes of Parquet and of a
DataFrame as they are, and looks at no element: uint8 arrays pass too (docs/model.md).
"""

import importlib.metadata
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image

from cxr_dist import storage
from cxr_dist.data.images import PIXELS_VERSION
from cxr_dist.evaluate import scores, thresholds
from cxr_dist.evaluate.calibration_kinds import calibration_for
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.model.weights import restore
from cxr_dist.predict.model import find_model, pack
from cxr_dist.registry.carry import write_code
from cxr_dist.serve.model import COLUMN, DEFAULT_RULE, FACTS, FORMAT
from cxr_dist.train.checkpoint import find_checkpoint

__all__ = ["CARD", "DATA", "REQUIREMENTS", "Contents", "contents", "example", "signature", "write_model"]

CARD = "MODEL_CARD.md"
DATA = "checkpoint"
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pillow", "kornia-rs")
"""Distributions of a model's environment; each is pinned to the version that is installed where the model is made."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is known of a model before it is written."""

    facts: dict[str, Any]
    """Content of `model.json`."""
    origin: str
    """Where the weights that training began with came from."""
    epoch: int
    score: float | None
    """Validation mean AUROC of the checkpoint."""
    manifest_sha256: str
    config: dict[str, Any]
    """The model's section of the config."""
    validation: ScoreTable | None


def contents(checkpoint_uri: str, *, method: Literal["platt", "isotonic"] = "platt") -> Contents:
    """What is known of a checkpoint: its operating points and calibration are fitted on the validation scores with it."""
    uri = storage.absolute(checkpoint_uri)
    with find_model(uri, "") as model:
        folder, checkpoints, entry = find_checkpoint(model.uri)
    state = checkpoints.load(entry)
    where = storage.join(folder, "initial.pt")
    initial = restore(storage.read_bytes(where), storage.shown(where))
    validation = None
    if entry.scores is not None:
        checkpoints.read_scores(entry)
        validation = scores.read(storage.join(checkpoints.folder, entry.scores))
    facts = {
        "format": FORMAT,
        "model_version": model.version,
        "findings": list(model.findings),
        "size": model.size,
        "pixels_version": PIXELS_VERSION,
        "thresholds": _thresholds(validation, model.findings),
        "calibration": None if validation is None else calibration_for(model.findings, validation, method).to_json(),
        "sha256": model.sha256,
    }
    return Contents(
        facts=facts,
        origin=storage.shown(initial.origin),
        epoch=entry.epoch,
        score=entry.score,
        manifest_sha256=state["manifest_sha256"],
        config=dict(state["model"]),
        validation=validation,
    )


def write_model(checkpoint_uri: str, found: Contents, card: str, to: Path) -> Path:
    """Write the MLflow model of a checkpoint to a folder that is not there yet; the folder."""
    with tempfile.TemporaryDirectory() as folder:
        data, code = Path(folder, DATA), Path(folder, "code")
        pack(storage.absolute(checkpoint_uri), str(data))
        (data / FACTS).write_text(json.dumps(found.facts, indent=1))
        module = write_code(code)
        mlflow.pyfunc.save_model(
            str(to),
            loader_module=module,
            data_path=str(data),
            code_paths=[str(code / module.partition(".")[0])],
            signature=signature(found.facts["findings"]),
            input_example=example(found.facts["size"]),
            pip_requirements=[f"{name}=={_installed(name)}" for name in REQUIREMENTS],
            metadata={key: found.facts[key] for key in ("model_version", "findings", "size", "pixels_version")},
        )
    (to / CARD).write_text(card)
    return to


def signature(findings: list[str]) -> ModelSignature:
    """One column of bytes in; out, what `serve.model` says. `rule` names the operating points of the flags."""
    columns = [ColSpec(DataType.string, "status"), ColSpec(DataType.string, "reason", required=False)]
    for finding in findings:
        columns += [ColSpec(DataType.double, f"{kind}_{finding}", required=False) for kind in ("raw", "calibrated")]
        columns.append(ColSpec(DataType.boolean, f"flag_{finding}", required=False))
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, COLUMN)]),
        outputs=Schema([*columns, ColSpec(DataType.string, "model_version")]),
        params=ParamSchema([ParamSpec("rule", DataType.string, DEFAULT_RULE)]),
    )


def example(size: int) -> pd.DataFrame:
    """One PNG, a bright disc on black: it shows the form of a request, not a chest."""
    line = np.linspace(-1, 1, size)
    disc = 255 * np.clip(1 - line[:, None] ** 2 - line**2, 0, 1)
    buffer = io.BytesIO()
    Image.fromarray(disc.astype(np.uint8)).save(buffer, "PNG")
    return pd.DataFrame({COLUMN: [buffer.getvalue()]})


def _thresholds(validation: ScoreTable | None, findings: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
    """Rule to finding to threshold."""
    fitted: dict[str, Any] = {} if validation is None else dict(thresholds.fit(validation))
    return {rule: {name: fitted.get(name, {}).get(rule) for name in findings} for rule in thresholds.RULES}


def _installed(name: str) -> str:
    """The version of a distribution, without what only a local build has (`+cu130`)."""
    return importlib.metadata.version(name).partition("+")[0]
