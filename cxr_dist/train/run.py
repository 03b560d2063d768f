"""A training run as the driver sees it: check, prepare, train on the ranks, evaluate, and keep everything in MLflow."""

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.train import DataConfig

from cxr_dist import cluster, preflight, storage
from cxr_dist.capacity import wants_gpu
from cxr_dist.config import Config, flatten
from cxr_dist.cost import sentence
from cxr_dist.data.features import set_aside
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.resident import DamagedFeatures
from cxr_dist.errors import InputError, RunError
from cxr_dist.evaluate import report, scores
from cxr_dist.evaluate.inference import score_split
from cxr_dist.evaluate.saliency import add_saliency
from cxr_dist.evaluate.second_labels import read_second_labels
from cxr_dist.evaluate.thumbnails import with_thumbnails
from cxr_dist.registry.prepare import about, evaluation_in, prepare
from cxr_dist.registry.publish import told
from cxr_dist.spending import Spending
from cxr_dist.tracking import TrackedRun, git_tags, open_run
from cxr_dist.train.cache import Cache, prepare_features
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.feed import data_config
from cxr_dist.train.fit import fit
from cxr_dist.train.identity import Identity
from cxr_dist.train.job import TrainJob
from cxr_dist.train.lease import Lease
from cxr_dist.train.nodes import system_metrics
from cxr_dist.train.outcome import last_line, recorded_outcome
from cxr_dist.train.prepare import DEV_RUN_STEPS, bundles, make_job, prepare_weights, with_defaults
from cxr_dist.train.progress import planned_samples
from cxr_dist.train.record import run_record
from cxr_dist.train.shown import params, tags, user

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Run a training job to its end, or go on with it where it stopped; the job's JSON result.

    Raises InputError before any worker starts, RunError if the run fails; the MLflow run has the right status in
    every case.
    """
    config = with_defaults(config)
    manifest = preflight.run(config)
    cluster.connect(config.train.workers[1] * config.train.cpus_per_worker + max(1, config.data.decode_workers))
    with Spending(config.cost) as spending:
        cluster.wait_for_room(bundles(config), config.train.wait_for_nodes_s)
        resources = ray.cluster_resources()
        preflight.check_resources(config, resources, ray.nodes())
        job = make_job(config, manifest, use_gpu=wants_gpu(config, resources))
        Identity.claim(job, resume=config.run.resume)  # a run that cannot be gone on with is not taken over either
        with (
            Lease.take(job.folder, owner=user()) as lease,
            spending.kept(job.folder, lease.number, lease.held),
            recorded_outcome(job.folder, lease),
        ):
            return train_as_owner(dataclasses.replace(job, owner=lease.number), manifest, lease, spending)


def train_as_owner(job: TrainJob, manifest: Manifest, lease: Lease, spending: Spending) -> dict[str, Any]:
    """`train`, from the moment on that nobody else writes to the run."""
    config = job.config
    identity = Identity.claim(job, resume=config.run.resume)
    Checkpoints(job.folder, owner=job.owner).adopt()
    prepare_weights(job, resumed=identity.run_id is not None)
    cluster.check_visible({"train.storage_path": job.folder, "data.uri": config.data.uri})
    with open_run(
        config,
        run_id=identity.run_id,
        params=params(config),
        tags=tags(job, manifest, new=identity.run_id is None),
        storage_dir=str(local_folder("journals", config.run.name)),
        folder=job.folder,
        is_ours=lease.held,
    ) as tracked:
        tracked.at_end = lambda: spending.tell(tracked)
        job = dataclasses.replace(job, run_id=tracked.run_id)
        identity.record(job)
        describe(tracked, job, manifest)
        tracked.send_kept()
        try:
            with system_metrics(job.tracking_uri, job.run_id) if tracked.held else contextlib.nullcontext():
                job, cache, data = with_features(job, use=identity.features)
                identity.record(job, features=cache.sets is not None)
                tracked.set_tags({"features": f"{'not ' if cache.sets is None else ''}kept: {cache.decision.why}"})
                trained = fit(job, data, tracked, lease)
            lease.check()
            check_samples(job, manifest, trained)
            corrupt = trained.pop("corrupt")
            result = {"run_id": tracked.run_id, "status": "FINISHED", "run_name": config.run.name, **trained}
            result["features"] = cache.summary()
            spending.images = trained["steps"] * job.plan.global_batch
            result |= evaluate(tracked, job, manifest, trained, corrupt, spending)
            result["model"] = log_model(tracked, job, manifest, result)
            cost = spending.cost()
            result["cost"] = cost.to_json()
            print(f"cost: {sentence(cost)}")
        except InputError as error:
            # the input was accepted: what fails now (a store that went away) is the run's failure
            raise RunError(last_line(error)) from error
    return result | {"tracking_missed": tracked.missed}


def with_features(job: TrainJob, *, use: bool | None) -> tuple[TrainJob, Cache, DataConfig]:
    """The job with the features that it works from, if any, and what gives its ranks their batches."""
    while True:
        cache = prepare_features(job, use=use)
        job = dataclasses.replace(job, features=cache.sets)
        try:
            return job, cache, data_config(job, device_bytes=cache.device_bytes)
        except DamagedFeatures as damaged:
            set_aside(damaged.set.folder, damaged.reason)


def check_samples(job: TrainJob, manifest: Manifest, trained: dict[str, Any]) -> None:
    """The images trained on, in global order, are the plan's; RunError otherwise."""
    batches = manifest.row_batches("train", ["image_id"])
    ids = itertools.chain.from_iterable(batch["image_id"].to_pylist() for batch in batches)
    expected = planned_samples(job.plan, ids, trained["epochs"])
    if trained["samples_sha256"] != expected:
        raise RunError(
            f"images trained on: found SHA-256 {trained['samples_sha256']}, expected {expected} by the plan; "
            "this is a fault of the stream, please report it"
        )


def describe(tracked: TrackedRun, job: TrainJob, manifest: Manifest) -> None:
    """Log what the run is made from: config, dataset, split audit."""
    counts = {name: split.num_rows for name, split in manifest.splits.items()}
    tracked.log_dataset(f"nih-{manifest.label_set}", manifest.hash, manifest.uri, counts)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(as_yaml(job.config))
        Path(folder, "split_audit.json").write_text(json.dumps(manifest.audit, indent=1))
        tracked.log_artifacts(folder)


def as_yaml(config: Config) -> str:
    """The config as YAML that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def evaluate(
    tracked: TrackedRun,
    job: TrainJob,
    manifest: Manifest,
    trained: dict[str, Any],
    corrupt: dict[str, str],
    spending: Spending,
) -> dict[str, Any]:
    """The report of the best checkpoint: on test with thresholds from validation, or on validation alone.

    `corrupt` names the unreadable images of training and validation; those of the test split are added.
    """
    checkpoints = Checkpoints(job.folder)
    best = checkpoints.best() or checkpoints.entries()[-1]
    checkpoint = checkpoints.uri(best)
    storage.put_atomic(storage.join(job.folder, "scores/validation.parquet"), checkpoints.read_scores(best))
    validation = scores.read(storage.join(job.folder, "scores/validation.parquet"))
    outcome: dict[str, Any] = {
        "n_scored": {"val": len(validation), "test": 0},
        "test_auroc": None,
        "checkpoint": storage.shown(checkpoint),
        "artifacts": None,
    }
    judged = validation
    if job.config.evaluate.test:
        limit = DEV_RUN_STEPS * job.plan.global_batch if job.config.train.fast_dev_run else None
        judged, unreadable = score_split(job.config, checkpoint, "test", use_gpu=job.use_gpu, max_images=limit)
        corrupt = corrupt | unreadable
        scores.write(judged, storage.join(job.folder, "scores/test.parquet"))
        outcome["n_scored"]["test"] = len(judged)
        tracked.count_in_experiment("test_evaluations", tag="test_evaluation")
    folder = local_folder("reports", job.config.run.name)
    second = job.config.evaluate.second_labels
    found = report.write_report(
        folder,
        judged,
        validation,
        bootstrap=job.config.evaluate.bootstrap,
        seed=job.config.evaluate.bootstrap_seed,
        title=job.config.run.name,
        run=run_record(
            job,
            manifest,
            trained,
            config=as_yaml(job.config),
            unreadable=len(corrupt),
            now_s=time.time(),
            spending=spending,
        ),
        illustrate=lambda worst: (
            add_saliency(folder, job.config, checkpoint, judged, validation)
            or with_thumbnails(worst, manifest.uri, judged.split, job.config.data)
        ),
        rows=manifest.rows(judged.split),
        second=read_second_labels(second) if second else None,
        calibration=job.config.evaluate.calibration,
    )
    print(report.table(found))
    if corrupt:
        (folder / "corrupt_images.json").write_text(json.dumps(corrupt, indent=1))
    tracked.log_artifacts(folder)
    if judged.split == "test":
        outcome["test_auroc"] = found["auroc"]
        named = {f"test/auroc/{name}": value for name, value in found["auroc"].items() if name != "mean"}
        named |= {"test/auroc_mean": found["auroc"]["mean"], "test/n_scored": float(len(judged))}
        # step 0: MLflow's UI draws what was measured once as bars, run beside run, and not as curves of one point
        tracked.log_metrics({key: value for key, value in named.items() if value is not None}, step=0)
    outcome |= {"artifacts": str(folder), "corrupt_images": len(corrupt)}
    return outcome


def log_model(
    tracked: TrackedRun, job: TrainJob, manifest: Manifest, result: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Log the model of the evaluated checkpoint, registered and promoted as the config says; what became of it, None if
    nothing yet. Never fails the run, which is trained and evaluated."""
    config, name = job.config, job.config.run.name
    if not config.tracking.log_model or config.train.fast_dev_run:
        return None
    folder = local_folder("models", name) / "model"
    try:
        checkpoint = Checkpoints(job.folder)
        best = checkpoint.best() or checkpoint.entries()[-1]
        run = about(name, tracked.run_id, git_tags() | tags(job, manifest, new=False), flatten(config))
        evaluation = evaluation_in(Path(result["artifacts"]))
        wish = prepare(
            checkpoint.uri(best), folder, run, evaluation, tracking=config.tracking, evaluate=config.evaluate
        )
        done = tracked.log_model(folder, dataclasses.asdict(wish))
    except Exception as error:  # noqa: BLE001 - disks, stores and MLflow fail in every way
        log.warning("the model is not logged (%s); jobs/promote.py --run.name %s does it", last_line(error), name)
        return None
    if done is not None:
        shutil.rmtree(folder, ignore_errors=True)
        print(told(done))
    return done


def local_folder(kind: str, run_name: str) -> Path:
    """Where the driver keeps reports or unsent metrics of a run: outputs/KIND/RUN in its working directory."""
    folder = Path("outputs", kind, run_name).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
