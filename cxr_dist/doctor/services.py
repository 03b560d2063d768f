"""What a run needs besides nodes, tried from the driver: weights, dataset, store, tracking server. Each by doing it."""

import dataclasses
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from cxr_dist import preflight, storage
from cxr_dist.config import Config
from cxr_dist.data import synth
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.shards import ShardReader
from cxr_dist.doctor.problems import Problem, caught, of_sentence, one_line
from cxr_dist.errors import DataError, InputError
from cxr_dist.experiment import create_run

__all__ = ["check_data", "check_runs", "check_store", "remove", "sample_images", "starting_weights"]

NUM_IMAGES = 8
"""PNG files that nodes decode in turn, 3 MB of NIH's."""
FILE = "doctor.txt"
WEIGHTS_S = 120.0
"""Longest that starting weights may take to load, seconds."""
TRACKING_S = 60.0
"""Longest that the tracking server may take to make a run and to delete it, seconds."""


def check_data(config: Config, problems: list[Problem], notes: list[str]) -> Manifest | None:
    """The dataset's manifest, if there is one that a run could use."""
    if not config.data.uri:
        notes.append("dataset: data.uri is empty, so none was looked at")
        return None
    manifest = None
    with caught("dataset", problems):
        manifest = preflight.check_dataset(config)
        preflight.check_positives(manifest, config)
        preflight.check_boxes(config, manifest)
    with caught("dataset", problems):
        preflight.check_second_labels(config)
    return manifest


def starting_weights(config: Config, findings: int, problems: list[Problem]) -> bytes:
    """The run's starting weights as its ranks get them, or random ones where they are not to be had."""
    import torch  # takes seconds

    from cxr_dist.model import weights
    from cxr_dist.model.augment import to_input

    def load(name: str) -> weights.Initial:
        return weights.initial(name, num_findings=findings, seed=config.train.seed)

    found = None
    with caught("weights", problems):
        preflight.check_weights(config)
        try:
            found = preflight.within(WEIGHTS_S, lambda: load(config.model.weights))
        except TimeoutError as error:
            raise InputError(
                f"model.weights: found {one_line(error)} from {storage.shown(config.model.weights)}, expected the weights; put "
                "the file in the bucket and give its URI"
            ) from None
    found = found or load("random")
    if found.random:  # else their features vanish with depth, and a CPU is slow on what is nearly nothing
        noise = torch.randint(0, 256, (4, 64, 64), dtype=torch.uint8)
        state = weights.calibrate(found.state, to_input(noise, found.normalization))
        found = dataclasses.replace(found, state=state)
    return weights.save(found)


def check_store(prefix: str, problems: list[Problem]) -> float | None:
    """Write an object under `prefix` and remove it; seconds by which the store's clock is ahead of ours, to a second or so.

    None where it does not tell, or cannot be written.
    """
    marker = storage.join(prefix, "driver")
    try:
        before = time.time()
        storage.put_atomic(marker, b"written by the doctor, may be removed")
        after = time.time()
        written = storage.modified_ns(marker) / 1e9
        storage.delete(marker)
    except (InputError, OSError) as error:
        found = str(error) if isinstance(error, InputError) else f"{storage.shown(prefix)}: {one_line(error)}"
        problems.append(of_sentence("store", f"train.storage_path: {found}"))
        return None
    if not written:
        return None
    # stores tell whole seconds, rounded down
    ahead, behind = written - after, written + 1 - before
    return 0.0 if ahead <= 0 <= behind else min(ahead, behind, key=abs)


def remove(prefix: str, notes: list[str]) -> None:
    """Take away what a node that died meanwhile has left under the doctor's prefix."""
    try:
        storage.delete_dir(prefix)
    except (InputError, OSError) as error:
        notes.append(f"{storage.shown(prefix)} could not be removed ({one_line(error)}); remove it by hand")


def check_runs(config: Config, problems: list[Problem], notes: list[str]) -> None:
    """Make a run in the experiment, log a metric and a file, and delete the run."""
    try:
        strict = dataclasses.replace(config.tracking, required=True)
        preflight.check_tracking(dataclasses.replace(config, tracking=strict))
        path = config.tracking.uri.removeprefix("sqlite:///")
        if path != config.tracking.uri and not Path(path).exists():
            notes.append(f"MLflow: {path} will be made by the first run")
            return
        left = preflight.within(TRACKING_S, lambda: _run_and_delete(config))
        if left:
            notes.append(f"MLflow: {left} (37 bytes) could not be deleted, which no run needs; `mlflow gc` may")
    except InputError as error:
        problem = of_sentence("MLflow", str(error))
    except Exception as error:  # noqa: BLE001 - servers and their stores fail in every way
        problem = Problem(
            check="MLflow",
            found=f"{storage.shown(config.tracking.uri)} did not make a run with a file and delete it ({one_line(error)})",
            expected="that it does",
            do="see the server's log, its rights on its database and bucket, and MLFLOW_TRACKING_USERNAME and _PASSWORD",
        )
    else:
        return
    if config.tracking.required:
        problems.append(problem)
    else:
        notes.append(f"MLflow: {problem.sentence()} (a run begins all the same: tracking.required is false)")


def sample_images(manifest: Manifest | None, config: Config) -> tuple[Sequence[bytes], str]:
    """PNG files for nodes to decode, and whose they are: the dataset's own if it holds any, else drawn ones."""
    if manifest is not None and manifest.encoding == "png":
        reader = ShardReader.from_manifest(manifest, "train", config.data)
        groups = range(min(-(-NUM_IMAGES // manifest.row_group), manifest.splits["train"].num_row_groups))
        try:
            images = reader.read(list(groups))["image"].to_pylist()[:NUM_IMAGES]
        except DataError:  # its check says so
            images = []
        if images:
            return images, "the dataset's"
    with tempfile.TemporaryDirectory(prefix="cxr-doctor-") as folder:
        synth.write_release(folder, num_patients=2, seed=0, processes=1)
        files = sorted(Path(folder, "images").iterdir())[:NUM_IMAGES]
        return [file.read_bytes() for file in files], "drawn"


def _run_and_delete(config: Config) -> str:
    """Make a run with a metric and a file, and delete both; what stays of it."""
    uri = config.tracking.uri
    client = MlflowClient(uri)
    run_id = create_run(client, uri, config.tracking.experiment, f"doctor-{uuid.uuid4().hex[:8]}")
    try:
        client.log_metric(run_id, "doctor", 1.0)
        client.log_text(run_id, "written by the doctor, may be removed", FILE)
        client.update_run(run_id, status="FINISHED")
        where = client.get_run(run_id).info.artifact_uri
        try:
            get_artifact_repository(where).delete_artifacts(FILE)
        except Exception:  # noqa: BLE001 - not every store takes a server's bulk deletion
            return f"{where}/{FILE}"
        return ""
    finally:
        client.delete_run(run_id)
