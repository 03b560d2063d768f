"""The frozen prefix's output as shards: one set for each (split, view), named by a hash of all that decides its values.

    FEATURES/0123456789abcdef/features.json     what the set is and which shards are whole; written last
    FEATURES/0123456789abcdef/00000.parquet     features of SHARD_IMAGES images, row groups as in the dataset
    FEATURES/0123456789abcdef/00000.parquet.json   its size and SHA-256; a build that was cut off goes on from these
    FEATURES/0123456789abcdef/used.json         written whenever a run begins to use or build the set

A set holds one view of one split, so that runs share what they have in common: view 0 (the plain image) depends on no
seed, and a run with four views finds the first two that another has made. An image's features lie as bytes in height,
width, channel order, the layout that the tail reads.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import ROW_GROUPS_SCHEMA
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.pages import WRITE_OPTIONS
from cxr_dist.data.plan import EMPTY, Int64, Split
from cxr_dist.data.rows import fixed_rows
from cxr_dist.data.shards import ShardReader
from cxr_dist.data.tables import read_table
from cxr_dist.errors import DataError, InputError, RunError

__all__ = [
    "FORMAT",
    "ITEM_BYTES",
    "SHARD_IMAGES",
    "FeatureSet",
    "FeatureShard",
    "finished_shards",
    "key_of",
    "locate",
    "num_shards",
    "set_aside",
    "shard_groups",
    "use",
    "write_shard",
]

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of features.json and of the shards."""

SHARD_IMAGES = 256
"""Images of a shard, in whole row groups: 13 MB at 50 kB an image, and the most that a killed build does again."""

ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
"""What features can be kept in: bytes of a value."""

INDEX = "features.json"
ASIDE = "set_aside.json"
USED = "used.json"


def key_of(inputs: dict[str, Any]) -> str:
    """Name of the set that these inputs make: half a SHA-256, hex."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class FeatureShard:
    """A finished shard, as its sidecar holds it."""

    path: str
    key: str
    bytes: int
    sha256: str
    rows: int
    corrupt: dict[str, str]
    """Unreadable images among its rows: id to reason. Their features are those of mean grey."""
    offsets: tuple[int, ...]
    """First byte of each row group."""
    lengths: tuple[int, ...]
    """Bytes of each row group."""

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "FeatureShard":
        return cls(**{**raw, "offsets": tuple(raw["offsets"]), "lengths": tuple(raw["lengths"])})


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of one view of one split, whole."""

    folder: str
    """URI of the set's folder."""
    key: str
    inputs: dict[str, Any]
    """All that can change a value; `key` is its hash."""
    shape_HWC: tuple[int, int, int]
    kind: str
    """Type of a value: fp16, bf16 or fp32."""
    num_rows: int
    row_group: int
    shards: tuple[FeatureShard, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        height, width, channels = self.shape_HWC
        return height * width * channels * ITEM_BYTES[self.kind]

    @property
    def num_bytes(self) -> int:
        """Bytes of all features."""
        return self.num_rows * self.row_bytes

    @property
    def groups_per_shard(self) -> int:
        return groups_per_shard(self.row_group)

    def reader(self, config: DataConfig | None = None) -> ShardReader:
        """Row groups of the set, as the stream reads them; `config` says how."""
        places = [
            (shard.path, number, min(self.row_group, shard.rows - number * self.row_group), offset, length)
            for shard in self.shards
            for number, (offset, length) in enumerate(zip(shard.offsets, shard.lengths, strict=True))
        ]
        names = ROW_GROUPS_SCHEMA.names
        return ShardReader.of_shards(
            self.folder,
            self.shards,
            pa.Table.from_pylist([dict(zip(names, place, strict=True)) for place in places], ROW_GROUPS_SCHEMA),
            schema=shard_schema(self.row_bytes),
            columns=tuple(shard_schema(self.row_bytes).names),
            missing="expected a shard of features; delete its folder, they are then made again",
            mend="the file was changed or cut, delete its folder; the features are then made again",
            config=config,
        )

    @property
    def corrupt(self) -> dict[str, str]:
        """Unreadable images: id to reason."""
        return {name: reason for shard in self.shards for name, reason in shard.corrupt.items()}

    @classmethod
    def load(cls, folder: str, inputs: dict[str, Any], split: Split) -> "FeatureSet | None":
        """The set in `folder`, or None if it is not finished. DataError if it is not the one that `inputs` make."""
        where = storage.join(folder, INDEX)
        try:
            raw = json.loads(storage.read_bytes(where))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DataError(f"{storage.shown(where)}: found no index of features in it") from None
        if raw.get("format") != FORMAT:
            raise DataError(f"{storage.shown(where)}: found format {raw.get('format')!r}, expected {FORMAT}")
        if raw["inputs"] != inputs or raw["key"] != key_of(inputs):
            differ = sorted(name for name in inputs if raw["inputs"].get(name) != inputs[name]) or ["key"]
            raise DataError(f"{storage.shown(where)}: found features of another {', '.join(differ)}")
        rows = sum(shard["rows"] for shard in raw["shards"])
        if raw["num_rows"] != split.num_rows or rows != split.num_rows or raw["row_group"] != split.row_group:
            raise DataError(f"{storage.shown(where)}: found {rows} rows, expected {split.num_rows}")
        found = cls(
            folder=folder,
            key=raw["key"],
            inputs=raw["inputs"],
            shape_HWC=tuple(raw["shape_HWC"]),
            kind=raw["kind"],
            num_rows=raw["num_rows"],
            row_group=raw["row_group"],
            shards=tuple(FeatureShard.from_json(shard) for shard in raw["shards"]),
        )
        listed = dict(storage.list_files(folder))
        for shard in found.shards:
            if listed.get(shard.path) != shard.bytes:
                raise DataError(
                    f"{storage.shown(storage.join(folder, shard.path))}: found {listed.get(shard.path, 'no file')}"
                    f"{' bytes' if shard.path in listed else ''}, expected {shard.bytes} bytes"
                )
        return found

    def save(self) -> None:
        """Write the index: from now on the set is whole."""
        raw = {"format": FORMAT, **asdict(self)}
        del raw["folder"]
        storage.put_atomic(storage.join(self.folder, INDEX), json.dumps(raw, indent=1).encode())

    def read_shard(self, number: int) -> pa.Table:
        """All rows of a shard: image_id, findings[14], state, reason, image (features). DataError if it was changed."""
        shard = self.shards[number]
        where = storage.join(self.folder, shard.path)
        try:
            data = storage.read_bytes(where)
        except FileNotFoundError:
            raise DataError(f"{storage.shown(where)}: found no file, expected a shard of features") from None
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise DataError(f"{storage.shown(where)}: found another SHA-256 than the index has ({shard.sha256[:12]}…)")
        try:
            return read_table(pa.py_buffer(data), use_threads=False)
        except pa.ArrowException as error:
            raise DataError(
                f"{storage.shown(where)}: found no shard of features ({error}); delete its folder"
            ) from None


def groups_per_shard(row_group: int) -> int:
    """Row groups of every shard but a split's last."""
    return max(1, SHARD_IMAGES // row_group)


def shard_groups(split: Split, number: int) -> Int64:
    """Row groups of a shard, padded to a full one, so that every shard is computed in one shape."""
    each = groups_per_shard(split.row_group)
    groups = np.arange(number * each, (number + 1) * each)
    return np.where(groups < split.num_groups, groups, EMPTY)


def num_shards(split: Split) -> int:
    return -(-split.num_groups // groups_per_shard(split.row_group))


def shard_schema(row_bytes: int) -> pa.Schema:
    """Columns of a shard of features; `image` holds an image's features, of so many bytes."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("findings", pa.list_(pa.bool_(), len(FINDINGS))),
            ("state", pa.uint8()),
            ("reason", pa.string()),
            ("image", pa.binary(row_bytes)),
        ]
    )


def shard_path(number: int) -> str:
    return f"{number:05d}.parquet"


def write_shard(
    folder: str, key: str, number: int, row_group: int, rows: pa.Table, stored: npt.NDArray[np.uint8]
) -> FeatureShard:
    """Store one shard and its sidecar: `rows` as decoded, with every stored finding as a label; `stored` their features."""
    labels = fixed_rows(rows["labels"], np.uint8).astype(bool)
    columns = {
        "image_id": rows["image_id"].combine_chunks(),
        "findings": pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), labels.shape[1]),
        "state": rows["state"].combine_chunks(),
        "reason": rows["reason"].combine_chunks(),
        "image": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(stored.shape[1]), len(stored), [None, pa.py_buffer(np.ascontiguousarray(stored))]
        ),
    }
    sink = pa.BufferOutputStream()
    footers: list[pq.FileMetaData] = []
    table = pa.table(columns, schema=shard_schema(stored.shape[1]))
    pq.write_table(table, sink, row_group_size=row_group, metadata_collector=footers, **WRITE_OPTIONS)
    data = sink.getvalue()
    groups = [footers[0].row_group(group) for group in range(footers[0].num_row_groups)]
    columns_of = [[group.column(column) for column in range(group.num_columns)] for group in groups]
    reasons = zip(rows["image_id"].to_pylist(), rows["reason"].to_pylist(), strict=True)
    shard = FeatureShard(
        path=shard_path(number),
        key=key,
        bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(stored),
        corrupt={image_id: reason for image_id, reason in reasons if reason is not None},
        offsets=tuple(min(column.data_page_offset for column in group) for group in columns_of),
        lengths=tuple(sum(column.total_compressed_size for column in group) for group in columns_of),
    )
    storage.put_atomic(storage.join(folder, shard.path), data)
    storage.put_atomic(storage.join(folder, f"{shard.path}.json"), json.dumps(asdict(shard)).encode())
    return shard


def finished_shards(folder: str, key: str, split: Split) -> dict[int, FeatureShard]:
    """Shards that an unfinished build has left whole: number to shard."""
    listed = dict(storage.list_files(folder))
    found = {}
    for number in range(num_shards(split)):
        path = shard_path(number)
        if f"{path}.json" not in listed:
            continue
        try:
            shard = FeatureShard.from_json(json.loads(storage.read_bytes(storage.join(folder, f"{path}.json"))))
        except (ValueError, TypeError, KeyError):
            continue
        if shard.key == key and listed.get(path) == shard.bytes:
            found[number] = shard
    return found


def locate(base: str, inputs: dict[str, Any], split: Split) -> tuple[str, FeatureSet | None]:
    """Folder of the set that `inputs` make, and the set if it is whole there.

    A set that is not what it should be is set aside where it lies, with the reason, and another folder beside it is
    given.
    """
    key = key_of(inputs)
    for attempt in range(1000):
        folder = storage.join(base, key if attempt == 0 else f"{key}.{attempt}")
        if storage.exists(storage.join(folder, ASIDE)):
            continue
        try:
            return folder, FeatureSet.load(folder, inputs, split)
        except DataError as error:
            set_aside(folder, str(error))
    raise RunError(f"{storage.shown(base)}: found 1000 unusable sets of features with key {key}; delete them")


def use(folder: str, by: str) -> bool:
    """Leave a sign that the set is used or built now; False if it was set aside meanwhile and must not be.

    The sign first, then the look: who sets a set aside in order to delete it (`cxr_dist.housekeeping`) does the same the
    other way round, so at least one of two that meet sees the other.
    """
    try:
        storage.put_atomic(storage.join(folder, USED), json.dumps({"run": by, "time": time.time()}).encode())
    except (InputError, OSError) as error:
        log.info("no sign of use is left: %s", error)  # features that may only be read can be used too
    return not storage.exists(storage.join(folder, ASIDE))


def set_aside(folder: str, reason: str) -> None:
    """Mark a set as never to be used again; its files stay for whoever wants to know why."""
    log.warning("features are not used and made again beside it: %s", reason)
    storage.put_atomic(storage.join(folder, ASIDE), json.dumps({"reason": reason}).encode())
