"""The node-local cache: verified, bounded, shared without locks, and never the reason that reading fails."""

import logging
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cxr_dist.data import nodecache
from cxr_dist.data.nodecache import BLOCK, NodeCache, _State

SHA, OTHER = "ab" * 32, "cd" * 32


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path) -> NodeCache:
    return NodeCache(folder=str(tmp_path / "cache"), max_bytes=1 << 30)


def test_what_is_put_is_got_by_its_own_name_only(cache):
    assert cache.get(SHA, 4, 10) is None
    cache.put(SHA, 4, memoryview(b"0123456789"))
    assert cache.get(SHA, 4, 10).to_pybytes() == b"0123456789"
    assert cache.get(OTHER, 4, 10) is None
    assert cache.get(SHA, 5, 10) is None
    cache.drop(SHA, 4)
    assert cache.get(SHA, 4, 10) is None
    cache.drop(SHA, 4)


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "header", "moved", "other length"])
def test_a_damaged_entry_is_dropped_and_named(cache, tmp_path, caplog, damage):
    cache.put(SHA, 4, b"0123456789")
    (path,) = entries(tmp_path)
    data, name, length = path.read_bytes(), SHA, 10
    if damage == "moved":
        name = OTHER
        path = Path(cache._path(OTHER, 4))
        path.parent.mkdir(parents=True)
    if damage == "other length":
        length = 9
    changed = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-1],
        "longer": data + b"x",
        "empty": b"",
        "header": b"x" + data[1:],
    }
    path.write_bytes(changed.get(damage, data))
    with caplog.at_level(logging.WARNING):
        assert cache.get(name, 4, length) is None
    assert not path.exists()
    assert str(path) in caplog.text


def test_it_takes_no_more_than_its_bound_and_evicts_nothing(tmp_path, caplog):
    cache = NodeCache(folder=str(tmp_path), max_bytes=20 * BLOCK)
    data = bytes(BLOCK - 100)
    with caplog.at_level(logging.WARNING):
        for number in range(30):
            cache.put(SHA, number, data)
    assert [number for number in range(30) if cache.get(SHA, number, len(data))] == list(range(20))
    assert sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in entries(tmp_path)) == cache.max_bytes
    assert caplog.text.count("full") == 1
    assert "data.cache_gb" in caplog.text


def test_processes_see_what_the_others_have_written(tmp_path):
    """As another process would: a state of its own over the same folder."""
    cache = NodeCache(folder=str(tmp_path), max_bytes=1000 * BLOCK)
    first, second = _State(cache), _State(cache)
    taken = 0
    for number in range(2000):
        state = (first, second)[number % 2]
        if state.takes(BLOCK):
            taken += 1
            path = Path(cache._path(SHA, number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(BLOCK))
    # each stops when less than a 64th is free, and has at most a 16th of what was free in hand when it looks
    assert 1000 * 63 // 64 - 1 <= taken <= 1000


def test_a_full_disk_ends_the_keeping_not_the_reading(tmp_path):
    """A real write that fails: the file may grow to 100 kB only."""
    program = (
        "import logging, resource, sys; from cxr_dist.data.nodecache import NodeCache\n"
        "logging.basicConfig(format='%(message)s')\n"
        f"cache = NodeCache(folder={str(tmp_path)!r}, max_bytes=1 << 30)\n"
        f"cache.put({SHA!r}, 0, bytes(1000))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"cache.put({SHA!r}, 1, bytes(200_000)); cache.put({SHA!r}, 2, bytes(1000))\n"
        f"print([cache.get({SHA!r}, n, s) is not None for n, s in ((0, 1000), (1, 200_000), (2, 1000))])"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert child.stdout == "[True, False, False]\n", child.stderr
    assert child.stderr.count("File too large") == 1
    assert [path.name for path in entries(tmp_path)] == [f"{SHA}-0"]  # and nothing half-written beside it


def test_a_nearly_full_disk_is_left_some_room(tmp_path, monkeypatch, caplog):
    cache = NodeCache(folder=str(tmp_path), max_bytes=1 << 30)
    monkeypatch.setattr(nodecache, "SPARE", 1.0)
    cache.put(SHA, 0, b"data")
    assert cache.get(SHA, 0, 4) is None
    assert "nearly full" in caplog.text


def test_a_folder_that_cannot_be_used_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    cache = NodeCache(folder=str(tmp_path / "file"), max_bytes=1 << 30)
    for number in range(3):
        assert cache.get(SHA, number, 4) is None
        cache.put(SHA, number, b"data")
        cache.drop(SHA, number)
    assert len(caplog.records) == 1
    assert "Not a directory" in caplog.text


def test_leftovers_of_killed_processes_are_cleared_away(tmp_path):
    cache = NodeCache(folder=str(tmp_path), max_bytes=1 << 30)
    folder = Path(cache._path(SHA, 0)).parent
    folder.mkdir(parents=True)
    old, new = folder / f"{SHA}-0.{uuid.uuid4().hex}.tmp", folder / f"{SHA}-1.{uuid.uuid4().hex}.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.put(SHA, 2, b"data")
    assert {path.name for path in entries(tmp_path)} == {new.name, f"{SHA}-2"}


def test_two_processes_fill_it_together(tmp_path):
    program = (
        "import sys; from cxr_dist.data.nodecache import NodeCache\n"
        f"cache = NodeCache(folder={str(tmp_path)!r}, max_bytes=1 << 30)\n"
        f"for n in range(500):\n    cache.put({SHA!r}, n, str(n).encode() * 1000)\n"
        f"    assert cache.get({SHA!r}, n, len(str(n)) * 1000).to_pybytes() == str(n).encode() * 1000"
    )
    children = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert {path.name for path in entries(tmp_path)} == {f"{SHA}-{n}" for n in range(500)}
