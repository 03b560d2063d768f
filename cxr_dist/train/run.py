"""A training run as the driver sees it: check, prepare, train on the ranks, evaluate, and keep everything in MLflow."""

import contextlib
import dataclasses
import getpass
import json
import logging
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from cxr_dist import cluster, preflight, storage
from cxr_dist.capacity import wants_gpu
from cxr_dist.config import Config, flatten
from cxr_dist.data.decode import Journal, RowDecoder, fixed_rows
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.data.stream import PlanDataConfig
from cxr_dist.errors import InputError, RunError
from cxr_dist.evaluate import report, scores
from cxr_dist.evaluate.inference import score_split
from cxr_dist.model import weights
from cxr_dist.model.augment import to_input
from cxr_dist.tracking import TrackedRun, absolute_uri, open_run
from cxr_dist.train.checkpoint import Checkpoints, run_folder
from cxr_dist.train.identity import Identity
from cxr_dist.train.job import TrainJob
from cxr_dist.train.loop import train_rank
from cxr_dist.train.progress import planned_chain
from cxr_dist.train.validation import VALIDATION_SCORES

__all__ = ["train"]

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
DEV_RUN_STEPS = 2


def train(config: Config) -> dict[str, Any]:
    """Run a training job to its end, or go on with it where it stopped; the job's JSON result.

    Raises InputError before any worker starts, RunError if the run fails; the MLflow run has the right status in
    every case.
    """
    config = with_defaults(config)
    manifest = preflight.run(config)
    held = config.train.num_workers * config.train.cpus_per_worker
    cluster.connect(held + max(1, config.data.decode_workers))
    job = make_job(config, manifest)
    identity = Identity.claim(job, resume=config.run.resume)
    prepare_weights(job)
    with contextlib.ExitStack() as closing:
        closing.enter_context(cluster.room_for(bundles(config), config.train.wait_for_nodes_s))
        resources = ray.cluster_resources()
        preflight.check_resources(config, resources, ray.nodes())
        tracked = closing.enter_context(
            open_run(
                config,
                run_id=identity.run_id,
                params=flatten(config),
                tags=tags(job, manifest),
                storage_dir=local_folder(config.run.name),
            )
        )
        job = dataclasses.replace(job, run_id=tracked.run_id, use_gpu=wants_gpu(config, resources))
        identity.record(job)
        describe(tracked, job, manifest)
        trained = fit(job, num_decoders=config.data.decode_workers or cluster.free_cpus(held))
        expected = planned_chain(job.plan, manifest.rows("train")["image_id"].to_pylist(), trained["epochs"])
        if trained["samples_sha256"] != expected:
            raise RunError(
                f"images trained on: found SHA-256 {trained['samples_sha256']}, expected {expected} by the plan; "
                "this is a fault of the stream, please report it"
            )
        corrupt = trained.pop("corrupt")
        result = {"run_id": tracked.run_id, "status": "FINISHED", "run_name": config.run.name, **trained}
        result |= {"corrupt_images": len(corrupt)} | evaluate(tracked, job, trained, corrupt)
    return result


def with_defaults(config: Config) -> Config:
    """The config with a run name, absolute local paths (ranks have other working directories) and a storage path."""
    name = config.run.name or f"{config.data.label_set}-{uuid.uuid4().hex[:8]}"
    uri = config.data.uri
    path = config.train.storage_path or "outputs/runs"
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=name),
        data=dataclasses.replace(config.data, uri=storage.absolute(uri) if uri else uri),
        train=dataclasses.replace(config.train, storage_path=storage.absolute(path)),
        tracking=dataclasses.replace(config.tracking, uri=absolute_uri(config.tracking.uri)),
    )


def bundles(config: Config) -> list[dict[str, float]]:
    """What the run needs of the cluster: a bundle a rank, and one a decoding process."""
    gpu = {"GPU": 1.0} if config.train.use_gpu == "yes" else {}
    ranks = [{"CPU": config.train.cpus_per_worker, **gpu}] * config.train.num_workers
    return ranks + [{"CPU": 1.0}] * max(1, config.data.decode_workers)


def make_job(config: Config, manifest: Manifest) -> TrainJob:
    """The run as its ranks see it; ConfigError where batch, row groups and world size do not fit."""
    findings = tuple(name for name in manifest.findings if name not in config.train.skip_findings)
    splits = {
        name: Split(num_rows=manifest.splits[name].num_rows, row_group=manifest.row_group)
        for name in ("train", "validation")
    }
    plan = Plan(
        train=splits["train"],
        validation=splits["validation"],
        seed=config.train.seed,
        epochs=1 if config.train.fast_dev_run else config.train.epochs,
        global_batch=config.train.global_batch,
        max_steps=DEV_RUN_STEPS if config.train.fast_dev_run else None,
    )
    plan.rank_batch(config.train.num_workers)
    return TrainJob(
        config=config,
        plan=plan,
        findings=findings,
        columns=tuple(FINDINGS.index(name) for name in findings),
        size=manifest.size,
        encoding=manifest.encoding,
        train=ShardReader.from_manifest(manifest, "train"),
        validation=ShardReader.from_manifest(manifest, "validation"),
        pos_weight=positive_weights(manifest, findings) if config.train.pos_weight else None,
        folder=run_folder(config.train.storage_path, config.run.name),
        manifest_sha256=manifest.hash,
        tracking_uri=config.tracking.uri,
        pixels_version=manifest.pixels_version,
        run_id="",
        use_gpu=False,
    )


def positive_weights(manifest: Manifest, findings: tuple[str, ...]) -> tuple[float, ...]:
    """Negatives / positives of each finding in the train split, after the validation cut."""
    split = manifest.splits["train"]
    return tuple((split.num_rows - split.positives[name]) / split.positives[name] for name in findings)


def prepare_weights(job: TrainJob) -> None:
    """Store the run's starting weights once; a resumed run keeps those that it has."""
    where = storage.join(job.folder, "initial.pt")
    if storage.exists(where):
        return
    model, seed = job.config.model, job.config.train.seed
    initial = weights.initial(model.weights, num_findings=len(job.findings), seed=seed)
    if initial.random:
        torch.set_num_threads(1)  # so that the same seed gives the same statistics on any machine
        state = weights.calibrate(initial.state, to_input(calibration_images(job), initial.normalization))
        initial = dataclasses.replace(initial, state=state)
    storage.put_atomic(where, weights.save(initial))


def calibration_images(job: TrainJob) -> torch.Tensor:
    """The first images of the plan as uint8 [N, S, S]."""
    decoder = RowDecoder(
        source=job.train, split=job.plan.train, size=job.size, encoding=job.encoding, findings=job.columns
    )
    groups: list[int] = []
    while len(groups) * job.plan.train.row_group < CALIBRATION_IMAGES:
        step = job.plan.step(len(groups) // job.plan.groups_per_step)
        if step.kind != "train":
            break
        groups += step.groups.tolist()
    with Journal(uuid.uuid4().hex, 0) as journal:
        rows = decoder.rows(np.array(groups), journal)
    pixels = fixed_rows(rows["image"], np.uint8).reshape(-1, job.size, job.size)[:CALIBRATION_IMAGES]
    return torch.from_numpy(pixels.copy())


def fit(job: TrainJob, *, num_decoders: int) -> dict[str, Any]:
    """Train on the ranks; rank 0's result. RunError if the run failed."""
    config = job.config.train
    attempt = uuid.uuid4().hex[:8]
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo", timeout_s=config.process_group_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if job.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=storage.join(job.folder, "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"run": lambda: None},
        dataset_config=PlanDataConfig(job.remaining, num_decoders),
    )
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        rank, cause = min(failures.items())
        raise RunError(f"training failed on rank {rank}: {last_line(cause)}") from error
    finally:
        with contextlib.suppress(OSError, InputError):  # Ray's own notes on this attempt; nothing reads them again
            storage.delete_dir(storage.join(job.folder, "ray"))
    if "error" in result:
        raise RunError(result["error"])
    return result


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def tags(job: TrainJob, manifest: Manifest) -> dict[str, str]:
    """What people filter runs by; keys with `mlflow.` are shown by its UI."""
    commit = job.config.run.commit
    return {
        **({MLFLOW_GIT_COMMIT: commit} if commit else {}),
        MLFLOW_SOURCE_NAME: "jobs/train.py",
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_USER: getpass.getuser(),
        "label_set": manifest.label_set,
        "split": "official test list, validation by patient",
        "manifest_sha256": manifest.hash,
        "plan_sha256": job.plan.sha256,
        "world_size": str(job.config.train.num_workers),
        "run_folder": storage.shown(job.folder),
    }


def describe(tracked: TrackedRun, job: TrainJob, manifest: Manifest) -> None:
    """Log what the run is made from: config, dataset, split audit."""
    counts = {name: split.num_rows for name, split in manifest.splits.items()}
    tracked.log_dataset(f"nih-{manifest.label_set}", manifest.hash, manifest.uri, counts)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump(plain(job.config), sort_keys=False))
        Path(folder, "split_audit.json").write_text(json.dumps(manifest.audit, indent=1))
        tracked.log_artifacts(folder)


def plain(config: Config) -> dict[str, Any]:
    """The config as YAML that `--config` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def evaluate(tracked: TrackedRun, job: TrainJob, trained: dict[str, Any], corrupt: dict[str, str]) -> dict[str, Any]:
    """The report of the best checkpoint: on test with thresholds from validation, or on validation alone."""
    checkpoints = Checkpoints(job.folder)
    best = checkpoints.best() or checkpoints.entries()[-1]
    checkpoint = checkpoints.uri(best)
    validation = scores.read(storage.join(job.folder, VALIDATION_SCORES))
    outcome: dict[str, Any] = {
        "n_scored": {"val": len(validation), "test": 0},
        "test_auroc": None,
        "checkpoint": storage.shown(checkpoint),
        "artifacts": None,
    }
    judged = validation
    if job.config.evaluate.test:
        limit = DEV_RUN_STEPS * job.plan.global_batch if job.config.train.fast_dev_run else None
        judged = score_split(job.config, checkpoint, "test", use_gpu=job.use_gpu, max_images=limit)
        scores.write(judged, storage.join(job.folder, "scores/test.parquet"))
        outcome["n_scored"]["test"] = len(judged)
    folder = Path(local_folder(job.config.run.name))
    found = report.write_report(
        folder,
        judged,
        validation,
        bootstrap=job.config.evaluate.bootstrap,
        seed=job.config.evaluate.bootstrap_seed,
        title=job.config.run.name,
    )
    print(report.table(found))
    if corrupt:
        (folder / "corrupt_images.json").write_text(json.dumps(corrupt, indent=1))
    tracked.log_artifacts(folder)
    if judged.split == "test":
        outcome["test_auroc"] = found["auroc"]
        named = {f"test/auroc/{name}": value for name, value in found["auroc"].items() if name != "mean"}
        named |= {"test/auroc_mean": found["auroc"]["mean"], "test/n_scored": float(len(judged))}
        last = trained["steps"]
        tracked.log_metrics({key: value for key, value in named.items() if value is not None}, step=last)
    outcome["artifacts"] = str(folder)
    return outcome


def local_folder(run_name: str) -> str:
    """Where the driver keeps the report and unsent metrics of a run: outputs/reports/RUN in its working directory."""
    folder = Path("outputs", "reports", run_name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
