"""A run's folder: which checkpoints are kept, and what happens when one is damaged."""

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch

from cxr_dist import storage
from cxr_dist.errors import InputError, RunError
from cxr_dist.train.checkpoint import FORMAT, Checkpoints, Entry, load_checkpoint, run_folder

OWNER = "000000"
"""Folder of an owner without a lease."""


def save(checkpoints: Checkpoints, index: int, score: float | None, *, finished: bool = False) -> Entry:
    state = {"tail": {"weight": torch.full((2,), float(index))}, "progress": {"index": index}}
    return checkpoints.save(state, index=index, epoch=index // 10 - 1, score=score, finished=finished)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints" / OWNER).iterdir())


def test_run_folder() -> None:
    assert run_folder("s3://bucket/runs", "demo") == "s3://bucket/runs/demo"


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    assert (checkpoints.entries(), checkpoints.latest_whole(), checkpoints.best()) == ([], None, None)


def test_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    entry = save(checkpoints, 10, 0.5, finished=True)
    data = (tmp_path / "checkpoints" / OWNER / "000000010.pt").read_bytes()
    assert (entry.file, entry.bytes, entry.epoch, entry.finished) == ("000000/000000010.pt", len(data), 0, True)
    found = checkpoints.load(entry)
    assert torch.equal(found["tail"]["weight"], torch.full((2,), 10.0))
    assert found["progress"] == {"index": 10}
    assert Checkpoints(str(tmp_path)).entries() == [entry]
    assert checkpoints.at(10) == checkpoints.latest_whole() == entry
    with pytest.raises(RunError, match="found no checkpoint of step 20, which the stream starts from"):
        checkpoints.at(20)


def test_more_or_fewer_are_kept_as_asked(tmp_path: Path) -> None:
    for more, kept in ((0, [2, 6]), (1, [2, 5, 6]), (3, [2, 3, 4, 5, 6])):
        checkpoints = Checkpoints(str(tmp_path / str(more)), more=more)
        for index in range(1, 7):
            save(checkpoints, index, 0.9 if index == 2 else None)
        assert [entry.index for entry in checkpoints.entries()] == kept
        assert files(tmp_path / str(more)) == [f"{index:09d}.pt" for index in kept] + ["index.json"]


def test_best_last_and_the_one_before_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    kept = []
    for index, score in ((10, 0.5), (20, 0.9), (30, 0.6), (40, 0.9), (50, None), (60, 0.7)):
        save(checkpoints, index, score)
        kept.append([entry.index for entry in checkpoints.entries()])
        assert files(tmp_path) == [f"{number:09d}.pt" for number in kept[-1]] + ["index.json"]
    assert kept == [[10], [10, 20], [20, 30], [20, 30, 40], [20, 40, 50], [20, 50, 60]]
    best = checkpoints.best()
    assert best is not None
    # of equals the earlier
    assert best.index == 20


def test_without_any_score_there_is_no_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for index in (10, 20, 30):
        save(checkpoints, index, None)
    assert checkpoints.best() is None
    assert [entry.index for entry in checkpoints.entries()] == [20, 30]


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_latest_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    first, last = save(checkpoints, 10, 0.5), save(checkpoints, 20, 0.6)
    path = tmp_path / "checkpoints" / last.file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest_whole() == first
    assert len(caplog.messages) == 1
    assert "000000020.pt" in caplog.messages[0]
    with pytest.raises(RunError, match=r"000000020\.pt: (found other bytes than were saved|not found)"):
        checkpoints.load(last)
    # the run goes on from the first and stores the same step anew
    assert save(checkpoints, 20, 0.6) == last
    assert checkpoints.latest_whole() == last


def test_all_damaged_is_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    entry = save(checkpoints, 10, 0.5)
    (tmp_path / "checkpoints" / entry.file).write_bytes(b"")
    assert checkpoints.latest_whole() is None


@pytest.mark.parametrize("fails", ["000000020.pt", "index.json"])
def test_a_save_that_dies_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    first = save(checkpoints, 10, 0.5)
    put = storage.put_atomic

    def dying(uri: str, data: bytes) -> None:
        if uri.endswith(fails):
            raise OSError("the machine went away")
        put(uri, data)

    monkeypatch.setattr(storage, "put_atomic", dying)
    with pytest.raises(OSError, match="went away"):
        save(checkpoints, 20, 0.6)
    assert checkpoints.entries() == [first]
    assert checkpoints.latest_whole() == first


def test_the_old_best_is_deleted_only_after_the_index_names_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for index, score in ((10, 0.9), (20, 0.5), (30, 0.6)):
        save(checkpoints, index, score)
    listed = []
    delete = storage.delete

    def watching(uri: str) -> None:
        listed.append((Path(uri).name, [entry.index for entry in checkpoints.entries()]))
        delete(uri)

    monkeypatch.setattr(storage, "delete", watching)
    save(checkpoints, 40, 0.95)
    assert listed == [("000000010.pt", [30, 40]), ("000000020.pt", [30, 40])]


def test_a_checkpoint_is_found_by_its_file_or_its_runs_folder(tmp_path: Path) -> None:
    run = str(tmp_path / "demo")
    checkpoints = Checkpoints(run)
    for index, score in ((10, 0.9), (20, 0.5)):
        save(checkpoints, index, score)
    for uri, index in ((run, 10), (run + "/", 10), (f"{run}/checkpoints/{OWNER}/000000020.pt", 20)):
        found = load_checkpoint(uri)
        assert found["progress"] == {"index": index}
        assert (found["uri"], found["folder"]) == (f"{run}/checkpoints/{OWNER}/{index:09d}.pt", run)
    (tmp_path / "weights.pt").write_bytes(b"not a run")
    for uri in (f"{run}/checkpoints/{OWNER}/000000030.pt", str(tmp_path / "other"), str(tmp_path / "weights.pt")):
        with pytest.raises(
            InputError, match=r"found none there, expected RUN/checkpoints/OWNER/STEP\.pt or a run's folder"
        ):
            load_checkpoint(uri)


def test_an_unscored_run_is_found_by_its_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for index in (10, 20):
        save(checkpoints, index, None)
    assert load_checkpoint(str(tmp_path))["progress"] == {"index": 20}


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    save(checkpoints, 10, 0.5)
    path = tmp_path / "checkpoints" / OWNER / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))
    for ask in (checkpoints.entries, checkpoints.latest_whole, lambda: load_checkpoint(str(tmp_path))):
        with pytest.raises(InputError, match=r"index\.json: found format 3, expected 2; use the version that wrote it"):
            ask()


def test_scores_lie_beside_their_checkpoint_and_go_with_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), more=0)
    first = checkpoints.save({}, index=10, epoch=0, score=0.5, finished=False, scores=b"first")
    assert (tmp_path / "checkpoints" / (first.scores or "")).read_bytes() == b"first"
    checkpoints.save({}, index=20, epoch=1, score=0.6, finished=False, scores=b"second")
    assert files(tmp_path) == ["000000020.parquet", "000000020.pt", "index.json"]
    assert save(checkpoints, 30, 0.1).scores is None


def test_a_new_owner_begins_with_copies_of_what_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Checkpoints(str(tmp_path), owner=1)
    kept = [
        old.save({"at": index}, index=index, epoch=0, score=0.1 * index, finished=False, scores=b"s")
        for index in (1, 2)
    ]
    (tmp_path / "checkpoints" / kept[1].file).write_bytes(b"damaged")
    new = Checkpoints(str(tmp_path), owner=2)
    with caplog.at_level(logging.WARNING):
        new.adopt()
    assert "000001/000000002.pt" in caplog.text
    [entry] = Checkpoints(str(tmp_path)).entries()
    assert (entry.file, entry.scores) == ("000002/000000001.pt", "000002/000000001.parquet")
    assert new.load(entry)["at"] == 1
    assert (tmp_path / "checkpoints" / (entry.scores or "")).read_bytes() == b"s"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]


def test_an_owner_of_nothing_counts_too(tmp_path: Path) -> None:
    Checkpoints(str(tmp_path), owner=3).adopt()
    assert Checkpoints(str(tmp_path)).entries() == []
    with pytest.raises(RunError, match="another driver has taken this run over"):
        save(Checkpoints(str(tmp_path), owner=2), 10, 0.5)


def test_a_finished_run_keeps_its_checkpoints_where_they_are(tmp_path: Path) -> None:
    entry = save(Checkpoints(str(tmp_path), owner=1), 10, 0.5, finished=True)
    Checkpoints(str(tmp_path), owner=2).adopt()
    assert Checkpoints(str(tmp_path)).entries() == [entry]


def test_damaged_scores_are_no_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Checkpoints(str(tmp_path), owner=1)
    entry = old.save({}, index=1, epoch=0, score=0.5, finished=False, scores=b"scores")
    assert old.read_scores(entry) == b"scores"
    (tmp_path / "checkpoints" / (entry.scores or "")).write_bytes(b"Scores")
    with pytest.raises(RunError, match=r"000001/000000001\.parquet: found other bytes than were saved"):
        old.read_scores(entry)
    with caplog.at_level(logging.WARNING):
        Checkpoints(str(tmp_path), owner=2).adopt()
    assert "000000001.parquet" in caplog.text
    assert Checkpoints(str(tmp_path)).entries() == []


def test_checkpoints_of_a_version_without_owners_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "index.json").write_text('{"format": 1, "checkpoints": []}')
    with pytest.raises(InputError, match=r"checkpoints/index\.json: found format 1, expected 2"):
        Checkpoints(str(tmp_path)).entries()


@pytest.mark.parametrize("asleep_in", ["put_atomic", "read_bytes"])
def test_an_owner_that_was_only_asleep_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep_in: str
) -> None:
    old, new = Checkpoints(str(tmp_path), owner=1), Checkpoints(str(tmp_path), owner=2)
    for index in (10, 20):
        save(old, index, 0.1 * index)
    awake = getattr(storage, asleep_in)

    def falling_asleep(*args: object) -> object:
        """In the middle of its save."""
        monkeypatch.setattr(storage, asleep_in, awake)
        new.adopt()
        save(new, 25, None)
        return awake(*args)

    monkeypatch.setattr(storage, asleep_in, falling_asleep)
    with contextlib.suppress(RunError):
        save(old, 30, 0.9)
    assert [entry.file for entry in Checkpoints(str(tmp_path)).entries()] == [
        "000002/000000020.pt",
        "000002/000000025.pt",
    ]
    assert all(new.read(entry) for entry in new.entries())
    with pytest.raises(RunError, match="another driver has taken this run over"):
        save(old, 40, 0.9)
