"""What a soak does to its run, at random, and how one sees that the run goes on."""

import random
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import psutil

from tests.soak.site import DECODERS, RANKS, Latest, Site, SoakError

__all__ = ["FAULTS", "STOP", "Fault", "Recovery", "deal", "hurt", "wait_for_steps"]

AWAY_S = (5.0, 20.0)
"""How long the MLflow server stays away, seconds."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to hurt a run."""

    name: str
    do: Callable[[Site, random.Random], None]
    again: bool = False
    """Whether it ends the driver, and the same command is given again."""
    renews: str = "rank"
    """Kind of the processes that are others afterwards; "" for none."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A fault that was survived."""

    fault: str
    at_s: float
    """Since the soak's first step, seconds."""
    step: int
    """Last step that was logged before."""
    new_step: int
    """First step seen after."""
    took_s: float
    """From the fault to the first new step that the processes of after it logged; looked for twice a second."""


def kill_worker(site: Site, rng: random.Random) -> None:
    site.one("rank", rng).kill()


def kill_decoder(site: Site, rng: random.Random) -> None:
    site.one("decoder", rng).kill()


def kill_driver(site: Site, rng: random.Random) -> None:
    site.one("driver").kill()


def stop_driver(site: Site, rng: random.Random) -> None:
    site.one("driver").terminate()


def stop_job(site: Site, rng: random.Random) -> None:
    site.jobs.stop_job(site.job_id)


def lose_mlflow(site: Site, rng: random.Random) -> None:
    site.kill_mlflow()
    time.sleep(rng.uniform(*AWAY_S))
    site.restart_mlflow()


STOP = Fault(name="driver told to stop (SIGTERM), then the same command", do=stop_driver, again=True)
FAULTS = (
    Fault(name="training worker killed (SIGKILL)", do=kill_worker),
    Fault(name="driver killed (SIGKILL), then the same command", do=kill_driver, again=True),
    Fault(name="`ray job stop`, then the same command", do=stop_job, again=True),
    STOP,
    Fault(name="decoder killed (SIGKILL)", do=kill_decoder, renews="decoder"),
    Fault(name="MLflow killed (SIGKILL), started again after a while", do=lose_mlflow, renews=""),
)


def deal(rng: random.Random) -> Iterator[Fault]:
    """Faults without end: all of them in a random order, then again, so that none is left out for long."""
    while True:
        yield from rng.sample(FAULTS, len(FAULTS))


def hurt(site: Site, fault: Fault, rng: random.Random, began: float) -> Recovery:
    """Do it, and wait until the run has new steps; SoakError, with the fault's name, if none come in time."""
    site.wait(lambda: site.latest() is not None, "an answer of MLflow")
    before, living = site.latest(), site.living()
    step, at = before.step if before else 0, time.time()
    try:
        fault.do(site, rng)
        if fault.again:
            site.wait(site.ended, "the end of the driver")
            site.begin()
        new = wait_for_steps(site, after=step, since=at, gone=living[fault.renews] if fault.renews else set())
    except Exception as error:
        raise SoakError(f"{fault.name}, after step {step}: {error}") from error
    return Recovery(
        fault=fault.name, at_s=round(at - began, 1), step=step, new_step=new.step, took_s=round(new.at - at, 1)
    )


def wait_for_steps(
    site: Site, *, after: int = 0, since: float = 0.0, gone: Set[psutil.Process] = frozenset()
) -> Latest:
    """When the run had a step beyond `after`, logged later than `since`, seconds since 1970.

    Of the `gone` processes at least one must be gone, all of them if they are ranks, and others be in their place
    before that step: for a moment steps come from ranks that are about to be ended, later from their journals.
    """
    found, whole_since = Latest(0, 0.0), 0.0 if gone else since

    def goes_on() -> bool:
        nonlocal found, whole_since
        if site.ended():
            raise SoakError(f"the run has ended; {site.tail()}")
        living = site.living()
        ranks, decoders = living.get("rank", set()), living.get("decoder", set())
        if (len(ranks), len(decoders)) != (RANKS, DECODERS) or gone & ranks or (gone and gone <= decoders):
            return False
        whole_since = whole_since or time.time()
        latest = site.latest()
        if latest is None or latest.step <= after or latest.at <= whole_since:
            return False
        found = latest
        return True

    site.wait(goes_on, "new steps")
    return found
