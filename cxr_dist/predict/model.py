"""Which model predicts: a checkpoint by its URI, or what a version in MLflow's model registry, or a run, holds of one.

A version holds a checkpoint if its artifacts, at their top or in a folder of FOLDERS, are a run's folder in small:
`initial.pt` and `checkpoints/OWNER/{index.json, STEP.pt, STEP.parquet}`, as `pack` writes them. Otherwise it is the best
checkpoint of the run that it was registered from, which the run's tag `run_folder` leads to. Nothing is unpickled:
tensors load with `weights_only`, and no other file of the version is fetched.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cxr_dist import storage
from cxr_dist.data import images
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate import scores
from cxr_dist.evaluate.thresholds import DEFAULT_THRESHOLD, fit
from cxr_dist.scrub import scrub
from cxr_dist.train.checkpoint import FORMAT, Checkpoints, find_checkpoint, load_checkpoint

__all__ = ["Model", "Thresholds", "find_model", "pack", "thresholds_of"]

FOLDERS = ("", "checkpoint", "data/checkpoint")
"""Where among a version's artifacts a run's folder in small may lie; the last is that of models that the job logs."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint that can be read here, and what is known of it."""

    asked: str
    """What the user gave."""
    uri: str
    """Of the checkpoint."""
    name: str
    """NAME/VERSION of a registered one, else the end of its URI."""
    sha256: str
    """Of everything that decides its output: starting weights (the frozen prefix) and checkpoint."""
    findings: tuple[str, ...]
    size: int
    local: bool = False
    """Whether only this machine has it, until the `with` block of `find_model` ends."""

    @property
    def version(self) -> str:
        """What predictions are marked with."""
        return f"{self.name}@{self.sha256[:12]}"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The probability from which each finding is flagged."""

    source: str
    """Where they are from, for people."""
    values: dict[str, float] = field(default_factory=dict)
    """Rounded to float32, as probabilities are stored, so that a stored one compares as it did here."""


@contextmanager
def find_model(asked: str, tracking_uri: str) -> Iterator[Model]:
    """The model of a checkpoint's or run folder's URI, of `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/ID/PATH`.

    InputError if there is none, if it holds no checkpoint, or if its pixels are not those that this version makes.
    """
    with ExitStack() as stack:
        if asked.startswith(("models:/", "runs:/")):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            uri, name = _from_mlflow(asked, tracking_uri, folder)
            local = uri == folder
        else:
            uri, name, local = storage.absolute(asked), "", False
        model = replace(_model(asked, uri, name), local=local)
        yield model


def thresholds_of(model: Model, rule: str) -> Thresholds:
    """The model's operating points: those of `youden` or `f1` on its run's validation scores, or one number for all.

    A half where the checkpoint has no scores with it, and for findings that have no such point; `source` says so.
    """
    if rule not in ("youden", "f1"):
        return _same(model, _number(rule), "as asked")
    _, checkpoints, entry = find_checkpoint(model.uri)
    if entry.scores is None:
        return _same(model, DEFAULT_THRESHOLD, "for the checkpoint has no validation scores with it")
    checkpoints.read_scores(entry)
    validation = scores.read(storage.join(checkpoints.folder, entry.scores))
    fitted = {finding: points["youden" if rule == "youden" else "f1"] for finding, points in fit(validation).items()}
    found = {finding: fitted.get(finding) for finding in model.findings}
    lacking = [finding for finding, value in found.items() if value is None]
    source = (
        f"{'Youden’s J' if rule == 'youden' else 'best F1'} on the run's validation split, {len(validation):,} images"
    )
    if lacking:
        source += f" ({DEFAULT_THRESHOLD} for {', '.join(lacking)}: undefined there)"
    values = {finding: DEFAULT_THRESHOLD if value is None else value for finding, value in found.items()}
    return Thresholds(source=source, values={finding: _float32(value) for finding, value in values.items()})


def pack(uri: str, to: str) -> str:
    """Copy a checkpoint, its validation scores and its run's starting weights to the folder `to`: a run's folder in small.

    The URI of the copy. InputError if there is no checkpoint at `uri`.
    """
    folder, checkpoints, entry = find_checkpoint(uri)
    owner, name = "000000", f"{entry.index:09d}"
    storage.put_atomic(storage.join(to, "initial.pt"), storage.read_bytes(storage.join(folder, "initial.pt")))
    copy = replace(entry, file=f"{owner}/{name}.pt")
    storage.put_atomic(storage.join(to, "checkpoints", copy.file), checkpoints.read(entry))
    if entry.scores is not None:
        copy = replace(copy, scores=f"{owner}/{name}.parquet")
        storage.put_atomic(storage.join(to, "checkpoints", str(copy.scores)), checkpoints.read_scores(entry))
    index = {"format": FORMAT, "checkpoints": [asdict(copy)]}
    storage.put_atomic(storage.join(to, "checkpoints", owner, "index.json"), json.dumps(index, indent=1).encode())
    return Checkpoints(to).uri(copy)


def _model(asked: str, uri: str, name: str) -> Model:
    folder, checkpoints, entry = find_checkpoint(uri)
    state: dict[str, Any] = load_checkpoint(checkpoints.uri(entry))
    if state["pixels_version"] != images.PIXELS_VERSION:
        raise DataError(
            f"model {storage.shown(asked)}: found a model of pixels_version {state['pixels_version']!r}, this version makes "
            f"{images.PIXELS_VERSION!r}; use the version that trained it"
        )
    where = storage.join(folder, "initial.pt")
    try:
        initial = hashlib.sha256(storage.read_bytes(where)).hexdigest()
    except FileNotFoundError:
        raise InputError(
            f"model {storage.shown(asked)}: found no {storage.shown(where)}, expected the run's starting weights beside its "
            "checkpoints; give a checkpoint in its run's folder"
        ) from None
    return Model(
        asked=storage.shown(asked),
        uri=checkpoints.uri(entry),
        name=name or f"{storage.shown(folder).rstrip('/').rsplit('/', 1)[-1]}/{entry.index:09d}",
        sha256=hashlib.sha256(f"{initial} {entry.sha256}".encode()).hexdigest(),
        findings=tuple(state["findings"]),
        size=state["size"],
    )


def _from_mlflow(asked: str, tracking_uri: str, folder: str) -> tuple[str, str]:
    """URI of a run's folder, or `folder` if the checkpoint was fetched to it, and the model's name."""
    from mlflow import MlflowClient  # seconds that a plain URI does not take
    from mlflow.exceptions import MlflowException

    path = Path(tracking_uri.removeprefix("sqlite:///"))
    if tracking_uri.startswith("sqlite:///") and not path.is_file():
        raise ConfigError(
            f"tracking.uri: found no file {path}, expected MLflow's database that has {asked}; give its URI"
        )
    client = MlflowClient(tracking_uri)
    try:
        if asked.startswith("models:/"):
            version = _version(client, asked)
            name, run_id = f"{version.name}/{version.version}", version.run_id
            artifacts = client.get_model_version_download_uri(version.name, version.version)
        else:
            run_id, _, artifacts = asked.removeprefix("runs:/").partition("/")
            name, artifacts = asked.removeprefix("runs:/").rstrip("/"), artifacts and asked
        run = client.get_run(run_id) if run_id else None
        if artifacts.startswith("runs:/"):
            source, _, inside = artifacts.removeprefix("runs:/").partition("/")
            artifacts = f"{client.get_run(source).info.artifact_uri}/{inside}"
        if artifacts and _fetch(artifacts, tracking_uri, folder):
            return folder, name
    except MlflowException as error:
        raise InputError(
            f"model {asked}: MLflow at {scrub(tracking_uri)} does not give it ({scrub(' '.join(str(error).split()))[:300]}); "
            "check name, version and tracking.uri"
        ) from None
    tagged = run.data.tags.get("run_folder") if run is not None else None
    if tagged and (asked.startswith("models:/") or not artifacts):
        return tagged, name
    raise InputError(
        f"model {asked}: found no checkpoint, neither initial.pt and checkpoints/ in {scrub(artifacts) or 'its artifacts'} nor a "
        "run with the tag run_folder; give the URI of a run's folder or of a checkpoint in one"
    )


def _version(client: Any, asked: str) -> Any:
    """The registered version; InputError for a name that is none."""
    found = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", asked)
    if found is None:
        raise InputError(f"model {asked}: expected models:/NAME/VERSION with its number, or models:/NAME@ALIAS")
    name, number, alias = found.groups()
    return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)


def _fetch(artifacts: str, tracking_uri: str, folder: str) -> bool:
    """Download a run's folder in small to `folder`; False if these artifacts hold none."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    for inside in FOLDERS:
        base = f"{artifacts.rstrip('/')}/{inside}".rstrip("/")
        names = {Path(entry.path).name for entry in list_artifacts(artifact_uri=base, tracking_uri=tracking_uri)}
        if {"initial.pt", "checkpoints"} <= names:
            for name in ("initial.pt", "checkpoints"):
                download_artifacts(artifact_uri=f"{base}/{name}", dst_path=folder, tracking_uri=tracking_uri)
            return True
    return False


def _same(model: Model, value: float, why: str) -> Thresholds:
    values = dict.fromkeys(model.findings, _float32(value))
    return Thresholds(source=f"{value:g} for every finding, {why}", values=values)


def _number(rule: str) -> float:
    try:
        value = float(rule)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"--thresholds: found {rule!r}, expected youden, f1, or a number from 0 to 1")
    return value


def _float32(value: float) -> float:
    return float(np.float32(value))
