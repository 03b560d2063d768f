"""Stage `step`: what a training step costs on the device, part by part, beside the rate of a plain matrix product there.

Weights are random and images are noise, so values mean nothing; times do not depend on them. On a CPU it is the
notebooks' batch on the threads of one rank, on a GPU a batch that fills it. FLOPs are those of the convolutions in the
form that is measured (a folded prefix has fewer); the backward of the tail has twice those of its forward.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cxr_dist.bench.device import Clock, finished, flops, matrix_rate
from cxr_dist.bench.measure import in_turns
from cxr_dist.bench.options import BenchOptions
from cxr_dist.bench.report import Row
from cxr_dist.data.plan import NUM_DRAWS
from cxr_dist.model import weights
from cxr_dist.model.augment import affine_coefficients, to_grey, to_input
from cxr_dist.model.batchnorm import group_norms, update_running_statistics
from cxr_dist.model.densenet import DenseBlock
from cxr_dist.model.graph import graphed
from cxr_dist.model.network import Network, masked_loss
from cxr_dist.train.optimize import make_optimizer

__all__ = ["run"]

STAGE = "step"
BATCH = {"cpu": 16, "cuda": 512}
FINDINGS = 14
PRECISIONS = ("fp32", "bf16")
PLAIN, FOLDED, GRAPH = "prefix, layer by layer", "prefix, folded", "prefix, folded, one CUDA graph"
TAIL_PLAIN, TAIL, SCORE = "tail step, layer by layer", "tail step", "tail, scoring"
UNCACHED, CACHED = "whole step", "whole step from kept features"
FIRST = "first convolution"
COLUMNS = {UNCACHED: "whole step"}
"""Name of the ratio over a row, where it is not `layer by layer`."""


def run(options: BenchOptions) -> list[Row]:
    """The parts of a step in both forms, whole steps, and the limit, in each precision."""
    config = options.config
    device = torch.device("cuda" if config.train.use_gpu != "no" and torch.cuda.is_available() else "cpu")
    group = config.model.bn_group
    batch = -(-options.count(BATCH[device.type]) // group) * group
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(config.train.threads_per_worker)
    try:
        return [
            row
            for precision in PRECISIONS
            for row in _rows(Parts.make(options, precision, device, batch), options.repeats)
        ]
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The network as it runs and layer by layer, and what a step needs."""

    network: Network
    plain: Network
    optimizers: dict[str, torch.optim.Optimizer]
    images_BSS: npt.NDArray[np.uint8]
    draws_B6: npt.NDArray[np.float32]
    labels_BK: Tensor
    valid_B: Tensor
    kept_BCHW: Tensor
    """Features as they are kept, on the host."""

    @classmethod
    def make(cls, options: BenchOptions, precision: str, device: torch.device, batch: int) -> "Parts":
        random = np.random.default_rng(options.seed)
        size = options.config.data.size
        images = random.integers(0, 256, (batch, size, size), dtype=np.uint8)
        start = weights.initial("random", num_findings=FINDINGS, seed=options.seed)
        few = to_input(torch.from_numpy(images[:4]), start.normalization)
        start = dataclasses.replace(start, state=weights.calibrate(start.state, few))

        def build(**changes: Any) -> Network:
            model = dataclasses.replace(options.config.model, prefix_chunk=0, **changes)
            return Network.build(start, model, num_findings=FINDINGS, precision=precision, device=device)

        network, plain = build(prefix_form="folded"), build(prefix_form="plain")
        for module in plain.tail.modules():
            if isinstance(module, DenseBlock):
                module.as_one = False
        optimizers = {}
        for name, one in (("network", network), ("plain", plain)):
            trained = [parameter for parameter in one.tail.train().parameters() if parameter.requires_grad]
            optimizers[name] = make_optimizer(options.config.optimizer, trained, batch)
        return cls(
            network=network,
            plain=plain,
            optimizers=optimizers,
            images_BSS=images,
            draws_B6=random.random((batch, NUM_DRAWS), dtype=np.float32),
            labels_BK=torch.from_numpy(random.integers(0, 2, (batch, FINDINGS)).astype(np.float32)).to(device),
            valid_B=torch.ones(batch, dtype=torch.bool, device=device),
            kept_BCHW=network.features(images).to(torch.float16).cpu(),
        )

    def train(self, features_BCHW: Tensor, *, plain: bool = False, clock: Clock | None = None) -> None:
        """A step of the tail, as the training loop takes it."""
        network = self.plain if plain else self.network
        optimizer = self.optimizers["plain" if plain else "network"]
        clock = clock or Clock(network.device)
        with network.mixed():
            logits = network.tail(features_BCHW)
        loss = masked_loss(logits, self.labels_BK, self.valid_B, None, divisor=float(self.labels_BK.numel()))
        clock.mark("tail forward")
        loss.backward()
        clock.mark("tail backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_running_statistics(group_norms(network.tail))
        clock.mark("optimizer")

    def phases(self, repeats: int) -> dict[str, float]:
        """Milliseconds of each phase of a whole step, the least of the repeats; of the device's time on a GPU."""
        network, found = self.network, []
        for _ in range(1 + repeats):
            clock = Clock(network.device)
            images = network.transfer(self.images_BSS)
            coefficients = network.transfer(affine_coefficients(self.draws_B6, images.shape[-1]))
            clock.mark("transfer")
            to_grey(images, network.dtype, coefficients)
            clock.mark("augmentation")
            features = network.features(self.images_BSS)
            clock.mark("prefix")
            self.train(features, clock=clock)
            found.append(clock.ms())
        return {name: min(one[name] for one in found[1:]) for name in found[0]}


def _rows(parts: Parts, repeats: int) -> list[Row]:
    network, plain, images, draws = parts.network, parts.plain, parts.images_BSS, parts.draws_B6
    device, batch = network.device, len(images)
    features = network.features(images)
    bases: dict[str, str] = {FOLDED: PLAIN, TAIL: TAIL_PLAIN, CACHED: UNCACHED}
    work: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain.features(images),
        FOLDED: lambda: network.features(images),
        TAIL_PLAIN: lambda: parts.train(features, plain=True),
        TAIL: lambda: parts.train(features),
        SCORE: lambda: network.score_features(features),
        UNCACHED: lambda: parts.train(network.features(images, draws)),
        CACHED: lambda: parts.train(network.stored(parts.kept_BCHW)),
    }
    for name, (by_layer, folded) in _pieces(parts).items():
        work |= {f"{name}, layer by layer": by_layer, f"{name}, folded": folded}
        bases[f"{name}, folded"] = f"{name}, layer by layer"
    if device.type == "cuda":
        captured = dataclasses.replace(network, run=graphed(network.run))
        work[GRAPH], bases[GRAPH] = (lambda: captured.features(images)), PLAIN
    on_cpu = device.type == "cpu"
    found = in_turns({name: finished(one, device, batch) for name, one in work.items()}, repeats, by_cpu=on_cpu)
    # of a CPU's own time, which other work there does not change; of the clock on a GPU
    speed = {name: one.images_per_core_s if on_cpu else one.images_per_s for name, one in found.items()}
    rate, cost = matrix_rate(device, network.autocast or network.dtype, repeats), _flops_of(plain, images)
    rows = []
    for name, timing in found.items():
        extra: dict[str, float | str] = {} if on_cpu else {"ms/image": 1e3 / speed[name]}
        if name in cost:
            achieved = cost[name] * speed[name]
            extra |= {"GFLOP/image": cost[name] / 1e9, "GFLOP/s": achieved / 1e9, "of matrix rate": achieved / rate}
        if name == UNCACHED:
            extra |= {f"{phase} ms/image": ms / batch for phase, ms in parts.phases(repeats).items()}
        base = bases.get(name)
        rows.append(
            Row(
                stage=STAGE,
                name=f"{name}, {network.precision}",
                images=batch,
                images_per_s=speed[name],
                ratios={COLUMNS.get(base, "layer by layer"): speed[name] / speed[base]} if base else {},
                cpu_ms_per_image=timing.cpu_ms_per_image,
                extra=extra,
            )
        )
    name = f"limit: matrix product, {network.precision}"
    return [*rows, Row(stage=STAGE, name=name, images=0, extra={"GFLOP/s": rate / 1e9})]


def _pieces(parts: Parts) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What folding changes, piece by piece, layer by layer and folded, each in the chunks it runs in."""
    network, plain, folded = parts.network, parts.plain, parts.network.prefix.folded
    if folded is None or network.autocast is not None:
        return {}
    modules = dict(plain.prefix.features.named_children())
    first = nn.Sequential(*(modules.pop(name) for name in ("conv0", "norm0", "relu0", "pool0")))
    images = torch.from_numpy(parts.images_BSS).to(network.device)
    found = {}
    with torch.inference_mode():
        value = to_input(images, plain.normalization).contiguous(memory_format=torch.channels_last)
        given: Tensor = to_grey(images, network.dtype)
        for name, by_layer, part in zip((FIRST, *modules), (first, *modules.values()), folded.parts, strict=True):
            found[name] = _in_chunks(by_layer, value, plain.chunk), _in_chunks(part, given, network.chunk)
            given = value = by_layer(value)
    return found


def _in_chunks(function: Callable[[Tensor], Tensor], batch: Tensor, chunk: int) -> Callable[[], object]:
    @torch.inference_mode()
    def work() -> None:
        for part in batch.split(chunk):
            function(part)

    return work


def _flops_of(plain: Network, images_BSS: npt.NDArray[np.uint8]) -> dict[str, float]:
    """FLOPs an image of what is measured."""
    image = to_input(torch.from_numpy(images_BSS[:1]).to(plain.device), plain.normalization, dtype=plain.dtype)
    by_layer = flops(plain.prefix, image)
    with torch.inference_mode():
        tail = sum(flops(plain.tail.eval(), plain.prefix(image)).values())
    plain.tail.train()
    whole = sum(by_layer.values())
    folded = whole
    for name, value in by_layer.items():
        if name.endswith("conv0"):
            folded -= value * (1 - 1 / len(plain.normalization.scale))  # one channel
        elif "transition" in name:
            folded -= value * 3 / 4  # after the pooling
    of_prefix, of_tail = {PLAIN: whole, FOLDED: folded, GRAPH: folded}, {TAIL_PLAIN: 3 * tail, TAIL: 3 * tail}
    return {**of_prefix, **of_tail, SCORE: tail, UNCACHED: folded + 3 * tail, CACHED: 3 * tail}
