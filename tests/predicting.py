"""Models and folders of images to predict with, and a job that is killed in the middle."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from cxr_dist import storage
from cxr_dist.config import ModelConfig
from cxr_dist.data.images import PIXELS_VERSION, to_grey
from cxr_dist.evaluate import scores
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.model import weights
from cxr_dist.model.augment import to_input
from cxr_dist.model.network import Network
from cxr_dist.train.checkpoint import Checkpoints
from tests.conftest import ROOT
from tests.releases import noise, png

SIZE = 32
SIDE = 48
NAMES = ("Effusion", "Mass", "Hernia")

KILLED = """
import os, signal, sys
import ray
from cxr_dist.cli import parse
from cxr_dist.predict import run

after, model, images, out = int(sys.argv[1]), *sys.argv[2:]
config, _ = parse("", None, [])
ray.init(address=os.environ["TEST_RAY"], log_to_driver=False)
parts = run._Work._parts
stored = [0]

def until(self, *arguments):
    for rows in parts(self, *arguments):
        stored[0] += 1
        if stored[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield rows

run._Work._parts = until
run.predict(config, model=model, images=images, out=out, part_images=8)
"""


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    manifest_sha256: str = "0" * 64,
    validation: ScoreTable | None = None,
    tail_bias: float | None = None,
    **changes: object,
) -> str:
    """A run's folder with one checkpoint of random weights that suit `write_images`; its URI.

    `changes` are of the checkpoint's state, `tail_bias` that of every finding.
    """
    torch.set_num_threads(1)
    fresh = weights.initial("random", num_findings=len(NAMES), seed=seed)
    images = torch.from_numpy(np.stack([to_grey(png(noise(row, SIDE)), SIZE) for row in range(32)]))
    state = weights.calibrate(fresh.state, to_input(images, fresh.normalization))
    initial = weights.save(dataclasses.replace(fresh, state=state))
    storage.put_atomic(str(folder / "initial.pt"), initial)
    config = ModelConfig(weights="random", prefix_chunk=8)
    network = Network.build(
        weights.restore(initial, "initial"),
        config,
        num_findings=len(NAMES),
        precision="fp32",
        device=torch.device("cpu"),
    )
    if tail_bias is not None:
        torch.nn.init.constant_(network.tail.classifier.bias, tail_bias)
    state = {
        "tail": network.tail.state_dict(),
        "findings": list(NAMES),
        "model": dataclasses.asdict(config),
        "size": SIZE,
        "precision": "fp32",
        "pixels_version": PIXELS_VERSION,
        "manifest_sha256": manifest_sha256,
        **changes,
    }
    encoded = None if validation is None else scores.encoded(validation)
    Checkpoints(str(folder)).save(state, index=10, epoch=0, score=0.5, finished=True, scores=encoded)
    return str(folder)


def write_images(folder: Path, count: int, first: int = 0) -> dict[str, bytes]:
    """Noise radiographs in two nested folders; path below `folder` to bytes."""
    files = {f"{'ab'[row % 2]}/{row:04d}.png": png(noise(row, SIDE)) for row in range(first, first + count)}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def kill_after(cluster: str, parts: int, model: str, images: Path, out: Path) -> None:
    """A prediction in parts of 8 whose driver is killed when it knows of so many parts."""
    env = {**os.environ, "TEST_RAY": cluster, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(parts), model, str(images), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
