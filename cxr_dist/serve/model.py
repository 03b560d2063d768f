"""The logged model, as `mlflow.pyfunc.load_model` and `mlflow models serve` see it: images in, a table out.

Its folder holds `model.json` (findings, operating points, calibration) beside a run's folder in small: `initial.pt` and
`checkpoints/OWNER/{index.json, STEP.pt}`. All is JSON or tensors read with `weights_only`: nothing is unpickled.

A row an image: status (`ok` or `unreadable`), reason, for each finding raw_<finding> (the network's probability, which the
evaluation's tables and thresholds are of), calibrated_<finding>, flag_<finding> (raw >= threshold; calibration never turns
the order round, so it is the same cut), and model_version. Where an image cannot be read its numbers are None.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from cxr_dist.data.images import PIXELS_VERSION, ImageError
from cxr_dist.errors import InputError
from cxr_dist.evaluate.calibration import Calibration
from cxr_dist.model.initial import read_tensors, restore
from cxr_dist.model.network import Network
from cxr_dist.serve.pixels import to_pixels

__all__ = ["COLUMN", "DEFAULT_RULE", "FACTS", "FORMAT", "OK", "UNREADABLE", "Served"]

FORMAT = "cxr-dist/model/1"
FACTS = "model.json"
COLUMN = "image"
"""The one column of the input."""
DEFAULT_RULE = "youden"
OK, UNREADABLE = "ok", "unreadable"
SLAB = 256
"""Images that are decoded before they are scored."""


class Served:
    """The model of a folder, on a GPU if there is one."""

    def __init__(self, folder: str | Path, device: str = ""):
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self.findings: tuple[str, ...] = tuple(self.facts["findings"])
        self.version: str = self.facts["model_version"]
        found = self.facts["calibration"]
        self.calibration = None if found is None else Calibration.from_json(found)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        initial = restore(*_file(self.folder / "initial.pt"))
        self.network = Network.restore(initial, _checkpoint(self.folder), self.device)
        self.network.tail.eval()
        self._alone = threading.Lock()  # a server answers in several threads

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The table of these images: a DataFrame with the column `image`, or any iterable of images.

        `params`: `rule`, the operating points that flags are of (those of `model.json`).
        """
        thresholds = self.thresholds((params or {}).get("rule") or DEFAULT_RULE)
        images = list(data[COLUMN]) if isinstance(data, pd.DataFrame | dict) else list(data)
        reasons: list[str | None] = []
        logits = [np.zeros((0, len(self.findings)), np.float32)]
        for start in range(0, len(images), SLAB):
            pixels, why = self.pixels(images[start : start + SLAB])
            reasons += why
            if len(pixels):
                logits.append(self.logits(pixels))
        return self.table(np.concatenate(logits), reasons, thresholds)

    def pixels(self, images: Iterable[Any]) -> tuple[npt.NDArray[np.uint8], list[str | None]]:
        """uint8 [N, S, S] of those that can be read, and for each image why it cannot, or None."""
        readable: list[npt.NDArray[np.uint8]] = []
        reasons: list[str | None] = []
        for image in images:
            try:
                readable.append(to_pixels(image, self.facts["size"]))
                reasons.append(None)
            except ImageError as error:
                reasons.append(error.reason)
        size = self.facts["size"]
        return np.stack(readable) if readable else np.zeros((0, size, size), np.uint8), reasons

    def logits(self, pixels_NSS: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[N, findings], in fixed chunks: an image's do not depend on its neighbours."""
        with self._alone:
            return self.network.score(pixels_NSS)

    def thresholds(self, rule: str) -> dict[str, float | None]:
        """The probability from which each finding is flagged; None: the rule has none for it."""
        points = self.facts["thresholds"]
        if rule not in points:
            from mlflow.exceptions import MlflowException  # whose text a server gives back

            raise MlflowException.invalid_parameter_value(
                f"rule: found {rule!r}, expected one of {', '.join(points)}, the model's operating points"
            )
        return dict(points[rule])

    def table(
        self, logits_NK: npt.NDArray[np.float32], reasons: list[str | None], thresholds: Mapping[str, float | None]
    ) -> pd.DataFrame:
        """The answer; `logits_NK` are those of the readable images alone (reason None), in order."""
        readable = np.array([reason is None for reason in reasons], np.bool_)
        with np.errstate(over="ignore"):  # of a logit below -700 the probability is 0 all the same
            raw_NK = 1 / (1 + np.exp(-logits_NK.astype(np.float64)))
        calibrated_NK = raw_NK if self.calibration is None else self.calibration.apply(logits_NK)
        columns: dict[str, Any] = {"status": np.where(readable, OK, UNREADABLE).tolist(), "reason": reasons}
        for k, finding in enumerate(self.findings):
            threshold = thresholds[finding]
            columns[f"raw_{finding}"] = _column(raw_NK[:, k], readable)
            columns[f"calibrated_{finding}"] = _column(calibrated_NK[:, k], readable)
            flags = np.full(len(raw_NK), None) if threshold is None else raw_NK[:, k] >= threshold
            columns[f"flag_{finding}"] = _column(flags, readable)
        columns["model_version"] = [self.version] * len(reasons)
        # of type object: JSON has no NaN, and a type must not depend on whether an image was unreadable
        return pd.DataFrame(columns, dtype=object)


def read_facts(folder: Path) -> dict[str, Any]:
    """`model.json`; InputError for one of another format, or of pixels that this code does not make."""
    found: dict[str, Any] = json.loads((folder / FACTS).read_text())
    for key, expected in (("format", FORMAT), ("pixels_version", PIXELS_VERSION)):
        if found.get(key) != expected:
            raise InputError(
                f"{folder / FACTS}: found {key} {found.get(key)!r}, expected {expected!r}; use the version that wrote it"
            )
    return found


def _checkpoint(folder: Path) -> dict[str, Any]:
    """The state of the one checkpoint; InputError if its bytes are not those that were saved."""
    [index] = (folder / "checkpoints").glob("*/index.json")
    [entry] = json.loads(index.read_text())["checkpoints"]
    data, name = _file(folder / "checkpoints" / entry["file"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError(
            f"{name}: found other bytes than were saved, expected SHA-256 {entry['sha256']}; fetch it again"
        )
    return read_tensors(data, name)


def _file(path: Path) -> tuple[bytes, str]:
    return path.read_bytes(), str(path)


def _column(values: npt.NDArray[Any], readable: npt.NDArray[np.bool_]) -> list[Any]:
    """Plain Python values, None where there is no image."""
    found = iter(values.tolist())
    return [next(found) if good else None for good in readable.tolist()]


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Served:
    """What MLflow calls; `model_config` may say the `device`."""
    return Served(path, (model_config or {}).get("device", ""))
