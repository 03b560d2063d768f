"""The decoding end of the stream: one task in, one block of rows out, in a process that imports no torch.

A block is a rank's run of consecutive steps. The ranks' blocks of one round have the same number of rows, which is all
that dealing them in turn needs; the first rounds are short, so that the first batch need not wait for a whole task: of a
step each, or of a piece of it that pays. The last one is as long as what is left.
"""

import dataclasses
import itertools
import json
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cxr_dist.data import images, ranges
from cxr_dist.data.plan import Plan, view_of
from cxr_dist.data.rows import DecodeMany, Journal, Part, RowDecoder, RowSource, decode_rows
from cxr_dist.data.suspects import DecodeOne, decode_isolated, sweep
from cxr_dist.data.turns import Turns

__all__ = ["BlockFacts", "Decoder", "StreamSpec"]

_FACTS = b"cxr_dist"


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
    """Steps of a task, after a few tasks of 1, 2, 4, … steps."""
    pieces: int = 0
    """Tasks that a rank's share of the first step is cut into; 0: one, unless `build_splits` finds that more pay."""
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
    def block_bytes(self) -> int:
        """Bytes of the rows of a task of `steps_per_task` steps."""
        return self.steps_per_task * self.plan.rank_batch(self.world_size) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of an image or of its features, as decoded."""
        return self.feature_bytes or self.size * self.size

    @property
    def num_tasks(self) -> int:
        left, short = self.plan.num_steps - self.start, self._short_rounds
        rounds = left.bit_length() if left < 2**short else short + -(-(left - 2**short + 1) // self.steps_per_task)
        return (rounds + self._more_pieces if left else 0) * self.world_size

    def task(self, number: int) -> tuple[int, range]:
        """Rank and step numbers of a task."""
        turn, rank = divmod(number, self.world_size)
        turn = max(0, turn - self._more_pieces)
        return rank, range(self._first_step(turn), self._first_step(turn + 1))

    def part(self, number: int) -> slice:
        """Of the row groups that the task's rank has in a step, those that the task holds: all, or a piece of the first."""
        piece = number // self.world_size
        if piece > self._more_pieces:
            return slice(None)
        size = self.groups_per_share // (self._more_pieces + 1)
        return slice(piece * size, (piece + 1) * size)

    @property
    def groups_per_share(self) -> int:
        """Row groups of a rank in a step."""
        return self.plan.rank_batch(self.world_size) // self.plan.train.row_group

    @property
    def _more_pieces(self) -> int:
        """Pieces of the first step after its first."""
        return max(0, self.pieces - 1)

    @property
    def _short_rounds(self) -> int:
        """Rounds of 1, 2, 4, … steps before those of `steps_per_task`."""
        return (self.steps_per_task - 1).bit_length()

    def _first_step(self, turn: int) -> int:
        short = min(turn, self._short_rounds)
        done = 2**short - 1 + (turn - short) * self.steps_per_task
        return min(self.start + done, self.plan.num_steps)


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What a block says of itself as a whole; travels with its schema."""

    start: int
    """First step of this stream."""
    ended: float
    """When its decoding ended, seconds since 1970."""
    reads: ranges.ReadCounters = field(default_factory=ranges.ReadCounters)
    """What its process had read from storage by then and not yet told with an earlier block."""

    def attach(self, block: pa.Table) -> pa.Table:
        return block.replace_schema_metadata({_FACTS: json.dumps(dataclasses.asdict(self))})

    @classmethod
    def of(cls, block: pa.Table) -> "BlockFacts":
        facts = json.loads(block.schema.metadata[_FACTS])
        return cls(**{**facts, "reads": ranges.ReadCounters(**facts["reads"])})


class Decoder:
    """Makes the blocks of a stream's tasks; several threads may ask for different ones, of which one decodes at a time.

    Columns: `row_schema`, then the row's step (index) and its rank.
    """

    def __init__(
        self, spec: StreamSpec, decode: DecodeMany = images.to_grey_many, isolated: DecodeOne = decode_isolated
    ):
        sweep()
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
        # of two tasks at once one waits for its first bytes; decoding both by turns would only finish both late
        self.turns = Turns()
        self.telling = threading.Lock()
        self.told = ranges.counters()

    def block(self, number: int) -> pa.Table:
        """The block of one task: a rank's run of consecutive steps, or a piece of the first."""
        rank, indices = self.spec.task(number)
        with Journal(self.spec.token, number) as journal, self.turns.task(number) as turn:
            block = decode_rows(self._parts(rank, indices, self.spec.part(number)), journal, turn)
        share = len(block) // len(indices)
        block = block.append_column("index", pa.array(np.repeat(np.arange(indices.start, indices.stop), share)))
        block = block.append_column("rank", pa.array(np.full(len(block), rank, dtype=np.int32)))
        with self.telling:
            read = ranges.counters()
            facts = BlockFacts(start=self.spec.start, ended=time.time(), reads=read - self.told)
            self.told = read
        return facts.attach(block)

    def _parts(self, rank: int, indices: range, part: slice) -> list[Part]:
        """What that part of the steps holds, neighbours from one source and of one view in one piece."""
        spec, plan = self.spec, self.spec.plan
        steps = [plan.share(index, rank, spec.world_size) for index in indices]
        parts = []
        for (kind, epoch), group in itertools.groupby(steps, lambda step: (step.kind, step.epoch)):
            view = view_of(epoch, views=spec.views, augment=spec.augment) if kind == "train" else 0
            parts.append(
                Part(
                    decoder=self.decoders[kind, view if spec.train_views else 0],
                    groups=np.concatenate([step.groups[part] for step in group]),
                    seed=plan.seed,
                    view=view,
                )
            )
        return parts
