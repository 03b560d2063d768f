"""What a rank tells the world: progress lines for people, metrics for MLflow, speed at the end."""

import logging
import resource
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

from cxr_dist import unsent
from cxr_dist.data.plan import Step
from cxr_dist.data.resident import ResidentFeed
from cxr_dist.data.stream import Stream
from cxr_dist.folders import private_folder
from cxr_dist.journal import MetricJournal
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.job import TrainJob
from cxr_dist.train.progress import Progress
from cxr_dist.train.validation import Validation

__all__ = ["Monitor", "Spent"]

log = logging.getLogger(__name__)

MIB = 2**20


class Spent(NamedTuple):
    """What a rank has spent on the run's steps so far."""

    own_s: float
    """Up to the first backward of every step, waiting for data included: what it does before it meets the others."""
    head_of_line_s: float
    """Of waiting for data, while the awaited block or the one after it was already decoded."""
    bytes_read: int
    """From storage, for the blocks that it received."""

    @classmethod
    def by(cls, feed: Stream | ResidentFeed, own_s: float) -> "Spent":
        if isinstance(feed, ResidentFeed):
            return cls(own_s + feed.wait_s, 0.0, 0)
        return cls(own_s + feed.wait_s, feed.head_of_line_s, feed.reads.bytes_read)


class Monitor:
    """Rank 0 logs the run's metrics; the others only keep time."""

    def __init__(self, job: TrainJob, ranks: Ranks):
        self.job, self.ranks = job, ranks
        self.journal: MetricJournal | None = None
        self.began = self.logged = time.perf_counter()
        self.first_index = self.logged_index = 0
        self.logged_wait_s = 0.0
        self.logged_own_s: list[float] = []
        self.epoch_began = self.began
        self.epoch_s: list[float] = []
        """Seconds of each epoch that was begun here, validation and checkpoint included."""
        self.epoch_is_whole = True

    def __enter__(self) -> Self:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if self.ranks.rank == 0:
            folder = private_folder(f"cxr-dist-{self.job.run_id}")
            self.journal = MetricJournal(folder / "metrics.jsonl", self.job.tracking_uri, self.job.run_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.journal is not None:
            unsent.close(self.journal, self.job.folder)

    def start(self, index: int) -> None:
        """Begin to keep time: the first batch is here and the network is ready."""
        self.first_index = self.logged_index = index
        self.epoch_is_whole = index % self.job.plan.steps_per_epoch == 0
        self.began = self.logged = self.epoch_began = time.perf_counter()

    def unsent_records(self) -> list[dict[str, Any]]:
        """Metrics that the server has not confirmed yet; they go with a checkpoint, for this node may be lost."""
        return [] if self.journal is None else self.journal.unsent_records()

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Take up the metrics that came with a checkpoint."""
        if self.journal is not None:
            self.journal.add(records)

    def log_steps(self, step: Step, losses: list[float], *, lr: float, wait_s: float, spent: list[Spent]) -> None:
        """Once in a while: loss (the mean of `losses`), speed, waiting for data and for other ranks (of which the slowest holds up the rest)
        since the last time; what order cost and what was read since the start."""
        now = time.perf_counter()
        elapsed, waited = max(now - self.logged, 1e-9), wait_s - self.logged_wait_s
        own_s = [rank.own_s for rank in spent]
        own = [new - old for new, old in zip(own_s, self.logged_own_s or [0.0] * len(own_s), strict=True)]
        steps = step.index + 1 - self.logged_index
        self.logged, self.logged_index, self.logged_wait_s, self.logged_own_s = now, step.index + 1, wait_s, own_s
        if self.ranks.rank != 0 or not losses:
            return
        plan = self.job.plan
        loss = sum(losses) / len(losses)
        images_per_s = steps * plan.global_batch / elapsed
        done = step.index + 1 - self.first_index
        left_s = (now - self.began) / done * (plan.num_steps - step.index - 1)
        log.info(
            "epoch %d/%d step %d/%d  loss %.4f  %.1f images/s  data wait %.0f %%  ETA %s",
            step.epoch + 1,
            plan.epochs,
            step.number + 1,
            plan.train_steps,
            loss,
            images_per_s,
            100 * waited / elapsed,
            _duration(left_s),
        )
        self._log(
            {
                "train/loss": loss,
                "train/lr": lr,
                "train/images_per_s": images_per_s,
                "train/data_wait_fraction": waited / elapsed,
                "train/rank_skew_fraction": (max(own) - min(own)) / elapsed,
                "train/head_of_line_s": max(rank.head_of_line_s for rank in spent),
                "train/read_mb": sum(rank.bytes_read for rank in spent) / MIB,
                "train/world_size": float(self.ranks.world_size),
            },
            step,
        )

    def log_epoch(self, step: Step, validation: Validation, progress: Progress) -> None:
        """At an epoch's end, on rank 0: validation."""
        # the time of validation and checkpoint is not the next interval's
        self.logged, self.logged_index = time.perf_counter(), step.index + 1
        metrics = {"val/loss": validation.loss, "val/n_scored": float(len(validation.rows_N))}
        if self.epoch_is_whole:
            self.epoch_s.append(self.logged - self.epoch_began)
            metrics["train/epoch_s"] = self.epoch_s[-1]
        self.epoch_began, self.epoch_is_whole = self.logged, True
        if validation.mean_auroc is not None:
            metrics["val/auroc_mean"] = validation.mean_auroc
        metrics |= {f"val/auroc/{name}": value for name, value in validation.auroc.items() if value is not None}
        self._log(metrics, step)
        log.info(
            "epoch %d/%d  val loss %.4f  val mean AUROC %s%s",
            step.epoch + 1,
            self.job.plan.epochs,
            validation.loss,
            "undefined" if validation.mean_auroc is None else f"{validation.mean_auroc:.4f}",
            "  (best)" if progress.is_best else "",
        )

    def summary(self, stream: Stream | ResidentFeed) -> dict[str, Any]:
        """Speed, waiting and memory over all ranks; a collective call."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        mine = (stream.delivered, stream.wait_s / elapsed, peak_mb, Spent.by(stream, own_s=0.0))
        delivered, waited, peaks, spent = zip(*self.ranks.gather(mine), strict=True)
        return {
            "images_per_s": round(sum(delivered) / elapsed, 2),
            "images_per_epoch": self.job.plan.train_steps * self.job.plan.global_batch
            + self.job.plan.validation.num_rows,
            "epoch_s": [round(seconds, 3) for seconds in self.epoch_s],
            "data_wait_fraction": round(max(waited), 4),
            "head_of_line_s": round(max(rank.head_of_line_s for rank in spent), 3),
            "read_mb": round(sum(rank.bytes_read for rank in spent) / MIB, 2),
            "peak_rss_mb": round(max(peaks), 1),
        }

    def _steps_done(self, step: Step) -> int:
        """Optimizer steps of the run up to the end of this one: the x axis of every metric."""
        plan = self.job.plan
        return step.epoch * plan.train_steps + (step.number + 1 if step.kind == "train" else plan.train_steps)

    def _log(self, metrics: dict[str, float], step: Step) -> None:
        if self.journal is not None:
            self.journal.log(metrics | self._place(self._steps_done(step)), step=self._steps_done(step))

    def _place(self, steps: int) -> dict[str, float]:
        """How far the run is after so many optimizer steps, in what the UI's charts can take as x axis besides these steps:
        a point of another metric is drawn over that of the same step. Whole at the end of an epoch, where validation is."""
        plan = self.job.plan
        return {"epoch": steps / plan.train_steps, "images_seen": float(steps * plan.global_batch)}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
