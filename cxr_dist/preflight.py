"""Everything that can be known to fail before a GPU is held, each as one check that raises one sentence."""

import difflib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cxr_dist import storage
from cxr_dist.capacity import check_resources, wants_gpu, world_sizes
from cxr_dist.config import Config, flatten
from cxr_dist.data.boxes import given_boxes
from cxr_dist.data.images import PIXELS_VERSION
from cxr_dist.data.manifest import MANIFEST, Manifest
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate.second_labels import read_second_labels
from cxr_dist.experiment import absolute_uri, no_answer
from cxr_dist.prices import read_prices
from cxr_dist.scrub import refuse_secrets, scrub

__all__ = [
    "check_boxes",
    "check_dataset",
    "check_positives",
    "check_resources",
    "check_second_labels",
    "check_secrets",
    "check_storage",
    "check_tracking",
    "check_weights",
    "run",
    "wants_gpu",
    "within",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

"""Longest wait for the first answer of a tracking server, seconds."""
DEADLINE_S = 20.0
"""Longest wait for a tracking server to look up the experiment, or a database to log in, seconds."""


def run(config: Config, *, writing: bool = True) -> Manifest:
    """Every check that needs no cluster, cheapest first; gives the dataset's manifest. Raises InputError.

    `check_resources` is the one that is left, once Ray is there to ask. Without `writing` nothing is written, and so
    not tried whether it can be.
    """
    check_secrets(config)
    check_weights(config)
    read_prices(config.cost)
    manifest = check_dataset(config)
    check_positives(manifest, config)
    check_second_labels(config)
    check_boxes(config, manifest)
    world_sizes(config, manifest.row_group)
    check_tracking(config)
    if writing:
        check_storage(config)
    return manifest


def check_secrets(config: Config) -> None:
    """No config value holds a credential: the config is logged, kept in checkpoints and pickled to workers."""
    refuse_secrets(flatten(config))


def check_tracking(config: Config) -> None:
    """The tracking store can be reached and written: a SQLite file, an MLflow server, or a database."""
    uri = config.tracking.uri
    try:
        if uri.startswith("sqlite:"):
            _check_sqlite(absolute_uri(uri))
        elif uri.startswith(("http://", "https://")):
            _check_server(uri.rstrip("/"), config.tracking.experiment)
        else:
            _check_database(uri)
    except ConfigError:
        raise
    except InputError as error:
        if config.tracking.required:
            raise
        log.warning("%s (the run begins all the same: tracking.required is false)", error)


def check_storage(config: Config) -> None:
    """`train.storage_path` takes an object and lets it be removed again."""
    uri = config.train.storage_path
    if not uri:
        raise ConfigError("train.storage_path: found nothing, expected the URI under which checkpoints are kept")
    marker = storage.join(uri, f".preflight-{uuid.uuid4().hex}")
    try:
        storage.put_atomic(marker, b"written by preflight, may be removed")
        storage.delete(marker)
    except OSError as error:
        raise InputError(
            f"train.storage_path: {storage.shown(uri)} cannot be written ({error.strerror or error}); "
            "give the user of this process the right to write there, or give another path"
        ) from None


def check_weights(config: Config) -> None:
    """`model.weights` names known weights or something that exists; what is in it, the model's loader checks."""
    weights = config.model.weights
    if weights in ("imagenet", "random"):
        return
    if not storage.exists(weights):
        near = difflib.get_close_matches(weights, ("imagenet", "random"), n=1)
        hint = f"did you mean {near[0]}?" if near else "give imagenet, random, or the URI of a state dict"
        raise ConfigError(f"model.weights: found nothing at {storage.shown(weights)}; {hint}")


def check_dataset(config: Config) -> Manifest:
    """The manifest at `data.uri`, if it can be read and is the dataset that the config describes."""
    uri = config.data.uri
    if not uri:
        raise ConfigError("data.uri: found nothing, expected the URI that jobs/ingest.py wrote the dataset to")
    if not storage.exists(storage.join(uri, MANIFEST)):
        found = storage.list_files(uri, recursive=False)
        if not found and not storage.exists(uri):
            raise DataError(
                f"data.uri: found nothing under {storage.shown(uri)}; run jobs/ingest.py with this data.uri first, "
                "or correct the prefix"
            )
    manifest = Manifest.load(uri)
    for name in ("label_set", "size", "encoding"):
        wanted, there = getattr(config.data, name), getattr(manifest, name)
        if wanted != there:
            raise ConfigError(
                f"data.{name}: found {wanted!r}, but the dataset at {storage.shown(uri)} was ingested with {there!r}; "
                f"set data.{name} to {there!r}, or ingest again to another data.uri"
            )
    check_pixels(manifest)
    for split in ("train", "validation", *(["test"] if config.evaluate.test else [])):
        if split not in manifest.splits or manifest.splits[split].num_rows == 0:
            raise DataError(
                f"{storage.shown(uri)}: found no images in the {split} split, expected some; ingest a larger part of the "
                + (
                    "release, or set evaluate.test to false"
                    if split == "test"
                    else "release or another data.validation_fraction"
                )
            )
    return manifest


def check_pixels(manifest: Manifest) -> None:
    """The dataset's pixels are those that this version makes."""
    if manifest.pixels_version != PIXELS_VERSION:
        raise DataError(
            f"{storage.shown(manifest.uri)}: found pixels_version {manifest.pixels_version!r}, this version makes "
            f"{PIXELS_VERSION!r}; ingest again to another data.uri, or use the version that wrote it"
        )


def check_second_labels(config: Config) -> None:
    """The second source of labels, which is wanted when training is over, can be read."""
    if config.evaluate.second_labels:
        read_second_labels(config.evaluate.second_labels)


def check_positives(manifest: Manifest, config: Config) -> None:
    """Every finding that is trained has positives and negatives in the train split."""
    skipped = config.train.skip_findings
    for name in skipped:
        if name not in manifest.findings:
            near = difflib.get_close_matches(name, manifest.findings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the findings are {', '.join(manifest.findings)}"
            raise ConfigError(f"train.skip_findings: found {name!r}, which the dataset has not; {hint}")
    if set(manifest.findings) <= set(skipped):
        raise ConfigError("train.skip_findings: found every finding of the dataset, expected one left to train")
    train = manifest.splits["train"]
    for name in manifest.findings:
        positives = train.positives.get(name, 0)
        if name not in skipped and positives in (0, train.num_rows):
            kind = "positives" if positives == 0 else "negatives"
            raise DataError(
                f"{name}: found no {kind} among the {train.num_rows} images of the train split, expected at least one; "
                f"add {name} to train.skip_findings or ingest more images"
            )


def check_boxes(config: Config, manifest: Manifest) -> None:
    """The boxes at `evaluate.boxes`, if any, can be read, and are of the dataset's images."""
    boxes = given_boxes(config.evaluate)
    if not boxes:
        return
    named = pa.array(sorted({box.image_id for box in boxes}), pa.string())
    batches = (batch for split in manifest.splits for batch in manifest.row_batches(split, ["image_id"]))
    if not any(pc.any(pc.is_in(batch["image_id"], value_set=named)).as_py() for batch in batches):
        raise DataError(
            f"evaluate.boxes: found {len(boxes)} boxes in {storage.shown(config.evaluate.boxes)} (first {boxes[0].image_id}), none "
            f"of an image in {storage.shown(manifest.uri)}, expected some; give the boxes of that release, or leave it empty"
        )


def _check_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ConfigError(
            f"tracking.uri: found {found}, expected a SQLite file {path}; make its folder or give another"
        )
    for needed in (path.parent, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise InputError(
                f"tracking.uri: {needed} may not be written by this user; give the right to write it or another path"
            )


def _check_server(uri: str, experiment: str) -> None:
    mend = "start it (mlflow server) or correct tracking.uri"
    reason = no_answer(uri)
    if reason:
        raise InputError(f"tracking.uri: {reason}; {mend}")
    try:
        within(DEADLINE_S, lambda: MlflowClient(uri).get_experiment_by_name(experiment))
    except (MlflowException, TimeoutError) as error:
        raise InputError(
            f"tracking.uri: the server at {uri} does not serve MLflow experiments ({_one_line(error)}); check the "
            "address, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and the server's --allowed-hosts"
        ) from None


def _check_database(uri: str) -> None:
    try:
        within(DEADLINE_S, lambda: sqlalchemy.create_engine(uri).connect().close())
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, TimeoutError) as error:
        raise InputError(
            f"tracking.uri: the database {scrub(uri)} cannot be opened ({_one_line(error)}); start it, correct the "
            "address, or set PGPASSWORD"
        ) from None


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result or exception; TimeoutError if neither has come by then (the call is left behind)."""
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((True, call()))
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.append((False, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    done, result = outcome[0]
    if not done:
        raise result
    return result


def _one_line(error: BaseException) -> str:
    return scrub(" ".join(str(error).split()))[:300]
