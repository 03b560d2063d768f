"""What may go, and that removing it can be cut off, repeated and raced without harm; with a real registry in SQLite."""

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cxr_dist import storage
from cxr_dist.data import features
from cxr_dist.errors import ConfigError, InputError, RunError
from cxr_dist.housekeeping.facts import Facts, gather
from cxr_dist.housekeeping.plan import DAY_S, Item, plan
from cxr_dist.housekeeping.remove import Remover
from cxr_dist.housekeeping.tracked import Tracking
from cxr_dist.train.checkpoint import Checkpoints, Entry
from cxr_dist.train.identity import read_run
from cxr_dist.train.lease import Claim, Lease, latest_claims, living_owner
from cxr_dist.train.outcome import Outcome
from cxr_dist.train.sync import sync_run

OLDER_S = 30 * DAY_S
KEY = "0123456789abcdef" * 2
INPUTS = {"manifest_sha256": "m", "boundary": "denseblock4", "type": "fp16", "view": 1, "seed": 0}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store with nothing in it; MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class World:
    """A prefix with runs and features, and the MLflow that knows them."""

    def __init__(self, folder: Path, store: Path):
        self.runs, self.features = folder / "runs", folder / "runs" / "features"
        self.store = f"sqlite:///{shutil.copy(store, folder / 'mlflow.db')}"
        self.client = MlflowClient(self.store)
        self.runs.mkdir()

    def run(
        self,
        name: str = "demo",
        *,
        days: float = 40,
        status: str = "FINISHED",
        owner: int = 1,
        journal: tuple[dict[str, Any], ...] = (),
        released: bool = True,
        config: dict[str, Any] | None = None,
        **record: Any,
    ) -> Path:
        """A run of so many days ago, with two checkpoints; its folder."""
        folder = self.runs / name
        run_id = self.client.create_run("0").info.run_id
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        config = {"model.weights": "imagenet", "model.trainable": "denseblock4", "train.features_type": "fp16"} | (
            config or {}
        )
        content = {"format": 1, "run_id": run_id, "manifest_sha256": "m", "features": None, "config": config}
        put(folder / "run.json", {**content, **record})
        put(folder / "initial.pt", "weights")
        put(folder / "scores" / "validation.parquet", "scores")
        for index in (10, 20):
            finished = status == "FINISHED" and index == 20
            self.save(folder, index, owner=owner, finished=finished, journal=list(journal))
        Outcome(owner=owner, status="FAILED" if status == "RUNNING" else status).write(str(folder))  # type: ignore[arg-type]
        claim = dataclasses.replace(BOB, number=owner, time=time.time() - days * DAY_S)
        Lease(str(folder), claim)._write(released=released)
        age(folder, days)
        return folder

    def save(self, folder: Path, index: int, *, owner: int, finished: bool = False, **state: Any) -> Entry:
        return Checkpoints(str(folder), owner=owner).save(
            state, index=index, epoch=0, score=None, finished=finished, scores=b"scores"
        )

    def cache(self, name: str = KEY, *, days: float = 40, index: bool = True, **inputs: Any) -> Path:
        """A set of features that was last used so many days ago."""
        folder = self.features / name
        put(folder / "00000.parquet", "features")
        put(folder / "00000.parquet.json", {})
        if index:
            put(folder / "features.json", {"format": 1, "inputs": {**INPUTS, **inputs}})
        age(folder, days)
        return folder

    def register(self, source: str, run_id: str | None = None, **tags: str) -> None:
        if not self.client.search_registered_models():
            self.client.create_registered_model("chest")
        self.client.create_model_version("chest", source, run_id=run_id, tags=tags)

    def facts(self, pause: Callable[[float], Any] = lambda seconds: None, older_s: float = OLDER_S) -> Facts:
        return gather(
            str(self.runs),
            str(self.features),
            Tracking(self.store),
            older_s=older_s,
            watch=lambda folder: living_owner(folder, pause=pause),
        )

    def items(self, **options: Any) -> dict[str, Item]:
        return {f"{item.kind} {item.name}": item for item in plan(self.facts(**options), older_s=OLDER_S)}

    def why(self, name: str, **options: Any) -> str:
        """Why something stays."""
        found = self.items(**options)[name]
        assert not found.goes
        return found.why

    def remove(self, facts: Facts | None = None, **lease: Any) -> dict[str, str]:
        """Remove what may go; what stayed after all."""
        facts = facts or self.facts()
        remover = Remover(
            storage_path=str(self.runs),
            facts=facts,
            tracking=Tracking(self.store),
            older_s=OLDER_S,
            lease={"pause": lambda seconds: None, **lease},
        )
        return remover.remove(plan(facts, older_s=OLDER_S))


BOB = Claim(number=1, token="b" * 12, owner="bob@there, process 9", machine="", pid=9, beat=1, time=0.0)


@pytest.fixture
def world(tmp_path: Path, empty_store: Path) -> World:
    return World(tmp_path, empty_store)


def put(path: Path, content: Any) -> None:
    storage.put_atomic(str(path), content.encode() if isinstance(content, str) else json.dumps(content).encode())


def age(folder: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else [folder]:
        os.utime(path, (then, then))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but leases."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "lease/" not in name}


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["run_id"])


def checkpoint(folder: Path) -> str:
    return Checkpoints(str(folder)).uri(Checkpoints(str(folder)).entries()[-1])


def beating(folder: Path, claim: Claim) -> Callable[[float], None]:
    """A pause in which a driver shows a sign of life."""

    def pause(seconds: float) -> None:
        [last] = latest_claims(str(folder))
        Lease(str(folder), dataclasses.replace(claim, beat=last.beat + 1, time=time.time()))._write()

    return pause


# runs


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_an_old_run_goes_whole_and_its_mlflow_entry_stays(world: World, status: str) -> None:
    folder = world.run(status=status)
    known = run_id(folder)
    item = world.items()["run demo"]
    assert (item.goes, item.why, item.bytes) == (True, f"{status}, older than 30 days", size(folder))
    assert world.remove() == {}
    assert not folder.exists()
    assert world.client.get_run(known).info.status == status


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_listing_changes_nothing(world: World) -> None:
    world.run()
    world.cache()
    before = {path: path.stat().st_mtime_ns for path in world.runs.rglob("*")}
    assert [item.goes for item in world.items().values()] == [True, True]
    assert {path: path.stat().st_mtime_ns for path in world.runs.rglob("*")} == before


def test_age_is_that_of_the_newest_file(world: World) -> None:
    folder = world.run(days=40)
    age(folder / "scores" / "validation.parquet", 29.9)
    assert world.why("run demo") == "FINISHED, younger than 30 days"
    age(folder / "scores" / "validation.parquet", 30.1)
    assert world.items()["run demo"].goes


def test_a_lease_that_was_taken_and_given_back_makes_a_run_no_younger(world: World) -> None:
    folder = world.run()
    with Lease.take(str(folder), owner="ann"):
        pass
    assert world.items()["run demo"].goes


def test_the_last_sign_of_life_of_a_vanished_driver_counts(world: World) -> None:
    folder = world.run(status="FAILED", released=False)
    assert world.items()["run demo"].goes
    Lease(str(folder), dataclasses.replace(BOB, time=time.time() - 2 * DAY_S))._write()
    assert world.why("run demo") == "FAILED, younger than 30 days"


def test_a_living_driver_keeps_its_run(world: World) -> None:
    folder = world.run(released=False)
    alive = dataclasses.replace(BOB, time=time.time())
    Lease(str(folder), alive)._write()
    assert world.why("run demo", pause=beating(folder, alive)) == "being written by bob@there, process 9"


@pytest.mark.parametrize("place", ["checkpoint", "file URI", "folder", "inside", "another mount", "run link", "tag"])
def test_a_registered_model_keeps_the_run_that_it_points_to(world: World, place: str) -> None:
    folder = world.run()
    world.run("demo-2")
    sources = {
        "checkpoint": checkpoint(folder),
        "file URI": f"file://{checkpoint(folder)}",
        "folder": f"{folder}/",
        "inside": f"{folder}/export/model.onnx",
        "another mount": "/mnt/elsewhere/demo/checkpoints/000001/000000020.pt",
        "run link": f"runs:/{run_id(folder)}/model",
        "tag": "somewhere",
    }
    world.register(sources[place], **({"checkpoint": checkpoint(folder)} if place == "tag" else {}))
    assert world.why("run demo") == "version 1 of model chest points to it"
    assert world.remove() == {}
    assert not (world.runs / "demo-2").exists()
    assert Checkpoints(str(folder)).latest_whole()


def test_a_registered_model_keeps_the_run_that_made_it(world: World) -> None:
    folder = world.run()
    world.register("s3://elsewhere/model", run_id=run_id(folder))
    assert world.why("run demo") == "version 1 of model chest points to it"
    world.client.delete_model_version("chest", "1")
    assert world.items()["run demo"].goes


def test_all_pages_of_the_registry_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.run()
    search = MlflowClient.search_model_versions
    monkeypatch.setattr(
        MlflowClient, "search_model_versions", lambda self, **asked: search(self, **{**asked, "max_results": 2})
    )
    world.register(checkpoint(folder))
    for number in range(5):
        world.register(f"s3://elsewhere/{number}")
    assert world.why("run demo") == "version 1 of model chest points to it"


def test_a_model_that_is_registered_meanwhile_keeps_its_run(world: World) -> None:
    folder = world.run()
    facts, before = world.facts(), tree(folder)
    world.register("s3://elsewhere/model", run_id=run_id(folder))
    assert "version 1 of model chest points to it, which was not so a moment ago" in world.remove(facts)["run demo"]
    assert tree(folder) == before


def test_without_a_registry_nothing_is_removed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.run()
    facts, before = world.facts(), tree(folder)
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    world.store = "http://127.0.0.1:9"
    with pytest.raises(
        InputError, match=r"tracking\.uri: MLflow at http://127\.0\.0\.1:9 does not say what its registry points to"
    ):
        world.facts()
    assert "does not say what its registry points to" in world.remove(facts)["run demo"]
    assert tree(folder) == before


def test_an_empty_store_is_not_made_for_want_of_the_right_one(world: World, tmp_path: Path) -> None:
    world.run()
    world.store = f"sqlite:///{tmp_path}/wrong.db"
    with pytest.raises(InputError, match=r"tracking\.uri: found no file .*wrong\.db, expected the SQLite file"):
        world.facts()
    assert not (tmp_path / "wrong.db").exists()


def test_a_run_that_mlflow_does_not_know_stays(world: World, empty_store: Path, tmp_path: Path) -> None:
    known = run_id(world.run())
    world.store = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
    assert world.why("run demo") == f"MLflow does not know its run {known}; give the server that does (tracking.uri)"


def test_what_mlflow_has_not_heard_is_synced_first(world: World) -> None:
    record = {"step": 3, "timestamp": 1, "metrics": {"loss": 0.5}}
    carried = world.run("carried", status="FAILED", journal=(record,))
    kept, unheard = world.run("kept"), world.run("unheard", status="RUNNING")
    lines = [{"format": "cxr-dist-metrics/1", "run_id": run_id(kept)}, record]
    put(kept / "unsent" / "x.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    age(kept, 40)
    assert world.why("run carried") == "MLflow does not have some of its metrics; run jobs/sync.py first"
    assert world.why("run kept") == "MLflow does not have some of its metrics; run jobs/sync.py first"
    assert world.why("run unheard") == "MLflow does not have how it ended; run jobs/sync.py first"
    for folder in (carried, kept, unheard):
        sync_run(str(folder), world.store)
        age(folder, 40)
    assert all(item.goes for item in world.items().values())


def test_a_run_keeps_the_one_that_it_started_from(world: World) -> None:
    first = world.run("first")
    world.run("second", config={"model.weights": checkpoint(first)})
    third = world.run("third", days=3, config={"model.weights": "outputs/runs/second/checkpoints/000001/000000020.pt"})
    assert world.why("run first") == "run second started from its weights"
    assert world.why("run second") == "run third started from its weights"
    age(third, 40)
    assert [item.name for item in plan(world.facts(), older_s=OLDER_S)] == ["third", "second", "first"]
    assert world.remove() == {}
    assert tree(world.runs) == {}


def test_a_run_that_begins_meanwhile_keeps_the_one_that_it_starts_from(world: World) -> None:
    folder = world.run()
    facts = world.facts()
    world.run("new", days=0, config={"model.weights": checkpoint(folder)})
    assert "run new started from its weights" in world.remove(facts)["run demo"]
    assert Checkpoints(str(folder)).latest_whole()


def test_a_run_that_stays_after_all_keeps_the_one_that_it_started_from(world: World) -> None:
    first = world.run("first")
    second = world.run("second", config={"model.weights": checkpoint(first)})
    facts = world.facts()
    put(second / "scores" / "test.parquet", "new")
    assert set(world.remove(facts)) == {"run first", "run second"}
    assert (first / "initial.pt").exists()


def test_what_is_no_run_is_named_and_not_touched(world: World) -> None:
    notes, other, broken = world.runs / "notes", world.runs / "other", world.runs / "broken"
    source = world.run("source")
    put(notes / "plan.txt", "mine")
    put(other / "run.json", {"format": 9, "anything": checkpoint(source)})
    put(broken / "run.json", "{")
    bad = world.run("bad-index")
    put(bad / "checkpoints" / "000001" / "index.json", {"format": 1})
    for folder in world.runs.iterdir():
        age(folder, 400)
    before = tree(world.runs)
    found = world.items()
    assert {name: item.why for name, item in found.items() if item.kind == "folder"} == {
        "folder notes": "not touched: found no run.json, expected one in the folder of a run",
        "folder other": "not touched: run.json: found format 9, expected 1",
        "folder broken": "not touched: "
        + "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "folder bad-index": f"not touched: {bad}/checkpoints/000001/index.json: found format 1, expected 2; use the "
        "version that wrote it",
    }
    assert world.why("run source") == "run other started from its weights"
    assert world.remove() == {}
    assert tree(world.runs) == before


def test_a_run_that_holds_the_features_stays(world: World) -> None:
    world.features = world.run() / "features"
    world.cache()
    age(world.runs / "demo", 40)
    assert world.why("run demo") == "train.features_uri lies in it"


# removals that are cut off or meet others


class Gone(BaseException):
    """The machine is."""


CHANGES = ("put_atomic", "delete", "delete_dir", "delete_empty")


def intercept(patch: pytest.MonkeyPatch, before: Callable[[str, str], None]) -> None:
    """Call `before` with every operation of this thread that changes storage: its name, and what it is about."""

    def wrapped(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: str, *rest: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # and not the one that leaves signs of life
                before(name, uri)
            return operation(uri, *rest)

        return call

    for name in CHANGES:
        patch.setattr(storage, name, wrapped(name, getattr(storage, name)))


def cut_off(remove: Callable[[], Any], after: int) -> bool:
    """Whether a removal that is killed after so many changes was not done before; nothing is changed once it is killed."""
    done = 0

    def count(name: str, uri: str) -> None:
        nonlocal done
        if done == after:
            raise Gone
        done += 1

    with pytest.MonkeyPatch.context() as patch:
        intercept(patch, count)
        try:
            remove()
        except Gone:
            return True
    return False


def found_by_a_driver(folder: Path, whole: dict[str, bytes]) -> str:
    """What a driver makes of a run's folder: `whole`, `refused`, or `fresh`."""
    checkpoints = Checkpoints(str(folder))
    assert all(checkpoints.load(entry) for entry in checkpoints.entries())
    try:
        if read_run(str(folder)) is None:
            assert tree(folder) == {}
            return "fresh"
    except InputError as error:
        assert "a run that is being removed and no longer whole" in str(error)  # noqa: PT017
        return "refused"
    assert tree(folder) == whole
    return "whole"


def test_a_removal_that_is_cut_off_is_never_resumed_from_and_is_gone_on_with(world: World) -> None:
    folder = world.run()
    put(folder / "ray" / "notes" / "x", "of Ray")
    age(folder, 40)
    whole, spare = tree(folder), shutil.copytree(folder, world.runs.parent / "spare")
    seen: list[str] = []
    while cut_off(world.remove, len(seen)):
        seen.append(found_by_a_driver(folder, whole))
        again = world.items()
        assert [item.goes for item in again.values()] == [True] * len(again)
        assert world.remove() == {}
        assert list(world.runs.iterdir()) == []
        shutil.copytree(spare, folder)
    order = [state for number, state in enumerate(seen) if seen[number - 1 : number] != [state]]
    assert order == ["whole", "refused", "fresh"]
    assert seen.count("refused") > 8


def test_a_removal_that_is_cut_off_stays_so_for_a_registered_model(world: World) -> None:
    folder = world.run()
    known = run_id(folder)
    assert cut_off(world.remove, 5)
    world.register("s3://elsewhere/model", run_id=known)
    assert world.why("run demo") == "version 1 of model chest points to it (its removal had begun)"


class Driver:
    """A driver that starts in the middle of a removal, before its change number `moment`."""

    def __init__(self, folder: Path, run_id: str, moment: int):
        self.folder, self.run_id, self.moment = folder, run_id, moment
        self.seen, self.refused = 0, ""
        self.lease: Lease | None = None
        self.began_anew = False

    def may_start(self, name: str, uri: str) -> None:
        self.seen += 1
        if self.seen == self.moment + 1:
            self.moment = -1  # once; its own changes come here too
            try:
                self.start()
            except InputError as error:
                self.refused = str(error)

    def start(self) -> None:
        """As `train.run` does: look, take the lease, look again, adopt, record."""
        folder = str(self.folder)
        read_run(folder)
        lease = Lease.take(folder, owner="driver", beat_s=0.01, pause=watchful, on_loss=lambda: None)
        found = read_run(folder)
        self.began_anew, self.lease = found is None, lease.__enter__()
        Checkpoints(folder, owner=lease.number).adopt()
        put(self.folder / "run.json", found or {"format": 1, "run_id": self.run_id, "config": {}})


def watchful(seconds: float) -> None:
    """A pause in which a driver that lives shows it."""
    time.sleep(0.06)


def test_a_driver_that_starts_while_a_run_is_removed_is_refused_or_begins_anew(world: World) -> None:
    folder = world.run()
    known, whole, spare = run_id(folder), set(tree(folder)), shutil.copytree(folder, world.runs.parent / "spare")
    ends: list[str] = []
    while True:
        facts, driver = world.facts(), Driver(folder, known, moment=len(ends))
        with pytest.MonkeyPatch.context() as patch:
            intercept(patch, driver.may_start)
            stayed = world.remove(facts, beat_s=0.01, pause=watchful)
        if driver.moment != -1:
            break
        if driver.lease is None:
            assert (stayed, folder.exists()) == ({}, False)
            assert "being removed" in driver.refused or "being written by housekeeping@" in driver.refused
            ends.append("refused")
        else:
            driver.lease.check()
            assert [claim.token for claim in latest_claims(str(folder))] == [driver.lease.claim.token]
            own = {"run.json", f"checkpoints/{driver.lease.number:06d}/index.json"}
            assert set(tree(folder)) == (own if driver.began_anew else whole)
            assert driver.began_anew or list(stayed) == ["run demo"]
            ends.append("anew" if driver.began_anew else "first")
            driver.lease.__exit__(None, None, None)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(spare, folder)
    assert [end for number, end in enumerate(ends) if ends[number - 1 : number] != [end]] == [
        "first",
        "refused",
        "anew",
    ]


def test_a_run_that_was_gone_on_with_meanwhile_stays(world: World) -> None:
    folder = world.run(status="KILLED")
    facts = world.facts()
    with Lease.take(str(folder), owner="driver") as lease:
        Checkpoints(str(folder), owner=lease.number).adopt()
    age(folder, 35)
    before = tree(folder)
    assert "changed since it was looked at" in world.remove(facts)["run demo"]
    assert tree(folder) == before


@pytest.mark.parametrize("asleep_in", [("put_atomic", "run.json"), ("delete", ".pt")])
def test_who_was_taken_for_dead_while_it_removed_stops(
    world: World, monkeypatch: pytest.MonkeyPatch, asleep_in: tuple[str, str]
) -> None:
    folder = world.run()
    whole, takes = tree(folder), []

    def fall_asleep(name: str, uri: str) -> None:
        if (name, uri[-len(asleep_in[1]) :]) == asleep_in and not takes:
            takes.append(uri)
            put(folder / "lease" / "000000003-cccccccccccc.json", {"format": 1, **dataclasses.asdict(BOB)})

    intercept(monkeypatch, fall_asleep)
    assert "another driver has taken this run over" in world.remove()["run demo"]
    assert len(takes) == 1
    if asleep_in[0] == "put_atomic":
        assert tree(folder) == whole
    else:
        assert json.loads((folder / "run.json").read_text())["format"] == "being removed"
        assert len([name for name in whole if name not in tree(folder)]) == 3  # the index, and two files


# parts of runs that stay


def test_superseded_checkpoints_and_leftovers_of_a_finished_run_go(world: World) -> None:
    folder = world.run(days=3, owner=2)
    whole = tree(folder)
    for name in (
        "000001/index.json",
        "000001/000000010.pt",
        "000002/000000005.pt",
        "000002/.000000030.pt.0a1b2c3d.tmp",
    ):
        put(folder / "checkpoints" / name, {"format": 2, "checkpoints": []})
    put(folder / ".run.json.0a1b2c3d.tmp", "half")
    age(folder, 3)
    item = world.items()["checkpoints demo"]
    assert item.goes
    assert item.paths == (
        ".run.json.0a1b2c3d.tmp",
        "checkpoints/000001/000000010.pt",
        "checkpoints/000001/index.json",
        "checkpoints/000002/.000000030.pt.0a1b2c3d.tmp",
        "checkpoints/000002/000000005.pt",
    )
    assert world.remove() == {}
    assert tree(folder) == whole
    assert not (folder / "checkpoints" / "000001").exists()
    assert [claim.released for claim in latest_claims(str(folder))] == [True]
    assert "checkpoints demo" not in world.items()


def test_files_that_an_unfinished_run_may_yet_name_stay(world: World) -> None:
    """A driver that is asleep in a save, or in an adoption after which it deletes earlier owners' files, may name them."""
    folder = world.run(days=3, owner=2, status="KILLED")
    for name in ("000001/000000010.pt", "000002/000000030.pt", "000003/000000010.pt"):
        put(folder / "checkpoints" / name, "x")
    going, waiting = [item for item in plan(world.facts(), older_s=OLDER_S) if item.kind == "checkpoints"][::-1]
    assert (going.goes, going.paths) == (True, ("checkpoints/000001/000000010.pt",))
    assert (waiting.goes, waiting.paths) == (
        False,
        ("checkpoints/000002/000000030.pt", "checkpoints/000003/000000010.pt"),
    )
    assert waiting.why == "the next driver of the run clears them: 000002/000000030.pt, 000003/000000010.pt"


def test_checkpoints_that_something_points_to_stay(world: World) -> None:
    folder = world.run(days=3, owner=4)
    for owner in (1, 2, 3):
        put(folder / "checkpoints" / f"{owner:06d}" / "000000010.pt", "x")
    world.register(f"file://{folder}/checkpoints/000001/000000010.pt")
    world.run("later", days=3, config={"model.weights": "runs/demo/checkpoints/000002/000000010.pt"})
    assert world.remove() == {}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000001", "000002", "000004"]
    assert world.why("checkpoints demo").startswith("a model or a run points there: ")


def test_a_living_driver_or_one_that_mlflow_waits_for_keeps_even_leftovers(world: World) -> None:
    folder = world.run(days=3, owner=2, status="RUNNING", released=False)
    put(folder / "checkpoints" / "000001" / "000000010.pt", "x")
    assert world.why("checkpoints demo").startswith("MLflow does not have how it ended; run jobs/sync.py first")
    alive = dataclasses.replace(BOB, number=2, time=time.time())
    Lease(str(folder), alive)._write()
    assert "checkpoints demo" not in world.items(pause=beating(folder, alive))


def test_a_driver_that_comes_first_keeps_leftovers(world: World) -> None:
    folder = world.run(days=3, owner=2)
    put(folder / "checkpoints" / "000001" / "000000010.pt", "x")
    facts, before = world.facts(), tree(folder)
    with Lease.take(str(folder), owner="driver", beat_s=0.01, on_loss=lambda: None):
        stayed = world.remove(facts, pause=watchful)
    assert "being written by driver@" in stayed["checkpoints demo"]
    assert tree(folder) == before


def test_a_write_that_is_under_way_is_no_leftover(world: World) -> None:
    folder = world.run(days=3)
    half = folder / "checkpoints" / "000001" / ".000000030.pt.0a1b2c3d.tmp"
    put(half, "half")
    assert "checkpoints demo" not in world.items()
    age(half, 0.05)
    assert world.items()["checkpoints demo"].goes


# features


def test_features_that_nothing_uses_go(world: World) -> None:
    whole, half, aside = world.cache(), world.cache("1" * 32, index=False), world.cache("2" * 32)
    features.set_aside(str(aside), "found 3 bytes, expected 8")
    age(aside, 40)
    fresh = world.cache("3" * 32, days=29)
    assert {item.name: item.why for item in world.items().values() if item.goes} == {
        whole.name: "not used for 30 days",
        half.name: "half built, and not gone on with for 30 days",
        aside.name: "set aside: found 3 bytes, expected 8",
    }
    assert world.why(f"features {fresh.name}") == "used in the last 30 days"
    assert world.remove() == {}
    assert [path.name for path in world.features.iterdir()] == [fresh.name]


def test_a_sign_of_use_keeps_features(world: World) -> None:
    folder = world.cache()
    facts = world.facts()
    assert features.use(str(folder), "run")
    assert world.why(f"features {KEY}") == "used in the last 30 days"
    before = tree(folder)
    assert "changed since it was looked at" in world.remove(facts)[f"features {KEY}"]
    assert tree(folder) == before


@pytest.mark.parametrize("index", [True, False])
def test_a_run_that_may_go_on_keeps_its_features(world: World, index: bool) -> None:
    world.cache(index=index)
    world.run(days=3, status="KILLED")
    assert world.why(f"features {KEY}") == "run demo may go on with it"


@pytest.mark.parametrize(
    ("about", "inputs"),
    [
        ({"status": "FINISHED"}, {}),
        ({"status": "KILLED", "features": False}, {}),
        ({"status": "KILLED"}, {"manifest_sha256": "another"}),
        ({"status": "KILLED"}, {"boundary": "denseblock3"}),
        ({"status": "KILLED"}, {"type": "fp32"}),
        ({"status": "KILLED", "config": {"train.seed": 1}}, {}),
    ],
)
def test_a_run_that_cannot_use_features_does_not_keep_them(
    world: World, about: dict[str, Any], inputs: dict[str, Any]
) -> None:
    world.cache(**inputs)
    world.run(days=3, **about)
    assert world.items()[f"features {KEY}"].goes


def test_a_run_that_goes_takes_its_features_along(world: World) -> None:
    world.cache()
    world.run(status="KILLED")
    facts = world.facts()
    assert world.remove(facts) == {}
    assert tree(world.runs) == {}


def test_a_run_that_stays_after_all_keeps_its_features(world: World) -> None:
    world.cache()
    folder = world.run(status="KILLED")
    facts = world.facts()
    put(folder / "scores" / "test.parquet", "new")
    assert set(world.remove(facts)) == {"run demo", f"features {KEY}"}


def test_a_run_that_cannot_be_read_keeps_all_features(world: World) -> None:
    world.cache()
    put(world.runs / "other" / "run.json", {"format": 9})
    assert world.why(f"features {KEY}") == "run other may go on with it"


def test_a_run_that_begins_meanwhile_keeps_its_features(world: World) -> None:
    folder = world.cache()
    facts = world.facts()
    world.run("new", days=0, status="RUNNING")
    assert "run new may go on with it" in world.remove(facts)[f"features {KEY}"]
    assert not (folder / "set_aside.json").exists()


def test_a_living_run_may_still_read_features_that_were_set_aside(world: World) -> None:
    aside = world.cache()
    features.set_aside(str(aside), "damaged")
    age(aside, 40)
    folder = world.run(days=3, status="RUNNING", released=False)
    assert world.items()[f"features {KEY}"].goes
    alive = dataclasses.replace(BOB, time=time.time())
    Lease(str(folder), alive)._write()
    assert world.why(f"features {KEY}", pause=beating(folder, alive)) == "run demo may go on with it"


def test_what_are_no_features_is_named_and_not_touched(world: World) -> None:
    world.cache("notes")
    put(world.cache() / "mine.txt", "x")
    put(world.cache("4" * 32) / "features.json", {"format": 9, "inputs": {}})
    for folder in world.features.iterdir():
        age(folder, 40)
    before = tree(world.features)
    assert {item.name: item.why for item in world.items().values()} == {
        "notes": "not touched: found another name, expected a set of features",
        KEY: "not touched: found mine.txt, expected a set of features",
        "4" * 32: "not touched: features.json: found format 9, expected 1",
    }
    assert world.remove() == {}
    assert tree(world.features) == before


def test_the_mark_that_leads_to_later_features_stays_as_long_as_they_do(world: World) -> None:
    first, second = world.cache(), world.cache(f"{KEY}.1", days=3)
    features.set_aside(str(first), "damaged")
    age(first, 40)
    assert world.remove() == {}
    assert list(tree(first)) == ["set_aside.json"]
    assert world.why(f"features {KEY}") == f"its mark leads to {KEY}.1"
    age(second, 40)
    assert world.remove() == {}
    assert world.remove() == {}
    assert tree(world.runs) == {}


def test_features_whose_removal_is_cut_off_are_not_begun_with_and_go_later(world: World) -> None:
    folder = world.cache()
    whole, spare, seen = tree(folder), shutil.copytree(folder, world.runs.parent / "spare"), []
    while cut_off(world.remove, len(seen)):
        if (folder / "set_aside.json").exists():
            assert not features.use(str(folder), "run")
            (folder / "used.json").unlink()
            seen.append("aside")
        elif tree(folder) == whole:
            seen.append("whole")
        else:
            assert tree(folder) == {}
            seen.append("gone")
        if seen[-1] != "gone":
            assert [item.goes for item in world.items().values()] == [True]
            assert world.remove() == {}
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(spare, folder)
    assert seen == ["whole", *["aside"] * 4, "gone"]


def test_features_that_a_run_had_begun_with_before_a_removal_was_cut_off_stay(world: World) -> None:
    folder = world.cache()
    facts = world.facts()
    assert features.use(str(folder), "run")
    assert cut_off(lambda: world.remove(facts), 1)
    assert (folder / "set_aside.json").exists()
    assert world.why(f"features {KEY}") == "used in the last 30 days"


def test_what_the_store_knows_no_age_of_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    world.cache()
    scan = storage.scan
    monkeypatch.setattr(storage, "scan", lambda uri, *rest: [(path, size, 0.0) for path, size, _ in scan(uri, *rest)])
    assert world.why("run demo") == "the store does not say how old it is"
    assert world.why(f"features {KEY}") == "the store does not say how old it is"


# the job


@pytest.fixture
def job(world: World, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    from cxr_dist.cli import run_job
    from jobs import gc

    def call(*flags: str) -> tuple[int, dict[str, Any], str]:
        argv = ["--train.storage_path", str(world.runs), "--tracking.uri", world.store, *flags]
        with pytest.raises(SystemExit) as left:
            run_job(gc.main, description="", extra=gc.add_flags, argv=argv)
        out, err = capsys.readouterr()
        last = out.splitlines()[-1] if out else "{}"
        return int(left.value.code or 0), json.loads(last), out + err

    return call


def test_the_job_lists_and_removes_only_if_asked(world: World, job: Any) -> None:
    old, young = world.run("old"), world.run("young", days=3)
    code, result, said = job()
    assert (code, result["remove"], result["stayed"]) == (0, False, {})
    assert {(item["name"], item["goes"], item["age_days"]) for item in result["items"]} == {
        ("old", True, 40.0),
        ("young", False, 3.0),
    }
    assert "goes   run   old " in said
    assert "nothing was removed; give --remove" in said
    assert old.exists()
    code, result, _ = job("--remove", "--older-than", "2", "--run.name", "young")
    assert (code, result["remove"], [item["name"] for item in result["items"]]) == (0, True, ["young"])
    assert (old.exists(), young.exists()) == (True, False)
    code, result, _ = job("--remove")
    assert (code, result["bytes"] > 0, old.exists()) == (0, True, False)


def test_the_job_says_what_is_wrong(world: World, job: Any) -> None:
    code, _, said = job()
    assert code == 2
    assert "found no run and no features under" in said
    world.run()
    assert job("--older-than", "-1")[0] == 2
    assert job("--run.name", "demi")[0] == 2


def test_a_claim_that_was_buried_is_not_written_again(world: World) -> None:
    folder = world.run()
    with Lease.take(str(folder), owner="ann") as lease:
        lease.bury()
        with pytest.raises(RunError, match="another driver has taken this run over"):
            lease.check()
    assert list((folder / "lease").iterdir()) == []


def test_the_refusal_names_what_removes_the_run(world: World) -> None:
    folder = world.run()
    with (
        Lease.take(str(folder), owner="housekeeping", beat_s=0.01),
        pytest.raises(ConfigError, match="this run is being written by housekeeping@"),
    ):
        Lease.take(str(folder), owner="driver", pause=watchful)


def test_the_records_of_sweeps_are_no_run(world: World) -> None:
    world.run("lr-01", days=1)
    put(world.runs / "sweeps" / "lr" / "sweep.json", {"format": "cxr-dist/sweep/1"})
    assert [run.name for run in world.facts().runs] == ["lr-01"]
