"""The stream as queues: Ray Data's loop, decoders, delivery in order, and ranks that step together.

One process, Ray Data's loop, gives out all tasks of a run and takes in their blocks. It works in turns: it waits until all
tasks that are under way are done, at most `poll_s`, then handles each block that has come and each task that it can give
out at `task_s` apiece. A decoder has at most two tasks and works on one. Blocks leave in the order of their numbers and go to
the ranks in turn; not more than `window` of them are made or wait. A rank spends `block_s` on taking a block, then
`batch_s` and `step_s` on each step in it; `together` holds each round of steps until every rank has its block.

`poll_s`, two tasks a decoder and the order are how Ray 2.60 and `data/numbered.py` work; the costs are fitted to passes of
the real stream (`fitted`). What is said of more ranks than were measured is computed, and says so wherever it
stands.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from cxr_dist.data.numbered import TASKS_PER_ACTOR
from cxr_dist.data.stream import BLOCKS_PER_ACTOR, BLOCKS_PER_RANK

__all__ = ["Costs", "Flow", "Measured", "Pipeline", "errors", "fitted", "flow", "settled_rate"]

POLL_S = 0.1
"""Longest wait of Ray Data's loop for its tasks (`process_completed_tasks` of Ray 2.60)."""

SETTLED = 0.5
"""Part of the rounds that is left out of a rate: buffers fill."""


@dataclass(frozen=True)
class Costs:
    """What of the stream's own time is fitted, seconds."""

    task_s: float
    """Ray Data's loop, for a task given out and for its block taken in, each: measured, as its processor time."""
    block_s: float
    """A rank, for a block: asked for, fetched."""
    batch_s: float
    """A rank, for a step's rows in it: cut out, checked."""
    made_s: float = 0.0
    """A decoder's processor, for a block beside its images; it counts where cores are shared."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A stream and what takes from it."""

    ranks: int
    decoders: int
    share: int
    """Images of a rank in a step."""
    steps_per_task: int
    image_s: float
    """A decoder, for an image, seconds."""
    step_s: float
    """A rank, for a step, without waiting for data, seconds."""
    rounds: int = 200
    """Tasks of each rank."""
    cores: float | None = None
    """Cores that loop, decoders and ranks share, whose decoders sleep; None: each has its own."""
    together: bool = False
    """Whether the ranks begin each task's steps together, as gradients make them."""
    poll_s: float = POLL_S

    @property
    def window(self) -> int:
        """Blocks that may be made or wait at once: two for each decoder, and a quarter of what `build_splits` asks Ray for."""
        asked = BLOCKS_PER_ACTOR * self.decoders + BLOCKS_PER_RANK * self.ranks
        return TASKS_PER_ACTOR * self.decoders + asked // 4

    @property
    def images_per_task(self) -> int:
        return self.share * self.steps_per_task


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A pass of a pipeline once it is settled."""

    images_per_s: float
    loop: float
    """Part of the time that Ray Data's loop works."""
    decode: float
    """Part of the decoders' time that they decode."""
    step: float
    """Part of the ranks' time that they step."""

    @property
    def busiest(self) -> str:
        """The stage with the least time to spare."""
        return max(("loop", "decode", "step"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A pass of the real stream: its settings, and the images a second that came of them."""

    pipeline: Pipeline
    images_per_s: float
    task_s: float
    """Processor time of Ray Data's loop for a task given out, and for its block taken in, each."""
    fit: bool
    """Whether costs were fitted to it; the others show how well they predict."""


def flow(pipeline: Pipeline, costs: Costs) -> Flow:
    """The pass, event by event; nothing in it is random."""
    taken_RW = _taken(pipeline, costs).reshape(pipeline.rounds, pipeline.ranks)
    per_task = pipeline.images_per_task / settled_rate(taken_RW, pipeline.images_per_task)
    if pipeline.cores is not None:
        work = 2 * costs.task_s + costs.block_s + pipeline.steps_per_task * costs.batch_s + costs.made_s
        per_task = max(per_task, work / pipeline.cores)
    return Flow(
        images_per_s=pipeline.images_per_task / per_task,
        loop=min(1.0, 2 * costs.task_s / per_task),
        decode=min(1.0, pipeline.image_s * pipeline.images_per_task / pipeline.decoders / per_task),
        step=min(1.0, _rank_s(pipeline, costs) / pipeline.ranks / per_task),
    )


def settled_rate(taken_RW: npt.NDArray[np.float64], images: int) -> float:
    """Images a second of all ranks from when each took its blocks of so many images, without the first rounds."""
    first = int(len(taken_RW) * SETTLED)
    spans_W = taken_RW[-1] - taken_RW[first]
    if len(taken_RW) - 1 <= first or (spans_W <= 0).any():
        raise ValueError("found a pass without a length, expected more rounds and some work in them")
    return float((images * (len(taken_RW) - 1 - first) / spans_W).sum())


def _taken(pipeline: Pipeline, costs: Costs) -> np.ndarray:
    """When each block is taken by its rank, seconds."""
    count, ranks = pipeline.ranks * pipeline.rounds, pipeline.ranks
    service = pipeline.image_s * pipeline.images_per_task
    steps = _rank_s(pipeline, costs)
    taken = np.zeros(count)
    rank_free = [0.0] * ranks
    held: list[float] = []  # when the blocks that were delivered, and wait, are taken
    free_at = [0.0] * pipeline.decoders  # when a decoder has done all that it has
    room = [TASKS_PER_ACTOR] * pipeline.decoders
    idle = [(0.0, number) for number in range(pipeline.decoders)]  # those with room
    under_way: list[tuple[float, int, int]] = []  # end, task, decoder
    done: set[int] = set()
    now, latest, given, delivered = 0.0, 0.0, 0, 0
    while delivered < count:
        if under_way:
            now = max(now, min(now + pipeline.poll_s, latest))
        elif held and given - delivered + len(held) >= pipeline.window:
            now = max(now, held[0])
        while under_way and under_way[0][0] <= now:
            _, task, decoder = heapq.heappop(under_way)
            done.add(task)
            now += costs.task_s
            room[decoder] += 1
            if room[decoder] == 1:
                heapq.heappush(idle, (free_at[decoder], decoder))
            while delivered in done and (not pipeline.together or _round_is_done(delivered, ranks, done)):
                done.remove(delivered)
                rank = delivered % ranks
                begin = max(rank_free[rank], now)
                if pipeline.together and rank:
                    begin = max(begin, float(taken[delivered - rank]))
                taken[delivered] = begin
                rank_free[rank] = begin + steps
                heapq.heappush(held, begin)
                delivered += 1
        while held and held[0] <= now:
            heapq.heappop(held)
        while given < count and idle and given - delivered + len(held) < pipeline.window:
            _, decoder = heapq.heappop(idle)
            now += costs.task_s
            free_at[decoder] = max(free_at[decoder], now) + service
            latest = max(latest, free_at[decoder])
            heapq.heappush(under_way, (free_at[decoder], given, decoder))
            given += 1
            room[decoder] -= 1
            if room[decoder]:
                heapq.heappush(idle, (free_at[decoder], decoder))
    return taken


def _rank_s(pipeline: Pipeline, costs: Costs) -> float:
    """A rank's time for a block, seconds."""
    return costs.block_s + pipeline.steps_per_task * (costs.batch_s + pipeline.step_s)


def _round_is_done(task: int, ranks: int, done: set[int]) -> bool:
    """Whether the round that a task begins is whole; within a round it was."""
    return task % ranks != 0 or all(other in done for other in range(task, task + ranks))


def fitted(passes: Sequence[Measured]) -> Costs:
    """The loop's cost as these passes had it, and the others that predict the passes marked `fit` best: the least sum of squared errors of the logarithm of their rates."""
    known = [one for one in passes if one.fit]
    if not known:
        raise ValueError("found no pass to fit to, expected some")

    task_s = min(
        one.task_s for one in known
    )  # a loop with little to do turns all the same, and each task has more of it

    def miss(logs: npt.NDArray[np.float64]) -> float:
        costs = Costs(task_s, *np.exp(logs).tolist())
        return float(sum(np.log(flow(one.pipeline, costs).images_per_s / one.images_per_s) ** 2 for one in known))

    tries = [
        optimize.minimize(
            miss, np.log(start), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6, "maxiter": 300}
        )
        for start in ((0.003, 0.0003, 0.003), (0.01, 0.0003, 0.01), (0.02, 0.003, 0.003))
    ]
    return Costs(task_s, *np.exp(min(tries, key=lambda found: found.fun).x).tolist())


def errors(passes: Sequence[Measured], costs: Costs, *, fit: bool) -> list[float]:
    """Predicted over measured rate, less one, of the passes that were fitted to, or of the others."""
    return [flow(one.pipeline, costs).images_per_s / one.images_per_s - 1 for one in passes if one.fit is fit]
