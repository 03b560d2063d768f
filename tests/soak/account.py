"""What a hurt run has to show for itself once it was stopped: its steps, its images, and what it left lying about."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.plan import Plan, Split
from cxr_dist.train.checkpoint import Checkpoints, run_folder
from cxr_dist.train.identity import read_run
from cxr_dist.train.progress import samples
from tests.soak.site import DATA, RUN, RUNS, Site, SoakError

__all__ = ["Check", "Steps", "account", "planned", "steps_of"]


class Check(NamedTuple):
    """A promise, and what was found."""

    promise: str
    held: bool
    found: str


class Steps(NamedTuple):
    """Which of the steps 1 to `last` a metric has."""

    last: int
    once: int
    twice: int
    """Those logged more than once."""
    missing: int


def steps_of(logged: Iterable[int], last: int) -> Steps:
    """The account of step numbers; `last` is the last that was trained, the logged ones may go further."""
    counts = Counter(logged)
    last = max(last, *counts) if counts else last
    return Steps(
        last=last,
        once=sum(count == 1 for count in counts.values()),
        twice=sum(count > 1 for count in counts.values()),
        missing=len(set(range(1, last + 1)) - counts.keys()),
    )


def planned(plan: Plan, image_ids: list[str], index: int) -> tuple[int, str]:
    """The training steps before step `index` of a plan, and the sum that `samples_sha256` must be there."""
    steps = [step for step in map(plan.step, range(index)) if step.kind == "train"]
    names = [[image_ids[row] for row in plan.train.rows(step.groups)] for step in steps]
    total = sum(samples(step.index, 0, ids) for step, ids in zip(steps, names, strict=True))
    return len(steps), f"{total % (1 << 256):064x}"


def account(site: Site) -> tuple[dict[str, Any], list[Check]]:
    """Facts and promises of the site's run, which was stopped with a checkpoint; MLflow is told first what it lacks."""
    uri = site.client.tracking_uri
    synced = site.run(f"python jobs/sync.py --train.storage_path {RUNS} --run.name {RUN} --tracking.uri {uri}")["runs"][
        0
    ]
    folder = run_folder(RUNS, RUN)
    checkpoints = Checkpoints(folder)
    entry = checkpoints.latest_whole()
    if entry is None:
        raise SoakError("found no checkpoint, expected that of the end")
    progress = checkpoints.load(entry)["progress"]
    manifest = Manifest.load(DATA)
    ids = manifest.rows("train")["image_id"].to_pylist()
    num_steps, sha256 = planned(plan_of(folder, manifest), ids, entry.index)

    steps = steps_of(logged(site.client, site.run_id, "train/loss"), num_steps)
    epochs = steps_of(logged(site.client, site.run_id, "val/loss"), 0)
    run = site.client.get_run(site.run_id)
    scored = site.run(
        f"python jobs/evaluate.py --checkpoint {folder} --split test --data.uri {DATA} --data.size 64"
        " --evaluate.bootstrap 50 --train.use_gpu no"
    )
    left = leftovers(folder, checkpoints)
    facts = {
        "steps": steps._asdict(),
        "epochs": progress["epochs"],
        "checkpoint": {"index": entry.index, "steps": progress["steps"], "samples_sha256": progress["samples_sha256"]},
        "planned": {"steps": num_steps, "samples_sha256": sha256},
        "sync": synced,
        "left": left,
        "files_of_ray": [(name, size) for name, size in storage.list_files(f"{folder}/ray")],
        "folder_mb": round(sum(path.lstat().st_size for path in site.folder.rglob("*")) / 2**20),
        "temporary_files": sorted(path.name for path in site.temp.iterdir()),
        "evaluated": scored,
    }
    checks = [
        Check("every step logged once", steps.twice == 0, f"{steps.twice} of {steps.last} logged more than once"),
        Check("no step missing", steps.missing == 0, f"{steps.missing} of {steps.last} missing"),
        Check("every validation logged once", epochs.twice == 0, f"{epochs.twice} of {epochs.once} more than once"),
        Check(
            "the images trained on are the plan's",
            (progress["steps"], progress["samples_sha256"]) == (num_steps, sha256),
            f"after {progress['steps']} steps {progress['samples_sha256'][:9]}…, planned after {num_steps} {sha256[:9]}…",
        ),
        Check("MLflow says KILLED", run.info.status == "KILLED", run.info.status),
        Check("one owner's checkpoints", left["checkpoint_owners"] == 1, str(left["checkpoint_owners"])),
        Check(
            "best, last and the one before it kept",
            left["checkpoints"] <= 3 and left["unlisted_checkpoint_files"] == 0,
            f"{left['checkpoints']} checkpoints, {left['unlisted_checkpoint_files']} files that no index names",
        ),
        Check("one claim on the run", left["claims"] == 1, str(left["claims"])),
        Check("nothing unsent after jobs/sync.py", left["unsent"] == 0, f"{left['unsent']} files"),
    ]
    return facts, checks


def plan_of(folder: str, manifest: Manifest) -> Plan:
    """The plan of a run, from what its folder says of it and the dataset's manifest."""
    found = read_run(folder)
    assert found is not None
    splits = {
        name: Split(num_rows=manifest.splits[name].num_rows, row_group=manifest.row_group)
        for name in ("train", "validation")
    }
    config = found["config"]
    plan = Plan(
        **splits,
        seed=config["train.seed"],
        epochs=config["train.epochs"],
        global_batch=config["train.global_batch"],
    )
    if plan.sha256 != found["plan_sha256"]:
        raise SoakError(f"plan: found SHA-256 {plan.sha256}, expected {found['plan_sha256']} as the run began")
    return plan


def logged(client: MlflowClient, run_id: str, metric: str) -> list[int]:
    """The steps at which MLflow has a metric, as often as it has it."""
    return [point.step for point in client.get_metric_history(run_id, metric)]


def leftovers(folder: str, checkpoints: Checkpoints) -> dict[str, int]:
    """Counts of what lies in the run's folder."""
    files = [name for name, _ in storage.list_files(folder)]
    entries = checkpoints.entries()
    stored = [name.removeprefix("checkpoints/") for name in files if name.startswith("checkpoints/")]
    listed = {file for entry in entries for file in (entry.file, entry.scores) if file}
    return {
        "files": len(files),
        "checkpoint_owners": len({name.split("/")[0] for name in stored}),
        "checkpoints": len(entries),
        "unlisted_checkpoint_files": sum(name not in listed and not name.endswith("/index.json") for name in stored),
        "claims": sum(name.startswith("lease/") for name in files),
        "unsent": sum(name.startswith("unsent/") for name in files),
        "of_ray": sum(name.startswith("ray/") for name in files),
    }
