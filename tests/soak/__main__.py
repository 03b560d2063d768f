"""A long run that is hurt at random every few minutes, on real servers: `python -m tests.soak --minutes 30`.

Three calm moments are compared, each a median over `--window` seconds:

- *start*: of the second attempt at the run, `--settle` seconds and `--settle-steps` steps after its first new one; the
  first attempt is stopped at once, for it makes the weights that all later ones only read, and holds more;
- *end*: of the last attempt, after all faults, at the same age. Driver, ranks and decoders are new processes in both,
  so this finds what a run carries on from attempt to attempt; the head's processes are the same ones, so there it finds
  all that they have gathered;
- *later*: of the last attempt, at its end, at least a fifth of the whole time after it began: against *end* this finds
  what a process gathers while it lives.

The memory is what a process has alone (USS), of all processes of a kind together. Of the run's own kinds (driver,
ranks, decoders, node monitor) neither may have grown by more than 5 %, nor their open files (or 4 of them); Ray's and
the servers' are shown beside them, and are theirs.
Exit code 0 only if every promise held.
"""

import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tests.soak.account import account
from tests.soak.faults import STOP, Fault, Recovery, deal, hurt, wait_for_steps
from tests.soak.processes import Held, held
from tests.soak.site import Latest, Site, SoakError
from tests.soak.summary import checks_of_processes, summary

EPOCHS_PER_MINUTE = 300
"""More than a run of ten steps an epoch can do: it must not come to its end."""
LAST_PART = 0.2
"""Part of the time that the last attempt is left alone, at least."""
NONE = Latest(0, 0.0)


def main() -> int:
    """The command line; the exit code."""
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    report: dict[str, Any] = {"seed": options.seed, "minutes": options.minutes, "recoveries": [], "broken": ""}
    began = time.monotonic()
    code = 1
    try:
        epochs = options.epochs or round(EPOCHS_PER_MINUTE * options.minutes)
        with Site(epochs=epochs, deadline_s=options.deadline, sample_s=options.sample, say=say) as site:
            soak(site, options, report)
        code = 0 if all(check["held"] for check in report["checks"]) else 1
    except KeyboardInterrupt:
        report["broken"] = "interrupted"
        code = 130
    except Exception as error:
        report["broken"] = f"{type(error).__name__}: {error}"
    report["took_s"] = round(time.monotonic() - began)
    print(f"\n{summary(report)}", flush=True)
    if options.json:
        for name in {"start", "end", "later"} & report.keys():
            report[name] = {kind: found._asdict() for kind, found in report[name].items()}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return code


def soak(site: Site, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The whole of it; what was found goes into `report` as it is found."""
    rng, last_s = random.Random(options.seed), LAST_PART * 60 * options.minutes
    site.begin()
    first = wait_for_steps(site)
    say(f"the run has begun: step {first.step}")
    second = survive(site, STOP, rng, first.at, report)
    say("the run is left alone for a while")
    report["start"] = settled(site, second.new_step, options)
    for fault in deal(rng):
        pause_s = rng.uniform(*options.every)
        if time.time() - first.at + pause_s > 60 * options.minutes - last_s:
            break
        rest(site, pause_s)
        survive(site, fault, rng, first.at, report)
    last = survive(site, STOP, rng, first.at, report)
    again = time.monotonic()
    say("the run is left alone for the rest of the time")
    report["end"] = settled(site, last.new_step, options)
    rest(site, last_s - options.window - (time.monotonic() - again))
    report["later"] = moment(site, options.window)
    report["soaked_s"] = round(time.time() - first.at)
    site.one("driver").terminate()
    site.wait(site.ended, "the end of the driver")
    site.wait(lambda: not {"driver", "rank", "decoder"} & site.living().keys(), "the end of all processes of the run")
    say("the run is stopped; its steps are counted")
    report["account"], checks = account(site)
    report["checks"] = [check._asdict() for check in [*checks, *checks_of_processes(report)]]


def survive(site: Site, fault: Fault, rng: random.Random, began: float, report: dict[str, Any]) -> Recovery:
    """A fault, and a line about it."""
    recovery = hurt(site, fault, rng, began)
    report["recoveries"].append(asdict(recovery))
    say(f"{recovery.at_s / 60:5.1f} min, step {recovery.step}: {fault.name}; new steps after {recovery.took_s:.0f} s")
    return recovery


def settled(site: Site, step: int, options: argparse.Namespace) -> dict[str, Held]:
    """What is held by an attempt that began with `step`, once so many seconds have passed and steps were done."""
    rest(site, options.settle)
    wanted = step + options.settle_steps
    site.wait(lambda: (site.latest() or NONE).step >= wanted, f"step {wanted}")
    return moment(site, options.window)


def moment(site: Site, window_s: float) -> dict[str, Held]:
    """What is held from now on for so long."""
    begin = time.time()
    rest(site, window_s)
    return held(site.watch.seen, begin, time.time())


def rest(site: Site, seconds: float) -> None:
    """Leave the run alone; SoakError if it ends by itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if site.ended():
            raise SoakError(f"the run has ended, though nobody hurt it (is --epochs too few?); {site.tail()}")
        time.sleep(min(2.0, max(0.0, until - time.monotonic())))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="hurt a long run at random, and see what is lost")
    parser.add_argument("--minutes", type=float, default=30, help="from the first step to the last")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the times between them")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--every", type=float, nargs=2, default=(60.0, 240.0), help="seconds from recovery to next fault"
    )
    parser.add_argument("--settle", type=float, default=60.0, help="seconds after which a process is at rest")
    parser.add_argument("--settle-steps", type=int, default=150, help="steps after which a process is at rest")
    parser.add_argument("--window", type=float, default=60.0, help="seconds that a moment's medians are taken over")
    parser.add_argument("--sample", type=float, default=5.0, help="seconds between two looks at the processes")
    parser.add_argument("--deadline", type=float, default=600.0, help="longest wait for new steps, seconds")
    parser.add_argument("--epochs", type=int, default=0, help="of the run; 0: more than it can do in the time")
    return parser.parse_args()


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not cut the stopping short
    raise KeyboardInterrupt


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
