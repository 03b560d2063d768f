"""Housekeeping on a real S3 server, which takes no bulk delete and keeps empty objects for folders: nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.cli import run_job
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.lease import Lease
from jobs import gc

RUNS = "s3://cxr/housekeeping/runs"
KEY = "0123456789abcdef" * 2


def keys(prefix: str = "housekeeping/runs/") -> list[str]:
    """All objects under a prefix, those that stand for folders too."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="cxr", Prefix=prefix)
    return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])]


def make_run(name: str, client: MlflowClient) -> str:
    """A finished run with superseded checkpoints; its MLflow id."""
    folder, run_id = storage.join(RUNS, name), client.create_run("0").info.run_id
    client.set_terminated(run_id, "FINISHED")
    content = {"format": 1, "run_id": run_id, "manifest_sha256": "m", "config": {"model.weights": "imagenet"}}
    storage.put_atomic(storage.join(folder, "run.json"), json.dumps(content).encode())
    for path in ("initial.pt", "scores/test.parquet", "ray/a/b/note"):
        storage.put_atomic(storage.join(folder, path), b"x" * 1000)
    storage.put_atomic(storage.join(folder, "checkpoints/000001/000000010.pt"), b"superseded")
    with Lease.take(folder, owner="ann"):
        for index in (10, 20):
            Checkpoints(folder, owner=2).save(
                {"journal": []}, index=index, epoch=0, score=None, finished=index == 20, scores=b"s"
            )
    return run_id


def test_what_goes_leaves_nothing_and_what_stays_is_whole(
    s3_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.forget_filesystems()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    make_run("old", client)
    kept = make_run("kept", client)
    client.create_registered_model("chest")
    client.create_model_version("chest", "s3://elsewhere/model", run_id=kept)
    for path in ("00000.parquet", "00000.parquet.json"):
        storage.put_atomic(storage.join(RUNS, "features", KEY, path), b"{}")
    storage.put_atomic(storage.join(RUNS, "notes/mine.txt"), b"mine")

    def job(*flags: str) -> dict[str, Any]:
        argv = ["--train.storage_path", RUNS, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", *flags]
        with pytest.raises(SystemExit) as left:
            run_job(gc.main, description="", extra=gc.add_flags, argv=argv)
        assert left.value.code == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    before = keys()
    listed = job("--older-than", "0")
    assert {(item["kind"], item["name"]): item["goes"] for item in listed["items"]} == {
        ("run", "old"): True,
        ("run", "kept"): False,
        ("checkpoints", "kept"): True,
        ("features", KEY): True,
        ("folder", "notes"): False,
    }
    assert keys() == before
    removed = job("--older-than", "0", "--remove")
    assert removed["stayed"] == {}
    left = [name for name in keys() if name and "/lease/" not in name and not name.endswith("/")]
    assert left == sorted(
        [
            *(f"kept/checkpoints/000002/{name}" for name in ("000000010.parquet", "000000010.pt")),
            *(f"kept/checkpoints/000002/{name}" for name in ("000000020.parquet", "000000020.pt", "index.json")),
            *("kept/initial.pt", "kept/ray/a/b/note", "kept/run.json", "kept/scores/test.parquet", "notes/mine.txt"),
        ]
    )
    assert not [name for name in keys() if name.startswith(("old", f"features/{KEY}", "kept/checkpoints/000001"))]
    found = Checkpoints(storage.join(RUNS, "kept"))
    assert [found.load(entry)["journal"] for entry in found.entries()] == [[], []]
