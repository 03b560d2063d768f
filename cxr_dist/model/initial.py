"""A run's starting state and its file: tensors and plain values, read without unpickling anything.

Apart from `model.weights`, which finds such states in storage, because the logged model carries this module along.
"""

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxr_dist.errors import InputError
from cxr_dist.model.augment import Normalization

__all__ = ["Initial", "first_line", "read_tensors", "restore", "save"]

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


def read_tensors(data: bytes, name: str) -> dict[str, Any]:
    """What torch.save wrote, tensors and plain values only: nothing in the file is executed."""
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for bytes that are not its own
        raise InputError(
            f"{name}: cannot be read as saved tensors ({first_line(error)}); expected a state dict written "
            "by torch.save, without pickled modules"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{name}: found a {type(found).__name__}, expected a state dict")
    return found


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
