"""The ranks of a run under Ray Train: how they are started, started again, told to stop, and what came of them."""

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
import uuid
from typing import Any

from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig

from cxr_dist import storage
from cxr_dist.environment import SETTINGS
from cxr_dist.errors import InputError, RunError
from cxr_dist.tracking import TrackedRun
from cxr_dist.train.elastic import ElasticTrainer, WholeShares
from cxr_dist.train.job import TrainJob
from cxr_dist.train.lease import Lease
from cxr_dist.train.loop import train_rank
from cxr_dist.train.notice import Request
from cxr_dist.train.outcome import Outcome, last_line, record

__all__ = ["fit"]

log = logging.getLogger(__name__)

STOP_S = 10.0
"""Longest wait for a checkpoint after SIGTERM, seconds. `ray job stop` gives 3 in all (RAY_JOB_STOP_WAIT_TIME_S)."""

RESIZE_LOOK_S = 15.0
"""Time between two looks whether an elastic group has room for more ranks, seconds."""

LEAST_WAIT_S = 600.0
"""Shortest time that a run which has lost a node waits for another, seconds."""


def fit(job: TrainJob, data: DataConfig, tracked: TrackedRun, lease: Lease) -> dict[str, Any]:
    """Train on the ranks, with what `data` gives them; rank 0's result. RunError if the run failed.

    Told to stop (SIGTERM, `ray job stop`) it asks the ranks for a checkpoint, says KILLED, and then waits for the
    checkpoint, at most STOP_S seconds: who told may not give so many.
    """
    attempt = uuid.uuid4().hex[:8]
    stop = Request(f"{job.run_id} {attempt} stop", "the driver was told to stop")
    resize = Request(f"{job.run_id} {attempt} resize", "the number of ranks is going to change")
    trainer = make_trainer(
        dataclasses.replace(job, attempt=attempt, requests=(stop, resize)), data, before_resize=resize
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        raise RunError(f"training failed on {first_cause(error)}") from error
    except SystemExit:
        if not tracked.told_to_stop:  # Ctrl-C, upon which Ray has ended the ranks already
            raise
        asking = threading.Thread(target=ask_for_checkpoint, args=(stop,), daemon=True)  # it may never be answered
        asking.start()
        killed(job, tracked, lease)
        asking.join(STOP_S)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        # Ray leaves a handler behind that swallows Ctrl-C
        signal.signal(signal.SIGINT, on_interrupt)
    with contextlib.suppress(OSError, InputError):  # Ray's own notes on this attempt; nothing reads them again
        storage.delete_dir(storage.join(job.folder, "ray"))
    if "error" in result:
        raise RunError(result["error"])
    return result


def make_trainer(job: TrainJob, data: DataConfig, *, before_resize: Request) -> ElasticTrainer:
    """Ray's trainer of the job's ranks."""
    config = job.config.train
    least, most = job.world_sizes[0], job.world_sizes[-1]
    wait_s = max(LEAST_WAIT_S, config.wait_for_nodes_s)
    return ElasticTrainer(
        train_rank,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo", timeout_s=config.process_group_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if job.use_gpu else {})},
            elastic_resize_monitor_interval_s=RESIZE_LOOK_S,
        ),
        run_config=RunConfig(
            name=job.attempt,
            storage_path=storage.join(job.folder, "ray"),
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                # a group that finds no room fails after that time and is tried again; for ever, if Ray is left to it
                controller_failure_limit=round(wait_s / float(SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])),
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"run": lambda: None},
        dataset_config=data,
        policy=functools.partial(
            WholeShares, world_sizes=job.world_sizes, before_resize=before_resize, patience_s=wait_s
        ),
    )


def killed(job: TrainJob, tracked: TrackedRun, lease: Lease) -> None:
    """Say that the run was told to stop, while there is time."""
    tracked.finish("KILLED")
    if not lease.lost.is_set():
        record(job.folder, Outcome(owner=lease.number, status="KILLED"))


def ask_for_checkpoint(stop: Request) -> None:
    """Have the ranks store a checkpoint, and say when they have."""
    stop.ask()
    if stop.wait(STOP_S):
        log.warning("told to stop: a checkpoint was stored")


def first_cause(error: TrainingFailedError) -> str:
    """The rank that failed by itself and why, rather than one that only lost its peers."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lost_peer = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "Timed out waiting")
    rank, cause = min(failures.items(), key=lambda item: (any(mark in str(item[1]) for mark in lost_peer), item[0]))
    return f"rank {rank}: {last_line(cause)}"
