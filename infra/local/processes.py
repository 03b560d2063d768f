"""Processes that outlive the one that started them, free ports, and a lock on a directory."""

import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.local.parts import Part

__all__ = ["Process", "free_ports", "is_free", "launch", "lock"]

STOP_DEADLINE_S = 20.0
KILL_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Process:
    """A started part, leader of a process group. The start time tells it from a later process of the same pid."""

    pid: int
    created: float
    address: str
    stop_signal: int

    def find(self) -> psutil.Process | None:
        """The process, or None once it is gone; also as a zombie, whose process group is still ours."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.created) < 2:
                return found
        return None

    def alive(self) -> bool:
        found = self.find()
        return found is not None and _runs(found)

    def end(self) -> str:
        """Tell the group to stop, kill what is left after a deadline; says what happened, '' if it was gone already."""
        leader = self.find()
        if leader is None:
            return ""
        tree = [leader]
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += leader.children(recursive=True)
        self._signal_group(self.stop_signal)
        left = _wait_until_gone(tree, STOP_DEADLINE_S)
        outcome = f"stopped (process {self.pid})"
        if left:
            outcome = f"killed (process {self.pid} had not ended in {STOP_DEADLINE_S:.0f} s)"
            self._signal_group(signal.SIGKILL)
            for member in left:  # some descendants (Postgres, Ray's workers) lead groups of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            left = _wait_until_gone(left, KILL_DEADLINE_S)
        if left:
            outcome = f"still running after SIGKILL: {', '.join(str(member.pid) for member in left)}"
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return outcome

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def launch(part: Part, log: Path) -> Process:
    """Start `part` in a session of its own, so that a Ctrl-C in this terminal does not reach it."""
    with open(log, "wb") as output:
        child = subprocess.Popen(  # noqa: S603 - a part's own list of words, without a shell
            part.command,
            env=part.env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    child.returncode = 0  # it is ended through its record, perhaps by another program: Popen must not wait or warn
    created = psutil.Process(child.pid).create_time()
    return Process(pid=child.pid, created=created, address=part.address, stop_signal=part.stop_signal)


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A free loopback port for each name, below the range that systems hand to outgoing connections."""
    candidates = random.SystemRandom().sample(range(20000, 32000), 1000)
    free = (port for port in candidates if is_free(port))
    return {name: next(free) for name in names}


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """One start or stop at a time in a directory."""
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _runs(process: psutil.Process) -> bool:
    """Whether it still holds ports and files: a zombie does as long as its other threads are on their way out."""
    with contextlib.suppress(psutil.NoSuchProcess):
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return process.is_running() and not (zombie and process.num_threads() <= 1)
    return False


def _wait_until_gone(processes: list[psutil.Process], deadline_s: float) -> list[psutil.Process]:
    """Those that still run after at most `deadline_s`; a zombie counts as gone, its parent may be another program."""
    until = time.monotonic() + deadline_s
    while processes := [process for process in processes if _runs(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return processes
