"""A sweep as its driver sees it: the trials under Ray Tune, cut short by ASHA, one MLflow run above theirs.

Selection sees validation only: `evaluate.test` is false for the sweep and each of its trials.
"""

import dataclasses
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from cxr_dist import cluster, preflight, storage
from cxr_dist.capacity import wants_gpu
from cxr_dist.config import Config
from cxr_dist.cost import sentence
from cxr_dist.data.manifest import Manifest
from cxr_dist.errors import ConfigError, RunError
from cxr_dist.spending import Spending
from cxr_dist.sweep import table
from cxr_dist.sweep.record import SWEPT, Record, sweep_folder
from cxr_dist.sweep.recorder import Recorder
from cxr_dist.sweep.space import Space, draw, flags, full_command, trial_config
from cxr_dist.sweep.trial import EPOCH, SCORE, TrialRun, stop_key
from cxr_dist.tracking import TrackedRun, commit_tags, open_run
from cxr_dist.train import board, shown
from cxr_dist.train.checkpoint import run_folder
from cxr_dist.train.lease import Lease, latest_claims
from cxr_dist.train.prepare import bundles, with_defaults
from cxr_dist.train.run import local_folder
from cxr_dist.train.shown import how_split, user

__all__ = ["Cut", "sweep"]

log = logging.getLogger(__name__)

STOP_S = 20.0
"""Longest wait for the trials of a sweep that was told to stop, seconds. `ray job stop` gives 3 in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """When a trial is cut short: at `min_epochs` epochs, and at each `reduction` times as many, it goes on only if it is
    among the best 1/`reduction` of the trials that have come so far (ASHA, Li et al., 2020)."""

    min_epochs: int
    reduction: int

    def check(self, epochs: int) -> None:
        """ConfigError for values that cut nothing or everything."""
        if not 1 <= self.min_epochs <= epochs:
            raise ConfigError(f"--min-epochs: found {self.min_epochs}, expected 1 to train.epochs, which is {epochs}")
        if self.reduction < 2:
            raise ConfigError(f"--reduction: found {self.reduction}, expected 2 or more")


def sweep(config: Config, space: Space, cut: Cut, *, parallel: int, job: Path) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it where it stopped; the job's JSON result. `job` is jobs/train.py.

    `parallel` trials at a time, 0: as many as there is room for. Raises InputError before any trial starts, RunError
    if none finishes.
    """
    if not config.run.name:
        raise ConfigError(
            "run.name: found nothing, expected the sweep's name; the same name goes on with the same sweep"
        )
    config = with_defaults(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, test=False)))
    cut.check(config.train.epochs)
    draw(space, config.run.name)  # a name that is too long is said before anything is looked for
    log.info("sweep %s: evaluate.test is false for every trial; a sweep never looks at test", config.run.name)
    manifest = preflight.run(config)
    cluster.connect(config.train.workers[1] * config.train.cpus_per_worker + max(1, config.data.decode_workers))
    cluster.wait_for_room(bundles(config), config.train.wait_for_nodes_s)
    resources = ray.cluster_resources()
    preflight.check_resources(config, resources, ray.nodes())
    parallel, decode_workers = room(config, resources, parallel)
    folder = sweep_folder(config.train.storage_path, config.run.name)
    with (
        Spending(config.cost) as spending,
        Lease.take(folder, owner=user()) as lease,
        spending.kept(folder, lease.number, lease.held),
    ):
        record = Record.open(config, space, manifest.hash)
        with open_run(
            dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, required=True)),
            run_id=record.run_id,
            params=params(config, space, cut),
            tags=tags(config, manifest, space),
            storage_dir=str(local_folder("journals", config.run.name)),
            folder=record.folder,
            is_ours=lease.held,
        ) as tracked:
            record.run_id = tracked.run_id
            record.save()
            tracked.send_kept()
            tracked.at_end = lambda: spending.tell(tracked)
            try:
                run_trials(config, record, cut, tracked, parallel=parallel, decode_workers=decode_workers, job=job)
            except (SystemExit, KeyboardInterrupt):
                stop_trials(config, record, tracked)
                raise
            lease.check()
            result = conclude(config, record, tracked)
            cost = spending.cost()
            print(f"cost: {sentence(cost)}")
            return result | {"cost": cost.to_json()}


def room(config: Config, resources: Mapping[str, float], parallel: int) -> tuple[int, int]:
    """Trials at a time, and decoding processes of each: `parallel` or, for 0, as many trials as the cluster holds whole."""
    if parallel < 0:
        raise ConfigError(f"--parallel: found {parallel}, expected 0 or more trials at a time")
    need = bundles(config)
    cpus, ranks = resources.get("CPU", 0.0), config.train.workers[1] * config.train.cpus_per_worker
    fit = [cpus / sum(bundle["CPU"] for bundle in need)]
    if wants_gpu(config, dict(resources)):
        fit.append(resources.get("GPU", 0.0) / config.train.workers[1])
    parallel = parallel or max(1, math.floor(min(fit) + 1e-9))
    return parallel, max(1, math.floor((cpus / parallel) - ranks + 1e-9))


def run_trials(
    config: Config, record: Record, cut: Cut, tracked: TrackedRun, *, parallel: int, decode_workers: int, job: Path
) -> None:
    """Have Ray Tune run every trial; what comes of them goes into the record as it comes."""
    logs = local_folder("sweeps", config.run.name)
    stop = stop_key(tracked.run_id)
    board.delete(stop)
    about = []
    for one in record.trials:
        run = trial_config(config, one.trial, parent=tracked.run_id, decode_workers=decode_workers)
        about.append(
            {
                "number": one.trial.number,
                "command": [sys.executable, str(job.absolute()), *flags(run)],
                "log": str(logs / f"{one.trial.name}.log"),
                "folder": run_folder(config.train.storage_path, one.trial.name),
                "curve": list(one.curve),
                "ended": one.ended,
                "stop": stop,
            }
        )
    log.info("%d trials, %d at a time, on %s; their logs: %s", len(about), parallel, config.train.num_workers, logs)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(
        logging.ERROR
    )  # it misses files that none wrote
    here = f"node:{ray.util.get_node_ip_address()}"  # where the code and the logs are; it takes no CPU of the ranks
    with tempfile.TemporaryDirectory(prefix="cxr-dist-tune-") as folder:
        tune.Tuner(
            tune.with_resources(TrialRun, tune.PlacementGroupFactory([{here: 0.001}])),
            param_space={"trial": tune.grid_search(about)},
            tune_config=tune.TuneConfig(
                metric=SCORE,
                mode="max",
                max_concurrent_trials=parallel,
                scheduler=ASHAScheduler(
                    time_attr=EPOCH,
                    max_t=config.train.epochs + 1,  # the last epoch cuts nobody short
                    grace_period=cut.min_epochs,
                    reduction_factor=cut.reduction,
                ),
            ),
            run_config=tune.RunConfig(
                name=config.run.name,
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs keep their own
                callbacks=[
                    Recorder(
                        record,
                        tracked,
                        epochs=config.train.epochs,
                        reduction=cut.reduction,
                        storage_path=config.train.storage_path,
                    )
                ],
            ),
        ).fit()


def stop_trials(config: Config, record: Record, tracked: TrackedRun) -> None:
    """Tell the trials to stop, say KILLED while there is time, and wait for them, STOP_S seconds at most."""
    board.put(stop_key(tracked.run_id), b"1")
    tracked.finish("KILLED")
    record.save()
    folders = [run_folder(config.train.storage_path, one.trial.name) for one in record.trials if one.ended is None]
    ends = time.monotonic() + STOP_S
    while folders and time.monotonic() < ends:
        folders = [folder for folder in folders if not all(claim.surely_gone for claim in latest_claims(folder))]
        time.sleep(0.2)
    board.delete(stop_key(tracked.run_id))


def conclude(config: Config, record: Record, tracked: TrackedRun) -> dict[str, Any]:
    """The sweep's result: its table in MLflow, the best trial, the command that trains it in full. RunError if none finished."""
    record.save()
    rows = table.rows(record)
    best = record.best()
    command = full_command(config, best.trial) if best else ""
    print(table.text(rows))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trials.csv").write_text(table.csv(rows))
        if command:
            Path(folder, "best_command.sh").write_text(f"{command}\n")
        tracked.log_artifacts(folder)
    tracked.set_tags({MLFLOW_RUN_NOTE: table.note(rows, best, command)})
    if best is None:
        failed = [one for one in record.trials if one.ended == "failed"]
        raise RunError(f"no trial finished; {failed[0].trial.name}: {failed[0].why}" if failed else "no trial finished")
    print(
        f"best on validation: {best.trial.name}, mean AUROC {best.score:.4f} (the highest of {len(rows)}, so somewhat"
    )
    print("too high to be expected again); this trains it in full, and tests it:")
    print(f"  {command}")
    return {
        "run_id": tracked.run_id,
        "status": "FINISHED",
        "run_name": config.run.name,
        "test": "not looked at: evaluate.test is false in a sweep",
        "trials": rows,
        "best": next(row for row in rows if row["number"] == best.trial.number),
        "best_command": command,
        "tracking_missed": tracked.missed,
    }


def params(config: Config, space: Space, cut: Cut) -> dict[str, object]:
    """What the parent run shows: the values that all trials share, and what was swept."""
    shared = {key: value for key, value in shown.params(config).items() if key not in SWEPT}
    swept = {f"sweep.{key}": json.dumps(value) for key, value in dataclasses.asdict(space).items()}
    return {**shared, **swept, "sweep.min_epochs": cut.min_epochs, "sweep.reduction": cut.reduction}


def tags(config: Config, manifest: Manifest, space: Space) -> dict[str, str]:
    """As `train.shown.tags`, of the parent run."""
    return {
        **dict(tag.split("=", 1) for tag in config.tracking.tags),
        **(commit_tags(config.run.commit) if config.run.commit else {}),
        MLFLOW_SOURCE_NAME: "jobs/sweep.py",
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_USER: user(),
        "sweep": config.run.name,
        "trials": str(space.trials),
        "label_set": manifest.label_set,
        "split": how_split(manifest),
        "manifest_sha256": manifest.hash,
        "run_folder": storage.shown(sweep_folder(config.train.storage_path, config.run.name)),
    }
