"""The weights a run starts from: ImageNet, a state dict, a TorchXRayVision state dict, a run's checkpoint, or random.

All become one DenseNet121 state dict under torchvision's names, made once on the driver and stored with the run, so
that every rank, every restart and every later evaluation reads the same bytes.
"""

import hashlib
import io
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cxr_dist import storage
from cxr_dist.errors import InputError
from cxr_dist.model.augment import IMAGENET, XRV, Normalization
from cxr_dist.model.densenet import DenseNet121

__all__ = ["Initial", "calibrate", "initial", "load", "restore", "save", "sha256"]

StateDict = dict[str, Tensor]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Initial:
    """A whole model's starting state, and the normalisation that its weights expect."""

    state: StateDict
    normalization: Normalization
    origin: str
    """Where the weights came from."""
    random: bool = False
    """Whether batch-norm statistics still have to be calibrated on images."""


def initial(weights: str, *, num_findings: int, seed: int) -> Initial:
    """The starting state that `model.weights` names; InputError if it is not there or not a DenseNet121."""
    if weights == "random":
        return Initial(state=_random(num_findings, seed), normalization=IMAGENET, origin="random", random=True)
    if weights == "imagenet":
        import torchvision  # a second of imports that nothing else needs

        try:
            # the hash is that of the download: a file that lies in torch's cache already is not held to it
            state = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.get_state_dict(
                check_hash=True, progress=False, weights_only=True
            )
        except Exception as error:  # noqa: BLE001 - no network, another hash, or no saved tensors in torch's cache
            raise InputError(
                f"model.weights: found no way to download torchvision's DenseNet121 weights ({_first_line(error)}); put the file "
                "where this machine can read it and give its URI"
            ) from None
        return Initial(state=_adapt(state, weights, num_findings, seed), normalization=IMAGENET, origin=weights)
    state = load(weights)
    grey = "features.conv0.weight" in state and state["features.conv0.weight"].shape[1] == 1
    normalization = XRV if grey else IMAGENET
    return Initial(state=_adapt(state, weights, num_findings, seed), normalization=normalization, origin=weights)


def _random(num_findings: int, seed: int) -> StateDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DenseNet121(num_findings).state_dict()


_OLD_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def _adapt(state: StateDict, origin: str, num_findings: int, seed: int) -> StateDict:
    """The features under torchvision's names; the classifier if it fits, else a seeded new one."""
    renamed = {_OLD_NAME.sub(r"\1\2", name.removeprefix("module.")): value for name, value in state.items()}
    fresh = _random(num_findings, seed)
    missing = sorted(name for name in fresh if name.startswith("features.") and name not in renamed)
    if missing:
        raise InputError(
            f"model.weights {origin}: found no {missing[0]} ({len(missing)} of DenseNet121's tensors missing), "
            "expected a DenseNet121 state dict under torchvision's names"
        )
    adapted = {}
    for name, value in fresh.items():
        found = renamed.get(name)
        if found is None or (name.startswith("classifier.") and found.shape != value.shape):
            found = value
        grey_input = name == "features.conv0.weight" and found.shape == (64, 1, 7, 7)
        if found.shape != value.shape and not grey_input:
            raise InputError(
                f"model.weights {origin}: found {name} of shape {tuple(found.shape)}, expected {tuple(value.shape)} "
                "as in DenseNet121"
            )
        adapted[name] = found
    return adapted


def calibrate(state: StateDict, images_BCSS: Tensor) -> StateDict:
    """Give random weights batch-norm statistics that fit the images: those of one pass, layer by layer.

    Without them a random network's features grow or vanish with depth and the head starts from nothing.
    """
    model = DenseNet121(len(state["classifier.bias"]))
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.features(images_BCSS)
    return {name: value.clone() for name, value in model.state_dict().items()}


def save(initial_state: Initial) -> bytes:
    """The starting state as a file's bytes; `restore` reads it."""
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "origin": initial_state.origin,
            "scale": initial_state.normalization.scale,
            "shift": initial_state.normalization.shift,
            "state": initial_state.state,
        },
        buffer,
    )
    return buffer.getvalue()


def restore(data: bytes, name: str) -> Initial:
    """The starting state from bytes that `save` made."""
    found = read_tensors(data, name)
    if found.get("format") != FORMAT:
        raise InputError(
            f"{name}: found format {found.get('format')!r}, expected {FORMAT}; use the version that wrote it"
        )
    normalization = Normalization(tuple(found["scale"]), tuple(found["shift"]))
    return Initial(state=found["state"], normalization=normalization, origin=found["origin"])


def load(uri: str) -> StateDict:
    """A state dict from a URI; a dict that holds one under `state_dict` or `state` is opened, a run's checkpoint is
    put together with the frozen prefix that its run keeps."""
    try:
        found = read_tensors(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        raise InputError(f"model.weights {storage.shown(uri)}: found no file; give imagenet, random or a URI") from None
    except OSError as error:
        raise InputError(
            f"model.weights {storage.shown(uri)}: cannot be read ({error}); give imagenet, random or the URI of a file"
        ) from error
    if "tail" in found:
        where = storage.join(uri.rpartition("/checkpoints/")[0], "initial.pt")
        try:
            start = restore(storage.read_bytes(where), where)
        except FileNotFoundError:
            raise InputError(
                f"model.weights {storage.shown(where)}: found no file, expected the run's starting weights beside its "
                "checkpoints; give the URI of a checkpoint in its run's folder"
            ) from None
        return {**start.state, **found["tail"]}
    for key in ("state_dict", "state"):
        if isinstance(found.get(key), dict):
            found = found[key]
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"model.weights {uri}: found no tensors, expected a state dict saved with torch.save")
    return state


def read_tensors(data: bytes, name: str) -> dict:
    """What torch.save wrote, tensors and plain values only: nothing in the file is executed."""
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for bytes that are not its own
        raise InputError(
            f"{name}: cannot be read as saved tensors ({_first_line(error)}); expected a state dict written "
            "by torch.save, without pickled modules"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{name}: found a {type(found).__name__}, expected a state dict")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def sha256(state: StateDict) -> str:
    """Hash of names, types, shapes and values, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
