"""The training loop of one rank: next batch, forward, loss, backward, step; checkpoint; validate each epoch.

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

import ray.train
import ray.train.torch
import torch

from cxr_dist.data.plan import Step
from cxr_dist.data.resident import ResidentFeed, ResidentShard
from cxr_dist.data.stream import Batch, Stream
from cxr_dist.errors import RunFaultError
from cxr_dist.model import weights
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.feed import resident_feed
from cxr_dist.train.job import TrainJob
from cxr_dist.train.learner import Learner
from cxr_dist.train.monitor import Monitor, Spent
from cxr_dist.train.notice import Notice
from cxr_dist.train.progress import Progress
from cxr_dist.train.saver import PATIENCE_S, Saver, is_due
from cxr_dist.train.validation import Validation
from cxr_dist.train.watch import Watch

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
    with (
        Monitor(job, ranks) as monitor,
        Notice(ranks, requests=job.requests, preemption=ray.train.get_preemption_info) as notice,
        Watch(f"{job.run_id} {job.attempt}", ranks, job.config.train.process_group_timeout_s) as watch,
    ):
        try:
            trainer = Trainer(
                job, ranks, monitor, shard=ray.train.get_dataset_shard("run"), device=device, notice=notice, watch=watch
            )
            trainer.run()
        except RunFaultError as fault:
            return {"error": str(fault)}
        return trainer.result()


class Trainer:
    """The run on one rank: what learns, where it stands, what it has seen, and what it leaves behind.

    `shard` is the rank's part of the stream (anything with `iter_batches`), or the features that stay in memory;
    `notice` tells when a checkpoint is wanted at once (None: never), `watch` is told where the rank is.
    """

    def __init__(
        self,
        job: TrainJob,
        ranks: Ranks,
        monitor: Monitor,
        *,
        shard: Any,
        device: torch.device,
        notice: Notice | None = None,
        watch: Watch | None = None,
    ):
        self.job, self.ranks, self.monitor = job, ranks, monitor
        self.config = job.config.train
        stream = None
        if not isinstance(shard, ResidentShard):
            stream = Stream(shard=shard, plan=job.plan, rank=ranks.rank, world_size=ranks.world_size, size=job.row_size)
            stream.begin()  # the decoders start while the network is made
        self.learner = Learner(job, ranks, device)
        self.progress = Progress()
        self.checkpoints = Checkpoints(job.folder, owner=job.owner, more=self.config.keep_checkpoints)
        # the other ranks wait for rank 0 no longer than for one another
        self.saver = Saver(self.checkpoints, patience_s=min(PATIENCE_S, self.config.process_group_timeout_s / 2))
        self.notice = notice or Notice(ranks)
        self.watch = watch or Watch("", ranks, self.config.process_group_timeout_s)
        self.before_validation: dict[str, Any] = {}
        """Of the progress, what a state from the middle of a validation has: the network does not change in one."""
        self.feed: Stream | ResidentFeed = stream or resident_feed(shard, job, ranks, device)

    def run(self) -> None:
        with self.saver, contextlib.closing(iter(self.feed)) as delivered:
            batches = self.resume(delivered)
            self.learner.settle_buckets()
            self.monitor.start(self.progress.index)
            for batch in batches:
                self.watch.at(batch.step.index, "computes")
                if batch.step.kind == "train":
                    self.progress.trained(batch, self.train_step(batch), self.ranks.rank)
                    if (batch.step.number + 1) % self.config.log_every_steps == 0 or self.last_of_kind(batch.step):
                        self.check_and_log(batch.step)
                else:
                    self.progress.validated(batch, self.learner.score(batch))
                    if self.last_of_kind(batch.step):
                        self.end_epoch(batch.step)
                        if self.progress.stopped:
                            break
                        self.watch.at(batch.step.index + 1, "waits for data")
                        continue
                self.checkpoint_in_epoch(batch.step)
                self.watch.at(batch.step.index + 1, "waits for data")

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
            self.before_validation = self.progress.state_dict()
        return itertools.chain([first] if first else [], batches)

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; this rank's part of the global loss, on the device."""
        return self.learner.step(batch)

    def last_of_kind(self, step: Step) -> bool:
        plan = self.job.plan
        return step.number + 1 == (plan.train_steps if step.kind == "train" else plan.validation_steps)

    def merge(self, step: Step) -> None:
        """What each rank has seen since the last time becomes the run's; stop on a loss that is no number. Collective."""
        self.watch.at(step.index, "waits for the other ranks")
        mine, images = self.progress.take_losses()
        losses = self.ranks.sum(mine)
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                ids = [name for names in self.ranks.gather(images[number]) for name in names]
                raise RunFaultError(
                    f"loss became {loss} at step {step.number + 1 - len(losses) + number} of epoch {step.epoch}, images "
                    f"{', '.join(ids)}; lower optimizer.lr or look at these images"
                )
        self.progress.window += losses
        self.progress.merge(self.ranks.gather(self.progress.take_seen(self.feed.corrupt)))

    def check_and_log(self, step: Step) -> None:
        """Once in a while: merge, stop on a fault, log."""
        self.merge(step)
        self.check_corrupt()
        self.monitor.log_steps(
            step,
            self.progress.take_window(),
            lr=self.learner.lr,
            wait_s=self.feed.wait_s,
            spent=self.ranks.gather(Spent.by(self.feed, self.learner.own_s)),
        )
        if self.last_of_kind(step):
            self.before_validation = self.progress.state_dict()

    def check_corrupt(self) -> None:
        """Stop if more images of this epoch are unreadable than the config allows; all must be merged."""
        plan, allowed = self.job.plan, self.job.config.data.max_corrupt
        found, rows = self.progress.corrupt_in_epoch, plan.train_steps * plan.global_batch + plan.validation.num_rows
        if found > allowed * rows:
            raise RunFaultError(
                f"{found} of {rows} images of an epoch are unreadable, allowed are data.max_corrupt = {allowed:g} "
                f"of them; first {', '.join(sorted(self.progress.corrupt)[:5])}; mend or ingest these images again"
            )

    def checkpoint_in_epoch(self, step: Step) -> None:
        """Within an epoch: save the state every so many steps, or because someone wants one. Collective."""
        self.watch.at(step.index, "waits for the other ranks")
        wanted = self.notice.wanted()
        if not wanted and not is_due(step, self.progress.steps, self.config.checkpoint_every_steps):
            return
        progress = self.before_validation
        if step.kind == "train" and not self.last_of_kind(step):
            self.merge(step)
            progress = self.progress.state_dict()
        if self.ranks.rank != 0:
            return
        if wanted:
            log.warning("checkpoint before step %d now: %s", progress["index"], wanted.reason)
        self.saver.save(
            self.state(progress),
            index=progress["index"],
            epoch=step.epoch,
            needed=wanted is not None,
            then=wanted.then if wanted else None,
        )

    def end_epoch(self, step: Step) -> Validation:
        """Validate, step the schedule, decide whether to stop, checkpoint: alike on every rank. The validation."""
        self.merge(step)
        self.check_corrupt()
        parts = self.ranks.gather(self.progress.take_validation())
        validation = Validation.join(parts, self.job)
        if not math.isfinite(validation.loss):
            raise RunFaultError(
                f"validation loss became {validation.loss} after epoch {step.epoch}; lower optimizer.lr (no checkpoint "
                "of this epoch was kept)"
            )
        self.learner.schedule.after_epoch(validation.loss)
        self.progress.end_epoch(validation, patience=self.config.patience)
        if self.ranks.rank == 0:
            self.saver.save(
                self.state(self.progress.state_dict()),
                index=self.progress.index,
                epoch=step.epoch,
                score=validation.mean_auroc,
                finished=self.progress.stopped or self.progress.index == self.job.plan.num_steps,
                needed=True,
                scores=lambda: validation.scores_file(self.job),
            )
            self.monitor.log_epoch(step, validation, self.progress)
        return validation

    def state(self, progress: dict[str, Any]) -> dict[str, Any]:
        """All that a resume needs, with this state of the progress; no random state, for there is none."""
        return {
            **self.learner.state_dict(),
            "progress": progress,
            "journal": self.monitor.unsent_records(),
            "findings": list(self.job.findings),
            "model": dataclasses.asdict(self.job.config.model),
            "size": self.job.size,
            "pixels_version": self.job.pixels_version,
            "manifest_sha256": self.job.manifest_sha256,
            "plan_sha256": self.job.plan.sha256,
            "run_id": self.job.run_id,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.progress.load_state_dict(state["progress"])
        self.monitor.restore(state["journal"])

    def result(self) -> dict[str, Any]:
        """What the driver needs of the finished training; a collective call."""
        return {
            **self.progress.summary(),
            "dropped_per_epoch": self.job.plan.dropped_rows,
            "gradient_mb_per_step": round(self.learner.gradient_bytes / 2**20, 2),
            "weights_sha256": weights.sha256(self.learner.network.tail.state_dict()),
            "corrupt": self.progress.corrupt,
            **self.monitor.summary(self.feed),
        }
