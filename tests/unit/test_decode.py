"""Decoding: fixed shapes, corrupt images that keep their place, and images that kill the process found out."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist.data import images, ranges
from cxr_dist.data.decode import BlockFacts, Decoder, StreamSpec
from cxr_dist.data.plan import EMPTY, Plan, Split, draws
from cxr_dist.data.rows import (
    CORRUPT,
    GREY,
    OK,
    PADDING,
    Part,
    RowDecoder,
    decode_rows,
    fixed_rows,
    row_schema,
)
from cxr_dist.data.suspects import STALE_S, Journal, decode_isolated, sweep
from cxr_dist.errors import RunError
from tests.releases import noise, png

SIZE = 16
POISON = b"poison"
DIES = "import os; os.kill(os.getpid(), 11)"


@dataclass(frozen=True)
class Source:
    """Rows in memory: row r is image `name-r.png`; finding f is set where bit f of r is, three findings."""

    name: str
    encoded: Sequence[bytes]
    row_group: int

    def read(self, groups: np.ndarray) -> pa.Table:
        rows = [row for group in groups.tolist() for row in range(*self.span(group))]
        bits = pa.array([bool(row >> finding & 1) for row in rows for finding in range(3)])
        whole = pa.table(
            {
                "image_id": [f"{self.name} {row}.png" for row in rows],
                "findings": pa.FixedSizeListArray.from_arrays(bits, 3),
                "image": pa.array([self.encoded[row] for row in rows], self.type),
            }
        )
        return pa.concat_tables([whole.slice(0, 1), whole.slice(1)])  # tables from shards come in chunks

    def span(self, group: int) -> tuple[int, int]:
        return group * self.row_group, min((group + 1) * self.row_group, len(self.encoded))

    @property
    def type(self) -> pa.DataType:
        raw = {len(one) for one in self.encoded} == {SIZE * SIZE}
        return pa.binary(SIZE * SIZE) if raw else pa.binary()


PIXELS = [noise(row, 40) for row in range(11)]
PNGS = [png(pixels) for pixels in PIXELS]
GREYS = [images.to_grey(encoded, SIZE) for encoded in PNGS]


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that journal files lie in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def row_decoder(encoded: Sequence[bytes], **changes: object) -> RowDecoder:
    decoder = RowDecoder(
        source=Source("train", encoded, 4),
        split=Split(num_rows=len(encoded), row_group=4),
        size=SIZE,
        encoding="png",
        findings=(0, 1, 2),
    )
    return dataclasses.replace(decoder, **changes)  # type: ignore[arg-type]


def rows_of(decoder: RowDecoder, groups: list[int], **asked: int) -> pa.Table:
    with Journal("run", 0) as journal:
        return decoder.rows(np.array(groups), journal, **asked)


def pixels_of(table: pa.Table) -> np.ndarray:
    return fixed_rows(table["image"], np.uint8).reshape(-1, SIZE, SIZE)


def test_rows_of_full_short_and_empty_row_groups():
    table = rows_of(row_decoder(PNGS), [1, 2, EMPTY])
    assert table.schema == row_schema(SIZE * SIZE, 3)
    assert table["row"].to_pylist() == [4, 5, 6, 7, 8, 9, 10, -1, -1, -1, -1, -1]
    assert table["image_id"].to_pylist() == [f"train {row}.png" for row in range(4, 11)] + [""] * 5
    assert table["state"].to_pylist() == [OK] * 7 + [PADDING] * 5
    assert table["reason"].to_pylist() == [None] * 12
    assert (pixels_of(table) == np.stack([*GREYS[4:11], *[np.zeros((SIZE, SIZE), np.uint8)] * 5])).all()
    expected = [[row & 1, row >> 1 & 1, row >> 2 & 1] for row in range(4, 11)] + [[0, 0, 0]] * 5
    assert fixed_rows(table["labels"], np.uint8).tolist() == expected


def test_row_groups_come_in_the_asked_order():
    table = rows_of(row_decoder(PNGS), [1, 0])
    assert table["row"].to_pylist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert (pixels_of(table) == np.stack(GREYS[4:8] + GREYS[:4])).all()


def test_pixels_encoding_gives_the_bits_of_png():
    stored = row_decoder([grey.tobytes() for grey in GREYS], encoding="pixels")
    assert rows_of(stored, [1, 2]).equals(rows_of(row_decoder(PNGS), [1, 2]))


def test_findings_come_in_the_runs_order():
    table = rows_of(row_decoder(PNGS, findings=(2, 0)), [1])
    assert fixed_rows(table["labels"], np.uint8).tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("bad", [4, 5, 7])
def test_a_corrupt_image_keeps_its_place_and_harms_no_other(bad):
    encoded = [data[:-40] if row == bad else data for row, data in enumerate(PNGS)]
    table, clean = rows_of(row_decoder(encoded), [1, 2]), rows_of(row_decoder(PNGS), [1, 2])
    at, others = bad - 4, [row for row in range(8) if row != bad - 4]
    assert table["state"][at].as_py() == CORRUPT
    assert table["reason"][at].as_py() == "truncated PNG"
    assert table["image_id"][at].as_py() == f"train {bad}.png"
    assert (pixels_of(table)[at] == GREY).all()
    assert table.take(others).equals(clean.take(others))


def test_a_source_with_too_few_rows_is_an_error():
    short = row_decoder(PNGS, split=Split(num_rows=12, row_group=4))
    with pytest.raises(RunError, match=r"row groups \[1, 2\]: found 7 rows, expected 8"):
        rows_of(short, [1, 2])


def test_draws_only_for_augmented_views():
    plain = rows_of(row_decoder(PNGS), [2], seed=3, view=0)
    assert plain["draws"].to_pylist() == [bytes(24)] * 4
    augmented = rows_of(row_decoder(PNGS), [2], seed=3, view=5)
    assert augmented["draws"].to_pylist() == [*(draws(3, f"train {row}.png", 5) for row in (8, 9, 10)), bytes(24)]


def test_fixed_rows_of_slices_and_chunks():
    values = np.arange(12, dtype="<f4").reshape(6, 2)
    column = pa.chunked_array([pa.array([row.tobytes() for row in values], pa.binary(8))])
    assert fixed_rows(column.slice(2, 3), np.dtype("<f4")).tolist() == values[2:5].tolist()
    chunks = pa.chunked_array([*column.slice(1, 2).chunks, *column.slice(4).chunks])
    assert fixed_rows(chunks, np.dtype("<f4")).tolist() == values[[1, 2, 4, 5]].tolist()


def stream_spec(train: Sequence[bytes] = PNGS, **changes: object) -> StreamSpec:
    """Two ranks of 4 images; an epoch is 1 training step (rows 8-10 are left out) and 1 validation step of 5 rows."""
    plan = Plan(
        train=Split(num_rows=11, row_group=4),
        validation=Split(num_rows=5, row_group=4),
        seed=0,
        epochs=2,
        global_batch=8,
    )
    spec = StreamSpec(
        plan=plan,
        train=Source("train", train, 4),
        validation=Source("val", PNGS[:5], 4),
        world_size=2,
        start=0,
        steps_per_task=3,
        size=SIZE,
        encoding="png",
        findings=(0, 1, 2),
        views=0,
        augment=True,
        token="run",
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def test_a_block_is_a_ranks_run_of_steps(journals):
    """The second round's task of rank 1: the validation step of epoch 0, then the training step of epoch 1."""
    spec = stream_spec()
    assert spec.task(3) == (1, range(1, 3))
    block = Decoder(spec).block(3)
    [group] = spec.plan.step(2).of_rank(1, 2).tolist()
    assert block["row"].to_pylist() == [4, -1, -1, -1, *range(4 * group, 4 * group + 4)]
    assert block["index"].to_pylist() == [1] * 4 + [2] * 4
    assert block["rank"].to_pylist() == [1] * 8
    ids = block["image_id"].to_pylist()
    assert ids == ["val 4.png", "", "", "", *(f"train {row}.png" for row in range(4 * group, 4 * group + 4))]
    assert block["draws"].to_pylist() == [bytes(24)] * 4 + [draws(0, name, 2) for name in ids[4:]]
    expected = [images.to_grey(PNGS[4], SIZE), *[np.zeros((SIZE, SIZE))] * 3, *GREYS[4 * group : 4 * group + 4]]
    assert (pixels_of(block) == np.stack(expected)).all()
    assert list(journals.iterdir()) == []


def test_no_draws_without_augmentation():
    decoder = Decoder(stream_spec(augment=False))
    blocks = [decoder.block(number) for number in range(decoder.spec.num_tasks)]
    assert {one for block in blocks for one in block["draws"].to_pylist()} == {bytes(24)}


def test_blocks_of_a_round_have_one_shape_and_all_blocks_one_schema():
    """Rounds of 1 step, 2 steps and the 1 that is left, of 4 rows each; what a task holds of a round is in no other."""
    decoder = Decoder(stream_spec())
    blocks = [decoder.block(number) for number in range(decoder.spec.num_tasks)]
    assert [len(block) for block in blocks] == [4, 4, 8, 8, 4, 4]
    assert all(block.schema.equals(blocks[0].schema) for block in blocks)
    of_rank = [pa.concat_tables(blocks[rank::2])["index"].to_pylist() for rank in (0, 1)]
    assert of_rank == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4] * 2


def test_a_block_tells_when_it_was_decoded_and_what_was_read_for_it(monkeypatch):
    """Bytes are told once, whichever of two tasks of a process they were read for."""
    read = ranges.ReadCounters(bytes_read=100)
    monkeypatch.setattr(ranges, "counters", lambda: read)
    decoder = Decoder(stream_spec(start=1))
    told = []
    for number, more in enumerate((7, 0, 30)):
        read = dataclasses.replace(read, bytes_read=read.bytes_read + more, requests=read.requests + 1)
        before = time.time()
        facts = BlockFacts.of(decoder.block(number))
        assert before <= facts.ended <= time.time()
        assert facts.start == 1
        told.append((facts.reads.bytes_read, facts.reads.requests))
    assert told == [(7, 1), (0, 1), (30, 1)]


@dataclass(frozen=True)
class Streamed(Source):
    """Rows that come in runs; notes what happens when."""

    events: list[str] = field(default_factory=list)

    def stream(self, runs: Iterable[np.ndarray]) -> Iterator[pa.Table]:
        runs = list(runs)
        for number, run in enumerate(runs):
            self.events.append(f"asked for {runs[number].tolist()}")
            yield self.read(run)


def test_the_first_bytes_come_before_the_turn():
    """Of two tasks of a process one waits for storage while the other decodes."""
    source = Streamed("train", PNGS, 4)
    decoder = row_decoder(PNGS, source=source)
    plain = rows_of(decoder, [0, 2])
    source.events.clear()

    class Turn(contextlib.nullcontext):
        def __enter__(self) -> None:
            source.events.append("turn")

        def __exit__(self, *_: object) -> None:
            source.events.append("turn over")

    expected = ["asked for [0]", "turn", "asked for [2]", "turn over"]
    with pytest.MonkeyPatch.context() as patch, Journal("run", 0) as journal:
        patch.setattr("cxr_dist.data.rows.RUN_PNG", 4)
        parts = [Part(decoder=decoder, groups=np.array([0])), Part(decoder=decoder, groups=np.array([2]))]
        assert decode_rows(parts, journal, Turn()).equals(plain)
        assert source.events == expected
        source.events.clear()
        assert decode_rows([Part(decoder=decoder, groups=np.array([0, 2]))], journal, Turn()).equals(plain)
        assert source.events == expected


def test_a_source_with_too_many_rows_is_an_error():
    with pytest.raises(RunError, match=r"row groups \[0\]: found more rows than the 4 expected"):
        rows_of(row_decoder(PNGS, source=Source("train", PNGS, 8)), [0])


def die_journalled(number: int, names: list[str]) -> None:
    """What an attempt leaves behind that died while it was decoding these images."""
    journal = Journal("run", number)
    journal.mark(["train 0.png"])
    journal.mark(names)
    os.close(journal.file)


def test_suspects_of_a_dead_attempt_are_decoded_alone(journals):
    die_journalled(0, ["train 5.png", "train 6.png"])
    asked = []

    def isolated(encoded: bytes, size: int) -> np.ndarray:
        asked.append(encoded)
        return images.to_grey(encoded, size)

    with Journal("run", 0) as journal:
        table = row_decoder(PNGS, isolated=isolated).rows(np.array([1, 2]), journal)
    assert asked == [PNGS[5], PNGS[6]]
    assert table.equals(rows_of(row_decoder(PNGS), [1, 2]))
    assert list(journals.iterdir()) == []


def test_suspects_add_up_over_attempts_and_stay_with_their_task():
    die_journalled(0, ["train 1.png"])
    die_journalled(0, ["train 5.png"])
    with Journal("run", 0) as journal, Journal("run", 1) as other:
        assert journal.suspects == {"train 1.png", "train 5.png"}
        assert other.suspects == frozenset()


def test_an_attempt_that_raises_leaves_no_suspects():
    def refuse(encoded: list[bytes], size: int) -> np.ndarray:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rows_of(row_decoder(PNGS, decode=refuse), [0])
    assert Journal("run", 0).suspects == frozenset()


def test_files_of_tasks_that_were_killed_long_ago_are_swept_and_nothing_else(journals):
    token, now = "0123456789abcdef" * 2, time.time()
    old = [f"cxr-dist-{token}-17", f"cxr-dist-{token}", "cxr-dist-other-1", f"another-{token}-1"]
    for name in (*old, f"cxr-dist-{token}-18"):
        (journals / name).write_text("00000001_000.png\n")
    for name in old:
        os.utime(journals / name, (now - STALE_S - 60,) * 2)
    os.utime(journals / f"cxr-dist-{token}-18", (now - STALE_S + 60,) * 2)
    sweep()
    assert sorted(path.name for path in journals.iterdir()) == sorted([*old[1:], f"cxr-dist-{token}-18"])


def poisoned(encoded: list[bytes], size: int) -> np.ndarray:
    if any(data.endswith(POISON) for data in encoded):
        assert multiprocessing.parent_process(), "a suspect was decoded in the process again"
        os.kill(os.getpid(), signal.SIGKILL)
    return images.to_grey_many(encoded, size)


def isolated_poisoned(encoded: bytes, size: int) -> np.ndarray | str:
    return decode_isolated(encoded, size, DIES) if encoded.endswith(POISON) else decode_isolated(encoded, size)


def test_an_image_that_kills_the_process_is_found_at_the_second_attempt(journals):
    encoded = [data + POISON if row == 5 else data for row, data in enumerate(PNGS)]
    plan = dataclasses.replace(stream_spec().plan, epochs=4)
    spec = stream_spec(plan=plan, steps_per_task=4)
    number = 4
    assert [plan.step(index).of_rank(0, 2).tolist() for index in spec.task(number)[1]] == [[0], [1], [0], [1]]
    decoder = Decoder(
        dataclasses.replace(spec, train=Source("train", encoded, 4)), decode=poisoned, isolated=isolated_poisoned
    )
    child = multiprocessing.get_context("fork").Process(target=decoder.block, args=(number,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    block, clean = decoder.block(number), Decoder(spec).block(number)
    bad = [row for row, name in enumerate(block["image_id"].to_pylist()) if name == "train 5.png"]
    assert bad == [5, 13]  # two epochs are in this task
    for row in bad:
        assert block["state"][row].as_py() == CORRUPT
        assert block["reason"][row].as_py() == "decoder killed by signal 11"
        assert (pixels_of(block)[row] == GREY).all()
    others = [row for row in range(16) if row not in bad]
    assert block.take(others).equals(clean.take(others))
    assert list(journals.iterdir()) == []


def test_isolated_decoding_gives_the_same_bits_and_reasons():
    assert (decode_isolated(PNGS[3], SIZE) == GREYS[3]).all()
    assert decode_isolated(PNGS[3][:-40], SIZE) == "truncated PNG"


def test_isolated_decoding_names_what_went_wrong(monkeypatch):
    isolated = partial(decode_isolated, PNGS[3], SIZE)
    assert isolated("import os; os.kill(os.getpid(), 9)") == "decoder killed by signal 9"
    assert isolated("sys.exit(3)") == "decoder ended with 3"
    assert isolated("raise MemoryError('no room')") == "MemoryError: no room"
    assert isolated("sys.stdout.write('x')") == "decoder ended with 0"
    monkeypatch.setattr("cxr_dist.data.suspects.ISOLATED_TIMEOUT_S", 0.2)
    assert isolated("import time; time.sleep(60)") == "decoder hung for 0.2 s"
