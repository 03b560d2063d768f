"""The stream on a real Ray: every rank gets exactly the plan's batches, in order, whatever happens to the decoders."""

import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from cxr_dist.data.decode import BlockFacts, Decoder, StreamSpec
from cxr_dist.data.images import to_grey, to_grey_many
from cxr_dist.data.numbered import numbered_blocks
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.ranges import ReadCounters
from cxr_dist.data.rows import GREY
from cxr_dist.data.stream import Batch, EmptyShard, PlanDataConfig, Stream, build_splits
from cxr_dist.data.suspects import decode_isolated
from cxr_dist.errors import RunError
from tests.releases import noise, png

SIZE = 16
RANKS = 8
ROW_GROUP = 2
POISON = b"poison"
POISONED_ROW = 101


def plan_of(train: int = 149, validation: int = 21) -> Plan:
    """22 steps of 16 images: two epochs of 9 training steps and 2 validation steps, the last of them padded."""
    return Plan(
        train=Split(num_rows=train, row_group=ROW_GROUP),
        validation=Split(num_rows=validation, row_group=ROW_GROUP),
        seed=5,
        epochs=2,
        global_batch=16,
    )


@dataclass(frozen=True)
class Source:
    """Rows in memory; row r is `name-r.png` and shows finding r % 3."""

    name: str
    encoded: list[bytes]

    def read(self, groups: np.ndarray) -> pa.Table:
        rows = [row for group in groups.tolist() for row in range(group * ROW_GROUP, (group + 1) * ROW_GROUP)]
        rows = [row for row in rows if row < len(self.encoded)]
        shown = pa.array([row % 3 == finding for row in rows for finding in range(3)])
        return pa.table(
            {
                "image_id": [f"{self.name}-{row}.png" for row in rows],
                "findings": pa.FixedSizeListArray.from_arrays(shown, 3),
                "image": pa.array([self.encoded[row] for row in rows], pa.binary()),
            }
        )


def source(name: str, num_rows: int, seed: int) -> Source:
    encoded = [png(noise(seed + row, 24)) for row in range(num_rows)]
    if name == "train":
        encoded[POISONED_ROW] += POISON
    return Source(name, encoded)


SOURCES = {"train": source("train", 149, 0), "validation": source("validation", 21, 1000)}


def spec_of(**changes: Any) -> StreamSpec:
    spec = StreamSpec(
        plan=plan_of(),
        train=SOURCES["train"],
        validation=SOURCES["validation"],
        world_size=2,
        start=0,
        steps_per_task=3,
        size=SIZE,
        encoding="png",
        findings=(2, 0),
        views=0,
        augment=True,
        token=uuid.uuid4().hex,
    )
    return dataclasses.replace(spec, **changes)


@dataclass(frozen=True)
class Got:
    """A delivered batch, small enough to send back."""

    index: int
    image_ids: list[str]
    rows: list[int]
    valid: list[bool]
    images: np.ndarray
    labels: list[list[int]]

    @staticmethod
    def of(batch: Batch) -> "Got":
        return Got(
            index=batch.step.index,
            image_ids=batch.image_ids,
            rows=batch.rows_B.tolist(),
            valid=batch.valid_B.tolist(),
            images=batch.images_BSS.copy(),
            labels=batch.labels_BK.tolist(),
        )


@dataclass(frozen=True)
class Outcome:
    batches: list[Got]
    corrupt: dict[str, str]
    delivered: int
    start: int | None


class Consumer:
    """Some of the ranks, a thread each; fewer processes start faster."""

    def run(self, shard: Any, plan: Plan, rank: int, world_size: int) -> Outcome:
        stream = Stream(shard=shard, plan=plan, rank=rank, world_size=world_size, size=SIZE)
        batches = [Got.of(batch) for batch in stream]
        return Outcome(batches, stream.corrupt, stream.delivered, stream.start)


@pytest.fixture(scope="module")
def consumers() -> Iterator[list[Any]]:
    """Where each of eight ranks runs, on a Ray of two CPUs whose limit on a block's size is less than any block here."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    limit = context.target_max_block_size
    context.target_max_block_size = 1000
    processes = [ray.remote(num_cpus=0, max_concurrency=RANKS)(Consumer).remote() for _ in range(2)]
    yield [processes[rank % 2] for rank in range(RANKS)]
    context.target_max_block_size = limit
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def consume(consumers: list[Any], spec: StreamSpec, **options: Any) -> list[Outcome]:
    """What each rank got."""
    splits = build_splits(spec, num_actors=2, **options)
    return ray.get(
        [consumers[rank].run.remote(shard, spec.plan, rank, spec.world_size) for rank, shard in enumerate(splits)]
    )


def expected(spec: StreamSpec, rank: int, *, masked: bool = False) -> list[Got]:
    """What the plan says that a rank gets, worked out here."""
    return [expected_batch(spec, rank, index, masked) for index in range(spec.start, spec.plan.num_steps)]


def expected_batch(spec: StreamSpec, rank: int, index: int, masked: bool) -> Got:
    step = spec.plan.step(index)
    from_rows = SOURCES[step.kind]
    rows = spec.plan.split_of(step).rows(step.of_rank(rank, spec.world_size)).tolist()
    bad = [masked and step.kind == "train" and row == POISONED_ROW for row in rows]
    grey, black = np.full((SIZE, SIZE), GREY, np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    images = [
        black if row < 0 else grey if poisoned else to_grey(from_rows.encoded[row], SIZE)
        for row, poisoned in zip(rows, bad, strict=True)
    ]
    return Got(
        index=index,
        image_ids=[f"{from_rows.name}-{row}.png" if row >= 0 else "" for row in rows],
        rows=rows,
        valid=[row >= 0 and not poisoned for row, poisoned in zip(rows, bad, strict=True)],
        images=np.stack(images),
        labels=[[int(row >= 0 and row % 3 == 2), int(row >= 0 and row % 3 == 0)] for row in rows],
    )


def assert_delivered(outcomes: list[Outcome], spec: StreamSpec, *, masked: bool = False) -> None:
    """Every rank got exactly its share of every step, in order, bit for bit."""
    assert len(outcomes) == spec.world_size
    for rank, outcome in enumerate(outcomes):
        wanted = expected(spec, rank, masked=masked)
        assert [got.index for got in outcome.batches] == list(range(spec.start, spec.plan.num_steps))
        for got, want in zip(outcome.batches, wanted, strict=True):
            assert (got.image_ids, got.rows, got.valid) == (want.image_ids, want.rows, want.valid)
            assert got.labels == want.labels
            assert (got.images == want.images).all()
        assert outcome.start == spec.start
        assert outcome.delivered == sum(row >= 0 for want in wanted for row in want.rows)


def in_random_time(encoded: list[bytes], size: int) -> np.ndarray:
    time.sleep(random.random() * 0.05)  # the load under test: tasks that end out of order
    return to_grey_many(encoded, size)


class SlowDecoder(Decoder):
    def __init__(self, spec: StreamSpec):
        super().__init__(spec, decode=in_random_time)


def test_eight_ranks_on_two_cpus_get_the_plan_in_order(consumers):
    spec = spec_of(world_size=RANKS)
    outcomes = consume(consumers, spec, decoder=SlowDecoder)
    assert_delivered(outcomes, spec)
    assert all(outcome.corrupt == {} for outcome in outcomes)


def test_a_resume_gets_exactly_the_rest(consumers):
    spec = spec_of(start=10, world_size=4, steps_per_task=5)
    assert_delivered(consume(consumers, spec, decoder=SlowDecoder), spec)


@pytest.mark.parametrize("start", [0, 9])  # a training step, a validation step
def test_a_first_step_in_pieces_is_the_same_step(consumers, start):
    spec = spec_of(start=start, pieces=4)
    assert len({tuple(Decoder(spec).block(number)["row"].to_pylist()) for number in range(8)}) > 4
    assert_delivered(consume(consumers, spec, decoder=SlowDecoder), spec)


@pytest.mark.parametrize(("global_batch", "asked", "pieces"), [
    (256, 0, 2),  # 128 rows of a rank in 0.52 s of work, for two of four decoders
    (256, 1, 1),
    (128, 0, 1),
])  # fmt: skip
def test_a_first_step_of_much_work_is_cut_for_the_decoders(monkeypatch, global_batch, asked, pieces):
    made = []

    def numbered(count: int, make: Any, **_: Any) -> Any:
        made.append((count, make().spec.pieces))
        return SimpleNamespace(streaming_split=lambda *_, **__: [])

    monkeypatch.setattr("cxr_dist.data.stream.numbered_blocks", numbered)
    monkeypatch.setattr("cxr_dist.data.stream.decoding", dict)  # no Ray is asked for nodes
    plan = dataclasses.replace(plan_of(train=800), global_batch=global_batch)
    spec = spec_of(plan=plan, pieces=asked)
    build_splits(spec, num_actors=4)
    assert made == [(spec.num_tasks + 2 * (pieces - 1), pieces)]


def dying(folder: Path, times: int, task: int) -> Callable[..., Any]:
    """A decoder that kills its process in the middle of one task, so many times; each time leaves a file."""

    class Dying(Decoder):
        def block(self, number: int) -> pa.Table:
            if number == task and len(list(folder.iterdir())) < times:
                (folder / uuid.uuid4().hex).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().block(number)

    return Dying


def test_a_killed_decoder_changes_nothing(consumers, tmp_path):
    spec = spec_of()
    assert_delivered(consume(consumers, spec, decoder=dying(tmp_path, times=1, task=5)), spec)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_task_that_always_dies_ends_the_stream(consumers, tmp_path):
    """Ray's default is to try for ever."""
    with pytest.raises(ray.exceptions.RayError):
        consume(consumers, spec_of(), decoder=dying(tmp_path, times=6, task=3), retries=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_task_that_waits_weighs_nothing(consumers):
    """The whole run is one execution, so tasks must cost nothing before their turn: a few bytes of a list each."""
    few, many = (
        len(
            ray.cloudpickle.dumps(
                numbered_blocks(
                    count, partial(Decoder, spec_of()), num_actors=2, retries=0, store_bytes=1, placement={}
                )
            )
        )
        for count in (10, 20_010)
    )
    assert many - few < 8 * 20_000


def segfault_if_poisoned(encoded: list[bytes], size: int) -> np.ndarray:
    if any(data.endswith(POISON) for data in encoded):
        signal.raise_signal(signal.SIGSEGV)  # to this thread, as a real fault is; os.kill would hit another, later
    return to_grey_many(encoded, size)


def isolated_segfault(encoded: bytes, size: int) -> np.ndarray | str:
    program = f"import os; os.kill(os.getpid(), {signal.SIGSEGV:d})"
    return decode_isolated(encoded, size, program) if encoded.endswith(POISON) else decode_isolated(encoded, size)


class PoisonedDecoder(Decoder):
    def __init__(self, spec: StreamSpec):
        super().__init__(spec, decode=segfault_if_poisoned, isolated=isolated_segfault)


def test_an_image_that_always_crashes_the_decoder_is_named_and_masked(consumers):
    spec = spec_of()
    outcomes = consume(consumers, spec, decoder=PoisonedDecoder)
    assert_delivered(outcomes, spec, masked=True)
    found = {name: reason for outcome in outcomes for name, reason in outcome.corrupt.items()}
    assert found == {f"train-{POISONED_ROW}.png": f"decoder killed by signal {signal.SIGSEGV:d}"}


def test_a_run_without_steps_left_has_an_empty_stream():
    spec = spec_of(start=22)
    config = PlanDataConfig(lambda world_size: dataclasses.replace(spec, world_size=world_size), num_actors=lambda _: 1)
    shards = config.configure({"run": None}, 3, None, None)
    streams = [Stream(shard=shard["run"], plan=spec.plan, rank=0, world_size=1, size=SIZE) for shard in shards]
    assert [list(stream) for stream in streams] == [[], [], []]
    assert isinstance(shards[2]["run"], EmptyShard)


class FakeShard:
    """A rank's blocks, decoded here, delivered as told; knows whether its iterator was closed.

    It keeps the iterator, so that the garbage collector does not close it for the stream.
    """

    def __init__(self, blocks: list[pa.Table]):
        self.blocks = blocks
        self.closed = False
        self.asked: dict[str, Any] = {}

    def iter_batches(self, **asked: Any) -> Iterator[pa.Table]:
        self.asked = asked
        self.iterator = self._deliver()
        return self.iterator

    def _deliver(self) -> Iterator[pa.Table]:
        try:
            yield from self.blocks
        finally:
            self.closed = True


def blocks_of(spec: StreamSpec, rank: int) -> list[pa.Table]:
    return [Decoder(spec).block(number) for number in range(rank, spec.num_tasks, spec.world_size)]


def stream_of(blocks: list[pa.Table], spec: StreamSpec, rank: int = 1) -> tuple[Stream, FakeShard]:
    shard = FakeShard(blocks)
    return Stream(shard=shard, plan=spec.plan, rank=rank, world_size=spec.world_size, size=SIZE), shard


def test_a_lost_piece_is_an_error():
    spec = spec_of(start=4, pieces=2)
    blocks = blocks_of(spec, 1)
    assert [batch.step.index for batch in stream_of(blocks, spec)[0]] == list(range(4, 22))
    with pytest.raises(RunError, match=r"out of order: found step .*, expected .* at step 4"):
        list(stream_of(blocks[1:], spec)[0])
    with pytest.raises(RunError, match="ended before step 4 of 22"):
        list(stream_of(blocks[:1], spec)[0])


def test_blocks_in_order_pass():
    spec = spec_of(start=4)
    stream, shard = stream_of(blocks_of(spec, 1), spec)
    assert [batch.step.index for batch in stream] == list(range(4, 22))
    assert stream.start == 4
    assert shard.asked["batch_size"] is None
    assert shard.closed


@pytest.mark.parametrize(("order", "message"), [
    ([1, 0, 2, 3], r"rank 1 out of order: found step \[5, 5, 5, 5\]…, expected \[4, 4, 4, 4\]… at step 4"),
    ([0, 2, 1, 3], r"rank 1 out of order: found step \[7, 7, 7, 7\]…, expected \[5, 5, 5, 5\]… at step 5"),
    ([0, 1, 1, 2], r"rank 1 out of order: found step \[5, 5, 5, 5\]…, expected \[7, 7, 7, 7\]… at step 7"),
    ([0, 1, 2, 3, 4, 5, 6, 0], r"found step \[4, 4, 4, 4\]…, expected \[22, 22, 22, 22\]… at step 22"),
    ([0, 1, 2], "stream of rank 1 ended before step 10 of 22"),
    ([], "stream of rank 1 ended before step 0 of 22"),
])  # fmt: skip
def test_tampered_order_is_an_error(order, message):
    spec = spec_of(start=4)
    blocks = blocks_of(spec, 1)
    stream, shard = stream_of([blocks[place] for place in order], spec)
    with pytest.raises(RunError, match=message):
        list(stream)
    assert shard.closed


def test_another_ranks_block_is_an_error():
    spec = spec_of()
    stream, _ = stream_of([blocks_of(spec, 1)[0], blocks_of(spec, 0)[1]], spec)
    with pytest.raises(RunError, match=r"stream of rank 1 out of order: found rank \[0, 0, 0, 0\]…, .* at step 1"):
        list(stream)


def test_rows_of_another_plan_are_an_error():
    """A right step and rank with other images: the seeds differ."""
    spec = spec_of()
    other = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, seed=6))
    stream, _ = stream_of(blocks_of(other, 1), spec)
    with pytest.raises(RunError, match=r"stream of rank 1 out of order: found row .* at step 0"):
        list(stream)


def test_a_split_block_is_an_error():
    spec = spec_of()
    blocks = blocks_of(spec, 1)
    stream, _ = stream_of([*blocks[:2], blocks[2].slice(0, 12), blocks[2].slice(12), *blocks[3:]], spec)
    with pytest.raises(RunError, match=r"out of order: .* at step 4"):
        list(stream)


def test_early_stop_closes_the_pipeline():
    spec = spec_of()
    stream, shard = stream_of(blocks_of(spec, 1), spec)
    with contextlib.closing(iter(stream)) as batches:
        assert next(batches).step.index == 0
        assert not shard.closed
    assert shard.closed


def test_a_fault_of_the_consumer_closes_the_pipeline():
    spec = spec_of()
    stream, shard = stream_of(blocks_of(spec, 1), spec)

    def train() -> None:
        for batch in stream:
            raise ZeroDivisionError(batch.step.index)

    with contextlib.suppress(ZeroDivisionError):
        train()
    assert shard.closed


def test_blocks_may_be_asked_for_before_the_first_batch_is():
    spec = spec_of()
    plain, _ = stream_of(blocks_of(spec, 1), spec)
    stream, shard = stream_of(blocks_of(spec, 1), spec)
    stream.begin()
    iterator = shard.iterator
    for got, want in zip(stream, plain, strict=True):
        assert (got.step.index, got.image_ids) == (want.step.index, want.image_ids)
    assert shard.iterator is iterator
    assert shard.closed


def test_a_stream_that_was_begun_and_not_wanted_closes_the_pipeline():
    spec = spec_of()
    stream, shard = stream_of(blocks_of(spec, 1), spec)
    stream.begin()
    batches = iter(stream)
    next(batches)
    batches.close()
    assert shard.closed


def test_a_fault_of_the_pipeline_is_raised_to_who_asks_for_the_batch():
    class Faulty(FakeShard):
        def _deliver(self) -> Iterator[pa.Table]:
            raise ZeroDivisionError
            yield

    spec = spec_of()
    stream = Stream(shard=Faulty([]), plan=spec.plan, rank=1, world_size=2, size=SIZE)
    stream.begin()
    with pytest.raises(ZeroDivisionError):
        next(iter(stream))


class Clock:
    """A clock for the stream that moves when a block is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr("cxr_dist.data.stream.time.time", lambda: self.now)


def waiting(clock: Clock, blocks: list[pa.Table], waits: list[float], ended: list[float]) -> list[pa.Table]:
    """Blocks that come after so many seconds each and were decoded when `ended` says."""

    def deliver() -> Iterator[pa.Table]:
        for block, wait, end in zip(blocks, waits, ended, strict=True):
            clock.now += wait
            yield dataclasses.replace(BlockFacts.of(block), ended=end).attach(block)
        clock.now += 1

    return deliver()  # type: ignore[return-value]


@pytest.mark.parametrize(("ended", "head_of_line_s"), [
    ([110, 115, 118, 120], 0),  # every block came as soon as it was decoded, the one after it later
    ([107, 115, 118, 120], 3),  # the first was kept for three seconds
    ([110, 104, 118, 120], 6 + 5),  # the second was decoded while the first was waited for, and then waited for itself
    ([90, 91, 92, 93], 20),  # all were there before anything was asked for
    ([110, 115, 118, 116], 2 + 2),  # the fourth was decoded while the third was waited for, and then waited for itself
])  # fmt: skip
def test_head_of_line_time_is_waiting_while_a_block_was_decoded(monkeypatch, ended, head_of_line_s):
    """Waits of 10, 5, 3 and 2 seconds, then 1 for the end."""
    spec = spec_of(steps_per_task=9, start=4)
    blocks = blocks_of(spec, 1)
    assert len(blocks) == 4 + 1
    clock = Clock(monkeypatch)
    delivered = waiting(clock, blocks[:4], [10, 5, 3, 2], ended)
    stream, _ = stream_of(delivered, spec)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="ended before step"):
        list(stream)
    assert stream.wait_s == 21
    assert stream.head_of_line_s == head_of_line_s


def test_reads_of_all_blocks_are_summed():
    spec = spec_of()
    told = [ReadCounters(bytes_read=5, requests=1), ReadCounters(bytes_read=7, hedged=2)]
    blocks = blocks_of(spec, 1)
    blocks[0], blocks[3] = (
        dataclasses.replace(BlockFacts.of(blocks[place]), reads=reads).attach(blocks[place])
        for place, reads in zip((0, 3), told, strict=True)
    )
    stream, _ = stream_of(blocks, spec)
    assert len(list(stream)) == 22
    assert stream.reads == ReadCounters(bytes_read=12, requests=1, hedged=2)


def test_a_source_with_wrong_rows_is_an_error_not_a_shift():
    short = Source("train", SOURCES["train"].encoded[:100])
    with pytest.raises(RunError, match=r"row groups \[.*\]: found \d+ rows, expected 8"):
        blocks_of(spec_of(train=short), 0)
