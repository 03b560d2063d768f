"""A checkpoint as one ONNX file: from uint8 pixels to probabilities, for runtimes without torch.

Input `pixels`, uint8 [batch, S, S]: grey levels of the model's size. The file decodes and resizes nothing; what does is
`data.images.to_grey` (bilinear, antialiased, docs/model.md). Outputs `raw` and `calibrated`, float32 [batch, findings]. Its
metadata hold `model.json`. The plain form of the prefix is exported, which is the folded one to rounding.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cxr_dist import storage
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.evaluate.calibration import Calibration, sigmoid
from cxr_dist.model.augment import Normalization, to_input
from cxr_dist.model.network import Network
from cxr_dist.model.weights import restore
from cxr_dist.registry.package import contents
from cxr_dist.train.checkpoint import load_checkpoint

__all__ = ["TOLERANCE", "Pixels2Probabilities", "export"]

TOLERANCE = 1e-4
"""Most that a probability may differ from torch's: the export is checked before it counts."""
CHECKED = 5
"""Images of noise that it is checked on; no multiple of anything."""
OPSET = 20


class Pixels2Probabilities(nn.Module):
    """uint8 pixels [B, S, S] to raw and calibrated probabilities [B, K]."""

    def __init__(self, network: Network, calibration: Calibration | None):
        super().__init__()
        self.features, self.tail = network.prefix.features, network.tail.eval()
        self.normalization: Normalization = network.normalization
        curves = list(calibration.findings.values()) if calibration else []
        classes = network.tail.classifier.out_features
        self.register_buffer("slope_K", torch.tensor([one.slope for one in curves] or [1.0] * classes))
        self.register_buffer("intercept_K", torch.tensor([one.intercept for one in curves] or [0.0] * classes))

    def forward(self, pixels_BSS: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = self.tail(self.features(to_input(pixels_BSS, self.normalization)))
        return torch.sigmoid(logits_BK), torch.sigmoid(self.slope_K * logits_BK + self.intercept_K)


def export(checkpoint_uri: str, to: Path, *, method: Literal["platt", "isotonic"] = "platt") -> dict[str, Any]:
    """Write the ONNX file of a checkpoint; {"findings", "size", "bytes", "largest_difference" from torch}.

    ConfigError without the extra `onnx`, and for an isotonic calibration (a step has no tolerance); InputError if what
    onnxruntime computes differs by more than TOLERANCE.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter asks for it late
    except ImportError as error:
        raise ConfigError(
            f"export: found no {error.name}, expected the extra [onnx]; pip install 'cxr-dist[onnx]'"
        ) from None
    facts = contents(checkpoint_uri, method=method).facts
    network, calibration = _network(checkpoint_uri), _calibration(facts)
    pixels = _films(facts["size"])
    program = torch.onnx.export(
        Pixels2Probabilities(_network(checkpoint_uri, prefix_form="plain"), calibration).eval(),
        (torch.from_numpy(pixels),),
        input_names=["pixels"],
        output_names=["raw", "calibrated"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"cxr_dist": json.dumps(facts)})
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    largest = _difference(network.score(pixels), calibration, session, pixels)
    if not largest <= TOLERANCE:
        raise InputError(
            f"export: found probabilities that differ by {largest:.2g} between torch and onnxruntime, expected at most "
            f"{TOLERANCE:g}; try another version of either"
        )
    storage.put_atomic(str(to), data)
    return {"findings": facts["findings"], "size": facts["size"], "bytes": len(data), "largest_difference": largest}


def _calibration(facts: dict[str, Any]) -> Calibration | None:
    calibration = None if facts["calibration"] is None else Calibration.from_json(facts["calibration"])
    if calibration is not None and calibration.method != "platt":
        raise ConfigError(f"export: found a calibration by {calibration.method}, expected platt; fit that one")
    return calibration


def _network(checkpoint_uri: str, **changes: Any) -> Network:
    """The network of a checkpoint on a CPU, as the evaluation builds it but for `changes` of the model's config."""
    checkpoint = load_checkpoint(storage.absolute(checkpoint_uri))
    where = storage.join(checkpoint["folder"], "initial.pt")
    initial = restore(storage.read_bytes(where), storage.shown(where))
    wanted = checkpoint | {"model": checkpoint["model"] | changes, "precision": "fp32"}
    return Network.restore(initial, wanted, torch.device("cpu"))


def _films(size: int) -> npt.NDArray[np.uint8]:
    """uint8 [CHECKED, S, S]: soft gradients with grain, for on white noise a network's probabilities are 0 or 1."""
    rng, line = np.random.default_rng(0), np.linspace(-1, 1, size)
    tilts = rng.uniform(-60, 60, (CHECKED, 2, 1, 1))
    films = 128 + tilts[:, 0] * line[:, None] + tilts[:, 1] * line + rng.uniform(-12, 12, (CHECKED, size, size))
    return np.clip(films, 0, 255).astype(np.uint8)


def _difference(
    logits_BK: npt.NDArray[np.float32], calibration: Calibration | None, session: Any, pixels_BSS: npt.NDArray[np.uint8]
) -> float:
    """Largest difference of a probability from those of the logits, over all images at once and over the first alone."""
    raw_BK = sigmoid(logits_BK.astype(np.float64))
    calibrated_BK = raw_BK if calibration is None else calibration.apply(logits_BK)
    largest = 0.0
    for count in (len(pixels_BSS), 1):
        found = session.run(["raw", "calibrated"], {"pixels": pixels_BSS[:count]})
        for one, expected in zip(found, (raw_BK[:count], calibrated_BK[:count]), strict=True):
            largest = max(largest, float(np.abs(one - expected).max()))
    return largest
