"""One trial under Ray Tune: an actor that starts a training job as its own process and tells Tune its validation scores.

A process, as `jobs/train.py` is for a user: the run's lease, signals, status and clean-up are then what they always are,
and Ray Train's driver has a main thread, which it needs for them; Tune's actors have none to give. Scores are
read from the run's checkpoints, where an epoch counts once it is stored, so training knows nothing of sweeps.
"""

import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cxr_dist.errors import InputError
from cxr_dist.train import board
from cxr_dist.train.checkpoint import Checkpoints

__all__ = ["EPOCH", "FAILED", "SCORE", "WHOLE", "TrialRun", "stop_key"]

EPOCH, SCORE, WHOLE, FAILED = "epoch", "val_auroc_mean", "whole", "failed"
"""What a trial reports to Tune; `whole` is true of the last report of one that was not cut short, `failed` says why."""

POLL_S = 1.0
"""Time between two looks at a trial's checkpoints, seconds."""
STOP_S = 60.0
"""Longest wait for a trial that was told to stop, seconds; it stores a checkpoint first."""
TOLD = 128 + signal.SIGTERM
PR_SET_PDEATHSIG = 1


def stop_key(sweep_run_id: str) -> str:
    """Key on the cluster's board under which a sweep's driver says that all trials are to stop."""
    return f"{sweep_run_id} sweep stop"


class TrialRun(tune.Trainable):
    """A trial. Its config's `trial`: `number`; `command` and `log` of the job; `folder` of the run; `curve` and `ended` as
    recorded; `stop`, the key on the board that tells all trials to stop."""

    def setup(self, config: dict[str, Any]) -> None:
        about = config["trial"]
        self.known = [tuple(point) for point in about["curve"]]
        self.reported = 0
        self.folder, self.stop_asked, self.log = about["folder"], about["stop"], Path(about["log"])
        self.child: subprocess.Popen[bytes] | None = None
        if about["ended"] is None:
            self.child = start(about["command"], self.log)

    def step(self) -> dict[str, Any]:
        """The next epoch's score: recorded ones first, then what the job stores. The last one comes when the job is done."""
        if self.known:
            epoch, score = self.known.pop(0)
            return self.report(epoch, score, done=self.child is None and not self.known)
        if self.child is None:
            return self.failed("found a trial that has ended without a score, expected one; give another run.name")
        checkpoints = Checkpoints(self.folder)
        while self.child.poll() is None:
            if board.get(self.stop_asked) is not None:
                end(self.child)
                return self.failed("the sweep was told to stop")
            for epoch, score, finished in scored(checkpoints):
                if epoch > self.reported and not finished:
                    return self.report(epoch, score, done=False)
            time.sleep(POLL_S)
        if self.child.returncode:
            return self.failed(f"{last_words(self.log)} (exit code {self.child.returncode}; {self.log})")
        for epoch, score, _ in scored(checkpoints)[-1:]:
            return self.report(epoch, score, done=True)
        return self.failed("validation mean AUROC is undefined, expected findings with positives and negatives there")

    def report(self, epoch: int, score: float, *, done: bool) -> dict[str, Any]:
        self.reported = epoch
        return {EPOCH: epoch, SCORE: score, WHOLE: done, "done": done}

    def failed(self, why: str) -> dict[str, Any]:
        """The last report of a trial that failed: a value, for Tune would make a page of tracebacks out of an exception."""
        return {EPOCH: self.reported, SCORE: math.nan, WHOLE: False, FAILED: why, "done": True}

    def cleanup(self) -> None:
        """The job ends with the trial: one that is pruned is told to stop."""
        if self.child is not None:
            end(self.child)


def scored(checkpoints: Checkpoints) -> list[tuple[int, float, bool]]:
    """(epochs done, validation mean AUROC, whether it was the last epoch) of the run's checkpoints, ascending."""
    try:
        entries = checkpoints.entries()
    except (InputError, OSError):  # the store is asked again; if it is gone for good, the job says so
        return []
    return [(entry.epoch + 1, entry.score, entry.finished) for entry in entries if entry.score is not None]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The training job as a process of this cluster, which is told to stop if this one is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own job
            command, stdout=output, stderr=output, env=environment(), preexec_fn=_dies_with_parent()
        )


def environment() -> dict[str, str]:
    """This process's environment, with the way to this cluster and the code that travelled with a submitted job."""
    context = ray.get_runtime_context()
    found = {key: value for key, value in os.environ.items() if not key.startswith("TUNE_")}
    found["RAY_ADDRESS"] = context.gcs_address
    runtime_env = {
        key: value for key, value in dict(context.runtime_env).items() if key in ("working_dir", "py_modules", "pip")
    }
    if runtime_env:
        found["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": runtime_env})
    found["PYTHONPATH"] = os.pathsep.join(path for path in (str(Path.cwd()), *sys.path) if path)
    return found


def end(child: subprocess.Popen[bytes]) -> None:
    """Tell the job to stop, and wait until it has."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def last_words(log: Path) -> str:
    """What the job said at its end: its last error line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [found[1] for line in lines if (found := re.search(r"(?:^error| E failed): (.*)", line))]
    return (told or lines or ["it said nothing"])[-1]


def _dies_with_parent() -> Callable[[], None] | None:
    """Before the job begins: have Linux send it SIGTERM when the actor is killed, which has no time to."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
