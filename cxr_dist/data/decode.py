"""The decoding end of the stream: one task in, one block of rows out, in a process that imports no torch.

A block is a rank's run of consecutive steps, always the same number of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist.data import images
from cxr_dist.data.plan import EMPTY, Plan, view_of
from cxr_dist.data.rows import DecodeMany, DecodeOne, Journal, RowDecoder, RowSource, decode_isolated

__all__ = ["Decoder", "StreamSpec"]


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """All that decides the stream's content; small, so that every decoding process holds a copy."""

    plan: Plan
    train: RowSource
    validation: RowSource
    world_size: int
    start: int
    """First step of the run that is still to be done."""
    steps_per_task: int
    size: int
    encoding: str
    findings: tuple[int, ...]
    """Columns of the stored findings that the run uses, in the run's order."""
    feature_bytes: int = 0
    """Bytes of an image's features, where the rows are features (`encoding` features)."""
    train_views: tuple[RowSource, ...] = ()
    """Features of the augmented views 1, 2, …; empty where rows are images, which every view is made from."""
    views: int
    augment: bool
    token: str
    """Names the journal files of this run on a node."""

    @property
    def num_tasks(self) -> int:
        runs = -(-(self.plan.num_steps - self.start) // self.steps_per_task)
        return runs * self.world_size

    def task(self, number: int) -> tuple[int, range]:
        """Rank and step numbers of a task; numbers at or past the run's end are padding steps."""
        run, rank = divmod(number, self.world_size)
        first = self.start + run * self.steps_per_task
        return rank, range(first, first + self.steps_per_task)


class Decoder:
    """A Ray Data actor's callable: {"item": [task number]} to a block of steps_per_task * rank_batch rows.

    Columns: `row_schema`, then the run's first step of this stream (start), the row's step (index) and its rank.
    """

    def __init__(
        self, spec: StreamSpec, decode: DecodeMany = images.to_grey_many, isolated: DecodeOne = decode_isolated
    ):
        self.spec = spec
        sources = {("train", view): source for view, source in enumerate((spec.train, *spec.train_views))}
        self.decoders = {
            (kind, view): RowDecoder(
                source=source,
                split=spec.plan.train if kind == "train" else spec.plan.validation,
                size=spec.size,
                encoding=spec.encoding,
                findings=spec.findings,
                feature_bytes=spec.feature_bytes,
                decode=decode,
                isolated=isolated,
            )
            for (kind, view), source in {**sources, ("validation", 0): spec.validation}.items()
        }

    def __call__(self, batch: dict[str, npt.NDArray[np.int64]]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield self.block(int(number))

    def block(self, number: int) -> pa.Table:
        """The block of one task: a rank's run of consecutive steps."""
        rank, indices = self.spec.task(number)
        with Journal(self.spec.token, number) as journal:
            steps = [self._step(index, rank, journal) for index in indices]
        return pa.concat_tables(steps).combine_chunks()

    def _step(self, index: int, rank: int, journal: "Journal") -> pa.Table:
        spec, plan = self.spec, self.spec.plan
        if index < plan.num_steps:
            step = plan.step(index)
            view = view_of(step.epoch, views=spec.views, augment=spec.augment) if step.kind == "train" else 0
            groups = step.of_rank(rank, spec.world_size)
            decoder = self.decoders[step.kind, view if spec.train_views else 0]
            table = decoder.rows(groups, journal, seed=plan.seed, view=view)
        else:
            nothing = np.full(plan.groups_per_step // spec.world_size, EMPTY)
            table = self.decoders["train", 0].rows(nothing, journal)
        table = table.append_column("start", pa.array(np.full(len(table), spec.start)))
        table = table.append_column("index", pa.array(np.full(len(table), index)))
        return table.append_column("rank", pa.array(np.full(len(table), rank, dtype=np.int32)))
