"""What three choices do to accuracy: recurring views, stored 16-bit features, a large batch. Each over several seeds.

    RAY_ADDRESS=local RAY_AUTH_MODE=disabled python docs/accuracy.py [FOLDER]

Writes accuracy.json and accuracy.png and prints the tables. FOLDER (outputs/accuracy) keeps the drawn release, the
dataset, features and finished runs: a run of this that was cut off goes on where it was; delete it to begin afresh.
"""

import dataclasses
import json
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ray
import torch
from matplotlib.axes import Axes

from cxr_dist.cluster import connect
from cxr_dist.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from cxr_dist.data.features import FeatureShard
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.data.plan import Step, view_of
from cxr_dist.data.resident import ResidentShard
from cxr_dist.data.synth import write_release
from cxr_dist.train.cache import build, look
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.job import TrainJob
from cxr_dist.train.loop import Trainer
from cxr_dist.train.monitor import Monitor
from cxr_dist.train.prefix_pass import ComputeAlone, DecodeShard, Name, Place, Task, WriteShards
from cxr_dist.train.prepare import make_job, prepare_weights
from cxr_dist.train.survey import survey
from cxr_dist.train.validation import Validation

HERE = Path(__file__).parent
SEEDS = range(5)
T_975 = 2.776
"""Student's t for a 95 % interval from five differences (four degrees of freedom)."""
EPOCHS = 8
PATIENTS = 2_000
PREVALENCE = 0.18

Change = dict[str, dict[str, Any]]

FRESH: dict[str, Any] = {"views": EPOCHS}
"""As many recurring views as epochs: none of them recurs."""
BASE = "views 1"
VARIANTS: dict[str, Change] = {
    BASE: {},
    "fp16": {"train": {"features_type": "fp16"}},
    "other rounding": {"train": {"micro_batch": 32}},
    "fp16, other rounding": {"train": {"micro_batch": 32, "features_type": "fp16"}},
    "fresh": {"train": FRESH},
    "16": {"train": {**FRESH, "global_batch": 16}},
    "512, sqrt": {"train": {**FRESH, "global_batch": 512}},
    "views 4": {"train": {"views": 4}},
    "512, linear": {"train": {**FRESH, "global_batch": 512}, "optimizer": {"lr_rule": "linear"}},
    "512, none": {"train": {**FRESH, "global_batch": 512}, "optimizer": {"lr_rule": "none"}},
    "views 2": {"train": {"views": 2}},
    "no augmentation": {"train": {"augment": False}},
    "bf16": {"train": {"features_type": "bf16"}},
}
"""What each variant changes in the base run: one augmented view that recurs, features in fp32, a batch of 64."""
STUDIES: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "Views, against fresh ones": [
        ("4", ["views 4"], ["fresh"]),
        ("2", ["views 2"], ["fresh"]),
        ("1", [BASE], ["fresh"]),
        ("no augmentation", ["no augmentation"], ["fresh"]),
    ],
    "Stored type, against fp32": [
        ("fp16", ["fp16"], [BASE]),
        ("fp32, other rounding", ["other rounding"], [BASE]),
        ("fp16, other rounding", ["fp16, other rounding"], ["other rounding"]),
        ("fp16, mean of both", ["fp16", "fp16, other rounding"], [BASE, "other rounding"]),
        ("bf16", ["bf16"], [BASE]),
    ],
    "Batch and rule, against 16": [
        ("64, sqrt", ["fresh"], ["16"]),
        ("512, sqrt", ["512, sqrt"], ["16"]),
        ("512, linear", ["512, linear"], ["16"]),
        ("512, none", ["512, none"], ["16"]),
    ],
}
"""Rows of each study: a name, its runs, and the runs that they are compared with; where there are two of either, their
mean over the same seed."""
Curves = dict[str, list[list[float]]]
"""Validation mean AUROC of a variant, [seeds][epochs]."""


def base_config(folder: Path, seed: int, change: Change) -> Config:
    train = {
        "seed": seed,
        "epochs": EPOCHS,
        "global_batch": 64,
        "views": 1,
        "features_type": "fp32",
        **change.get("train", {}),
    }
    return Config(
        data=DataConfig(
            release=str(folder / "release"),
            uri=str(folder / "dataset"),
            label_set="nih8",
            size=64,
            row_group=2,
            validation_fraction=0.3,
        ),
        model=ModelConfig(weights="random", **change.get("model", {})),
        optimizer=OptimizerConfig(schedule="cosine", **{"lr_rule": "sqrt", **change.get("optimizer", {})}),
        train=TrainConfig(
            use_gpu="no",
            precision="fp32",
            patience=0,
            storage_path=str(folder / "runs"),
            features_uri=str(folder / "features"),
            **train,
        ),
        run=RunConfig(name=f"run-{uuid.uuid4().hex[:8]}"),
    )


def prepare_dataset(folder: Path) -> Manifest:
    """The synthetic dataset, drawn and ingested unless it is there; the test list is as small as it may be."""
    config = base_config(folder, 0, {})
    write_release(
        config.data.release,
        num_patients=PATIENTS,
        seed=0,
        findings=LABEL_SETS["nih8"],
        prevalence=PREVALENCE,
        test_fraction=0.02,
        size=256,
        processes=1,
    )
    if not (folder / "dataset" / "manifest.json").exists():
        connect(1)
        ingest(config)
        ray.shutdown()
    return Manifest.load(config.data.uri)


class NotingTrainer(Trainer):
    """The trainer, which notes the validation of every epoch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.noted: list[float] = []

    def end_epoch(self, step: Step) -> Validation:
        found = super().end_epoch(step)
        assert found.mean_auroc is not None
        self.noted.append(found.mean_auroc)
        return found


def compute_here(job: TrainJob, places: Mapping[Name, Place], tasks: list[Task]) -> Iterator[tuple[Name, FeatureShard]]:
    """The pass of the prefix, in this process."""
    actor = ComputeAlone(job, tasks, DecodeShard(job, tasks, uuid.uuid4().hex), WriteShards(tasks, places))
    for number in range(len(tasks)):
        for table in actor({"item": np.array([number])}):
            for row in table.to_pylist():
                yield (row["split"], row["view"]), FeatureShard.from_json(json.loads(row["shard"]))


def train(config: Config, manifest: Manifest) -> list[float]:
    """One run from features in memory, as a rank does it; the validation mean AUROC after every epoch."""
    job = make_job(config, manifest, use_gpu=False)
    prepare_weights(job, resumed=False)
    found = survey(job, measure=False)
    job = dataclasses.replace(job, features=build(job, look(job, found), found, compute_here))
    assert job.features is not None
    ranks = Ranks.join(60)
    shard = ResidentShard(sets=job.features, refs=None)
    trainer = NotingTrainer(job, ranks, Monitor(job, ranks), shard=shard, device=torch.device("cpu"))
    trainer.run()
    shutil.rmtree(job.folder)
    return trainer.noted


def run_all(folder: Path, manifest: Manifest) -> None:
    """Every variant with every seed, one after the other."""
    assert all(view_of(epoch, views=EPOCHS, augment=True) == 1 + epoch for epoch in range(EPOCHS))
    (folder / "results").mkdir(exist_ok=True)
    for name, change in VARIANTS.items():
        for seed in SEEDS:
            path = result_path(folder, name, seed)
            if path.exists():
                continue
            began = time.process_time()
            found = train(base_config(folder, seed, change), manifest)
            path.write_text(json.dumps(found))
            aurocs = " ".join(f"{value:.3f}" for value in found)
            print(
                f"{name}, seed {seed}: {aurocs}  ({time.process_time() - began:.0f} CPU s)", file=sys.stderr, flush=True
            )


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "results" / f"{name}-{seed}.json"


def finished(folder: Path) -> Curves:
    """The variants that have been run with every seed."""
    paths = {name: [result_path(folder, name, seed) for seed in SEEDS] for name in VARIANTS}
    return {
        name: [json.loads(path.read_text()) for path in of]
        for name, of in paths.items()
        if all(path.exists() for path in of)
    }


def rows_of(study: str, curves: Curves) -> list[tuple[str, list[str], list[str]]]:
    """The rows of a study whose runs are all there."""
    return [row for row in STUDIES[study] if set(row[1] + row[2]) <= set(curves)]


def last(curves: list[list[float]]) -> np.ndarray:
    return np.array([curve[-1] for curve in curves])


def best(curves: list[list[float]]) -> np.ndarray:
    return np.array([max(curve) for curve in curves])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, and half of its 95 % t-interval."""
    return float(differences.mean()), T_975 * float(differences.std(ddof=1)) / math.sqrt(len(differences))


def of_seeds(curves: Curves, names: list[str], pick: Callable[[list[list[float]]], np.ndarray]) -> np.ndarray:
    return np.mean([pick(curves[name]) for name in names], axis=0)


def print_table(study: str, curves: Curves) -> None:
    print(f"\n### {study}\n")
    print("| | best epoch | last epoch | best: difference, 95 % interval | last: difference, 95 % interval |")
    print("|---|---:|---:|---:|---:|")
    for place, (name, runs, references) in enumerate(rows_of(study, curves)):
        if place == 0:
            values = [of_seeds(curves, references, pick) for pick in (best, last)]
            print("| reference | " + " | ".join(f"{of.mean():.4f} ± {of.std(ddof=1):.4f}" for of in values) + " | | |")
        cells = [f"{of_seeds(curves, runs, pick).mean():.4f}" for pick in (best, last)]
        for pick in (best, last):
            mean, half = interval(of_seeds(curves, runs, pick) - of_seeds(curves, references, pick))
            cells.append(f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})")
        print(f"| {name} | {' | '.join(cells)} |")


def plot_study(axes: Axes, study: str, curves: Curves) -> None:
    """Differences of the last epoch: a dot a seed, the mean and its interval."""
    rows = rows_of(study, curves)
    for place, (_, runs, references) in enumerate(rows):
        differences = of_seeds(curves, runs, last) - of_seeds(curves, references, last)
        mean, half = interval(differences)
        axes.plot(differences, np.full(len(differences), place) + 0.18, "o", color="0.6", markersize=4)
        axes.errorbar(mean, place - 0.08, xerr=half, fmt="D", color="#0072b2", capsize=4, markersize=6)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.axvspan(-0.005, 0.005, color="0.93", zorder=0)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(study, fontsize=10)
    axes.set_xlabel("difference of val mean AUROC, last epoch")
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(axes: Axes, curves: Curves) -> None:
    styles = {
        "fresh": ("#0072b2", "-"),
        "views 4": ("#009e73", "-."),
        BASE: ("#d55e00", "--"),
        "no augmentation": ("#444444", ":"),
    }
    for name in (name for name in styles if name in curves):
        color, line = styles[name]
        axes.plot(range(1, EPOCHS + 1), np.mean(curves[name], axis=0), line, color=color, label=name)
    axes.set(xlabel="epoch", ylabel="val mean AUROC, mean of 5 seeds")
    axes.set_title("Learning curves, batch 64", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def report(folder: Path) -> None:
    """Tables, accuracy.png and accuracy.json of the finished runs."""
    curves = finished(folder)
    for study in STUDIES:
        print_table(study, curves)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    plot_curves(axes[0, 0], curves)
    for study, axis in zip(STUDIES, axes.flat[1:], strict=True):
        plot_study(axis, study, curves)
    figure.savefig(HERE / "accuracy.png", dpi=110)
    plt.close(figure)
    rounded = {name: [[round(value, 5) for value in curve] for curve in of] for name, of in curves.items()}
    found = {"changes": {name: VARIANTS[name] for name in curves}, "val_mean_auroc": rounded}
    (HERE / "accuracy.json").write_text(json.dumps(found) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/accuracy").absolute()
    run_all(folder, prepare_dataset(folder))
    report(folder)


if __name__ == "__main__":
    main()
