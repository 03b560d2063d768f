"""Prefix, tail and everything between a batch of grey pixels and a loss or logits, on one device."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cxr_dist.config import ModelConfig
from cxr_dist.model.augment import Normalization, affine_coefficients, to_input
from cxr_dist.model.densenet import Prefix, Tail, build, run_prefix
from cxr_dist.model.weights import Initial

__all__ = ["Network", "masked_loss", "precision_of"]


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` by the device: bf16 where it computes in it, fp16 on older GPUs, fp32 on CPU; other names as they are."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def precision_of(name: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """Type of the weights, and the autocast type or None."""
    autocast = {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    name = resolve_precision(name, device)
    return torch.float64 if name == "fp64" else torch.float32, autocast[name]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network ready to run: uint8 images in, features, logits or scores out."""

    prefix: Prefix
    tail: Tail
    normalization: Normalization
    chunk: int
    device: torch.device
    precision: str
    """What `auto` came to."""
    dtype: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def build(
        cls, initial: Initial, config: ModelConfig, *, num_findings: int, precision: str, device: torch.device
    ) -> "Network":
        """The network of a starting state, on a device."""
        dtype, autocast = precision_of(precision, device)
        prefix, tail = build(initial.state, config, num_findings)
        return cls(
            prefix=prefix.to(device, dtype),
            tail=tail.to(device, dtype),
            normalization=initial.normalization,
            chunk=config.prefix_chunk,
            device=device,
            precision=resolve_precision(precision, device),
            dtype=dtype,
            autocast=autocast,
        )

    def mixed(self) -> torch.autocast:
        """The autocast context of the run's precision; without effect in fp32 and fp64."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def features(self, images_BSS: npt.NDArray[np.uint8], draws_B6: npt.NDArray[np.float32] | None = None) -> Tensor:
        """The prefix's output for grey images, augmented if `draws_B6` is given."""
        images = torch.from_numpy(np.array(images_BSS)).to(self.device, non_blocking=True)
        coefficients = None
        if draws_B6 is not None:
            coefficients = torch.from_numpy(affine_coefficients(draws_B6, images.shape[-1])).to(self.device)
        inputs = to_input(images, self.normalization, dtype=self.dtype, coefficients_B6=coefficients)
        with self.mixed():
            return run_prefix(self.prefix, inputs, self.chunk)

    def stored(self, features_BCHW: Tensor) -> Tensor:
        """Kept features as the tail takes them: on the device, in the type that the prefix would have given."""
        return features_BCHW.to(self.device, self.autocast or self.dtype, non_blocking=True)

    @torch.inference_mode()
    def score(self, images_BSS: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits [B, K] in float32, on the host. Computed in fixed chunks, so an image's score is its own.

        The tail is put in eval mode and left in the mode it was in.
        """
        return self.score_features(self.features(images_BSS))

    @torch.inference_mode()
    def score_features(self, features_BCHW: Tensor) -> npt.NDArray[np.float32]:
        """Logits [B, K] as `score` gives them, from the prefix's output."""
        was_training = self.tail.training
        self.tail.eval()
        logits = []
        for part in features_BCHW.split(self.chunk):
            missing = self.chunk - len(part)
            padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            with self.mixed():
                logits.append(self.tail(padded.contiguous(memory_format=torch.channels_last))[: len(part)].float())
        self.tail.train(was_training)
        return torch.cat(logits).cpu().numpy()


def masked_loss(
    logits_BK: Tensor, labels_BK: Tensor, valid_B: Tensor, pos_weight_K: Tensor | None, *, divisor: float
) -> Tensor:
    """Binary cross-entropy with logits, summed over the valid images and all findings, over `divisor`."""
    wide = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
    losses_BK = functional.binary_cross_entropy_with_logits(
        wide, labels_BK.to(wide.dtype), pos_weight=pos_weight_K, reduction="none"
    )
    return torch.where(valid_B[:, None], losses_BK, 0.0).sum() / divisor
