"""From what a person names to score tables: files, runs, registered models, checkpoints.

    scores.parquet, preds.csv       a table of ours, or any model's with `data.labels`
    a folder                        of a run (scores/test.parquet) or of a report (scores.parquet)
    runs:/ID, models:/NAME/VERSION  the score tables that MLflow keeps with the run, else those in the run's folder
    RUN/checkpoints/OWNER/STEP.pt   scored now, on `data.uri`; so is any of the others that has no scores of the split

A run brings its validation scores along. NAME=URI says what a model is called. A checkpoint that is scored on test is one
more test evaluation of its run, and counted as such where the run is in MLflow.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cxr_dist import storage
from cxr_dist.compare.judge import Entry
from cxr_dist.config import Config
from cxr_dist.data.texts import shown
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate.loading import load, missing_from_test_list, read_labels
from cxr_dist.evaluate.scores import ScoreTable, read
from cxr_dist.predict.model import find_model, registered_version
from cxr_dist.scrub import scrub

__all__ = ["named", "read_entries"]

TABLE = (".csv", ".csv.gz", ".parquet")
"""Ends of the names of score tables."""
LONGEST_NAME = 80

STORED = {"test": "scores/test.parquet", "validation": "scores/validation.parquet"}
"""Score tables in a run's folder."""
REPORTED = {"test": "scores.parquet", "validation": "validation_scores.parquet"}
"""Score tables in a report's folder and among a run's artifacts."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    scores: ScoreTable
    validation: ScoreTable | None = None
    cleaned: int = 0
    origin: str = ""
    how: str = ""
    """How the scores were made, if they were made now."""


def read_entries(config: Config, asked: Sequence[str], validation: Sequence[str], split: str) -> list[Entry]:
    """The models that are asked for, scored on `split`; `validation` holds NAME=URI of tables to choose thresholds on.

    InputError for what cannot be read or scored, and for judged images that are not in `data.test_list` if it is given.
    """
    models = [named(text) for text in asked]
    fitted = dict(_pair(text, [name for name, _ in models]) for text in validation)
    labels = read_labels(config.data)
    entries = []
    for name, uri in models:
        found = _found(config, labels, uri, split)
        if found.scores.split != split:
            raise DataError(
                f"{name}: found scores of split {found.scores.split}, expected {split}; give --split or other scores"
            )
        if split == "test":
            try:
                missing_from_test_list(config.data, labels, found.scores)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
        if name in fitted:
            found = replace(found, validation=load(config, labels, fitted[name], "validation")[0])
        entries.append(
            Entry(
                name=name,
                scores=found.scores,
                validation=found.validation,
                origin=found.origin or storage.shown(uri),
                cleaned=found.cleaned,
            )
        )
    return entries


def named(text: str) -> tuple[str, str]:
    """Name and URI of NAME=URI; a URI alone is called by its end."""
    name, sign, uri = text.partition("=")
    if not sign or re.search(r"[/:?]", name):  # s3://bucket/x?region=y is no name
        name, uri = _called(text), text
    if not uri.strip() or not name.strip():
        raise ConfigError(f"models: found {shown(text)}, expected a URI or NAME=URI")
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ConfigError(f"models: found the name {shown(name)}, expected at most {LONGEST_NAME} letters of one line")
    return name, uri


def _called(uri: str) -> str:
    plain = storage.shown(uri).split("?")[0].rstrip("/")
    if plain.startswith(("models:/", "runs:/")):
        return plain.partition(":/")[2]
    parts = [part for part in plain.split("/") if part]
    last = re.sub(r"\.(csv|parquet)(\.gz)?$|\.pt$", "", parts[-1]) if parts else ""
    if "checkpoints" in parts[1:]:
        return f"{parts[parts.index('checkpoints') - 1]}/{last}"
    generic = last in ("scores", "test", "validation", "validation_scores") and last != parts[-1]
    above = [part for part in parts[:-1] if part != "scores"]
    return above[-1] if generic and above else last


def _pair(text: str, names: Sequence[str]) -> tuple[str, str]:
    for name in names:
        if text.startswith(f"{name}=") and len(text) > len(name) + 1:
            return name, text[len(name) + 1 :]
    raise ConfigError(f"--validation: found {shown(text)}, expected NAME=URI with one of {', '.join(names)}")


def _found(config: Config, labels: pa.Table | None, uri: str, split: str) -> _Found:
    if uri.startswith(("models:/", "runs:/")):
        return _from_mlflow(config, labels, uri, split)
    if uri.endswith(TABLE):
        scores, cleaned = load(config, labels, uri, split)
        return _Found(scores=scores, cleaned=cleaned)
    if "/checkpoints/" in uri:
        return _scored(config, uri, split)
    stored = _stored(config, labels, uri, split, STORED) or _stored(config, labels, uri, split, REPORTED)
    if stored is not None:
        return stored
    if not storage.exists(uri):
        raise InputError(
            f"model {storage.shown(uri)}: found nothing there, expected a score table ({', '.join(TABLE)}), a run's folder, a "
            "checkpoint, models:/NAME/VERSION or runs:/ID"
        )
    if storage.exists(storage.join(uri, "checkpoints")):
        return _scored(config, uri, split)
    raise InputError(
        f"model {storage.shown(uri)}: found neither {STORED[split]} nor {REPORTED['test']} of split {split} nor checkpoints in it, "
        "expected a run's or a report's folder"
    )


def _stored(config: Config, labels: pa.Table | None, folder: str, split: str, names: dict[str, str]) -> _Found | None:
    """The tables that lie in a folder; None if there are none of the split."""
    fitted = storage.join(folder, names["validation"])
    validation = load(config, labels, fitted, "validation") if storage.exists(fitted) else None
    for name in dict.fromkeys(
        (names[split], names["test"])
    ):  # a report of validation images has them as scores.parquet
        where = storage.join(folder, name)
        if storage.exists(where) and read(where).split == split:
            scores, cleaned = load(config, labels, where, split)
            return _Found(
                scores=scores,
                validation=validation[0] if validation else None,
                cleaned=cleaned,
                origin=storage.shown(where),
            )
    return None


def _from_mlflow(config: Config, labels: pa.Table | None, asked: str, split: str) -> _Found:
    """The tables of a run or of the run that a version was registered from; else its checkpoint, scored now."""
    from mlflow import MlflowClient  # seconds that a file does not take
    from mlflow.exceptions import MlflowException

    database = Path(config.tracking.uri.removeprefix("sqlite:///"))
    if config.tracking.uri.startswith("sqlite:///") and not database.is_file():
        raise ConfigError(
            f"tracking.uri: found no file {database}, expected MLflow's database that has {asked}; give its URI"
        )
    client = MlflowClient(config.tracking.uri)
    found, origin, run_id = None, asked, ""
    try:
        run_id = asked.removeprefix("runs:/").partition("/")[0]
        if asked.startswith("models:/"):
            run_id = registered_version(client, asked).run_id
        if run_id:
            run = client.get_run(run_id)
            origin = f"{asked}, run {run.info.run_name or run_id} ({run_id})"
            with tempfile.TemporaryDirectory() as folder:
                _download(client, run_id, folder)
                found = _stored(config, labels, folder, split, REPORTED)
            tagged = run.data.tags.get("run_folder")
            if found is None and tagged:
                found = _stored(config, labels, tagged, split, STORED)
    except MlflowException as error:
        raise InputError(
            f"model {asked}: MLflow at {scrub(config.tracking.uri)} does not give it "
            f"({scrub(' '.join(str(error).split()))[:300]}); check name, version and tracking.uri"
        ) from None
    if found is None:
        with find_model(asked, config.tracking.uri) as model:
            found = _scored(config, model.uri, split, run_id=run_id)
        origin += f", {found.how}"
    return replace(found, origin=origin)


def _download(client: Any, run_id: str, folder: str) -> None:
    for name in {entry.path for entry in client.list_artifacts(run_id)} & set(REPORTED.values()):
        client.download_artifacts(run_id, name, folder)


def _scored(config: Config, uri: str, split: str, *, run_id: str = "") -> _Found:
    """A checkpoint's scores, made now, with the validation scores that lie with it; `run_id` is its run, if known."""
    if not config.data.uri:
        raise ConfigError(
            f"data.uri: found nothing, expected the dataset that {storage.shown(uri)} is scored on; its run has no scores of "
            f"split {split}"
        )
    import ray  # only this branch needs Ray and torch, which take seconds to import

    from cxr_dist import cluster
    from cxr_dist.capacity import wants_gpu
    from cxr_dist.evaluate.counted import count_again
    from cxr_dist.evaluate.inference import score_split
    from cxr_dist.train.checkpoint import find_checkpoint

    config = replace(config, data=replace(config.data, uri=storage.absolute(config.data.uri)))
    uri = storage.absolute(uri)
    _, checkpoints, entry = find_checkpoint(uri)
    validation = None
    if entry.scores is not None:
        checkpoints.read_scores(entry)  # checked against its SHA-256
        validation = read(storage.join(checkpoints.folder, entry.scores))
    cluster.connect(2)
    cluster.check_visible({"data.uri": config.data.uri, "the checkpoint": uri})
    scores, _ = score_split(config, uri, split, use_gpu=wants_gpu(config, ray.cluster_resources()))
    how = "scored now"
    if split == "test":
        number, why = count_again(checkpoints.folder, config.tracking.uri, run_id=run_id)
        how += f", test evaluation number {number}" if number else f", a test evaluation that is not counted: {why}"
    return _Found(
        scores=scores, validation=validation, origin=f"{storage.shown(checkpoints.uri(entry))}, {how}", how=how
    )
