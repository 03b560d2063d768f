"""Byte ranges: which are asked for, in what order they come, and what is counted. Local files; S3 in test_reads."""

import dataclasses
import itertools
import pickle
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_dist.data import ranges
from cxr_dist.data.hedge import Pool
from cxr_dist.data.nodecache import NodeCache
from cxr_dist.data.ranges import ByteRanges, ReadCounters, counters
from cxr_dist.errors import DataError, RunError

PIECES = [(0, 4, 10), (0, 14, 10), (0, 24, 6), (1, 4, 10), (1, 20, 10)]
"""File, offset and length: three that touch, two with a gap."""


def byte_ranges(folder, pieces=PIECES, **changes) -> tuple[ByteRanges, list[bytes]]:
    """Two files of 40 random bytes, pieces in them, and what each piece holds."""
    rng = np.random.default_rng(0)
    files = [rng.bytes(40), rng.bytes(40)]
    for number, data in enumerate(files):
        (folder / f"{number}.bin").write_bytes(data)
    file, offset, length = (np.array(column) for column in zip(*pieces, strict=True))
    made = ByteRanges(
        root=str(folder),
        paths=pa.array(["0.bin", "1.bin"]),
        file_bytes=np.array([40, 40]),
        file_sha256=pa.array(["ab" * 32, "cd" * 32]),
        file_index=file.astype(np.int32),
        offset=offset,
        length=length,
        missing="expected a file; put {uri} back",
        mend="put {uri} back",
    )
    return dataclasses.replace(made, **changes), [files[f][o : o + n] for f, o, n in pieces]


def test_counters_are_subtracted_by_field():
    before = ReadCounters(bytes_read=5, requests=1, wait_s=0.5)
    after = ReadCounters(bytes_read=9, requests=3, hedged=1, wait_s=0.75)
    assert after - before == ReadCounters(bytes_read=4, requests=2, hedged=1, wait_s=0.25)


def test_pieces_come_in_the_asked_order_and_touching_ones_are_one_request(tmp_path):
    reader, contents = byte_ranges(tmp_path)
    before = counters()
    runs = [[4, 0, 2, 1], [3], [1, 1, 0]]
    found = list(pickle.loads(pickle.dumps(reader)).stream(runs))
    assert [numbers.tolist() for numbers, _ in found] == runs
    assert [[bytes(piece) for piece in pieces] for _, pieces in found] == [[contents[n] for n in run] for run in runs]
    read = counters() - before
    assert read.bytes_read == 26 + 10 + 10 + 20
    assert read.requests == 2 + 1 + 1


@given(st.lists(st.integers(0, 39), min_size=1, max_size=40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_spans_cover_each_piece_once_and_nothing_else(numbers, longest):
    pieces = [(n // 20, 5 * (n % 20) + (n % 20) // 7, 5) for n in range(40)]  # gaps after every seventh
    file, offset, length = (np.array(column) for column in zip(*pieces, strict=True))
    reader = dataclasses.replace(
        NOWHERE, file_index=file.astype(np.int32), offset=offset.astype(np.int64), length=length.astype(np.int64)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "MAX_RANGE", 5 * longest)
        spans = reader._spans(np.unique(numbers))
    assert sorted(n for span in spans for n in span) == sorted(set(numbers))
    for span in spans:
        assert len(span) <= longest
        for a, b in itertools.pairwise(span):
            assert file[a] == file[b]
            assert offset[a] + length[a] == offset[b]
    for a, b in itertools.pairwise(spans):  # cut only where it must be
        assert len(a) == longest or file[a[-1]] != file[b[0]] or offset[a[-1]] + length[a[-1]] != offset[b[0]]


NOWHERE = ByteRanges(
    root="",
    paths=pa.array([], pa.string()),
    file_bytes=np.zeros(0, np.int64),
    file_sha256=None,
    file_index=np.zeros(0, np.int32),
    offset=np.zeros(0, np.int64),
    length=np.zeros(0, np.int64),
    missing="",
    mend="",
)


def test_no_more_is_in_flight_than_asked_for(tmp_path):
    reader, _ = byte_ranges(tmp_path, [(0, n, 10) for n in range(30)])
    asked = []

    def runs():
        for number in range(30):
            asked.append(number)
            yield [number]

    stream = reader.stream(runs(), ahead_bytes=25)
    assert asked == []
    next(stream)
    assert asked == [0, 1, 2, 3]  # the run in hand, and the first three that hold 25 bytes
    next(stream)
    assert asked == [0, 1, 2, 3, 4]
    stream.close()
    assert asked == [0, 1, 2, 3, 4]
    stream = reader.stream(iter([[0], [1]]), ahead_bytes=0)
    assert len(list(stream)) == 2


def test_errors_name_the_file_and_what_to_do(tmp_path):
    reader, _ = byte_ranges(tmp_path)
    with pytest.raises(ValueError, match="no row groups"):
        next(reader.stream([[]]))
    path = tmp_path / "1.bin"
    path.write_bytes(bytes(39))
    with pytest.raises(DataError, match=r"1\.bin: found 39 bytes, the manifest says 40; put .*1\.bin back"):
        next(reader.stream([[0, 3]]))
    path.unlink()
    with pytest.raises(DataError, match=r"1\.bin: found no file, expected a file; put .*1\.bin back"):
        list(reader.stream([[0], [3]]))
    assert len(list(reader.stream([[0], [1]]))) == 2


def test_storage_that_never_answers_is_an_error_at_the_limit(tmp_path, monkeypatch):
    reader, _ = byte_ranges(tmp_path, timeout_s=0.05)
    hang = threading.Event()
    monkeypatch.setattr(ranges, "shared_pool", lambda on_hedge: pool)
    monkeypatch.setattr(ranges, "_read_local", lambda *_: hang.wait())
    pool = Pool(threads=2)
    with pytest.raises(RunError, match=r"0\.bin: storage gave no answer for 0\.05 s.*data\.read_timeout_s"):
        next(reader.stream([[0]]))
    hang.set()


def test_the_second_epoch_reads_the_cache_alone(tmp_path):
    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader, contents = byte_ranges(tmp_path, cache=cache)
    everything = [list(range(5))]
    before = counters()
    next(reader.stream(everything))
    first = counters() - before
    assert (first.bytes_read, first.cache_hits, first.cache_misses) == (46, 0, 5)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    before = counters()
    _, pieces = next(reader.stream(everything))
    assert [bytes(piece) for piece in pieces] == contents
    second = counters() - before
    assert (second.bytes_read, second.requests, second.cache_hits, second.cache_misses) == (0, 0, 5, 0)


def test_what_the_cache_lacks_is_read_in_as_few_ranges_as_before(tmp_path):
    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader, contents = byte_ranges(tmp_path, [(0, 4 * n, 4) for n in range(10)], cache=cache)
    next(reader.stream([[4, 8]]))
    before = counters()
    _, pieces = next(reader.stream([range(10)]))
    assert [bytes(piece) for piece in pieces] == contents
    read = counters() - before
    assert (read.requests, read.bytes_read, read.cache_hits, read.cache_misses) == (3, 32, 2, 8)  # 0-3, 5-7, 9


def test_a_damaged_entry_is_read_from_storage_again(tmp_path):
    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader, contents = byte_ranges(tmp_path, cache=cache)
    next(reader.stream([[1, 4]]))
    entry = next((tmp_path / "cache").rglob(f"{'ab' * 32}-14"))
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    before = counters()
    _, pieces = next(reader.stream([[1, 4]]))
    assert [bytes(piece) for piece in pieces] == [contents[1], contents[4]]
    read = counters() - before
    assert (read.bytes_read, read.cache_hits, read.cache_misses) == (10, 1, 1)
    assert cache.get("ab" * 32, 14, 10).to_pybytes() == contents[1]


@pytest.mark.parametrize("change", ["sha256", "manifest", "path"])
def test_another_dataset_never_matches(tmp_path, change):
    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=1 << 30)
    own = {} if change == "sha256" else {"file_sha256": None, "identity": "1"}
    reader, _ = byte_ranges(tmp_path, cache=cache, **own)
    next(reader.stream([[0, 3]]))
    changed = {
        "sha256": {"file_sha256": pa.array(["ef" * 32, "01" * 32])},
        "manifest": {"identity": "2"},
        "path": {"paths": pa.array(["./0.bin", "./1.bin"])},
    }
    before = counters()
    next(dataclasses.replace(reader, **changed[change]).stream([[0, 3]]))
    assert (counters() - before).cache_hits == 0


def test_many_threads_read_at_once(tmp_path):
    reader, contents = byte_ranges(tmp_path, [(n % 2, n, 10) for n in range(30)])
    failed = []

    def read(seed: int) -> None:
        for numbers in np.random.default_rng(seed).integers(0, 30, (50, 7)):
            (_, pieces), *_ = reader.stream([numbers])
            failed.extend(n for n, piece in zip(numbers, pieces, strict=True) if bytes(piece) != contents[n])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
