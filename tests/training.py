"""Training runs without Ray: a dataset in memory, the real loop, and gloo ranks as plain processes."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import traceback
import uuid
from collections.abc import Collection, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from cxr_dist import storage
from cxr_dist.config import Config, DataConfig, EvaluateConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from cxr_dist.data.decode import Decoder, StreamSpec
from cxr_dist.data.features import FeatureShard
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import Plan, Split, Step
from cxr_dist.data.resident import ResidentShard
from cxr_dist.data.stream import Batch, EmptyShard
from cxr_dist.errors import RunFaultError
from cxr_dist.model import weights
from cxr_dist.model.augment import to_input
from cxr_dist.train import validation
from cxr_dist.train.cache import build, look
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.job import TrainJob
from cxr_dist.train.loop import Trainer
from cxr_dist.train.monitor import Monitor
from cxr_dist.train.notice import Notice, Wish
from cxr_dist.train.prefix_pass import ComputeAlone, DecodeShard, Name, Place, Task, WriteShards
from cxr_dist.train.survey import survey
from cxr_dist.train.validation import Validation
from tests.releases import noise, png

SIZE = 32
NAMES = ("Effusion", "Mass", "Hernia")
COLUMNS = tuple(FINDINGS.index(name) for name in NAMES)


@dataclasses.dataclass(frozen=True)
class MemoryRows:
    """A split in memory: noise images whose brightness follows the findings; some of them may be unreadable."""

    split: str
    num_rows: int
    row_group: int
    encoding: str = "pixels"
    unreadable: frozenset[int] = frozenset()

    def image_id(self, row: int) -> str:
        return f"{self.split}{row:04d}.png"

    def findings(self, row: int) -> list[bool]:
        return (np.random.default_rng(row + len(self.split) * 10_000).random(len(FINDINGS)) < 0.4).tolist()

    def pixels(self, row: int) -> np.ndarray:
        bright = 12 * sum(self.findings(row)[column] for column in COLUMNS)
        return (noise(row, SIZE) // 2 + bright).astype(np.uint8)

    def image(self, row: int) -> bytes:
        if row in self.unreadable:
            return b"not an image"
        return self.pixels(row).tobytes() if self.encoding == "pixels" else png(self.pixels(row))

    def read(self, groups: np.ndarray) -> pa.Table:
        rows = [int(row) for row in Split(num_rows=self.num_rows, row_group=self.row_group).rows(groups) if row >= 0]
        kind = pa.binary(SIZE * SIZE) if self.encoding == "pixels" else pa.binary()
        return pa.table(
            {
                "image_id": [self.image_id(row) for row in rows],
                "findings": pa.array([self.findings(row) for row in rows], pa.list_(pa.bool_(), len(FINDINGS))),
                "image": pa.array([self.image(row) for row in rows], kind),
            }
        )

    def table(self) -> pa.Table:
        """The manifest's rows of this split."""
        rows = range(self.num_rows)
        return pa.table({"image_id": [self.image_id(row) for row in rows], "patient_id": [row // 2 for row in rows]})


def make_initial(seed: int = 0) -> bytes:
    """A run's `initial.pt`: random weights, calibrated on a few images of the train split."""
    torch.set_num_threads(1)
    fresh = weights.initial("random", num_findings=len(NAMES), seed=seed)
    source = MemoryRows("train", 32, 4)
    images = torch.from_numpy(np.stack([source.pixels(row) for row in range(32)]))
    state = weights.calibrate(fresh.state, to_input(images, fresh.normalization))
    return weights.save(dataclasses.replace(fresh, state=state))


def make_job(
    folder: str | Path,
    initial: bytes | None = None,
    *,
    train_rows: int = 51,
    validation_rows: int = 18,
    row_group: int = 4,
    encoding: str = "pixels",
    unreadable: frozenset[int] = frozenset(),
    max_corrupt: float = 0.0,
    pos_weight: tuple[float, ...] | None = (1.5, 0.5, 2.0),
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **train: Any,
) -> TrainJob:
    """A run over in-memory splits, its starting weights stored in its folder if they are given."""
    train = {"global_batch": 24, "epochs": 3, "patience": 0, "precision": "fp32", **train}
    config = Config(
        data=DataConfig(uri="memory", size=SIZE, row_group=row_group, max_corrupt=max_corrupt),
        model=ModelConfig(weights="random", **{"bn_group": 4, "prefix_chunk": 8, **(model or {})}),
        optimizer=OptimizerConfig(**(optimizer or {})),
        train=TrainConfig(**{"features_uri": str(folder) + "-features", **train}),
        evaluate=EvaluateConfig(bootstrap=0),
        run=RunConfig(name="test"),
    )
    where = str(folder)
    if initial is not None and not storage.exists(storage.join(where, "initial.pt")):
        storage.put_atomic(storage.join(where, "initial.pt"), initial)
    return TrainJob(
        config=config,
        plan=Plan(
            train=Split(num_rows=train_rows, row_group=row_group),
            validation=Split(num_rows=validation_rows, row_group=row_group),
            seed=config.train.seed,
            epochs=config.train.epochs,
            global_batch=config.train.global_batch,
        ),
        findings=NAMES,
        columns=COLUMNS,
        size=SIZE,
        encoding=encoding,
        train=MemoryRows("train", train_rows, row_group, encoding, unreadable),
        validation=MemoryRows("validation", validation_rows, row_group, encoding),
        pos_weight=pos_weight,
        folder=where,
        manifest_sha256="0" * 64,
        pixels_version="grey-bilinear-1",
        tracking_uri="sqlite:///unused.db",
        run_id="run",
        use_gpu=False,
    )


def with_features(job: TrainJob) -> TrainJob:
    """The job with its features computed in this process and kept in its folder."""

    def compute(job: TrainJob, places: Mapping[Name, Place], tasks: list[Task]) -> Iterator[tuple[Name, FeatureShard]]:
        actor = ComputeAlone(job, tasks, DecodeShard(job, tasks, uuid.uuid4().hex), WriteShards(tasks, places))
        for number in range(len(tasks)):
            for table in actor({"item": np.array([number])}):
                for row in table.to_pylist():
                    yield (row["split"], row["view"]), FeatureShard.from_json(json.loads(row["shard"]))

    found = survey(job, measure=False)
    return dataclasses.replace(job, features=build(job, look(job, found), found, compute))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The blocks of one rank, made as they are asked for, as Ray's splitter would deal them."""

    spec: StreamSpec
    rank: int

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        decoder = Decoder(self.spec)
        for number in range(self.rank, self.spec.num_tasks, self.spec.world_size):
            yield decoder.block(number)


class InterruptionError(Exception):
    """The machine went away."""


class WatchedTrainer(Trainer):
    """The real trainer, which notes each step's loss and the first step's summed gradients, and can be interrupted."""

    crash_at: int | None = None
    """Step of the run at which this rank dies: before it is trained on, or after it is validated."""
    stop_after: int | None = None
    """Epoch after whose end this rank stops."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.loss_at: dict[int, float] = {}
        self.reports: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.learner.optimizer.register_step_pre_hook(self._note_gradients)

    def _note_gradients(self, *_: Any) -> None:
        if not self.gradients:
            named = self.learner.network.tail.named_parameters()
            self.gradients = {name: value.grad.clone() for name, value in named if value.grad is not None}

    def train_step(self, batch: Batch) -> torch.Tensor:
        if batch.step.index == self.crash_at:
            raise InterruptionError
        loss = super().train_step(batch)
        self.losses.append(float(loss))
        self.loss_at[batch.step.index] = float(loss)
        return loss

    def checkpoint_in_epoch(self, step: Step) -> None:
        super().checkpoint_in_epoch(step)
        self.saver.wait()  # so that none is left out for want of time
        if step.kind == "validation" and step.index == self.crash_at:
            raise InterruptionError

    def end_epoch(self, step: Step) -> Validation:
        found = super().end_epoch(step)
        self.saver.wait()
        self.reports.append({"epoch": step.epoch, "val_loss": found.loss, "val_auroc": found.mean_auroc})
        if step.epoch == self.stop_after:
            raise InterruptionError
        return found


class MemoryManifest:
    """Stands in for the manifest where the trainer writes the scores of a new best epoch."""

    source: MemoryRows

    @classmethod
    def load(cls, uri: str) -> "MemoryManifest":
        return cls()

    def rows(self, split: str) -> pa.Table:
        return self.source.table()


@contextlib.contextmanager
def memory_manifest(job: TrainJob) -> Iterator[None]:
    """Inside, validation scores are written with the rows of the job's in-memory split."""
    MemoryManifest.source = job.validation  # type: ignore[assignment]
    with mock.patch.object(validation, "Manifest", MemoryManifest):
        yield


class WatchedMonitor(Monitor):
    """The real monitor, which notes what losses it was to log."""

    def __init__(self, job: TrainJob, ranks: Ranks):
        super().__init__(job, ranks)
        self.logged_losses: dict[int, list[float]] = {}

    def log_steps(self, step: Step, losses: list[float], **about: Any) -> None:
        self.logged_losses[step.index] = losses
        super().log_steps(step, losses, **about)


class Asked(Notice):
    """Someone wants a checkpoint after certain steps of this attempt, counted from 1."""

    def __init__(self, ranks: Ranks, after: Collection[int]):
        super().__init__(ranks)
        self.after, self.count = after, 0

    def wanted(self) -> Wish | None:
        self.count += 1
        return Wish("the test asks") if self.count in self.after else None


def make_trainer(
    job: TrainJob, ranks: Ranks, *, resident: bool = False, ask_after: Collection[int] = ()
) -> WatchedTrainer:
    """A trainer of this rank over the run's remaining steps; `resident`: from features in memory; a checkpoint is asked
    for after the steps numbered `ask_after`."""
    spec = job.remaining(ranks.world_size)
    shard: Any = Shard(spec, ranks.rank) if spec.num_tasks else EmptyShard()
    if resident:
        assert job.features is not None
        shard = ResidentShard(sets=job.features, refs=None, start=job.position())
    notice, monitor = Asked(ranks, ask_after), WatchedMonitor(job, ranks)
    return WatchedTrainer(job, ranks, monitor, shard=shard, device=torch.device("cpu"), notice=notice)


def run_rank(
    job: TrainJob,
    *,
    stop_after: int | None = None,
    crash_at: int | None = None,
    resident: bool = False,
    ask_after: Collection[int] = (),
) -> dict[str, Any]:
    """Train on this rank to the end of the run, or until it is interrupted: after the end of epoch `stop_after`, or at
    step `crash_at`. What it saw, and the run's result unless it was interrupted or failed."""
    ranks = Ranks.join(60)
    with memory_manifest(job):
        trainer = make_trainer(job, ranks, resident=resident, ask_after=ask_after)
        trainer.crash_at, trainer.stop_after = crash_at, stop_after
        before = weights.sha256(trainer.learner.network.prefix.state_dict())
        seen: dict[str, Any] = {"error": None, "interrupted": False}
        try:
            trainer.run()
        except InterruptionError:
            seen["interrupted"] = True
        except RunFaultError as fault:
            seen["error"] = str(fault)
        else:
            seen.update(trainer.result())
    return seen | {
        "reports": trainer.reports,
        "losses": ranks.sum(trainer.losses),
        "loss_at": trainer.loss_at,
        "logged_losses": trainer.monitor.logged_losses,  # type: ignore[attr-defined]
        "gradients": {name: value.numpy() for name, value in trainer.gradients.items()},
        "prefix_kept": before == weights.sha256(trainer.learner.network.prefix.state_dict()),
        "gradients_sha256": weights.sha256(trainer.gradients),
    }


class Gang:
    """Processes that act as the ranks of one gloo group after another; the first call of each pays for its imports."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def call(self, world_size: int, function: Any, *args: Any, timeout_s: float = 240, **kwargs: Any) -> list[Any]:
        """The function's result on every rank of a fresh group, in rank order."""
        while len(self.pipes) < world_size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        store = f"file://{self.folder}/store-{uuid.uuid4().hex}"
        for rank, pipe in enumerate(self.pipes[:world_size]):
            pipe.send(((store, rank, world_size), function, args, kwargs))
        results = []
        for rank, pipe in enumerate(self.pipes[:world_size]):
            if not pipe.poll(timeout_s):
                raise AssertionError(f"rank {rank} gave no answer within {timeout_s} s")
            fine, result = pipe.recv()
            if not fine:
                raise AssertionError(f"rank {rank}: {result}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        (store, rank, world_size), function, args, kwargs = pipe.recv()
        if world_size > 1:
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        try:
            answer = (True, function(*args, **kwargs))
        except Exception:
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def best_scores(job: TrainJob) -> Path:
    """Validation scores of the run's best checkpoint."""
    checkpoints = Checkpoints(job.folder)
    best = checkpoints.best() or checkpoints.entries()[-1]
    assert best.scores is not None
    return Path(checkpoints.folder, best.scores)
