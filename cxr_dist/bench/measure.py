"""Measuring: variants in turns, and what a tree of processes costs in CPU time, memory and Ray's object store."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import psutil

__all__ = ["Timing", "Usage", "in_turns", "object_store_bytes", "tree_cpu_s"]

SAMPLE_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of a variant."""

    images: int
    wall_s: float
    cpu_s: float
    """CPU time of this process and of its children that have ended, seconds."""

    @property
    def images_per_s(self) -> float:
        return self.images / self.wall_s

    @property
    def images_per_core_s(self) -> float:
        """Images a second of one core's time: what a busy machine does not change."""
        return self.images / self.cpu_s

    @property
    def cpu_ms_per_image(self) -> float:
        return 1e3 * self.cpu_s / self.images


def in_turns(
    variants: Mapping[str, Callable[[], int]], repeats: int, *, by_cpu: bool = False, warm: bool = True
) -> dict[str, Timing]:
    """The best of `repeats` runs of each variant; a variant does its work and returns the number of its images.

    Round by round every variant runs once, each round from another start: what the machine does meanwhile, and what
    came just before, falls on all of them alike. by_cpu: the best is that of least CPU time (for work in this process
    alone on a busy machine), else of least wall time. warm: each runs once unmeasured first.
    """
    names = list(variants)
    if warm:
        for name in names:
            variants[name]()
    best: dict[str, Timing] = {}
    for turn in range(repeats):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            found = _timed(variants[name])
            if name not in best or _cost(found, by_cpu) < _cost(best[name], by_cpu):
                best[name] = found
    return {name: best[name] for name in names}


def _cost(timing: Timing, by_cpu: bool) -> float:
    return (timing.cpu_s if by_cpu else timing.wall_s) / timing.images


def _timed(work: Callable[[], int]) -> Timing:
    wall, cpu = time.perf_counter(), _own_and_ended_cpu_s()
    images = work()
    return Timing(images=images, wall_s=time.perf_counter() - wall, cpu_s=_own_and_ended_cpu_s() - cpu)


def _own_and_ended_cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def tree_cpu_s(root: int | None = None) -> float:
    """CPU seconds so far of a process and all its descendants, those included that ended and were waited for."""
    return sum(_cpu_s(process) for process in _tree(root))


def _tree(root: int | None) -> list[psutil.Process]:
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0))


def _private_bytes(process: psutil.Process) -> int:
    """Resident memory that is not shared: leaves out mapped files and Ray's object store, and is cheap to ask."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def object_store_bytes() -> int:
    """Bytes in use in the object stores of the Ray cluster that this process is connected to; 0 if to none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0
    # the only place where Ray tells it without its metrics agent, which a cluster may run without
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


@dataclass
class _Cpu:
    """CPU seconds of a process when it was last seen alive, and of its children that ended and were waited for."""

    own_s: float = 0.0
    waited_s: float = 0.0
    parent: int = 0

    def update(self, process: psutil.Process) -> bool:
        """False if the process has ended."""
        try:
            times, self.parent = process.cpu_times(), process.ppid()
        except psutil.Error:
            return False
        self.own_s = float(times.user + times.system)
        self.waited_s = float(getattr(times, "children_user", 0) + getattr(times, "children_system", 0))
        return True


class Usage:
    """What this process and its descendants cost while the `with` block runs; processes it starts are found as they come.

    After the block: `wall_s`, `cpu_s`, `peak_rss_mb` (private memory of all together, sampled four times a second) and
    `peak_object_store_mb` (if asked for). Of a process that its parent does not wait for (Ray's workers) what it did
    after the last sample before its end is missed.
    """

    def __init__(self, *, object_store: bool = False):
        self.wall_s = self.cpu_s = self.peak_rss_mb = self.peak_object_store_mb = 0.0
        self._object_store = object_store
        self._seen: dict[psutil.Process, _Cpu] = {}
        self._own_cpu_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    def __enter__(self) -> "Usage":
        self._sample()
        self._cpu_before = self._cpu()
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self._sample()
        self.cpu_s = self._cpu() - self._cpu_before - self._own_cpu_s

    def _cpu(self) -> float:
        # all that were ever seen: one that outlived its parent is no longer among the descendants
        ended: dict[int, float] = {}
        for process, cpu in self._seen.items():
            if not cpu.update(process):
                ended[cpu.parent] = ended.get(cpu.parent, 0.0) + cpu.own_s + cpu.waited_s
        # a parent that waits for its children counts them too, and what they did after the last sample
        waited = (max(0.0, cpu.waited_s - ended.get(process.pid, 0.0)) for process, cpu in self._seen.items())
        return sum(cpu.own_s for cpu in self._seen.values()) + sum(waited)

    def _sample(self) -> None:
        for process in _tree(None):
            self._seen.setdefault(process, _Cpu())
        self._cpu()
        self.peak_rss_mb = max(self.peak_rss_mb, sum(map(_private_bytes, self._seen)) / 1e6)
        if self._object_store:
            self.peak_object_store_mb = max(self.peak_object_store_mb, object_store_bytes() / 1e6)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._sample()
        self._own_cpu_s = time.thread_time()
