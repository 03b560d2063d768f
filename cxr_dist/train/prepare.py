"""From a config and a manifest to a job: names, paths, the plan, class weights, and the weights that it starts from."""

import dataclasses
import uuid

import numpy as np
import numpy.typing as npt
import ray
import torch

from cxr_dist import storage
from cxr_dist.capacity import world_sizes
from cxr_dist.config import Config
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.rows import Journal, RowDecoder, fixed_rows
from cxr_dist.data.shards import ShardReader
from cxr_dist.experiment import absolute_uri
from cxr_dist.model import weights
from cxr_dist.model.augment import to_input
from cxr_dist.train.checkpoint import run_folder
from cxr_dist.train.job import TrainJob

__all__ = ["DEV_RUN_STEPS", "bundles", "calibration_groups", "make_job", "prepare_weights", "with_defaults"]

CALIBRATION_IMAGES = 64
DECODE_RETRIES = 8
"""Attempts after the first at decoding them, in a task whose process died."""
DEV_RUN_STEPS = 2


def with_defaults(config: Config) -> Config:
    """The config with a run name, absolute local paths (ranks have other working directories) and a storage path."""
    name = config.run.name or default_name(config)
    uri = config.data.uri
    path = config.train.storage_path or "outputs/runs"
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=name),
        data=dataclasses.replace(config.data, uri=storage.absolute(uri) if uri else uri),
        train=dataclasses.replace(config.train, storage_path=storage.absolute(path)),
        tracking=dataclasses.replace(config.tracking, uri=absolute_uri(config.tracking.uri)),
    )


def default_name(config: Config) -> str:
    """A run's name that says what people compare runs by, and is no other run's."""
    model, lr = config.model, f"{config.optimizer.lr:g}".replace("+", "")
    values = f"{config.data.label_set}-{model.trainable}-{model.pooling}-lr{lr}-b{config.train.global_batch}"
    return f"{values}-{uuid.uuid4().hex[:8]}"


def bundles(config: Config) -> list[dict[str, float]]:
    """What the run needs of the cluster: a bundle a rank, and one a decoding process."""
    gpu = {"GPU": 1.0} if config.train.use_gpu == "yes" else {}
    ranks = [{"CPU": config.train.cpus_per_worker, **gpu}] * config.train.workers[1]
    return ranks + [{"CPU": 1.0}] * max(1, config.data.decode_workers)


def make_job(config: Config, manifest: Manifest, *, use_gpu: bool) -> TrainJob:
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
    return TrainJob(
        config=config,
        plan=plan,
        world_sizes=world_sizes(config, manifest.row_group),
        findings=findings,
        columns=tuple(FINDINGS.index(name) for name in findings),
        size=manifest.size,
        encoding=manifest.encoding,
        train=ShardReader.from_manifest(manifest, "train", config.data),
        validation=ShardReader.from_manifest(manifest, "validation", config.data),
        pos_weight=positive_weights(manifest, findings) if config.train.pos_weight else None,
        folder=run_folder(config.train.storage_path, config.run.name),
        manifest_sha256=manifest.hash,
        tracking_uri=config.tracking.uri,
        pixels_version=manifest.pixels_version,
        run_id="",
        use_gpu=use_gpu,
    )


def positive_weights(manifest: Manifest, findings: tuple[str, ...]) -> tuple[float, ...]:
    """Negatives / positives of each finding in the train split, after the validation cut."""
    split = manifest.splits["train"]
    return tuple((split.num_rows - split.positives[name]) / split.positives[name] for name in findings)


def prepare_weights(job: TrainJob, *, resumed: bool) -> None:
    """Store the run's starting weights once; a resumed run keeps those that it has, whoever else left a file there."""
    where = storage.join(job.folder, "initial.pt")
    if resumed and storage.exists(where):
        return
    model, seed = job.config.model, job.config.train.seed
    initial = weights.initial(model.weights, num_findings=len(job.findings), seed=seed)
    if initial.random:
        torch.set_num_threads(1)  # so that the same seed gives the same statistics on any machine
        images = torch.from_numpy(calibration_images(job).copy())
        state = weights.calibrate(initial.state, to_input(images, initial.normalization))
        initial = dataclasses.replace(initial, state=state)
    storage.put_atomic(where, weights.save(initial))


def calibration_images(job: TrainJob) -> npt.NDArray[np.uint8]:
    """The first images of the plan as [N, S, S]; decoded beside the driver, for one of them may kill what decodes it."""
    token = uuid.uuid4().hex
    if not ray.is_initialized():
        return decode_first(job, token)
    return ray.get(ray.remote(max_retries=DECODE_RETRIES)(decode_first).remote(job, token))


def calibration_groups(job: TrainJob) -> npt.NDArray[np.int64]:
    """Row groups of the plan's first steps, that hold the images which random weights are calibrated on."""
    groups: list[int] = []
    while len(groups) * job.plan.train.row_group < CALIBRATION_IMAGES:
        step = job.plan.step(len(groups) // job.plan.groups_per_step)
        if step.kind != "train":
            break
        groups += step.groups.tolist()
    return np.array(groups)


def decode_first(job: TrainJob, token: str) -> npt.NDArray[np.uint8]:
    """`calibration_images`, in this process; `token` is the same in every attempt."""
    decoder = RowDecoder(
        source=job.train, split=job.plan.train, size=job.size, encoding=job.encoding, findings=job.columns
    )
    with Journal(token, 0) as journal:
        rows = decoder.rows(calibration_groups(job), journal)
    return fixed_rows(rows["image"], np.uint8).reshape(-1, job.size, job.size)[:CALIBRATION_IMAGES]
