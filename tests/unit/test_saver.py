"""Checkpoints written in the background: what is copied, what may be left out, what is tried again."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cxr_dist.errors import InputError, RunError
from cxr_dist.train.checkpoint import Checkpoints, Entry
from cxr_dist.train.saver import Saver, on_host


class Unreliable(Checkpoints):
    """A store that refuses the next `refusals` checkpoints."""

    refusals = 0
    asked = 0

    def save(self, state: dict[str, Any], **about: Any) -> Entry:
        self.asked += 1
        if self.refusals:
            self.refusals -= 1
            raise InputError("s3://runs: the object store does not answer; start it")
        return super().save(state, **about)


def held(until: threading.Event) -> bytes:
    """A scores file that is made when `until` is set."""
    assert until.wait(60)
    return b""


@pytest.fixture
def store(tmp_path: Path) -> Unreliable:
    return Unreliable(str(tmp_path))


def indices(store: Checkpoints) -> list[int]:
    return [entry.index for entry in store.entries()]


def test_a_copy_shares_nothing() -> None:
    state = {"tail": {"weight": torch.ones(3)}, "steps": [torch.zeros(1), (2, torch.ones(1))], "epoch": 4}
    copy = on_host(state)
    state["tail"]["weight"].fill_(7)
    state["steps"][0].fill_(7)
    state["steps"][1][1].fill_(7)
    assert copy["tail"]["weight"].tolist() == [1, 1, 1]
    assert copy["steps"][0].tolist() == [0]
    assert copy["steps"][1] == (2, torch.ones(1))
    assert copy["epoch"] == 4


def test_a_state_is_saved_as_it_was_given(store: Unreliable) -> None:
    weight, may_write = torch.ones(2), threading.Event()
    with Saver(store) as saver:
        assert saver.save({"tail": {"weight": weight}}, index=3, epoch=0, needed=True, scores=lambda: held(may_write))
        weight.fill_(5)
        may_write.set()
    [entry] = store.entries()
    assert (entry.index, entry.score, entry.finished) == (3, None, False)
    assert store.load(entry)["tail"]["weight"].tolist() == [1, 1]


def test_a_periodic_one_is_left_out_while_another_is_on_its_way(store: Unreliable) -> None:
    may_write = threading.Event()
    with Saver(store) as saver:
        assert saver.save({}, index=1, epoch=0, needed=False, scores=lambda: held(may_write))
        assert not saver.save({}, index=2, epoch=0, needed=False)
        may_write.set()
        assert saver.save({}, index=3, epoch=0, needed=True)
    assert indices(store) == [1, 3]


def test_scores_are_there_and_then_who_waits_is_told(store: Unreliable) -> None:
    seen = []
    with Saver(store) as saver:
        saver.save({}, index=1, epoch=0, needed=True, scores=lambda: b"PAR1", then=lambda: seen.append(indices(store)))
    assert seen == [[1]]
    [entry] = store.entries()
    assert Path(store.folder, entry.scores or "").read_bytes() == b"PAR1"


def test_what_is_stored_is_not_stored_again(store: Unreliable) -> None:
    told = []
    with Saver(store) as saver:
        saver.save({"at": 1}, index=1, epoch=0, needed=False)
        saver.save({"at": 2}, index=1, epoch=0, needed=True, then=lambda: told.append(indices(store)))
    assert (store.asked, told) == (1, [[1]])


def test_a_needed_one_is_tried_again(store: Unreliable, caplog: pytest.LogCaptureFixture) -> None:
    store.refusals = 3
    with caplog.at_level(logging.WARNING), Saver(store, pause_s=0) as saver:
        saver.save({}, index=1, epoch=0, needed=True)
    assert (indices(store), store.asked) == ([1], 4)
    assert (
        caplog.messages
        == ["checkpoint before step 1 is tried again: s3://runs: the object store does not answer; start it"] * 3
    )


def save_then(saver: Saver, index: int, error: BaseException | None = None) -> None:
    """A run that saves, and then ends, with an error or without."""
    with saver:
        saver.save({}, index=index, epoch=0, needed=True)
        if error:
            raise error


def test_a_needed_one_that_the_store_never_takes_fails_the_run(store: Unreliable) -> None:
    store.refusals = 100
    with pytest.raises(
        RunError, match=r"before step 1 could not be stored under .*checkpoints: s3://runs: .* not answer"
    ):
        save_then(Saver(store, patience_s=0, pause_s=0), 1)
    assert indices(store) == []


def test_a_periodic_one_that_the_store_does_not_take_is_left_out(
    store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    store.refusals = 1
    with caplog.at_level(logging.WARNING), Saver(store) as saver:
        saver.save({}, index=1, epoch=0, needed=False)
        saver.wait()
        saver.save({}, index=2, epoch=0, needed=False)
    assert (indices(store), store.asked) == ([2], 2)
    assert caplog.messages == [
        "checkpoint before step 1 is left out: s3://runs: the object store does not answer; start it"
    ]


def test_a_failing_run_waits_for_what_is_on_its_way_and_keeps_its_own_error(store: Unreliable) -> None:
    with pytest.raises(ZeroDivisionError):
        save_then(Saver(store), 1, ZeroDivisionError())
    assert indices(store) == [1]
    store.refusals = 1
    with pytest.raises(ZeroDivisionError):
        save_then(Saver(store, patience_s=0), 2, ZeroDivisionError())
    assert indices(store) == [1]
