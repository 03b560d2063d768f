"""The plan of a run without the run: what `jobs/train.py` would do with this config, dataset and cluster, and what it would take.

The same checks and the same planning code as the run's, up to where it would take its lease: nothing is written, no MLflow run
is made, no CPU or GPU is held. A cluster that is there is asked what it has; none is started.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import ray

from cxr_dist import cluster, preflight, storage
from cxr_dist.capacity import wants_gpu
from cxr_dist.config import Config
from cxr_dist.cost import Cost
from cxr_dist.data.features import ITEM_BYTES
from cxr_dist.data.manifest import Manifest
from cxr_dist.errors import ConfigError
from cxr_dist.measured import MeasuredNode, Measurements, of_ray, read_measurements
from cxr_dist.prices import read_prices
from cxr_dist.train import shown
from cxr_dist.train.estimate import (
    Cluster,
    cluster_of,
    epoch_bytes,
    left,
    lengths,
    memory,
    read_bytes,
    seen,
    times,
    written,
)
from cxr_dist.train.footprint import Footprint, footprint
from cxr_dist.train.identity import Identity
from cxr_dist.train.job import TrainJob, training_views
from cxr_dist.train.plan_text import text
from cxr_dist.train.prepare import DEV_RUN_STEPS, bundles, calibration_groups, make_job, with_defaults
from cxr_dist.train.survey import Decision, Rates, Work, decide, settled

__all__ = ["dry_run"]

log = logging.getLogger(__name__)

FORMAT = "cxr-dist/dry-run/1"
MEASURE = "python jobs/doctor.py with this config and --json FILE, then --dry-run --doctor FILE"


def dry_run(config: Config, *, doctor: str = "") -> dict[str, Any]:
    """The plan as plain values, printed as a table; `doctor` is the URI of a doctor's report. InputError as the run would raise
    it, and for a report that is none."""
    config = with_defaults(config)
    measured = read_measurements(doctor) if doctor else None
    manifest = preflight.run(config, writing=False)
    nodes, resources, notes = look(config, measured)
    job = make_job(config, manifest, use_gpu=wants_gpu(config, resources))
    identity = Identity.claim(job, resume=config.run.resume)
    start = job.position()
    workers = job.world_sizes[-1]
    size = footprint(
        config,
        num_findings=len(job.findings),
        size=job.size,
        share=job.plan.rank_batch(workers),
        use_gpu=job.use_gpu,
    )
    found = cluster_of(nodes, config, workers, use_gpu=job.use_gpu) if nodes is not None else None
    if found is not None and found.missing:
        notes.append(f"{found.missing}: its price, its CPUs and its times are not known")
    plan = facts(job, manifest, size, start, goes_on=identity.run_id is not None)
    plan |= {
        "read": reads(job, manifest, start, goes_on=plan["goes_on"]),
        "memory": memory(job, size, workers),
        "written": written(job, size, start),
    }
    plan["cluster"] = cluster_facts(found, config, job, measured)
    plan |= expected(job, manifest, size, measured, found, start, notes)
    plan["notes"] = notes
    print(text(plan))
    return plan


def look(
    config: Config, measured: Measurements | None
) -> tuple[list[MeasuredNode] | None, Mapping[str, float], list[str]]:
    """The nodes that the plan goes by (None: none are known), the resources that decide on GPUs, and what to say of them.

    Those of the doctor's report, or of the cluster that is there now; that one has to have room where the run would not wait for
    nodes. ConfigError otherwise, as the run would raise it.
    """
    notes: list[str] = []
    there, resources = None, {}
    if cluster.join():
        alive = [node for node in ray.nodes() if node["Alive"]]
        there, resources = [of_ray(node, config.cost.region) for node in alive], ray.cluster_resources()
        try:
            preflight.check_resources(config, resources, alive)
        except ConfigError as error:
            if not config.train.wait_for_nodes_s:
                raise
            wanted = len(bundles(config))
            notes.append(
                f"not enough nodes are up now ({error}); the run would ask the cluster for {wanted} bundles and wait "
                f"{config.train.wait_for_nodes_s} s for them"
            )
    else:
        notes.append("no cluster was asked: submit the dry run to it, to hold the plan to what is there")
    if measured is not None and measured.nodes:
        if measured.verdict != "ready":
            notes.append(f"the doctor's verdict of {measured.when} was {measured.verdict!r}: see what it says first")
        gpus = sum(node.gpus for node in measured.nodes)
        return list(measured.nodes), {"GPU": max(gpus, resources.get("GPU", 0.0))}, notes
    return there, resources, notes


def facts(job: TrainJob, manifest: Manifest, size: Footprint, start: int, *, goes_on: bool) -> dict[str, Any]:
    """What the plan decides, whatever the machine: exact."""
    plan, todo = job.plan, left(job.plan, start)
    return {
        "format": FORMAT,
        "status": "PLANNED",
        "run_name": job.config.run.name,
        "recipe": shown.recipe(job.config),
        "goes_on": goes_on,
        "start": start,
        "findings": len(job.findings),
        "images": {
            **{name: split.num_rows for name, split in manifest.splits.items()},
            "dropped_per_epoch": plan.dropped_rows,
        },
        "steps": {
            "epochs": plan.epochs,
            "train_per_epoch": plan.train_steps,
            "validation_per_epoch": plan.validation_steps,
            "all": plan.num_steps,
            "train_left": todo.train,
            "validation_left": todo.validation,
        },
        "plan_sha256": plan.sha256,
        "workers": {
            "numbers": list(job.world_sizes),
            "gpu": job.use_gpu,
            "images_per_step": plan.rank_batch(job.world_sizes[-1]),
            "cpus": job.config.train.cpus_per_worker,
        },
        "gradient_mb_per_step": round(size.gradient_bytes / 2**20, 2),
    }


def reads(job: TrainJob, manifest: Manifest, start: int, *, goes_on: bool) -> dict[str, Any]:
    """Bytes of images that are read from storage, by the manifest; side tables and weights are not in it."""
    train, validation = epoch_bytes(job, 0)
    test = 0
    if job.config.evaluate.test:
        of_test = manifest.row_groups("test")["bytes"].to_numpy()
        if job.config.train.fast_dev_run:
            limit = DEV_RUN_STEPS * job.plan.global_batch
            of_test = of_test[: math.ceil(min(limit, manifest.splits["test"].num_rows) / manifest.row_group)]
        test = int(of_test.sum())
    return {
        "encoding": job.encoding,
        # random weights are calibrated on the first images, once
        "calibration_bytes": 0
        if goes_on or job.config.model.weights != "random"
        else int(lengths(job.train)[calibration_groups(job)].sum()),
        "first_epoch_bytes": train + validation,
        "all_epochs_bytes": read_bytes(job, start),
        "test_bytes": test,
        "node_cache": bool(job.config.data.cache_dir),
    }


def cluster_facts(
    found: Cluster | None, config: Config, job: TrainJob, measured: Measurements | None
) -> dict[str, Any]:
    """The nodes, what an hour of them costs, and the CPUs for decoding."""
    if found is None or found.missing:
        return {
            "nodes": seen(found.nodes) if found else None,
            "more_nodes": 0,
            "cost_per_hour": None,
            "decode_cpus": None,
        }
    workers = job.world_sizes[-1]
    free = found.cpus_for_decoding(config, workers, use_gpu=job.use_gpu)
    rate = measured.decode.get(job.encoding) if measured else None
    wanted = None
    if rate and measured and measured.train:
        wanted = math.ceil(workers * measured.train / rate)
    return {
        "nodes": seen(found.nodes),
        "more_nodes": found.more,
        "cost_per_hour": found.bill(read_prices(config.cost)).to_json(),
        "decode_cpus": config.data.decode_workers or free,
        "decode_cpus_needed": wanted,
    }


def expected(
    job: TrainJob,
    manifest: Manifest,
    size: Footprint,
    measured: Measurements | None,
    found: Cluster | None,
    start: int,
    notes: list[str],
) -> dict[str, Any]:
    """Whether features are kept, and the time and the cost of the ways that are open: one, or both where nobody can tell."""
    workers, config = job.world_sizes[-1], job.config
    decision, work = features_of(job, size, measured, workers)
    if measured is None or measured.train is None:
        notes.append(f"times and cost are unknown: no training step was measured here; {MEASURE}, gives them")
        return {"features": decision, "ways": {}, "seconds": None, "cost": None}
    usable = found is not None and not found.missing
    rate = measured.decode.get(job.encoding)
    cpus = (
        (config.data.decode_workers or found.cpus_for_decoding(config, workers, use_gpu=job.use_gpu))
        if usable and found
        else 0
    )
    reading = [node.read_bytes_per_s for node in measured.nodes if node.cpus]
    if rate is None:
        notes.append(f"no decoding rate of {job.encoding} was measured: times are those of the network alone")
    if workers > 1 and measured.allreduce_bytes_per_s is None:
        notes.append("no gradient exchange was measured: times are without it")
    num_test = manifest.splits["test"].num_rows if config.evaluate.test else 0
    ways = {}
    for name, kept in {"without features": False, "with features": True}.items():
        if decision["use"] not in (None, kept):
            continue
        ways[name] = times(
            job,
            measured,
            size,
            start=start,
            workers=workers,
            decode_images_per_s=rate * cpus if rate and cpus else None,
            read_bytes_per_s=sum(filter(None, reading)) if reading and all(reading) else None,
            features=kept,
            missing=work.missing,
            num_test=min(num_test, DEV_RUN_STEPS * job.plan.global_batch) if config.train.fast_dev_run else num_test,
            scorers=workers if job.use_gpu else 1,
        )
    ways = {name: found_times for name, found_times in ways.items() if found_times is not None}
    [way] = ways.values() if len(ways) == 1 else [None]
    hourly: Cost | None = found.bill(read_prices(config.cost)) if usable and found else None
    seconds = way["all_s"] if way else None
    cost = None
    if seconds and hourly is not None:
        price = hourly.amount if hourly.amount is not None else hourly.at_most
        cost = {
            "low": price * seconds["low"] / 3600 if price is not None and hourly.amount is not None else None,
            "high": price * seconds["high"] / 3600 if price is not None else None,
            "currency": "USD",
            "price": hourly.words(),
        }
    return {"features": decision, "ways": ways, "seconds": seconds, "cost": cost}


def features_of(
    job: TrainJob, size: Footprint, measured: Measurements | None, workers: int
) -> tuple[dict[str, Any], Work]:
    """Whether the run would work from kept features, by the run's own decision; none are taken to be there already."""
    train, plan = job.config.train, job.plan
    channels, height, width = size.feature_shape
    row_bytes = channels * height * width * ITEM_BYTES[train.features_type]
    wanted = plan.validation.num_rows + len(training_views(train)) * plan.train.num_rows
    work = Work(
        epochs=plan.epochs,
        train=plan.train_steps * plan.global_batch,
        validation=min(plan.validation.num_rows, plan.validation_steps * plan.global_batch),
        missing=wanted,
        wanted=wanted,
    )
    decision: Decision | None = settled(job.config)
    if decision is None and measured is not None and measured.train and measured.prefix:
        tail = max(0.0, 1 / measured.train - 1 / measured.prefix)
        where = train.features_uri or storage.join(train.storage_path, "features")
        decision = decide(
            work,
            Rates(prefix=1 / measured.prefix, tail=tail, score=tail),
            workers=workers,
            free_bytes=storage.free_bytes(where),
            needed_bytes=wanted * row_bytes,
        )
    return {
        "use": decision.use if decision else None,
        "why": decision.why
        if decision
        else "train.features is auto: the run measures, and no doctor's rates were given",
        "bytes": wanted * row_bytes,
        "views_to_compute": wanted,
    }, work
