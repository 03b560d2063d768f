"""What a soak runs on: real servers, a small release and one long run, in a folder that is gone at the end."""

import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist.data.synth import write_release
from infra.local.stack import Stack, start
from tests.conftest import ROOT
from tests.soak.processes import Watch
from tests.submitting import COMMIT, TRAIN, find, submit

__all__ = ["DATA", "RANKS", "RUN", "RUNS", "Latest", "Site", "SoakError"]

RUN, RUNS, DATA = "soak", "s3://cxr/runs", "s3://cxr/nih"
RANKS, DECODERS, NUM_CPUS = 2, 2, 4
PATIENTS = 240
"""Some 320 training images, ten steps an epoch."""
TAIL = 3000
"""Characters of a job's log that an error shows."""


class SoakError(Exception):
    """A promise that was not kept, in a sentence, or with the end of a log."""


class Latest(NamedTuple):
    """The last step that MLflow has."""

    step: int
    at: float
    """When it was logged, seconds since 1970."""


class Site:
    """The stack, the run's command, and the job that runs it now; all of it up while its `with` block runs."""

    def __init__(self, *, epochs: int, deadline_s: float, sample_s: float, say: Callable[[str], None]):
        self.deadline_s, self.say = deadline_s, say
        self.folder = Path(tempfile.mkdtemp(prefix="cxr-soak-"))
        self.temp = self.folder / "tmp"
        """Everybody's temporary files, so that what is left of them can be listed."""
        self.code = self.folder / "code"
        """A copy, so that the same command is that of the same code while people go on working."""
        self.epochs = epochs
        self.stack: Stack | None = None
        self.watch = Watch(sample_s)
        self.job_id = ""
        self.run_id = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watch.stop()
        try:
            if self.stack is not None:
                self.stack.purge()
        finally:
            for process in self.watch.known:  # a driver whose supervisor was lost has another parent
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.temp.mkdir()
        for name in ("cxr_dist", "jobs"):
            shutil.copytree(ROOT / name, self.code / name, ignore=shutil.ignore_patterns("__pycache__"))
        logging.disable(logging.INFO)  # Ray has a dozen lines about packages with every command
        os.environ["TMPDIR"], tempfile.tempdir = str(self.temp), None
        self.stack = start(self.folder / "stack", num_cpus=NUM_CPUS, say=self.say)
        os.environ |= self.stack.env
        pids = {name: process.pid for name, process in self.stack.processes.items()}
        self.watch.roots |= {pids["ray"]: "", pids["mlflow"]: "MLflow", pids["s3"]: "S3", pids["postgres"]: "Postgres"}
        self.watch.start()
        self.jobs = JobSubmissionClient(self.stack.addresses["ray"])
        self.client = MlflowClient(self.stack.addresses["mlflow"])
        self.command = (
            f"{TRAIN} --run.name {RUN} --run.commit {COMMIT} --tracking.uri {self.client.tracking_uri}"
            f" --train.epochs {self.epochs} --train.patience 0 --train.checkpoint_every_steps 7"
            # workers that are killed are counted, and nobody knows how many these will be
            f" --train.max_failures 100000 --data.decode_workers {DECODERS}"
            " --data.task_images 256"  # small tasks: the decoders have something to do all the time
        )
        write_release(self.folder / "nih", num_patients=PATIENTS, seed=0, size=128)
        self.say(f"a synthetic release of {PATIENTS} patients is drawn")
        self.run(f"python jobs/ingest.py --data.release {self.folder / 'nih'} --data.uri {DATA} --data.size 64")

    def begin(self) -> None:
        """Give the run's command, for the first time or again."""
        self.job_id = submit(self.jobs, self.command, code=self.code)

    def run(self, command: str) -> dict:
        """A job to its end; its result. SoakError if it fails."""
        job_id = submit(self.jobs, command, code=self.code)
        self.wait(lambda: self.jobs.get_job_status(job_id).is_terminal(), f"the end of {command}")
        logs = self.jobs.get_job_logs(job_id)
        if self.jobs.get_job_status(job_id) != JobStatus.SUCCEEDED:
            raise SoakError(f"{command} failed:\n{logs[-TAIL:]}")
        return json.loads(logs.splitlines()[-1])

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Until it is true; SoakError after the deadline."""
        end = time.monotonic() + self.deadline_s
        while not until():
            if time.monotonic() > end:
                raise SoakError(f"{what}: not within {self.deadline_s:.0f} s; {self.tail()}")
            time.sleep(0.5)

    def ended(self) -> bool:
        """Whether the driver's job is over; False where the head does not answer in time."""
        try:
            return self.jobs.get_job_status(self.job_id).is_terminal()
        except (OSError, RuntimeError):
            return False

    def tail(self) -> str:
        """The end of the run's log, and how its job stands."""
        if not self.job_id:
            return ""
        return f"job {self.jobs.get_job_status(self.job_id).value}:\n{self.jobs.get_job_logs(self.job_id)[-TAIL:]}"

    def latest(self) -> Latest | None:
        """The last step in MLflow; None while there is none, or no server."""
        try:
            if not self.run_id:
                runs = find(self.client, RUN)
                if not runs:
                    return None
                self.run_id = runs[0].info.run_id
            where = f"{self.client.tracking_uri}/api/2.0/mlflow/runs/get?run_id={self.run_id}"
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(where, timeout=10) as answer:
                metrics = json.load(answer)["run"]["data"].get("metrics", [])
        except (OSError, http.client.HTTPException, MlflowException):  # the server is killed at times
            return None
        found = [metric for metric in metrics if metric["key"] == "train/loss"]
        return Latest(int(found[0]["step"]), int(found[0]["timestamp"]) / 1000) if found else None

    def living(self) -> dict[str, set[psutil.Process]]:
        """The processes of Ray and of the run that live now, by kind."""
        return self.watch.living()

    def one(self, kind: str, rng: random.Random | None = None) -> psutil.Process:
        """One living process of a kind, a random one if there are several; SoakError if there is none."""
        found = sorted(self.living().get(kind, ()), key=lambda process: process.pid)
        if not found:
            raise SoakError(f"found no {kind}, expected one; {self.tail()}")
        return rng.choice(found) if rng else found[0]

    def kill_mlflow(self) -> None:
        """SIGKILL to the MLflow server and its children."""
        assert self.stack is not None
        os.killpg(self.stack.processes["mlflow"].pid, signal.SIGKILL)

    def restart_mlflow(self) -> None:
        """The same server again, on the same port and database."""
        assert self.stack is not None
        self.stack = start(self.folder / "stack", num_cpus=NUM_CPUS)
        self.watch.roots[self.stack.processes["mlflow"].pid] = "MLflow"
