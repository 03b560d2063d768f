"""The processes of a stack by kind, and how much memory and how many open files each kind holds over time."""

import re
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import psutil

__all__ = ["OURS", "Held", "Seen", "Watch", "held", "kind_of"]

OURS = ("driver", "rank", "decoder", "node monitor")
"""Kinds that run this package's code, a run's own: what must not grow."""

TITLES = {
    "ray::RayTrainWorker": "rank",
    "ray::MapWorker": "decoder",
    "ray::NodeMonitor": "node monitor",
    "ray::TrainController": "Ray's controller",
    "ray::SplitCoordinator": "Ray's coordinator",
    "ray::DashboardAgent": "Ray's agent",
    "ray::RuntimeEnvAgent": "Ray's agent",
    "ray::IDLE": "Ray's idle workers",
    "ray-dashboard": "Ray's dashboard",
    "gcs_server": "Ray's GCS",
    "raylet": "Ray's raylet",
}
"""Kinds by how a process' name begins, the first that fits."""

MIB = 2**20


class Seen(NamedTuple):
    """A process at one moment."""

    at: float
    """Seconds since 1970."""
    kind: str
    pid: int
    mb: float
    """Memory that is this process' alone (USS), MiB: pages of libraries and of the object store are shared."""
    rss_mb: float
    files: int
    """Open files, sockets and pipes included."""


class Held(NamedTuple):
    """What all processes of a kind hold together: medians over a time."""

    processes: float
    mb: float
    rss_mb: float
    files: float


def held(seen: Iterable[Seen], begin: float, end: float) -> dict[str, Held]:
    """What each kind held between two moments, seconds since 1970."""
    looks: dict[float, dict[str, list[Seen]]] = {}
    for one in seen:
        if begin <= one.at < end:
            looks.setdefault(one.at, {}).setdefault(one.kind, []).append(one)
    kinds = sorted({kind for look in looks.values() for kind in look})
    totals = {
        kind: [
            (
                len(found),
                sum(one.mb for one in found),
                sum(one.rss_mb for one in found),
                sum(one.files for one in found),
            )
            for found in (look.get(kind, []) for look in looks.values())
        ]
        for kind in kinds
    }
    return {kind: Held(*map(statistics.median, zip(*rows, strict=True))) for kind, rows in totals.items()}


def kind_of(name: str, command: Sequence[str]) -> str:
    """The kind of a process of the Ray head's tree, by its name and command line; "" for shells."""
    if name in ("sh", "bash"):
        return ""
    if "jobs/train.py" in command:
        return "driver"
    title = command[0] if command and command[0].startswith("ray") else name
    for start, kind in TITLES.items():
        if title.startswith(start):
            return kind
    if title.startswith("ray::"):
        return f"Ray's {re.split('[.(]', title.removeprefix('ray::'))[0]}"
    return "Ray's dashboard" if any("dashboard.py" in word for word in command) else "Ray's other processes"


class Watch:
    """Looks at the processes under the roots every few seconds, from `start` to `stop`.

    `roots` is a kind by process id; "" takes the kinds of the processes below (`kind_of`), a name all of them together.
    """

    def __init__(self, every_s: float):
        self.every_s = every_s
        self.roots: dict[int, str] = {}
        self.seen: list[Seen] = []
        self.known: set[psutil.Process] = set()
        """Every process that was ever seen."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def living(self) -> dict[str, set[psutil.Process]]:
        """The processes that live now, by kind; without the roots that have a kind of their own."""
        found: dict[str, set[psutil.Process]] = {}
        for kind, process in self._below(pid for pid, kind in self.roots.items() if not kind):
            found.setdefault(kind, set()).add(process)
        return found

    def _look_on(self) -> None:
        while not self._over.wait(self.every_s):
            at = time.time()
            for kind, process in self._below(self.roots):
                self.known.add(process)
                try:
                    memory = process.memory_full_info()
                    self.seen.append(Seen(at, kind, process.pid, memory.uss / MIB, memory.rss / MIB, process.num_fds()))
                except psutil.Error:  # it has ended since
                    continue

    def _below(self, roots: Iterable[int]) -> list[tuple[str, psutil.Process]]:
        found = []
        for pid in list(roots):
            kind = self.roots[pid]
            try:
                root = psutil.Process(pid)
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in tree:
                try:
                    name = kind or kind_of(process.name(), process.cmdline())
                    alive = process.status() != psutil.STATUS_ZOMBIE
                except psutil.Error:
                    continue
                if name and alive:
                    found.append((name, process))
        return found
