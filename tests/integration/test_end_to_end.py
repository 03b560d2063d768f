"""The job as users run it: `ray job submit` on real servers, out of S3 into MLflow on Postgres.

Real radiographs where they are present, drawn ones in a clone without them. One release is ingested and one run is
trained for all tests of this file; what is asserted comes from the MLflow server and the object store.
"""

import json
import re
import socket
from collections.abc import Iterator

import mlflow.artifacts
import numpy as np
import pytest
from ray.job_submission import JobStatus

from cxr_dist import storage
from cxr_dist.data.manifest import Manifest
from cxr_dist.evaluate import scores
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.spending import attempts_in
from cxr_dist.train.checkpoint import Checkpoints
from tests.conftest import ROOT
from tests.faultproxy import FaultProxy, fault_proxy
from tests.policy import documented, held_to, needs, refused
from tests.submitting import COMMIT, EPOCHS, SHORT, Submitted, find, run

pytestmark = pytest.mark.slow

ARTIFACTS = {
    "figures",
    "report.html",
    "run_record.json",
    "evaluation.json",
    "classification_report.json",
    "classification_report.md",
    "auroc.csv",
    "thresholds.json",
    "curves.csv",
    "config.yaml",
    "scores.parquet",
    "split_audit.json",
    "saliency.json",
}


@pytest.fixture(scope="module")
def manifest(ingested, full_stack) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in full_stack.env.items():
            patch.setenv(name, value)
        loaded = Manifest.load("s3://cxr/nih")
        yield loaded


def test_a_submitted_run_ends_with_everything_in_mlflow(trained, client, manifest):
    assert trained.status == JobStatus.SUCCEEDED, trained.logs[-6000:]
    result = trained.result
    [found] = find(client, "straight")
    assert found.info.run_id == result["run_id"]
    assert found.info.status == "FINISHED" == result["status"]

    assert {file.path for file in client.list_artifacts(found.info.run_id)} >= ARTIFACTS
    assert found.data.tags["manifest_sha256"] == manifest.hash
    assert found.data.params["train.global_batch"] == "32"
    assert found.inputs.dataset_inputs[0].dataset.digest == manifest.hash[:36]

    steps = manifest.splits["train"].num_rows // 32
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, EPOCHS * steps + 1))
    assert np.isfinite([point.value for point in history]).all()
    validated = client.get_metric_history(found.info.run_id, "val/auroc_mean")
    assert [point.step for point in validated] == [steps * (epoch + 1) for epoch in range(EPOCHS)]
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == [
        point.step for point in validated
    ]
    assert {"train/images_per_s", "train/data_wait_fraction", "train/lr"} <= set(found.data.metrics)
    assert {"train/head_of_line_s", "train/rank_skew_fraction"} <= set(found.data.metrics)
    # validation ends the run, after the last steps; the result is rounded to hundredths
    assert 0 < found.data.metrics["train/read_mb"] <= result["read_mb"] + 0.005
    assert any(name.startswith(f"system/{socket.gethostname()}/") for name in found.data.metrics)
    places = {key: client.get_metric_history(found.info.run_id, key) for key in ("epoch", "images_seen")}
    assert [point.value for point in places["epoch"]] == [point.step / steps for point in history]
    assert [point.value for point in places["images_seen"]] == [point.step * 32 for point in history]
    assert found.data.tags["recipe"].startswith("random weights; denseblock4 trained")
    assert (found.data.tags["world_size"], found.data.tags["commit"]) == ("2", COMMIT[:12])
    assert found.data.tags["mlflow.source.git.commit"] == COMMIT
    assert found.data.tags["test_evaluation"] == "number 1 of this experiment"
    for finding, value in result["test_auroc"].items():
        name = "test/auroc_mean" if finding == "mean" else f"test/auroc/{finding}"
        assert found.data.metrics.get(name) == pytest.approx(value)

    rows = {name: split.num_rows for name, split in manifest.splits.items()}
    assert result["n_scored"] == {"val": rows["validation"], "test": rows["test"]}
    assert found.data.metrics["val/n_scored"] == rows["validation"]
    assert found.data.metrics["test/n_scored"] == rows["test"]


def test_a_run_says_what_it_cost(trained, client, manifest):
    """Of the stack's one node, which does not say what it is: hours, and why there is no price."""
    cost = trained.result["cost"]
    assert (cost["nodes"], cost["attempts"], cost["amount"], cost["gpu_utilization"]) == (1, 1, None, None)
    assert cost["prices"] == "infra/prices.toml"  # it came with the working directory
    assert cost["charges"][0]["why"] == "the node does not say its type (label cxr-instance)"
    assert cost["images"] == trained.result["steps"] * 32
    [found] = find(client, "straight")
    hours = found.data.metrics["cost/node_hours"]  # logged when all was done
    record = RunRecord.from_json(storage.read_bytes("s3://cxr/runs/straight/scores/run_record.json"), "record")
    took_s = (found.info.end_time - found.info.start_time) / 1000
    assert 0 < record.cost["node_hours"] < cost["node_hours"] <= hours
    assert hours * 3600 == pytest.approx(took_s, abs=30)  # the driver begins before its MLflow run does
    assert hours == found.data.metrics["cost/unpriced_node_hours"]
    assert "cost/usd" not in found.data.metrics
    assert found.data.tags["cost"].startswith(f"{hours:.3g} node-hours of 1 node")
    assert "\ncost: " in trained.logs
    kept, unread = attempts_in("s3://cxr/runs/straight")
    assert (list(kept), unread) == ([1], 0)
    assert kept[1][0].seconds >= hours * 3600 - 0.01


PLACE = ("s3://cxr", "s3://mlflow")


@pytest.fixture(scope="module")
def planned(jobs, train, trained, client, manifest) -> tuple[Submitted, list, list]:
    """A dry run of the run that nothing disturbed, under another name; what was in storage and MLflow before."""
    before = [storage.list_files(uri) for uri in PLACE], sorted(run.info.run_id for run in everything(client))
    return run(jobs, f"{train} --run.name planned --dry-run"), *before


def everything(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_a_dry_run_says_what_the_run_then_did(planned, trained, manifest):
    job, *_ = planned
    assert job.status == JobStatus.SUCCEEDED, job.logs[-4000:]
    plan, did = job.result, trained.result
    steps, rows = plan["steps"], {name: split.num_rows for name, split in manifest.splits.items()}
    assert {name: plan["images"][name] for name in rows} == rows
    assert (steps["train_left"], steps["epochs"]) == (did["steps"], did["epochs"])
    assert steps["train_per_epoch"] * 32 + plan["images"]["dropped_per_epoch"] == rows["train"]
    assert (
        plan["plan_sha256"]
        == RunRecord.from_json(storage.read_bytes("s3://cxr/runs/straight/scores/run_record.json"), "record").origin[
            "plan_sha256"
        ]
    )
    assert plan["gradient_mb_per_step"] == did["gradient_mb_per_step"]
    # what the decoders counted, rounded to hundredths; a hedged range counts twice
    assert (
        plan["read"]["all_epochs_bytes"] / 2**20 - 0.005
        <= did["read_mb"]
        <= 1.05 * plan["read"]["all_epochs_bytes"] / 2**20
    )
    sizes = [entry.bytes for entry in Checkpoints("s3://cxr/runs/straight").entries()]
    assert all(1 <= size / plan["written"]["checkpoint_bytes"] < 1.05 for size in sizes)
    assert len(sizes) <= plan["written"]["kept"]
    assert plan["cluster"]["nodes"][0]["cpus"] == 4
    assert (plan["cluster"]["decode_cpus"], plan["ways"], plan["seconds"], plan["cost"]) == (3, {}, None, None)
    assert "jobs/doctor.py" in plan["notes"][-1]
    assert re.search(r"^steps +\d+ \+ \d+ of validation an epoch, at most 4 epochs", job.logs, re.MULTILINE)


def test_a_dry_run_leaves_nothing_behind(planned, client):
    _, stored, tracked = planned
    assert [storage.list_files(uri) for uri in PLACE] == stored
    assert sorted(run.info.run_id for run in everything(client)) == tracked


def test_the_logged_scores_are_every_test_row_and_give_the_logged_auroc(trained, client, manifest, tmp_path):
    from sklearn.metrics import roc_auc_score

    path = mlflow.artifacts.download_artifacts(
        run_id=trained.result["run_id"],
        artifact_path="scores.parquet",
        dst_path=str(tmp_path),
        tracking_uri=client.tracking_uri,
    )
    table = scores.read(path)
    assert sorted(table.image_ids) == sorted(manifest.rows("test")["image_id"].to_pylist())
    for k, finding in enumerate(table.findings):
        found = trained.result["test_auroc"][finding]
        if found is not None:
            assert found == pytest.approx(roc_auc_score(table.labels_NK[:, k], table.logits_NK[:, k]), abs=1e-12)


def test_heat_maps_of_the_surest_images_are_logged(trained, client, tmp_path):
    mlflow.artifacts.download_artifacts(
        run_id=trained.result["run_id"], dst_path=str(tmp_path), tracking_uri=client.tracking_uri
    )
    found = json.loads((tmp_path / "saliency.json").read_text())
    assert found["error"] is None
    shown = {image["overlay"] for image in found["images"] if image["overlay"]}
    assert shown
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / "saliency").rglob("*.png")} == shown


def test_no_credential_of_the_servers_is_in_the_log_or_in_mlflow(trained, client, full_stack, tmp_path):
    [found] = find(client, "straight")
    mlflow.artifacts.download_artifacts(
        run_id=found.info.run_id, dst_path=str(tmp_path), tracking_uri=full_stack.addresses["mlflow"]
    )
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(files) >= ARTIFACTS - {"figures"}
    shown = files | {"log": trained.logs.encode(), "run": repr(found.to_dictionary()).encode()}
    for secret in (full_stack.credentials["s3_secret"], full_stack.credentials["postgres_password"]):
        assert not [name for name, content in shown.items() if secret.encode() in content]


@pytest.fixture(scope="module")
def policed(full_stack) -> Iterator[FaultProxy]:
    """The object store as one may use it under the policy of docs/security.md."""
    policy = documented(ROOT / "docs" / "security.md", {"BUCKET": "cxr", "dataset": "nih"})
    with fault_proxy(full_stack.env["AWS_ENDPOINT_URL"]) as proxy:
        proxy.rule = held_to(policy)
        yield proxy


@pytest.fixture(scope="module")
def with_features(jobs, train, manifest, policed, second_id, request) -> dict[str, Submitted]:
    """The same run without kept features, and with them; at once, if the first has not been made yet."""
    env = {"AWS_ENDPOINT_URL": policed.url}
    kept = run(jobs, f"{SHORT.format(train=train)} --train.features on --run.name features-on", env)
    return {"off": request.getfixturevalue("second"), "on": kept}


def test_a_run_needs_no_more_of_the_store_than_the_documented_policy(with_features, policed):
    asked = {action for request in policed.seen for action, _, _ in needs(request)}
    assert {"s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"} <= asked
    assert refused(policed.seen) == []
    assert with_features["on"].status == JobStatus.SUCCEEDED, with_features["on"].logs[-6000:]


def test_runs_from_features_are_the_run_without_and_share_what_is_whole(jobs, train, client, manifest, with_features):
    plain, kept = with_features["off"], with_features["on"]
    rows = {name: split.num_rows for name, split in manifest.splits.items()}
    assert kept.status == JobStatus.SUCCEEDED, kept.logs[-6000:]
    assert kept.result["features"]["computed"] == rows["train"] + rows["validation"]
    assert "object store" in kept.logs
    [found] = find(client, "features-on")
    assert found.data.tags["features"] == "kept: train.features is on"

    where = f"s3://cxr/runs/features/{kept.result['features']['keys']['train/1']}/00000.parquet"
    data = bytearray(storage.read_bytes(where))
    data[len(data) // 2] ^= 1
    storage.put_atomic(where, bytes(data))
    flags = f"{train} --train.epochs 2 --train.views 1 --train.features_type fp32 --evaluate.test false"
    again = run(jobs, f"{flags} --train.features on --run.name features-again")
    assert again.status == JobStatus.SUCCEEDED, again.logs[-6000:]
    assert "00000.parquet: found another SHA-256 than the index has" in again.logs
    assert again.result["features"]["computed"] == rows["train"]
    for key in ("samples_sha256", "weights_sha256", "best_val_auroc"):
        assert kept.result[key] == plain.result[key] == again.result[key], key


def test_a_run_that_fails_is_failed_in_mlflow(jobs, train, client, ingested):
    job = run(jobs, f"{train} --run.name diverges --optimizer.lr 1e30 --optimizer.warmup_epochs 0")
    assert job.status == JobStatus.FAILED
    assert "at step" in job.logs
    assert ".png" in job.logs.partition("loss became")[2]
    [found] = find(client, "diverges")
    assert found.info.status == "FAILED"
    assert "loss became" in found.data.tags["failure"]


def test_evaluate_judges_a_checkpoint_as_the_run_did(jobs, trained, manifest):
    image_id = manifest.rows("test")["image_id"][0].as_py()
    boxes = f"Image Index,Finding Label,Bbox [x,y,w,h],,,\n{image_id},Effusion,225.08,547,86.8,79.2\n"
    storage.put_atomic("s3://cxr/boxes.csv", boxes.encode())
    job = run(
        jobs,
        f"python jobs/evaluate.py --checkpoint {trained.result['checkpoint']} --split test --data.uri s3://cxr/nih"
        " --data.size 64 --train.cpus_per_worker 0.5 --evaluate.bootstrap 0"
        " --evaluate.boxes s3://cxr/boxes.csv",
    )
    assert job.status == JobStatus.SUCCEEDED, job.logs[-6000:]
    assert job.result["auroc"] == trained.result["test_auroc"]
    assert re.search(r"^finding +boxes +pointing", job.logs, re.MULTILINE)
    assert re.search(r"^Effusion +1 +[01]\.000 ", job.logs, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data.uri s3://cxr/nothing", "found nothing under s3://cxr/nothing"),
        ("--data.uri s3://no-such-bucket/nih", "bucket"),
        ("--tracking.uri http://127.0.0.1:9", "no MLflow server answers"),
        ("--train.cpus_per_worker 2", "leave 0 for decoding"),
        ("--train.use_gpu yes", "the cluster has 0 GPUs"),
        ("--train.global_batch 36", "multiple of"),
    ],
)
def test_what_cannot_work_is_said_before_training(jobs, train, client, ingested, flags, sentence):
    before = len(find(client, "refused"))
    job = run(jobs, f"{train} --run.name refused {flags}")
    assert job.status == JobStatus.FAILED
    error = [line for line in job.logs.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert job.exit_code == 2
    assert len(find(client, "refused")) == before
