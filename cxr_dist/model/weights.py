"""The weights a run starts from: ImageNet, a state dict, a TorchXRayVision state dict, a run's checkpoint, or random.

All become one DenseNet121 state dict under torchvision's names, made once on the driver and stored with the run, so
that every rank, every restart and every later evaluation reads the same bytes.
"""

import hashlib
import re

import torch
from torch import Tensor, nn

from cxr_dist import storage
from cxr_dist.errors import InputError
from cxr_dist.model.augment import IMAGENET, XRV
from cxr_dist.model.densenet import DenseNet121
from cxr_dist.model.initial import Initial, first_line, read_tensors, restore, save

__all__ = ["Initial", "calibrate", "initial", "load", "read_tensors", "restore", "save", "sha256"]

StateDict = dict[str, Tensor]


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
                f"model.weights: found no way to download torchvision's DenseNet121 weights ({first_line(error)}); put the file "
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


def sha256(state: StateDict) -> str:
    """Hash of names, types, shapes and values, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
