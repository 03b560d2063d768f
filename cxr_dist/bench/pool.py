"""The limit of a stream: a pool of plain processes that decode its tasks and keep nothing. No Ray."""

import dataclasses
import multiprocessing
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import Any, Self

from cxr_dist.data.decode import Decoder, StreamSpec

__all__ = ["PoolRun", "ProcessPool"]


@dataclass(frozen=True, kw_only=True)
class PoolRun:
    """One pass of a pool over a stream's tasks."""

    images: int
    wall_s: float
    """From the first task's begin to the last one's end."""
    cpu_s: float
    """CPU time of the processes, all threads."""


class ProcessPool:
    """Processes that stay, import what decoding needs when they start, and take the next task whenever they are free."""

    def __init__(self, num_processes: int):
        context: Any = multiprocessing.get_context("spawn")
        self._next: Synchronized[int] = context.Value("q", 0)
        self._processes, self._pipes = [], []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._next), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, spec: StreamSpec) -> PoolRun:
        """Decode every task once."""
        self._next.value = 0
        spec = dataclasses.replace(spec, token=uuid.uuid4().hex)
        for pipe in self._pipes:
            pipe.send(spec)
        done = _received(self._pipes)
        return PoolRun(
            images=sum(images for images, _, _, _ in done),
            wall_s=max(ended for _, _, ended, _ in done) - min(began for _, began, _, _ in done),
            cpu_s=sum(cpu for _, _, _, cpu in done),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _received(pipes: Sequence[Connection]) -> list[tuple[int, float, float, float]]:
    answers = [pipe.recv() for pipe in pipes]
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def _serve(pipe: Connection, following: "Synchronized[int]") -> None:
    while True:
        spec = pipe.recv()
        try:
            pipe.send(_run(spec, following))
        except Exception as error:  # noqa: BLE001  raised again by who asked
            pipe.send(error)


def _run(spec: StreamSpec, following: "Synchronized[int]") -> tuple[int, float, float, float]:
    """Images decoded, begin, end and CPU seconds."""
    decoder, images = Decoder(spec), 0
    began, cpu = time.time(), time.process_time()
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= spec.num_tasks:
            return images, began, time.time(), time.process_time() - cpu
        images += int((decoder.block(number)["row"].to_numpy() >= 0).sum())
