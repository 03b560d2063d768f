"""A run's folder: which checkpoints are kept, and what happens when one is damaged."""

import json
import logging
from pathlib import Path

import pytest
import torch

from cxr_dist import storage
from cxr_dist.errors import InputError, RunError
from cxr_dist.train.checkpoint import FORMAT, Checkpoints, Entry, load_checkpoint, run_folder


def save(checkpoints: Checkpoints, index: int, score: float | None, *, finished: bool = False) -> Entry:
    state = {"tail": {"weight": torch.full((2,), float(index))}, "progress": {"index": index}}
    return checkpoints.save(state, index=index, epoch=index // 10 - 1, score=score, finished=finished)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_run_folder() -> None:
    assert run_folder("s3://bucket/runs", "demo") == "s3://bucket/runs/demo"


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    assert (checkpoints.entries(), checkpoints.latest_whole(), checkpoints.best()) == ([], None, None)


def test_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    entry = save(checkpoints, 10, 0.5, finished=True)
    data = (tmp_path / "checkpoints" / "000000010.pt").read_bytes()
    assert (entry.file, entry.bytes, entry.epoch, entry.finished) == ("000000010.pt", len(data), 0, True)
    found = checkpoints.load(entry)
    assert torch.equal(found["tail"]["weight"], torch.full((2,), 10.0))
    assert found["progress"] == {"index": 10}
    assert Checkpoints(str(tmp_path)).entries() == [entry]
    assert checkpoints.at(10) == checkpoints.latest_whole() == entry
    with pytest.raises(RunError, match="found no checkpoint of step 20, which the stream starts from"):
        checkpoints.at(20)


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
    for uri, index in ((run, 10), (run + "/", 10), (f"{run}/checkpoints/000000020.pt", 20)):
        found = load_checkpoint(uri)
        assert found["progress"] == {"index": index}
        assert (found["uri"], found["folder"]) == (f"{run}/checkpoints/{index:09d}.pt", run)
    (tmp_path / "weights.pt").write_bytes(b"not a run")
    for uri in (f"{run}/checkpoints/000000030.pt", str(tmp_path / "other"), str(tmp_path / "weights.pt")):
        with pytest.raises(InputError, match=r"found none there, expected RUN/checkpoints/STEP\.pt or a run's folder"):
            load_checkpoint(uri)


def test_an_unscored_run_is_found_by_its_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for index in (10, 20):
        save(checkpoints, index, None)
    assert load_checkpoint(str(tmp_path))["progress"] == {"index": 20}


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    save(checkpoints, 10, 0.5)
    path = tmp_path / "checkpoints" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))
    for ask in (checkpoints.entries, checkpoints.latest_whole, lambda: load_checkpoint(str(tmp_path))):
        with pytest.raises(InputError, match=r"index\.json: found format 2, expected 1; use the version that wrote it"):
            ask()
