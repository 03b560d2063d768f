"""Prefix, tail and everything between a batch of grey pixels and a loss or logits, on one device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cxr_dist.config import ModelConfig
from cxr_dist.model.augment import Normalization, affine_coefficients, to_grey, to_input
from cxr_dist.model.densenet import Prefix, Tail, build, run_prefix
from cxr_dist.model.fold import fold
from cxr_dist.model.graph import graphed
from cxr_dist.model.initial import Initial
from cxr_dist.model.memory import keep_freed_memory
from cxr_dist.model.transfer import Transfer

__all__ = ["Network", "fix_arithmetic", "masked_loss", "precision_of"]

PREFIX_CHUNK = {("cpu", "folded"): 4, ("cpu", "plain"): 16, ("cuda", "folded"): 128, ("cuda", "plain"): 128}
"""Images in a call of the prefix where the config leaves it open. On a CPU the activations of four stay near its cache
(fp32, one core: 24 ms an image, 28 in calls of 16), but torch gives the plain form's 1x1 convolutions of fewer than 16
to slower kernels, and which ones depends on the number of threads; a GPU wants enough to fill it."""
TAIL_CHUNK = {"cpu": 16, "cuda": 128}
"""The same for scoring with the tail, whose feature maps are small."""


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


def fix_arithmetic() -> None:
    """Make this process's GPU arithmetic the same in every run and as wide as it is called, for bitwise resumes.

    cuDNN takes deterministic kernels and does not time them against each other, which would choose others from run to run;
    TF32, ten bits of mantissa under the name of fp32, is off (bf16 and fp16, where speed is wanted, do not use it).
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


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
    transfer: Transfer
    """Host arrays to the device."""
    run: Callable[[Tensor], Tensor]
    """The prefix in the form that is used: from grey levels if it is folded, else from normalised images."""

    @classmethod
    def build(
        cls, initial: Initial, config: ModelConfig, *, num_findings: int, precision: str, device: torch.device
    ) -> "Network":
        """The network of a starting state, on a device, in a process that from now on does what suits that device: keeps
        freed memory for a CPU, computes as `fix_arithmetic` says on a GPU."""
        if device.type == "cuda":
            fix_arithmetic()
        else:
            keep_freed_memory()
        dtype, autocast = precision_of(precision, device)
        prefix, tail = (half.to(device, dtype) for half in build(initial.state, config, num_findings))
        if config.prefix_form == "folded" and len(prefix.features):
            prefix.folded = fold(prefix.features, initial.normalization, autocast or dtype)
        run: Callable[[Tensor], Tensor] = prefix if prefix.folded is None else prefix.folded
        if config.cuda_graph and device.type == "cuda" and prefix.folded is not None:
            run = graphed(run)
        return cls(
            prefix=prefix,
            tail=tail,
            normalization=initial.normalization,
            chunk=config.prefix_chunk or PREFIX_CHUNK[device.type, config.prefix_form],
            device=device,
            precision=resolve_precision(precision, device),
            dtype=dtype,
            autocast=autocast,
            transfer=Transfer(device),
            run=run,
        )

    @classmethod
    def restore(cls, initial: Initial, checkpoint: Mapping[str, Any], device: torch.device) -> "Network":
        """The network of a run's checkpoint, ready to score."""
        network = cls.build(
            initial,
            ModelConfig(**checkpoint["model"]),
            num_findings=len(checkpoint["findings"]),
            precision=checkpoint["precision"],
            device=device,
        )
        network.tail.load_state_dict(checkpoint["tail"])
        return network

    def mixed(self) -> torch.autocast:
        """The autocast context of the run's precision; without effect in fp32 and fp64."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def features(self, images_BSS: npt.NDArray[np.uint8], draws_B6: npt.NDArray[np.float32] | None = None) -> Tensor:
        """The prefix's output for grey images, augmented if `draws_B6` is given."""
        images = self.transfer(images_BSS)
        coefficients = None
        if draws_B6 is not None:
            coefficients = self.transfer(affine_coefficients(draws_B6, images.shape[-1]))
        if self.prefix.folded is not None:
            return run_prefix(self.run, to_grey(images, self.dtype, coefficients), self.chunk)
        inputs = to_input(images, self.normalization, dtype=self.dtype, coefficients_B6=coefficients)
        with self.mixed():
            return run_prefix(self.run, inputs, self.chunk)

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
        chunk = TAIL_CHUNK[self.device.type]
        for part in features_BCHW.split(chunk):
            missing = chunk - len(part)
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
