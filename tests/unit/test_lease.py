"""Who may write to a run: never two, and never one that was taken for dead."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cxr_dist import storage
from cxr_dist.errors import ConfigError, RunError
from cxr_dist.train.lease import LONG_GONE_S, Claim, Lease, latest_claims, living_owner, this_machine


def never(seconds: float) -> None:
    raise AssertionError("there is nothing to wait for")


def take(folder: Path, owner: str = "ann", **options: Any) -> Lease:
    return Lease.take(str(folder), owner=owner, **{"pause": never, **options})


def claims(folder: Path) -> list[str]:
    return sorted(path.name[:9] for path in (folder / "lease").iterdir())


def leave(folder: Path, claim: Claim) -> None:
    """A claim as another process would leave it."""
    Lease(str(folder), claim)._write()


def elsewhere(**changes: Any) -> Claim:
    """The claim of a driver on another machine."""
    claim = Claim(number=4, token="b" * 12, owner="bob@there, process 9", machine="", pid=9, beat=3, time=time.time())
    return dataclasses.replace(claim, **changes)


def test_a_run_is_free_at_first_and_after_it_was_given_back(tmp_path: Path) -> None:
    assert latest_claims(str(tmp_path)) == []
    with take(tmp_path) as first:
        assert first.number == 1
        first.check()
    [found] = latest_claims(str(tmp_path))
    assert (found.released, found.pid, found.number) == (True, os.getpid(), 1)
    assert found.owner.startswith("ann@")
    with take(tmp_path) as second:
        assert second.number == 2
        assert claims(tmp_path) == ["000000002"]


def test_a_living_owner_keeps_the_run(tmp_path: Path) -> None:
    owner = elsewhere()
    leave(tmp_path, owner)

    def pause(seconds: float) -> None:
        leave(tmp_path, dataclasses.replace(owner, beat=owner.beat + 1, time=time.time()))

    with pytest.raises(
        ConfigError,
        match=r"run\.name: this run is being written by bob@there, process 9 \(its last sign of life is 0 s old\)",
    ):
        take(tmp_path, pause=pause)
    assert claims(tmp_path) == ["000000004"]


def test_a_silent_owner_is_watched_and_then_succeeded(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(time=time.time() + 500))  # its clock is wrong
    waited: list[float] = []
    assert take(tmp_path, stale_s=30, pause=waited.append).number == 5
    assert sum(waited) == 30


def test_who_comes_while_one_watches_is_watched_as_long(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere())
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 28:
            leave(tmp_path, elsewhere(number=5, token="c" * 12))

    assert take(tmp_path, stale_s=30, pause=pause).number == 6
    assert sum(waited) == 28 + 30


def test_an_owner_that_gives_back_while_it_is_watched_is_succeeded_at_once(tmp_path: Path) -> None:
    owner = elsewhere()
    leave(tmp_path, owner)
    waited: list[float] = []

    def give_back(seconds: float) -> None:
        waited.append(seconds)
        Lease(str(tmp_path), owner)._write(released=True)

    assert take(tmp_path, pause=give_back).number == 5
    assert len(waited) == 1


def test_an_owner_of_long_ago_is_not_watched(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(time=time.time() - LONG_GONE_S - 1))
    assert take(tmp_path).number == 5


def test_a_process_of_this_machine_that_is_no_more_is_not_watched(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(tmp_path, elsewhere(machine=this_machine(), pid=ended.pid))
    assert take(tmp_path).number == 5
    leave(tmp_path, elsewhere(number=7, machine=this_machine(), pid=os.getpid()))
    with pytest.raises(AssertionError, match="nothing to wait for"):
        take(tmp_path)


def test_who_claims_at_the_same_time_withdraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, beats = storage.put_atomic, itertools.count(1)
    winners: list[Claim] = []

    def slow(uri: str, data: bytes) -> None:
        put(uri, data)
        monkeypatch.setattr(storage, "put_atomic", put)
        winners.append(elsewhere(number=1))
        leave(tmp_path, winners[0])  # before the first has looked

    def pause(seconds: float) -> None:
        leave(tmp_path, dataclasses.replace(winners[0], beat=next(beats)))

    monkeypatch.setattr(storage, "put_atomic", slow)
    with pytest.raises(ConfigError, match="being written by bob@there"):
        take(tmp_path, pause=pause)
    assert [path.name for path in (tmp_path / "lease").iterdir()] == [winners[0].name]


def test_a_driver_that_died_before_it_withdrew_hides_nobody(tmp_path: Path) -> None:
    owner, dead = elsewhere(token="a" * 12), elsewhere(token="z" * 12, owner="carl@gone, process 7")
    for claim in (owner, dead):
        leave(tmp_path, claim)
    beats = itertools.count(4)

    def pause(seconds: float) -> None:
        leave(tmp_path, dataclasses.replace(owner, beat=next(beats)))

    with pytest.raises(ConfigError, match="being written by bob@there"):
        take(tmp_path, pause=pause)
    alive, _ = living_owner(str(tmp_path), pause=pause)
    assert alive is not None
    assert alive.token == owner.token


def test_a_claim_that_comes_and_goes_is_no_sign_of_life(tmp_path: Path) -> None:
    """Nor is its going: the driver that withdrew may have seen one that has the run."""
    loser, owner = elsewhere(number=1, token="z" * 12), elsewhere(number=1, token="a" * 12)
    leave(tmp_path, loser)
    beats = itertools.count(4)

    def pause(seconds: float) -> None:
        storage.delete(storage.join(str(tmp_path), "lease", loser.name))
        leave(tmp_path, dataclasses.replace(owner, beat=next(beats)))

    with pytest.raises(ConfigError, match="being written by bob@there"):
        take(tmp_path, pause=pause)


def test_of_many_at_once_one_has_the_run(tmp_path: Path) -> None:
    won: list[Lease] = []
    refused: list[str] = []
    over = threading.Event()

    def driver(number: int) -> None:
        try:
            with Lease.take(str(tmp_path), owner=f"driver{number}", beat_s=0.02, stale_s=20, on_loss=over.set) as lease:
                won.append(lease)
                over.wait(60)
                lease.check()
        except ConfigError as error:
            refused.append(str(error))
            if len(refused) == 5:
                over.set()

    threads = [threading.Thread(target=driver, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 5
    assert not won[0].lost.is_set()
    assert all(won[0].claim.owner in text for text in refused)


def test_an_owner_learns_that_it_was_succeeded(tmp_path: Path) -> None:
    lost = threading.Event()
    with take(tmp_path, beat_s=0.02, on_loss=lost.set) as lease:
        lease.check()
        leave(tmp_path, elsewhere(number=2))
        assert lost.wait(60)
        with pytest.raises(RunError, match="another driver has taken this run over"):
            lease.check()
    [found] = latest_claims(str(tmp_path))
    assert (found.number, found.released) == (2, False)
    own = storage.read_bytes(storage.join(str(tmp_path), "lease", lease.claim.name))
    assert b'"released": false' in own


def test_an_owner_whose_claim_was_cleared_is_none_even_if_no_successor_is_left(tmp_path: Path) -> None:
    """A successor may have removed the run and its own claim; a sign of life would now take the next run of that name."""
    lost = threading.Event()
    with take(tmp_path, beat_s=0.02, on_loss=lost.set) as lease:
        storage.delete(lease._where)
        assert lost.wait(60)
    assert claims(tmp_path) == []


def test_a_buried_lease_leaves_nothing(tmp_path: Path) -> None:
    with take(tmp_path, beat_s=0.02) as lease:
        lease.bury()
    assert claims(tmp_path) == []
    assert take(tmp_path).number == 1


def test_a_lease_is_not_buried_by_who_lost_it(tmp_path: Path) -> None:
    with take(tmp_path, on_loss=lambda: None) as lease:
        leave(tmp_path, elsewhere(number=2))
        with pytest.raises(RunError, match="another driver has taken this run over"):
            lease.bury()
    assert claims(tmp_path) == ["000000001", "000000002"]


def test_signs_of_life_are_left(tmp_path: Path) -> None:
    with take(tmp_path, beat_s=0.02):
        deadline = time.monotonic() + 60
        while latest_claims(str(tmp_path))[0].beat < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_store_that_is_away_for_a_while_does_not_end_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, failed = storage.put_atomic, threading.Event()

    def away(uri: str, data: bytes) -> None:
        failed.set()
        raise OSError("no route to host")

    with take(tmp_path, beat_s=0.02) as lease:
        monkeypatch.setattr(storage, "put_atomic", away)
        assert failed.wait(60)
        monkeypatch.setattr(storage, "put_atomic", put)
        beat = lease.claim.beat
        deadline = time.monotonic() + 60
        while latest_claims(str(tmp_path))[0].beat <= beat:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "no sign of life could be left" in caplog.text
