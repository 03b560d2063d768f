"""The MLflow run from birth to final status, as the driver owns it.

Only explicit clients are used: nothing sets MLflow's global tracking URI, its environment variable or an active run.
Once the run is open, no failure of the tracking server stops the job: what could not be written is tried again at the
end, then kept in the run's folder (`unsent`), and named in `TrackedRun.missed` and in the log. With `tracking.required`
false a run may even begin while the server is away; it gets its MLflow run later (`PENDING`). Credentials of the server belong in the environment (MLFLOW_TRACKING_USERNAME,
MLFLOW_TRACKING_PASSWORD, PGPASSWORD), never in the URI; whatever is written passes `scrub`.
"""

import contextlib
import logging
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from cxr_dist import unsent, writes
from cxr_dist.config import Config
from cxr_dist.errors import InputError
from cxr_dist.experiment import PENDING, absolute_uri, create_run, no_answer
from cxr_dist.journal import MetricJournal
from cxr_dist.scrub import scrub
from cxr_dist.writes import Write

__all__ = ["TrackedRun", "commit_tags", "git_tags", "open_run"]

CLOSE_S = 30.0
KILLED_CLOSE_S = 2.0

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]


def open_run(
    config: Config,
    *,
    run_id: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, object],
    storage_dir: str,
    folder: str = "",
    is_ours: Callable[[], bool] = lambda: True,
) -> "TrackedRun":
    """The run of `config`, created on `with` (or reopened, with `run_id`) and closed with its true status at the end.

    `storage_dir` is a local folder that outlives the process; the driver's own metrics wait there for the server, and if
    it does not come back, under `folder`, the run's folder in storage. Once `is_ours` is false, another process has taken
    the run over, and this one leaves it as it is.
    """
    return TrackedRun(config, run_id, params, tags, Path(storage_dir), folder, is_ours)


class TrackedRun:
    """An MLflow run that is open while its `with` block runs.

    Status at the end: FINISHED; KILLED after SIGTERM, SystemExit or KeyboardInterrupt; FAILED after any other exception,
    whose one-line message becomes the tag `failure`. The exception itself goes on unchanged. Opening raises `InputError`
    if the server cannot be used or `run_id` is unknown; later methods raise only for faults of the caller.
    """

    def __init__(
        self,
        config: Config,
        run_id: str | None,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        storage_dir: Path,
        folder: str = "",
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.tracking_uri = absolute_uri(config.tracking.uri)
        self.missed: list[str] = []
        self._again: list[Write] = []
        self._experiment = config.tracking.experiment
        self._required = config.tracking.required
        self._name = config.run.name
        self._run_id = run_id
        self._params = params
        self._tags = tags
        self._storage_dir = storage_dir
        self._folder, self._is_ours = folder, is_ours
        self._journal: MetricJournal | None = None
        self.told_to_stop = False
        """Whether SIGTERM has come. The SystemExit that it raises may reach others with another code (out of `ray.get`)."""
        self._old_sigterm: Any = None
        self._opened = False
        self.at_end: Callable[[], object] = lambda: None
        """Called when the run ends, whichever way: the last that it logs."""
        self.held = False
        """Whether the server has the run open; else everything waits for another day."""
        self._closed = False

    @property
    def run_id(self) -> str:
        """Id of the MLflow run, known once the run is open."""
        if self._run_id is None:
            raise RuntimeError("the run has no id before its `with` block begins")
        return self._run_id

    def __enter__(self) -> Self:
        self._catch_sigterm()
        try:
            self._open()
            self.set_tags(git_tags() | dict(self._tags))
            self.log_params(self._params)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.finish("KILLED")
        else:
            self.finish("FAILED", _one_line(error) or type(error).__name__)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Add params; a value too long for MLflow is cut. A param that the run has with another value keeps the old one."""
        self._tell(writes.params(params))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set or overwrite tags."""
        self._tell(writes.tags(tags))

    def count_in_experiment(self, counter: str, tag: str) -> None:
        """Add one to a number kept as a tag of the experiment, and say in a tag of the run which one it is."""
        self._tell(writes.count(counter, tag))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, epoch: float | None = None) -> None:
        """Record metrics of the driver, local first: see `MetricJournal.log`."""
        if self._journal is None:
            path = self._storage_dir / f"metrics-driver-{self.run_id}.jsonl"
            self._journal = MetricJournal(path, self.tracking_uri, self.run_id)
        self._journal.log(metrics, step=step, epoch=epoch)

    def send_kept(self) -> None:
        """Send what the server did not take in earlier attempts at the run."""
        if not (self._folder and self.held):
            return
        try:
            unsent.send(self._folder, self.tracking_uri, self.run_id)
        except Exception as error:  # noqa: BLE001 - as `_tell`; what was not sent stays where it is
            log.warning("MLflow run %s: earlier attempts' writes are not sent: %s", self._run_id, _one_line(error))

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Keep a file with the run."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a file to keep with the run")
        self._tell(writes.artifacts(Path(path), artifact_path))

    def log_artifacts(self, folder: str | Path, artifact_path: str | None = None) -> None:
        """Keep all files of a folder with the run."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: expected a folder to keep with the run")
        self._tell(writes.artifacts(Path(folder), artifact_path))

    def log_model(self, folder: str | Path, wish: Mapping[str, Any]) -> dict[str, Any] | None:
        """Log an MLflow model's folder, as a version if that is wished (`registry.publish.Wish`); what became of it. None
        if the server did not take it: it is told again at the end, or by `jobs/sync.py`."""
        return self._tell(writes.model(Path(folder), wish))

    def log_dataset(
        self, name: str, digest: str, source_uri: str, profile: Mapping[str, object], *, context: str = "training"
    ) -> None:
        """Name a dataset as an input of the run; of the digest MLflow keeps the first 36 characters."""
        self._tell(writes.dataset(name, digest, source_uri, profile, context))

    def finish(self, status: Status = "FINISHED", failure: str = "") -> None:
        """Send what waits and set the final status; called by the `with` block, harmless when called again.

        Takes at most 30 s, after a kill 2 s (`ray job stop` kills outright after 3). SIGTERM is ignored meanwhile.
        """
        if self._closed:
            return
        self._closed = True
        with self._sigterm_ignored():
            if not self._opened:
                return
            if not self._is_ours():
                log.error("run %s has been taken over by another process; its status is left to that one", self._run_id)
                return
            longest_s = KILLED_CLOSE_S if status == "KILLED" else CLOSE_S
            closing = threading.Thread(target=self._close, args=(status, failure, longest_s), daemon=True)
            closing.start()
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the waiting, not the story of the first
                closing.join(longest_s)
            if closing.is_alive():
                self._miss(f"status {status}", TimeoutError(f"no answer within {longest_s:g} s"))

    def _close(self, status: Status, failure: str, longest_s: float) -> None:
        # after a kill the status first: there may be no time for anything else
        if status == "KILLED":
            self._set_status(status)
        try:
            self.at_end()
        except Exception as error:  # noqa: BLE001 - the status comes before what is said beside it
            self._miss("what is logged at the end", error)
        if self._journal is not None and unsent.close(self._journal, self._folder, longest_s / 2):
            self.missed.append(f"metrics in {self._journal.path}")
        if status != "KILLED":
            self._tell_again()
            if failure:
                self.set_tags({"failure": failure})
            self._set_status(status)
        unsent.keep(self._again, self._folder)

    def _set_status(self, status: Status) -> None:
        try:
            self._require_server()
            self._client.set_terminated(self.run_id, status)
        except Exception as error:  # noqa: BLE001 - as `_tell`
            self._miss(f"status {status}", error)

    def _open(self) -> None:
        """Create or reopen the run; where MLflow is away and not required, leave that to `jobs/sync.py` or the next start."""
        try:
            self._client = MlflowClient(self.tracking_uri)
            pending = self._run_id if self._run_id and self._run_id.startswith(PENDING) else ""
            if self._run_id and not pending:
                self._reopen(self._run_id)
            else:
                self._run_id = create_run(self._client, self.tracking_uri, self._experiment, self._name, pending)
            self.held = True
        except MlflowException as error:
            if self._required:
                raise InputError(
                    f"tracking.uri: MLflow at {scrub(self.tracking_uri)} does not open the run ({_one_line(error)}); "
                    "start the server, give another URI, or set tracking.required to false"
                ) from None
            self._run_id = self._run_id or f"{PENDING}{uuid.uuid4().hex}"
            log.warning(
                "MLflow at %s does not open the run (%s); it goes on without (tracking.required is false), and "
                "jobs/sync.py or its next start tells MLflow of it",
                scrub(self.tracking_uri),
                _one_line(error),
            )
        self._opened = True

    def _reopen(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        self._client.update_run(run_id, status="RUNNING")
        if "failure" in run.data.tags:
            self._client.delete_tag(run_id, "failure")

    def _tell(self, write: Write) -> dict[str, Any] | None:
        """Tell the server now, or later if it does not take it; what came of it, None in the latter case."""
        try:
            self._require_server()
            return write.do(self._client, self.run_id)
        except Exception as error:  # noqa: BLE001 - servers and artifact stores fail in every way; a trained model is worth more
            self._miss(write.what, error)
            self._again.append(write)
            return None

    def _require_server(self) -> None:
        """RuntimeError if the server has the run not open, or has missed something and still does not answer.

        MLflow's client takes seconds over each request to a server that is away; a run's end has a dozen of them.
        """
        if not self.held:
            raise RuntimeError("the server was away when the run began")
        reason = no_answer(self.tracking_uri) if self.missed else None
        if reason:
            raise RuntimeError(scrub(reason))

    def _tell_again(self) -> None:
        """What failed while the run was open, once more: the server may be back."""
        again, self._again = self._again, []
        for write in again:
            self._tell(write)
            self.missed.remove(write.what)

    def _miss(self, what: str, error: Exception) -> None:
        self.missed.append(what)
        log.warning("MLflow run %s lacks %s: %s", self._run_id, what, _one_line(error))

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.told_to_stop = True
        raise SystemExit(128 + signum)

    def _catch_sigterm(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._old_sigterm = signal.signal(signal.SIGTERM, self._on_sigterm) or signal.SIG_DFL

    @contextlib.contextmanager
    def _sigterm_ignored(self) -> Iterator[None]:
        """No SIGTERM while the run closes; afterwards the handler from before the run, or one set since (Ray's)."""
        if self._old_sigterm is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        current = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._old_sigterm if current == self._on_sigterm else current)


def commit_tags(commit: str) -> dict[str, str]:
    """The code's commit as MLflow's UI links it, and in short for people to filter by, with `-dirty` if it ends so."""
    whole, dash, dirty = commit.partition("-")
    return {MLFLOW_GIT_COMMIT: whole, "commit": whole[:12] + dash + dirty}


def git_tags() -> dict[str, str]:
    """The commit of the checkout that this file lies in, if it lies in one; `commit` says whether files were changed since."""
    try:
        found = subprocess.run(  # noqa: S603 - fixed words, and the folder of this file
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607 - git lies elsewhere on every machine
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return commit_tags(found.stdout.strip()) if found.returncode == 0 else {}


def _one_line(error: BaseException) -> str:
    return scrub(" ".join(str(error).split()))[:1000]
