"""Calls in background threads: a stalled one is made again, the first answer wins, and nobody waits for the loser."""

import subprocess
import sys
import threading
import time

import pytest

from cxr_dist.data.hedge import KNOWN, MAX_HEDGES, MULTIPLE, Attempt, Pool


def hasty(**settings) -> Pool:
    """A pool that takes every call for stalled at once."""
    return Pool(least_s=0.0, unknown_s=0.0, multiple=0.0, **settings)


def test_answers_come_from_their_own_calls():
    pool = Pool(threads=4)
    pending = [pool.submit(lambda _, n=n: n * n, hedged=True) for n in range(100)]
    assert [p.result() for p in pending] == [n * n for n in range(100)]


def test_a_stalled_call_is_made_again_and_the_others_do_not_wait_for_it():
    release, told, numbers, stuck = threading.Event(), [], [], []

    def stalls_first(attempt: Attempt) -> str:
        numbers.append(attempt.number)
        if attempt.number == 0:
            stuck.append(threading.current_thread())
            release.wait()
        return f"attempt {attempt.number}"

    pool = hasty(threads=1, on_hedge=lambda: told.append(1))
    stalled = pool.submit(stalls_first, hedged=True)
    others = [pool.submit(lambda _, n=n: n, hedged=False) for n in range(5)]
    assert stalled.result(60) == "attempt 1"
    assert [other.result(60) for other in others] == list(range(5))  # by the thread that took the stalled one's place
    assert numbers == [0, 1]
    assert told == [1]
    assert not release.is_set()
    release.set()
    stuck[0].join(60)
    assert not stuck[0].is_alive()  # another has its place


def test_the_first_attempt_wins_if_it_answers_first():
    second, release = threading.Event(), threading.Event()

    def call(attempt: Attempt) -> int:
        if attempt.number == 1:
            second.set()
            release.wait()
        else:
            second.wait()
        return attempt.number

    assert hasty().submit(call, hedged=True).result(60) == 0
    release.set()


def test_a_call_without_hedge_is_made_once():
    seen = []
    waiting = threading.Event()

    def call(attempt: Attempt) -> None:
        seen.append(attempt.number)
        waiting.wait(0.3)

    hasty().submit(call, hedged=False).result(60)
    assert seen == [0]


def test_a_failed_attempt_leaves_the_answer_to_the_other():
    both = threading.Barrier(2)
    fail = [True, False]

    def call(attempt: Attempt) -> str:
        both.wait(60)
        if fail[attempt.number]:
            raise ValueError(f"attempt {attempt.number}")
        while attempt.pending.attempts == 2:  # until the other has failed
            time.sleep(0.001)
        return "answer"

    assert hasty().submit(call, hedged=True).result(60) == "answer"
    fail[1] = True
    with pytest.raises(ValueError, match=r"attempt [01]"):
        hasty().submit(call, hedged=True).result(60)


def test_an_attempt_that_pauses_on_purpose_is_not_stalled():
    seen, done = [], threading.Event()

    def call(attempt: Attempt) -> int:
        seen.append(attempt.number)
        attempt.pause()
        done.wait()
        return attempt.number

    pool = Pool(least_s=0.2, unknown_s=0.2)
    pending = pool.submit(call, hedged=True)
    with pytest.raises(TimeoutError):  # longer than a stalled one would be waited for
        pending.result(0.6)
    done.set()
    assert seen == [0]


def test_not_more_than_a_few_are_made_twice_at_a_time():
    release, hedges = threading.Event(), threading.Semaphore(0)
    second = []

    def call(attempt: Attempt) -> int:
        if attempt.number == 1:
            second.append(attempt)
            hedges.release()
        release.wait()
        return attempt.number

    pool = hasty(threads=12)
    pending = [pool.submit(call, hedged=True) for _ in range(12)]
    for _ in range(MAX_HEDGES):
        assert hedges.acquire(timeout=60)
    assert not hedges.acquire(timeout=0.3)  # there is no other sign of what does not happen
    assert len(second) == MAX_HEDGES
    release.set()
    assert len([p.result(60) for p in pending]) == 12


def test_waiting_ends_at_its_limit_and_cancelled_calls_are_not_begun():
    release, begun = threading.Event(), []
    pool = Pool(threads=1)
    stuck = pool.submit(lambda _: release.wait(), hedged=False)
    later = pool.submit(lambda _: begun.append(1), hedged=False)
    with pytest.raises(TimeoutError):
        stuck.result(0.01)
    later.cancel()
    release.set()
    assert pool.submit(lambda _: 7, hedged=False).result(60) == 7
    assert begun == []


def test_patience_is_a_multiple_of_what_is_usual():
    pool = Pool(least_s=1.0, unknown_s=3.0)
    assert pool.patience_s() == 3.0
    pool._recent.extend([0.01] * KNOWN)
    assert pool.patience_s() == 1.0
    pool._recent.extend([2.0] * KNOWN)
    assert pool.patience_s() == MULTIPLE * 2.0


def test_a_call_that_never_ends_keeps_no_process_alive():
    program = (
        "import threading; from cxr_dist.data.hedge import Pool\n"
        "pool, begun = Pool(least_s=0.0, unknown_s=0.0), threading.Semaphore(0)\n"
        "def call(attempt):\n    begun.release(); threading.Event().wait()\n"
        "pool.submit(call, hedged=True); begun.acquire(); begun.acquire(); print('both attempts hang')"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, "both attempts hang\n"), child.stderr
