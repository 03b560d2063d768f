"""The training loop of one rank: next batch, forward, loss, backward, step; validate and checkpoint each epoch.

Everything that must agree over the ranks (the plan, the position, when to stop) is computed from the same numbers on
each of them or sent from rank 0; the only random numbers come with the batch.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch.nn.parallel import DistributedDataParallel

from cxr_dist import storage
from cxr_dist.data.plan import Step
from cxr_dist.data.resident import ResidentFeed, ResidentShard
from cxr_dist.data.stream import Batch, Stream
from cxr_dist.model import weights
from cxr_dist.model.batchnorm import discard_statistics, group_norms, update_running_statistics
from cxr_dist.model.features import from_bytes
from cxr_dist.model.network import Network, masked_loss
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.distributed import Ranks, parallel
from cxr_dist.train.feed import resident_feed
from cxr_dist.train.job import TrainJob
from cxr_dist.train.monitor import Monitor, Spent
from cxr_dist.train.optimize import Schedule, make_optimizer
from cxr_dist.train.progress import Progress
from cxr_dist.train.validation import Validation

__all__ = ["train_rank"]

log = logging.getLogger(__name__)


def train_rank(parameters: dict[str, TrainJob]) -> dict[str, Any]:
    """Train on this rank to the end of the run; the result of rank 0 is the job's.

    Returns {"error": sentence} where every rank found the same fault of the run (NaN, too many unreadable images), so
    that it is not tried again; other exceptions end the group of workers, and Ray starts it again from the last
    checkpoint.
    """
    job = parameters["job"]
    ranks = Ranks.join(job.config.train.process_group_timeout_s)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    device = ray.train.torch.get_device() if job.use_gpu else torch.device("cpu")
    with Monitor(job, ranks) as monitor:
        try:
            trainer = Trainer(job, ranks, monitor, shard=ray.train.get_dataset_shard("run"), device=device)
            trainer.run()
        except RunFaultError as fault:
            return {"error": str(fault)}
        return trainer.result()


class RunFaultError(Exception):
    """A fault of the run itself that all ranks see alike."""


class Trainer:
    """The state of one rank: network, optimizer, position and what has been seen so far.

    `shard` is the rank's part of the stream (anything with `iter_batches`), or the features that stay in memory.
    """

    def __init__(
        self,
        job: TrainJob,
        ranks: Ranks,
        monitor: Monitor,
        *,
        shard: Any,
        device: torch.device,
    ):
        self.job, self.ranks, self.monitor = job, ranks, monitor
        self.config = job.config.train
        stream = None
        if not isinstance(shard, ResidentShard):
            stream = Stream(shard=shard, plan=job.plan, rank=ranks.rank, world_size=ranks.world_size, size=job.row_size)
            stream.begin()  # the decoders start while the network is made
        if device.type == "cpu":
            torch.set_num_threads(self.config.threads_per_worker)
        else:
            torch.cuda.set_device(device)
        initial = weights.restore(storage.read_bytes(storage.join(job.folder, "initial.pt")), "initial.pt")
        self.network = Network.build(
            initial, job.config.model, num_findings=len(job.findings), precision=self.config.precision, device=device
        )
        kinds = ranks.gather(self.network.precision)
        if len(set(kinds)) > 1:
            raise RunFaultError(
                f"train.precision: auto is {', '.join(kinds)} on ranks 0, 1, …, which cannot be mixed; name one that all "
                "devices can do"
            )
        tail = self.network.tail.train()
        self.model = parallel(tail, ranks)
        self.norms = group_norms(tail)
        trained = [parameter for parameter in tail.parameters() if parameter.requires_grad]
        self.gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.optimizer = make_optimizer(job.config.optimizer, trained, self.config.global_batch)
        self.schedule = Schedule(
            job.config.optimizer,
            self.optimizer,
            steps_per_epoch=job.plan.train_steps,
            epochs=self.config.epochs,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.network.autocast is torch.float16)
        self.pos_weight = None
        if job.pos_weight is not None:
            self.pos_weight = torch.tensor(job.pos_weight, device=device, dtype=self.network.dtype)
        self.progress = Progress()
        self.own_s = 0.0
        """Seconds up to the first backward of every step: what a rank does before it meets the others."""
        self.checkpoints = Checkpoints(job.folder)
        self.feed: Stream | ResidentFeed = stream or resident_feed(shard, job, ranks, device)

    def run(self) -> None:
        with contextlib.closing(iter(self.feed)) as delivered:
            batches = self.resume(delivered)
            self.settle_buckets()
            self.monitor.start(self.progress.index)
            for batch in batches:
                if batch.step.kind == "train":
                    self.progress.trained(batch, self.train_step(batch))
                    if (batch.step.number + 1) % self.config.log_every_steps == 0 or self.last_of_kind(batch.step):
                        self.check_and_log(batch.step)
                else:
                    self.progress.validated(batch, self.network.score_features(self.features_of(batch)))
                    if self.last_of_kind(batch.step):
                        self.end_epoch(batch.step)
                        if self.progress.stopped:
                            break

    def resume(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Take up the state that belongs to the first batch delivered, or the last one if there is nothing left."""
        waited = time.perf_counter()
        first = next(batches, None)
        log.info("first batch after %.1f s", time.perf_counter() - waited)
        self.feed.wait_s = 0.0
        if first is None:
            entry = self.checkpoints.latest_whole()
        elif first.step.index:
            entry = self.checkpoints.at(first.step.index)
        else:
            return itertools.chain([first], batches)
        if entry is not None:
            self.load_state(self.checkpoints.load(entry))
            log.info("resumed from step %d (epoch %d)", entry.index, entry.epoch)
        return itertools.chain([first] if first else [], batches)

    def settle_buckets(self) -> None:
        """Two throw-away backwards: DDP orders its gradient buckets anew after the first, and the order decides how
        sums round. Without them a resumed run would not repeat an uninterrupted one bit for bit."""
        share = self.config.micro_batch or self.job.plan.rank_batch(self.ranks.world_size)
        features = self.network.features(np.zeros((1, self.job.size, self.job.size), dtype=np.uint8))
        features = features.new_zeros((share, *features.shape[1:])).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            with self.network.mixed():
                self.model(features).float().sum().mul(0.0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        discard_statistics(self.norms)

    def features_of(self, batch: Batch) -> torch.Tensor:
        """The prefix's output for a batch: stored, or computed now."""
        if batch.features is not None:
            found = self.job.features["validation", 0]  # type: ignore[index]  # features come only where the job has them
            return self.network.stored(from_bytes(batch.features, found.shape_HWC, found.kind))
        augmented = self.config.augment and batch.step.kind == "train"
        return self.network.features(batch.images_BSS, batch.draws_B6 if augmented else None)

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; this rank's part of the global loss, on the device."""
        network, findings = self.network, len(self.job.findings)
        began = time.perf_counter()
        features = self.features_of(batch)
        labels, valid = network.transfer(batch.labels_BK), network.transfer(batch.valid_B)
        micro = self.config.micro_batch or len(labels)
        divisor = self.config.global_batch * findings
        total = torch.zeros((), device=network.device, dtype=network.dtype)
        for start in range(0, len(labels), micro):
            part = slice(start, start + micro)
            last = start + micro >= len(labels)
            with self.gradients_stay_local(not last):
                with network.mixed():
                    logits = self.model(features[part])
                if start == 0:
                    self.own_s += time.perf_counter() - began
                loss = masked_loss(logits, labels[part], valid[part], self.pos_weight, divisor=divisor)
                # DDP averages over the ranks; the sum is wanted
                self.scaler.scale(loss * self.ranks.world_size).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_running_statistics(self.norms)
        self.schedule.after_step()
        return total

    def gradients_stay_local(self, local: bool) -> contextlib.AbstractContextManager:
        if local and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def last_of_kind(self, step: Step) -> bool:
        plan = self.job.plan
        return step.number + 1 == (plan.train_steps if step.kind == "train" else plan.validation_steps)

    def check_and_log(self, step: Step) -> None:
        """Once in a while: sum the losses over the ranks, stop on a fault, log."""
        losses = self.ranks.sum(self.progress.take_losses())
        for number, loss in zip(range(step.number + 1 - len(losses), step.number + 1), losses, strict=True):
            if not math.isfinite(loss):
                ids = [name for names in self.ranks.gather(self.progress.epoch_ids[number]) for name in names]
                raise RunFaultError(
                    f"loss became {loss} at step {number} of epoch {step.epoch}, images {', '.join(ids)}; lower "
                    "optimizer.lr or look at these images"
                )
        self.check_corrupt()
        self.monitor.log_steps(
            step,
            losses,
            lr=self.optimizer.param_groups[0]["lr"],
            wait_s=self.feed.wait_s,
            spent=self.ranks.gather(Spent.by(self.feed, self.own_s)),
        )

    def check_corrupt(self) -> None:
        """Stop if more images of this epoch are unreadable than the config allows."""
        plan, allowed = self.job.plan, self.job.config.data.max_corrupt
        [found] = self.ranks.sum([float(self.progress.corrupt_in_epoch)])
        rows = plan.train_steps * plan.global_batch + plan.validation.num_rows
        if found > allowed * rows:
            names = sorted({name for seen in self.ranks.gather(self.feed.corrupt) for name in seen})
            raise RunFaultError(
                f"{found:.0f} of {rows} images of an epoch are unreadable, allowed are data.max_corrupt = {allowed:g} "
                f"of them; first {', '.join(names[:5])}; mend or ingest these images again"
            )

    def end_epoch(self, step: Step) -> Validation:
        """Validate, step the schedule, decide whether to stop, checkpoint: alike on every rank. The validation."""
        self.check_corrupt()
        parts = self.ranks.gather(self.progress.take_validation())
        validation = Validation.join(parts, self.job)
        if not math.isfinite(validation.loss):
            raise RunFaultError(
                f"validation loss became {validation.loss} after epoch {step.epoch}; lower optimizer.lr (no checkpoint "
                "of this epoch was kept)"
            )
        self.schedule.after_epoch(validation.loss)
        for seen in self.ranks.gather(self.feed.corrupt):
            self.progress.corrupt |= seen
        ids_of_ranks = self.ranks.gather(self.progress.take_epoch_ids())
        self.progress.end_epoch(ids_of_ranks, validation, patience=self.config.patience)
        if self.ranks.rank == 0:
            if self.progress.is_best:
                validation.write_scores(self.job)
            self.checkpoints.save(
                self.state(),
                index=self.progress.index,
                epoch=step.epoch,
                score=validation.mean_auroc,
                finished=self.progress.stopped or self.progress.index == self.job.plan.num_steps,
            )
            self.monitor.log_epoch(step, validation, self.progress)
        return validation

    def state(self) -> dict[str, Any]:
        """All that a resume needs; no random state, for there is none."""
        return {
            "tail": self.network.tail.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state_dict(),
            "findings": list(self.job.findings),
            "model": dataclasses.asdict(self.job.config.model),
            "precision": self.network.precision,
            "size": self.job.size,
            "pixels_version": self.job.pixels_version,
            "manifest_sha256": self.job.manifest_sha256,
            "plan_sha256": self.job.plan.sha256,
            "run_id": self.job.run_id,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if state["precision"] != self.network.precision:
            raise RunFaultError(
                f"train.precision: found {self.network.precision} on these devices, expected {state['precision']}, which the "
                "run was begun in; use such devices again, or another run.name"
            )
        self.network.tail.load_state_dict(state["tail"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress.load_state_dict(state["progress"])

    def result(self) -> dict[str, Any]:
        """What the driver needs of the finished training; a collective call."""
        return {
            **self.progress.summary(),
            "dropped_per_epoch": self.job.plan.dropped_rows,
            "gradient_mb_per_step": round(self.gradient_bytes / 2**20, 2),
            "weights_sha256": weights.sha256(self.network.tail.state_dict()),
            "corrupt": self.progress.corrupt,
            **self.monitor.summary(self.feed),
        }
