"""What a run tells MLflow besides metrics, as values: told at once, told again later, or kept in storage for another day."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from cxr_dist import storage
from cxr_dist.errors import DataError
from cxr_dist.scrub import scrub, scrub_items

__all__ = ["Write", "artifacts", "count", "dataset", "keep", "kept", "model", "params", "tags"]

PARAMS_PER_REQUEST = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_DIGEST = 36

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Write:
    """One thing to be told: plain content, and for artifacts and models the file or folder on this machine."""

    kind: Literal["params", "tags", "dataset", "count", "artifacts", "model"]
    what: str
    """For people."""
    content: dict[str, Any]
    path: str = ""

    def do(self, client: MlflowClient, run_id: str) -> dict[str, Any] | None:
        """Tell it; raises whatever the server or its artifact store raises. Of a model, what became of it."""
        match self.kind:
            case "params":
                _log_params(client, run_id, self.content)
            case "tags":
                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self.content.items()])
            case "dataset":
                inputs = DatasetInput(
                    Dataset(**self.content["dataset"]), [InputTag(MLFLOW_DATASET_CONTEXT, self.content["context"])]
                )
                client.log_inputs(run_id, [inputs])
            case "count":
                _count(client, run_id, **self.content)
            case "artifacts":
                send = client.log_artifact if Path(self.path).is_file() else client.log_artifacts
                send(run_id, self.path, self.content["artifact_path"])
            case "model":
                from cxr_dist.registry.publish import (  # imports the network, which nothing else here needs
                    Wish,
                    publish,
                )

                return publish(client, run_id, Path(self.path), Wish(**self.content))
        return None


def params(values: Mapping[str, object]) -> Write:
    """Params; one too long for MLflow is cut. A param that the run has with another value keeps the old one."""
    return Write("params", "params", {key: value[:LONGEST_PARAM] for key, value in scrub_items(values).items()})


def tags(values: Mapping[str, object]) -> Write:
    """Tags, set or overwritten."""
    return Write("tags", "tags", {key: value[:LONGEST_TAG] for key, value in scrub_items(values).items()})


def dataset(name: str, digest: str, source_uri: str, profile: Mapping[str, object], context: str) -> Write:
    """A dataset as an input of the run; of the digest MLflow keeps the first 36 characters."""
    scheme = source_uri.partition("://")[0] if "://" in source_uri else "local"
    content = {
        "name": name,
        "digest": digest[:LONGEST_DIGEST],
        "source_type": "local" if scheme == "file" else scheme,
        "source": json.dumps({"uri": scrub(source_uri)}),
        "profile": json.dumps(profile),
    }
    return Write("dataset", "dataset", {"dataset": content, "context": context})


def count(counter: str, tag: str) -> Write:
    """One more of something in the experiment: a number that is a tag of the experiment, and which one this is, of the run."""
    return Write("count", f"count of {counter}", {"counter": counter, "tag": tag})


def artifacts(path: Path, artifact_path: str | None) -> Write:
    """A file, or all files of a folder."""
    kind = "artifacts" if path.is_dir() else "artifact"
    return Write("artifacts", f"{kind} {path}", {"artifact_path": artifact_path}, str(path))


def model(folder: Path, wish: Mapping[str, Any]) -> Write:
    """The folder of an MLflow model, to be logged and, by the fields of a `registry.publish.Wish`, registered and promoted."""
    return Write("model", f"model {wish['name']}", dict(wish), str(folder))


def keep(writes: list[Write], where: str) -> None:
    """Keep them under a URI, files and all, until `kept` finds them: whole or not at all."""
    entries = []
    for number, write in enumerate(writes):
        files = []
        path = Path(write.path)
        if write.path:
            files = [path.name] if path.is_file() else [str(file.relative_to(path)) for file in _files(path)]
        for file in files:
            storage.upload_atomic(path if path.is_file() else path / file, storage.join(where, f"{number}/{file}"))
        entries.append({**dataclasses.asdict(write), "files": files, "is_file": path.is_file()})
    storage.put_atomic(storage.join(where, "writes.json"), json.dumps(entries, indent=1).encode())


def kept(where: str, folder: Path) -> list[Write]:
    """What `keep` kept, its files fetched into a local folder. DataError for a file that would lie outside of it: who
    writes to the store does not write to this machine."""
    writes = []
    for number, entry in enumerate(json.loads(storage.read_bytes(storage.join(where, "writes.json")))):
        files, is_file = entry.pop("files"), entry.pop("is_file")
        _check_files(where, entry, files)
        local = folder / str(number)
        for file in files:
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            (local / file).write_bytes(storage.read_bytes(storage.join(where, f"{number}/{file}")))
        if entry["path"]:
            entry["path"] = str(local / files[0]) if is_file else str(local)
        writes.append(Write(**entry))
    return writes


def _check_files(where: str, entry: Mapping[str, Any], files: list[str]) -> None:
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file:
            raise DataError(
                f"{storage.shown(where)}: found the file name {file!r}, expected one in a folder; delete it"
            )
    if bool(entry["path"]) is not (entry["kind"] in ("artifacts", "model")):
        raise DataError(
            f"{storage.shown(where)}: found {entry['kind']} of {entry['path']!r}, no write of ours; delete it"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    known = client.get_run(run_id).data.params
    changed = [f"{key}: {known[key]} -> {value}" for key, value in values.items() if known.get(key, value) != value]
    if changed:
        log.warning("params of run %s stay as they were logged; changed since: %s", run_id, "; ".join(changed))
        client.set_tag(run_id, "params_changed", "; ".join(changed)[:LONGEST_TAG])
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_REQUEST])


def _count(client: MlflowClient, run_id: str, *, counter: str, tag: str) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    number = int(client.get_experiment(experiment).tags.get(counter, "0")) + 1
    client.set_experiment_tag(experiment, counter, number)
    client.set_tag(run_id, tag, f"number {number} of this experiment")
