"""What becomes of a run whose object store misbehaves, seen through a proxy in front of the real one."""

import random
import threading
import time
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.local.stack import Stack
from tests.drills.conftest import Drill
from tests.drills.runs import back_at, begin, go_on, is_the_undisturbed_run
from tests.faultproxy import Fault, FaultProxy, Rule, Seen, fault_proxy
from tests.submitting import Submitted, find, run, wait

pytestmark = [pytest.mark.slow, pytest.mark.long]

SLOW_DOWN = Fault(status=503, code="SlowDown")
GONE = Fault(cut=True)
HALF = Fault(after_bytes=4096, cut=True)


@pytest.fixture
def proxy(full_stack: Stack) -> Iterator[FaultProxy]:
    with fault_proxy(full_stack.env["AWS_ENDPOINT_URL"]) as found:
        yield found


def some(part: float, fault: Fault) -> Rule:
    """The rule that this part of all requests meets the fault, at random."""
    draws, lock = random.Random(0), threading.Lock()

    def rule(request: Seen) -> Fault | None:
        with lock:
            return fault if draws.random() < part else None

    return rule


def bursts(fault: Fault, *, on_s: float, off_s: float) -> Rule:
    """The rule that every request meets the fault for a while, then none, and so on."""
    began = time.monotonic()
    return lambda request: fault if (time.monotonic() - began) % (on_s + off_s) < on_s else None


def in_halves() -> Rule:
    """The rule that every other ranged read is cut in the middle of its object."""
    count, lock = [0], threading.Lock()

    def rule(request: Seen) -> Fault | None:
        if request.range is None:
            return None
        with lock:
            count[0] += 1
            return HALF if count[0] % 2 else None

    return rule


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "slow_down",
            marks=pytest.mark.drill("object store: bursts of 503 SlowDown", "done again, to the same result"),
        ),
        pytest.param(
            "cut",
            marks=pytest.mark.drill(
                "object store: every other read cut in the middle of its object", "done again, to the same result"
            ),
        ),
        pytest.param(
            "errors",
            marks=pytest.mark.drill("object store: 10 % of all requests fail", "done again, to the same result"),
        ),
    ],
)
def test_store(
    drill: Drill,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    trained: Submitted,
    proxy: FaultProxy,
    kind: str,
) -> None:
    drill.name = f"store_{kind}"
    name = f"drill-store-{kind}"
    drill.hurt()
    proxy.rule = {
        "slow_down": bursts(SLOW_DOWN, on_s=1.0, off_s=3.0),
        "cut": in_halves(),
        "errors": some(0.1, Fault(status=500, code="InternalError")),
    }[kind]
    job = run(jobs, f"{train} --run.name {name} --train.checkpoint_every_steps 2", {"AWS_ENDPOINT_URL": proxy.url})
    is_the_undisturbed_run(job, trained, client, name)
    hurt = sum(request.status in (500, 503) for request in proxy.seen) if kind != "cut" else len(proxy.ranges()) // 2
    assert hurt > 3
    drill.outcome = f"FINISHED, the same weights; {hurt} requests were hurt"


@pytest.mark.drill("object store gone for 30 s", "waited for; goes on, to the same result")
def test_store_gone_for_a_while(
    drill: Drill,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    trained: Submitted,
    proxy: FaultProxy,
) -> None:
    name = "drill-store-back"
    env = {"AWS_ENDPOINT_URL": proxy.url}
    job_id, _ = begin(
        jobs, client, name, f"{train} --run.name {name} --train.checkpoint_every_steps 1", steps=2, env=env
    )
    drill.hurt()
    proxy.rule = lambda request: GONE
    threading.Timer(30.0, lambda: setattr(proxy, "rule", lambda request: None)).start()
    job = wait(jobs, job_id)
    is_the_undisturbed_run(job, trained, client, name)
    drill.recovered(back_at(client, name, drill.hurt_at))
    drill.outcome = "FINISHED, the same weights"


@pytest.mark.drill("object store gone for good", "FAILED, in minutes; goes on once it is back, to the same result")
def test_store_gone_for_good(
    drill: Drill,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    trained: Submitted,
    proxy: FaultProxy,
) -> None:
    name = "drill-store-gone"
    env = {"AWS_ENDPOINT_URL": proxy.url}
    command = f"{train} --run.name {name} --train.checkpoint_every_steps 1"
    job_id, _ = begin(jobs, client, name, command, steps=2, env=env)
    drill.hurt()
    proxy.rule = lambda request: GONE
    job = wait(jobs, job_id, deadline_s=560)
    assert job.status == JobStatus.FAILED
    [found] = find(client, name)
    assert found.info.status == "FAILED"
    took = time.time() - drill.hurt_at
    proxy.rule = lambda request: None
    go_on(drill, jobs, client, name, command, trained, env)
    drill.outcome = f"FAILED after {took:.0f} s ({found.data.tags['failure'][:80]}…), then FINISHED, the same weights"
