"""Where rows go, and the writing of one shard: the same rows give the same bytes, wherever their images came from.

The image column is stored as it is. Grey pixels gain 10 % from lz4 and cost twice the time to read, PNG gains nothing;
every page has a checksum instead, so that a flipped bit in a shard is found when it is read. There are no statistics,
dictionaries or times in a shard.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data import images
from cxr_dist.data.archives import encode
from cxr_dist.data.nih import LABELS_SCHEMA
from cxr_dist.data.pages import WRITE_OPTIONS
from cxr_dist.errors import DataError

READ_BATCH = 64
"""Images whose encoded bytes are held while a shard is built."""
READ_THREADS = 8
MERGE_GAP = 1 << 20
"""Bytes between two wanted ranges of a staged object that are rather read than skipped."""

SOURCES_SCHEMA = pa.schema([("path", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
"""Where a row's image lies. A whole file has offset -1 and a path in the release; a staged one has the run's URI."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Everything that decides a shard's bytes but its rows."""

    uri: str
    release: str
    encoding: str
    size: int
    row_group: int


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A finished shard, as its sidecar `PATH.json` holds it."""

    path: str
    key: str
    bytes: int
    sha256: str
    rows: int
    offsets: tuple[int, ...]
    """First byte of each row group."""
    lengths: tuple[int, ...]
    """Bytes of each row group."""


def place(image_ids: list[str], seed: int) -> np.ndarray:
    """The order (int64 [N], indices into `image_ids`) of images in their split: by a hash of (seed, image id).

    An image's neighbours change when others come or go, its side of any other image never does.
    """
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in image_ids]
    return np.array(sorted(range(len(image_ids)), key=lambda i: (digests[i], image_ids[i])), np.int64)


def rows_per_shard(num_images: int, num_bytes: int, shard_mb: int, row_group: int) -> int:
    """Images in every shard but a split's last: the aimed size in whole row groups, at least one."""
    mean = max(1.0, num_bytes / max(1, num_images))
    return max(1, int((shard_mb << 20) / mean) // row_group) * row_group


def build_shard(spec: ShardSpec, path: str, rows: pa.Table, sources: pa.Table) -> ShardInfo | list[tuple[str, str]]:
    """Write the shard `path` unless it is there already; or give the (image id, reason) that cannot be read.

    `rows` (LABELS_SCHEMA) and `sources` (SOURCES_SCHEMA) in placement order. Raises DataError for a vanished file.
    """
    key = _key(spec, rows, sources)
    if finished := _finished(spec.uri, path, key):
        return finished
    image_column, unreadable = _images(spec, rows["image_id"].to_pylist(), sources)
    if unreadable:
        return unreadable
    table = rows.select(LABELS_SCHEMA.names).cast(LABELS_SCHEMA).append_column("image", image_column).combine_chunks()
    sink = pa.BufferOutputStream()
    footers: list[pq.FileMetaData] = []
    pq.write_table(table, sink, row_group_size=spec.row_group, metadata_collector=footers, **WRITE_OPTIONS)
    data = sink.getvalue()
    groups = [footers[0].row_group(number) for number in range(footers[0].num_row_groups)]
    columns = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    info = ShardInfo(
        path=path,
        key=key,
        bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        rows=table.num_rows,
        offsets=tuple(min(column.data_page_offset for column in group) for group in columns),
        lengths=tuple(sum(column.total_compressed_size for column in group) for group in columns),
    )
    storage.put_atomic(storage.join(spec.uri, path), data)
    storage.put_atomic(storage.join(spec.uri, f"{path}.json"), json.dumps(asdict(info)).encode())
    return info


def _finished(uri: str, path: str, key: str) -> ShardInfo | None:
    try:
        raw = json.loads(storage.read_bytes(storage.join(uri, f"{path}.json")))
        info = ShardInfo(**{**raw, "offsets": tuple(raw["offsets"]), "lengths": tuple(raw["lengths"])})
        written = storage.size(storage.join(uri, path))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return info if info.key == key and written == info.bytes else None


def _key(spec: ShardSpec, rows: pa.Table, sources: pa.Table) -> str:
    """What a shard was made from: its rows, its images' files, and all that turns them into bytes."""
    settings = [spec.encoding, spec.size, spec.row_group, images.PIXELS_VERSION, pa.__version__]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for table in (rows.select(LABELS_SCHEMA.names), sources.select(["length"])):
        digest.update(json.dumps(table.to_pydict(), sort_keys=True).encode())
    return digest.hexdigest()


def _images(spec: ShardSpec, ids: list[str], sources: pa.Table) -> tuple[pa.Array, list[tuple[str, str]]]:
    paths, offsets, lengths = (sources[name].to_pylist() for name in SOURCES_SCHEMA.names)
    staged = offsets[0] >= 0
    num_pixels = spec.size * spec.size
    pixels = np.zeros((len(ids) if spec.encoding == "pixels" else 0, num_pixels), np.uint8)
    files: list[bytes] = []
    unreadable: list[tuple[str, str]] = []
    payloads = _staged(paths, offsets, lengths) if staged else None
    for start in range(0, len(ids), READ_BATCH):
        numbers = range(start, min(start + READ_BATCH, len(ids)))
        if payloads is not None:
            batch = payloads[start : numbers.stop]
        else:
            batch = _files(spec.release, [paths[i] for i in numbers], [lengths[i] for i in numbers])
        if spec.encoding == "pixels":
            if staged:
                pixels[start : numbers.stop] = [np.frombuffer(data, np.uint8) for data in batch]
            else:
                bad = _decode_batch(batch, spec.size, pixels[start : numbers.stop])
                unreadable += [(ids[start + i], reason) for i, reason in bad]
            continue
        for number, data in zip(numbers, batch, strict=True):
            if not staged and (reason := _refusal(data)):
                unreadable.append((ids[number], reason))
            files.append(data)
    if spec.encoding == "png":
        return pa.array(files, pa.binary()), unreadable
    buffers = [None, pa.py_buffer(pixels)]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(num_pixels), len(ids), buffers), unreadable


def _decode_batch(batch: list[bytes], size: int, out: np.ndarray) -> list[tuple[int, str]]:
    """Pixels of a batch into `out` [N, size*size]; the (index, reason) of what cannot be decoded."""
    try:
        out[:] = images.to_grey_many(batch, size).reshape(len(batch), -1)
        return []
    except images.ImageError:
        bad = []
    for index, data in enumerate(batch):
        try:
            out[index] = images.to_grey(data, size).reshape(-1)
        except images.ImageError as error:
            bad.append((index, error.reason))
    return bad


def _refusal(data: bytes) -> str:
    try:
        encode(data, "png", 0)
    except images.ImageError as error:
        return error.reason
    return ""


def _files(release: str, paths: list[str], lengths: list[int]) -> list[bytes]:
    def read(number: int) -> bytes:
        uri = storage.join(release, paths[number])
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            raise DataError(f"{storage.shown(uri)}: the image vanished while ingest ran; run ingest again") from None
        if len(data) != lengths[number]:
            raise DataError(
                f"{storage.shown(uri)}: found {len(data)} bytes, listed with {lengths[number]}; "
                "let nothing write to the release while ingest runs, and run it again"
            )
        return data

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(read, range(len(paths))))


def _staged(paths: list[str], offsets: list[int], lengths: list[int]) -> list[bytes]:
    """Byte ranges of staged runs in the given order, neighbours read together."""
    order = sorted(range(len(paths)), key=lambda i: (paths[i], offsets[i]))
    spans: list[list[int]] = []
    for i in order:
        last = spans[-1][-1] if spans else None
        near = last is not None and paths[last] == paths[i] and offsets[i] - offsets[last] - lengths[last] <= MERGE_GAP
        if near:
            spans[-1].append(i)
        else:
            spans.append([i])

    def read(span: list[int]) -> dict[int, bytes]:
        first, last = span[0], span[-1]
        block = storage.read_range(paths[first], offsets[first], offsets[last] + lengths[last] - offsets[first])
        return {i: block[offsets[i] - offsets[first] : offsets[i] - offsets[first] + lengths[i]] for i in span}

    found: dict[int, bytes] = {}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for part in pool.map(read, spans):
            found.update(part)
    return [found[i] for i in range(len(paths))]
