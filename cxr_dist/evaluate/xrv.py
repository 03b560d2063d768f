"""TorchXRayVision's pretrained DenseNet121s, judged by the same code: its network and scaling over our stream of pixels.

Its release files are pickled modules, which execute what is in them; they are not read here. `infra/xrv_state_dict.py`
makes a state dict of one, once, and that is what is loaded. The library gives network, targets, operating points and the
scaling of pixels to [-1024, 1024]; images come at 224 pixels, one channel, by our own antialiased resize.
"""

import functools
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from cxr_dist import storage
from cxr_dist.config import Config
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.data.texts import shown
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate.inference import pixels_of, score_with, with_outputs
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.model.weights import read_tensors
from cxr_dist.preflight import check_pixels

__all__ = ["XrvNetwork", "XrvScorer", "note", "score_xrv"]

SIZE = 224
CHUNK = 32
"""Images that go through the network at once: 0.5 GB of activations on a CPU."""
FAMILY = "densenet121-res224-"

SEEN = {
    "nih": "NIH ChestX-ray14",
    "rsna": "the RSNA pneumonia challenge, whose images are NIH's",
    "all": "NIH ChestX-ray14 and others",
}
"""What the models were trained on that may have seen the images judged here, by the end of their names."""
UNSEEN = {"pc": "PadChest", "chex": "CheXpert", "mimic_nb": "MIMIC-CXR", "mimic_ch": "MIMIC-CXR"}


def score_xrv(
    config: Config, name: str, weights_uri: str, split: str, *, use_gpu: bool = False
) -> tuple[ScoreTable, dict[str, str]]:
    """Scores of a split of `config.data.uri` by one of the library's models, and the unreadable images with the reason.

    The findings are those of the dataset's label set that the model has an output for. InputError if the library, the
    model or its weights are not there, or if the dataset's images are not of 224 pixels.
    """
    manifest = Manifest.load(config.data.uri)
    check_pixels(manifest)
    if manifest.size != SIZE:
        raise DataError(
            f"data.uri {storage.shown(manifest.uri)}: found images of {manifest.size} pixels, expected {SIZE} for {name}; ingest "
            f"with data.size {SIZE} to another data.uri"
        )
    wanted = [finding for finding in LABEL_SETS[manifest.label_set] if finding not in config.train.skip_findings]
    outputs = _targets(name)
    findings = tuple(finding for finding in wanted if finding in outputs)
    if not findings:
        raise ConfigError(
            f"--xrv {name}: found no output for any of {', '.join(wanted)}, expected one at least; take another model"
        )
    XrvNetwork(
        name, weights_uri, findings, torch.device("cpu")
    )  # what is wrong with the weights is known before Ray has work

    def to_table(
        rows: pa.Table,
        split: str,
        findings: tuple[str, ...],
        outputs_NK: npt.NDArray[np.float32],
        labels_NK: npt.NDArray[np.bool_],
    ) -> ScoreTable:
        return ScoreTable(
            image_ids=np.array(rows["image_id"].to_pylist()),
            patient_ids=rows["patient_id"].to_numpy().astype(np.int64),
            split=split,
            findings=findings,
            probabilities_NK=outputs_NK.astype(np.float64),
            logits_NK=None,
            labels_NK=labels_NK,
            note=note(name),
        )

    arguments = (name, weights_uri, findings, config.train.threads_per_worker)
    return score_with(XrvScorer, arguments, config, manifest, split, findings, use_gpu=use_gpu, to_table=to_table)


def note(name: str) -> str:
    """What readers of the model's scores must know."""
    end = name.removeprefix(FAMILY)
    if end in UNSEEN:
        seen = f"trained on {UNSEEN[end]}, by its name"
    elif end in SEEN:
        seen = f"trained on {SEEN[end]}, on a split of its own: it may have seen the images judged here"
    else:
        seen = "what it was trained on is not known here: it may have seen the images judged here"
    return (
        f"TorchXRayVision {name}; its scores are rescaled so that the library's operating point is 0.5 (op_norm): they are "
        f"neither logits nor calibrated probabilities; {seen}"
    )


class XrvNetwork:
    """One of the library's models with weights from a state dict, ready to score."""

    def __init__(self, name: str, weights_uri: str, findings: tuple[str, ...], device: torch.device):
        library, targets = _library(), _targets(name)
        points = torch.tensor(library.models.model_urls[name]["op_threshs"])
        with torch.random.fork_rng(devices=[]):  # the library draws weights that are overwritten here
            self.model = library.models.DenseNet(num_classes=len(targets))
        _load(self.model, weights_uri, name, points)
        self.model.op_threshs = points
        self.model.eval().to(device)
        self.device = device
        self.normalize = library.utils.normalize
        self.columns = [targets.index(finding) for finding in findings]

    def score(self, pixels_NSS: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The library's rescaled scores of grey levels, float32 [images, findings]."""
        parts = []
        for start in range(0, len(pixels_NSS), CHUNK):
            images = torch.from_numpy(self.normalize(pixels_NSS[start : start + CHUNK], 255)[:, None])
            with torch.inference_mode():
                parts.append(self.model(images.to(self.device))[:, self.columns].cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.columns)), np.float32)


class XrvScorer:
    """A Ray Data actor: decoded rows to the scores of one of the library's models."""

    def __init__(self, name: str, weights_uri: str, findings: tuple[str, ...], threads: int):
        use_gpu = bool(ray.get_gpu_ids())
        if not use_gpu:
            torch.set_num_threads(threads)
        self.network = XrvNetwork(name, weights_uri, findings, torch.device("cuda" if use_gpu else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        return with_outputs(table, np.ascontiguousarray(self.network.score(pixels_of(table)), dtype="<f4"))


@functools.cache
def _library() -> ModuleType:
    """torchxrayvision, which switches all warnings off when it is imported: here they stay as they were."""
    try:
        with warnings.catch_warnings():
            import torchxrayvision
    except ImportError as error:
        raise InputError(
            f"--xrv: found no package torchxrayvision ({error}), expected the extra xrv; pip install 'cxr-dist[xrv]'"
        ) from None
    return torchxrayvision


def _targets(name: str) -> list[str]:
    """The model's outputs in order, '' for those that it was not trained on."""
    models: dict[str, dict[str, Any]] = _library().models.model_urls
    known = sorted(model for model in models if model.startswith(FAMILY))
    if name not in known:
        raise ConfigError(f"--xrv: found {shown(name)}, expected one of {', '.join(known)}")
    return list(models[name]["labels"])


def _load(model: torch.nn.Module, uri: str, name: str, points: torch.Tensor) -> None:
    """Load a state dict; InputError if it is not this model's."""
    where = storage.shown(uri)
    try:
        found = read_tensors(storage.read_bytes(uri), where)
    except FileNotFoundError:
        raise InputError(
            f"--xrv-weights {where}: found no file, expected a state dict; infra/xrv_state_dict.py makes it"
        ) from None
    except InputError as error:
        raise InputError(
            f"--xrv-weights {error}; infra/xrv_state_dict.py makes a state dict of a release file"
        ) from None
    own = found.pop("op_threshs", None)
    if isinstance(own, torch.Tensor) and not torch.equal(own.nan_to_num(-1.0), points.nan_to_num(-1.0)):
        raise InputError(
            f"--xrv-weights {where}: found the operating points of another model, expected those of {name}"
        )
    try:
        model.load_state_dict(found)
    except (RuntimeError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"--xrv-weights {where}: found no state dict of {name} ({first}); infra/xrv_state_dict.py makes it"
        ) from None
