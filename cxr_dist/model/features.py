"""Between the prefix's output and its stored bytes, and the key of all that decides them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr_dist.config import ModelConfig
from cxr_dist.data.features import FeatureSet
from cxr_dist.data.plan import Int64
from cxr_dist.model.network import Network
from cxr_dist.model.weights import sha256

__all__ = ["TYPES", "DeviceRows", "from_bytes", "key_inputs", "to_bytes"]

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def to_bytes(features_BCHW: Tensor, kind: str) -> npt.NDArray[np.uint8]:
    """Features as they are stored: height, width, channel, [B, H * W * C * bytes of a value].

    ValueError with the number of the first image that has a value which `kind` cannot hold.
    """
    stored = features_BCHW.detach().to(TYPES[kind]).permute(0, 2, 3, 1).contiguous()
    finite = torch.isfinite(stored).flatten(1).all(1)
    if not finite.all():
        raise ValueError(int((~finite).nonzero()[0]))
    return stored.flatten(1).view(torch.uint8).cpu().numpy()


def from_bytes(stored: npt.NDArray[np.uint8] | Tensor, shape_HWC: Sequence[int], kind: str) -> Tensor:
    """Features [B, C, H, W] in channels-last layout from their stored bytes; a view where the bytes allow it."""
    if isinstance(stored, np.ndarray):
        stored = torch.from_numpy(stored if stored.flags.writeable else stored.copy())
    return stored.view(TYPES[kind]).view(-1, *shape_HWC).permute(0, 3, 1, 2)


def key_inputs(network: Network, config: ModelConfig) -> dict[str, Any]:
    """What the network adds to the key of features: all in it that can change a value. Plain JSON values."""
    on_cpu = network.device.type == "cpu"
    return {
        "weights_sha256": sha256(network.prefix.state_dict()),
        "boundary": config.trainable,
        "normalization": [list(network.normalization.scale), list(network.normalization.shift)],
        "precision": network.precision,
        "form": network.prefix.form,
        "chunk": network.chunk,
        "device": network.device.type,
        "tf32": not on_cpu and torch.backends.cudnn.allow_tf32,
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


class DeviceRows:
    """Stored features of a set in the device's memory, as one matrix."""

    def __init__(self, found: FeatureSet, device: torch.device):
        self.matrix = torch.empty((found.num_rows, found.row_bytes), dtype=torch.uint8, device=device)
        self.filled = 0

    def add(self, shard: npt.NDArray[np.uint8]) -> None:
        """Copy the next shard, [rows, row_bytes], to the device."""
        self.matrix[self.filled : self.filled + len(shard)] = torch.from_numpy(shard.copy())
        self.filled += len(shard)

    def take(self, rows_B: Int64) -> Tensor:
        """Rows [B, row_bytes] on the device; zeros for padding (-1)."""
        rows = torch.from_numpy(rows_B).to(self.matrix.device, non_blocking=True)
        return torch.where(rows[:, None] >= 0, self.matrix[rows.clamp(min=0)], 0)
