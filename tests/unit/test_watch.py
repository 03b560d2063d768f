"""Who is named when ranks wait in vain."""

import threading
import time
from typing import Any

import pytest

from cxr_dist.errors import RunError
from cxr_dist.train import watch as module
from cxr_dist.train.distributed import Ranks
from cxr_dist.train.watch import Doing, Place, Watch, who_hangs

NOW = 1000.0


def place(step: int, doing: Doing, since: float = 700.0, told: float = NOW - 1) -> Place:
    return Place(step, doing, since, told, "node-a, process 7")


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (  # a rank that does not run at all, wherever it stands
            {0: place(5, "computes"), 1: place(5, "computes", told=NOW - 290), 2: place(5, "computes")},
            "rank 1 hangs: it computes at step 5 for 300 s (node-a, process 7, no sign of life for 290 s); rank 0, 2 "
            "computes at step 5",
        ),
        (  # one that waits for data, which the others have
            {0: place(5, "waits for data"), 1: place(5, "computes")},
            "rank 0 hangs: it waits for data at step 5 for 300 s (node-a, process 7); rank 1 computes at step 5",
        ),
        (  # one that is a step behind
            {0: place(6, "waits for data"), 1: place(5, "waits for the other ranks")},
            "rank 1 hangs: it waits for the other ranks at step 5 for 300 s (node-a, process 7); rank 0 waits for data at "
            "step 6",
        ),
        (  # all at the same place: the store that gives them data is slow
            {0: place(5, "waits for data", since=600), 1: place(5, "waits for data")},
            "rank 0 hangs: it waits for data at step 5 for 400 s (node-a, process 7); rank 1 hangs: it waits for data at "
            "step 5 for 300 s (node-a, process 7)",
        ),
    ],
)
def test_who_is_waited_for(places: dict[int, Place], sentence: str) -> None:
    assert who_hangs(places, len(places), NOW) == sentence


def test_a_rank_that_never_told_anything() -> None:
    assert who_hangs({0: place(0, "computes")}, 3, NOW) == "rank 1, 2 of 3 has not begun"


class Store:
    """A key-value store in this process, and how often it was written."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.writes = 0

    def put(self, key: str, value: bytes) -> None:
        with self.changed:
            self.content[key] = value
            self.writes += 1
            self.changed.notify_all()

    def get(self, key: str) -> bytes | None:
        return self.content.get(key)

    def wait_for(self, writes: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.writes >= writes, 60)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(module, "board", found)
    monkeypatch.setattr(module, "TELL_S", 0.01)
    return found


def watch(rank: int, timeout_s: float) -> Watch:
    return Watch("run", Ranks(rank, 2, None), timeout_s)


def wait_in_vain(store: Store) -> None:
    """Rank 0 waits in the gradients of step 3, whose data rank 1 does not get, until its collective gives up."""
    with watch(1, 1e6) as late:
        late.at(3, "waits for data")
        store.wait_for(store.writes + 2)
        with watch(0, 1e-6) as waiting:
            waiting.at(3, "computes")
            store.wait_for(store.writes + 10)
            raise RuntimeError("Timed out waiting 1ms for recv operation to complete")


def test_the_rank_that_waited_says_for_whom(store: Store) -> None:
    with pytest.raises(RunError, match=r"^rank 1 hangs: it waits for data at step 3 for") as raised:
        wait_in_vain(store)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_of_a_rank_that_did_not_wait_stays_itself(store: Store) -> None:
    with pytest.raises(RuntimeError, match="other"), watch(0, 1e6) as own:  # noqa: PT012
        own.at(1, "computes")
        store.wait_for(3)
        raise RuntimeError("other")


def test_a_rank_that_goes_on_takes_its_verdict_back(store: Store) -> None:
    with watch(0, 1e-6) as own:
        store.wait_for(5)
        assert own.verdict
        own.patience_s = 1e6
        own.at(2, "computes")
        store.wait_for(store.writes + 4)
        assert not own.verdict


def test_a_store_that_fails_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Failing:
        def put(self, *_: object) -> None:
            asked.append(time.time())
            raise RuntimeError("connection lost")

    monkeypatch.setattr(module, "board", Failing())
    monkeypatch.setattr(module, "TELL_S", 0.01)
    with watch(0, 1e6):
        while len(asked) < 3:
            time.sleep(0.001)
