"""The MLflow run from birth to final status, as the driver owns it.

Only explicit clients are used: nothing sets MLflow's global tracking URI, its environment variable or an active run.
Once the run is open, no failure of the tracking server stops the job: what could not be written is named in
`TrackedRun.missed` and in the log. Credentials of the server belong in the environment (MLFLOW_TRACKING_USERNAME,
MLFLOW_TRACKING_PASSWORD, PGPASSWORD), never in the URI; whatever is written passes `scrub`.
"""

import contextlib
import json
import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT

from cxr_dist import unsent
from cxr_dist.config import Config
from cxr_dist.errors import InputError
from cxr_dist.journal import MetricJournal
from cxr_dist.scrub import scrub, scrub_items

__all__ = ["TrackedRun", "absolute_uri", "open_run"]

PARAMS_PER_REQUEST = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_DIGEST = 36
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's UI open the experiment as model training, with its charts, and not as language-model traces."""
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
        self._again: list[tuple[str, Callable[[], object]]] = []
        self._experiment = config.tracking.experiment
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
            known = self._open()
            self.set_tags(_git_tags() | dict(self._tags))
            self._try("params", lambda: self._log_new_params(self._params, known))
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
        self._try("params", lambda: self._log_new_params(params, self._client.get_run(self.run_id).data.params))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set or overwrite tags."""
        entities = [RunTag(key, value[:LONGEST_TAG]) for key, value in scrub_items(tags).items()]
        self._try("tags", lambda: self._client.log_batch(self.run_id, tags=entities))

    def count_in_experiment(self, tag: str) -> int | None:
        """Add one to a number kept as a tag of the experiment; the new number, or None if the server did not answer."""
        counted: list[int] = []

        def count() -> None:
            experiment = self._client.get_run(self.run_id).info.experiment_id
            before = int(self._client.get_experiment(experiment).tags.get(tag, "0"))
            self._client.set_experiment_tag(experiment, tag, before + 1)
            counted.append(before + 1)

        self._try(f"count of {tag}", count)
        return counted[0] if counted else None

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, epoch: int | None = None) -> None:
        """Record metrics of the driver, local first: see `MetricJournal.log`."""
        if self._journal is None:
            path = self._storage_dir / f"metrics-driver-{self.run_id}.jsonl"
            self._journal = MetricJournal(path, self.tracking_uri, self.run_id)
        self._journal.log(metrics, step=step, epoch=epoch)

    def send_kept(self) -> None:
        """Send metrics that the server did not take in earlier attempts at the run."""
        if self._folder:
            self._try("metrics of earlier attempts", lambda: unsent.send(self._folder, self.tracking_uri, self.run_id))

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Keep a file with the run."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a file to keep with the run")
        self._try(f"artifact {path}", lambda: self._client.log_artifact(self.run_id, str(path), artifact_path))

    def log_artifacts(self, folder: str | Path, artifact_path: str | None = None) -> None:
        """Keep all files of a folder with the run."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: expected a folder to keep with the run")
        self._try(f"artifacts {folder}", lambda: self._client.log_artifacts(self.run_id, str(folder), artifact_path))

    def log_dataset(
        self, name: str, digest: str, source_uri: str, profile: Mapping[str, object], *, context: str = "training"
    ) -> None:
        """Name a dataset as an input of the run; of the digest MLflow keeps the first 36 characters."""
        scheme = source_uri.partition("://")[0] if "://" in source_uri else "local"
        dataset = Dataset(
            name=name,
            digest=digest[:LONGEST_DIGEST],
            source_type="local" if scheme == "file" else scheme,
            source=json.dumps({"uri": scrub(source_uri)}),
            profile=json.dumps(profile),
        )
        inputs = [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])]
        self._try("dataset", lambda: self._client.log_inputs(self.run_id, inputs))

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
        if status == "KILLED":
            # The status first: there may be no time for anything else.
            self._try(f"status {status}", lambda: self._client.set_terminated(self.run_id, status))
        if self._journal is not None and unsent.close(self._journal, self._folder, longest_s / 2):
            self.missed.append(f"metrics in {self._journal.path}")
        if status != "KILLED":
            self._try_again()
            if failure:
                self.set_tags({"failure": failure})
            self._try(f"status {status}", lambda: self._client.set_terminated(self.run_id, status))

    def _open(self) -> dict[str, str]:
        """Create or reopen the run; returns the params that it has."""
        try:
            self._client = MlflowClient(self.tracking_uri)
            known = self._reopen(self._run_id) if self._run_id else self._create()
        except MlflowException as error:
            raise InputError(
                f"tracking.uri: MLflow at {scrub(self.tracking_uri)} does not open the run ({_one_line(error)}); "
                "start the server or give another URI"
            ) from None
        self._opened = True
        return known

    def _create(self) -> dict[str, str]:
        experiment = self._find_experiment()
        if experiment.lifecycle_stage != "active":
            raise InputError(
                f"tracking.experiment: {self._experiment!r} is deleted; restore it "
                f"(mlflow experiments restore -x {experiment.experiment_id}) or give another name"
            )
        self._run_id = self._client.create_run(experiment.experiment_id, run_name=self._name or None).info.run_id
        return {}

    def _find_experiment(self) -> Experiment:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                created = self._client.create_experiment(
                    self._experiment, _artifacts_beside(self.tracking_uri), tags=EXPERIMENT_TAGS
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self._experiment)
            else:
                found = self._client.get_experiment(created)
        return found

    def _reopen(self, run_id: str) -> dict[str, str]:
        run = self._client.get_run(run_id)
        self._client.update_run(run_id, status="RUNNING")
        if "failure" in run.data.tags:
            self._client.delete_tag(run_id, "failure")
        return dict(run.data.params)

    def _log_new_params(self, params: Mapping[str, object], known: Mapping[str, str]) -> None:
        values = {key: value[:LONGEST_PARAM] for key, value in scrub_items(params).items()}
        changed = [f"{key}: {known[key]} -> {value}" for key, value in values.items() if known.get(key, value) != value]
        if changed:
            log.warning("params of run %s stay as they were logged; changed since: %s", self.run_id, "; ".join(changed))
            self.set_tags({"params_changed": "; ".join(changed)})
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), PARAMS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_REQUEST])

    def _try(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - servers and artifact stores fail in every way; a trained model is worth more
            self._miss(what, error)
            self._again.append((what, call))

    def _try_again(self) -> None:
        """What failed while the run was open, once more: the server may be back."""
        again, self._again = self._again, []
        for what, call in again:
            self.missed.remove(what)
            self._try(what, call)

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


def absolute_uri(tracking_uri: str) -> str:
    """The tracking URI as every process may use it: a relative SQLite path is taken from the current folder."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return tracking_uri
    return prefix + str(Path(tracking_uri.removeprefix(prefix)).absolute())


def _artifacts_beside(tracking_uri: str) -> str | None:
    """Folder for artifacts next to a SQLite database (MLflow's default depends on the current folder); None: the server's."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    return (database.parent / f"{database.stem}-artifacts").as_uri()


def _git_tags() -> dict[str, str]:
    """The commit of the checkout that this file lies in, if it lies in one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {MLFLOW_GIT_COMMIT: found.stdout.strip()} if found.returncode == 0 else {}


def _one_line(error: BaseException) -> str:
    return scrub(" ".join(str(error).split()))[:1000]
