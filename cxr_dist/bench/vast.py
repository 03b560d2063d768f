"""Manifests of datasets that are not there: every table as ingest writes it, for any number of images, and no shard.

What a driver, a coordinator or a decoder needs to plan a run lies in manifest.json and its side tables, so how that grows
can be measured without a single image. Names, patients and findings are drawn; nothing is claimed about them.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.data import images, nih
from cxr_dist.data.assemble import rows_per_shard
from cxr_dist.data.manifest import ROW_GROUPS_SCHEMA, Manifest, Shard, Split
from cxr_dist.errors import InputError

__all__ = ["label_rows", "write_manifest"]

PIECE = 1 << 19
"""Rows that are drawn at a time."""
PARTS = {"train": 0.76, "validation": 0.04, "test": 0.20}
"""Parts of the images: NIH's own, rounded."""
IMAGES_PER_PATIENT = 4
PREVALENCE = 0.05
"""Of each finding."""
ROW_OVERHEAD, GROUP_OVERHEAD = 27, 640
"""Bytes of a row beside its image, and of a row group beside its rows."""
TABLE_BYTES = 40
"""Of side tables an image, more than they take."""
STEP = 1_000_003
"""Rows lie in another order than patients: neighbours are so many images apart."""


def write_manifest(uri: str, num_images: int, *, size: int = 224, row_group: int = 8, shard_mb: int = 128) -> Manifest:
    """The manifest of a dataset of pixel shards at `uri`. InputError if the disk would not take it."""
    free = storage.free_bytes(uri)
    if free is not None and free < 2 * TABLE_BYTES * num_images:
        raise InputError(
            f"{storage.shown(uri)}: found {free / 1e9:.1f} GB free, expected {2 * TABLE_BYTES * num_images / 1e9:.1f} for the "
            f"tables of {num_images} images; give another --out or fewer --max_images"
        )
    group_bytes = row_group * (size**2 + ROW_OVERHEAD) + GROUP_OVERHEAD
    shard_rows = rows_per_shard(num_images, num_images * group_bytes // row_group, shard_mb, row_group)
    counts = {split: int(part * num_images) for split, part in PARTS.items()}
    counts["train"] += num_images - sum(counts.values())
    # filled while the rows are written, which is before manifest.json is
    positives: dict[str, dict[str, int]] = {split: dict.fromkeys(nih.FINDINGS, 0) for split in counts}
    firsts = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    manifest = Manifest(
        label_set="nih14",
        findings=nih.FINDINGS,
        encoding="pixels",
        size=size,
        pixels_version=images.PIXELS_VERSION,
        row_group=row_group,
        in_place=False,
        seed=0,
        validation_fraction=0.05,
        splits={
            split: Split(
                shards=tuple(_shards(split, rows, shard_rows, group_bytes, row_group)),
                num_rows=rows,
                num_row_groups=-(-rows // row_group),
                patients=-(-rows // IMAGES_PER_PATIENT),
                positives=positives[split],
            )
            for split, rows in counts.items()
        },
        audit={"patients_shared": 0},
        sources={},
        settings={},
        counts={"quarantined": 0},
        quarantine=(),
    )
    return manifest.save(
        uri,
        {split: label_rows(rows, firsts[split], positives[split]) for split, rows in counts.items()},
        {split: _row_groups(split, rows, shard_rows, group_bytes, row_group) for split, rows in counts.items()},
    )


def _path(split: str, shard: int) -> str:
    return f"{split}/part-{shard:05d}.parquet"


def _shards(split: str, rows: int, shard_rows: int, group_bytes: int, row_group: int) -> Iterator[Shard]:
    for number in range(-(-rows // shard_rows)):
        path, here = _path(split, number), min(shard_rows, rows - number * shard_rows)
        yield Shard(
            path=path,
            bytes=4 + -(-here // row_group) * group_bytes + 4096,
            sha256=hashlib.sha256(path.encode()).hexdigest(),
            rows=here,
        )


def _row_groups(split: str, rows: int, shard_rows: int, group_bytes: int, row_group: int) -> Iterator[pa.Table]:
    count, per_shard = -(-rows // row_group), shard_rows // row_group
    for start in range(0, count, PIECE):
        groups = np.arange(start, min(start + PIECE, count))
        shards, places = np.divmod(groups, per_shard)
        paths = pa.array([_path(split, number) for number in range(int(shards[0]), int(shards[-1]) + 1)])
        columns = [
            paths.take(pa.array(shards - shards[0])),
            pa.array(places, pa.int32()),
            pa.array(np.minimum(row_group, rows - groups * row_group), pa.int32()),
            pa.array(4 + places * group_bytes),
            pa.array(np.full(len(groups), group_bytes)),
        ]
        yield pa.table(columns, schema=ROW_GROUPS_SCHEMA)


def label_rows(rows: int, first: int, positives: dict[str, int] | None = None) -> Iterator[pa.Table]:
    """Label rows of a split whose first image has that number; counts the images with each finding into `positives`."""
    random = np.random.default_rng(first)
    patients = -(-first // IMAGES_PER_PATIENT)
    step = STEP if math.gcd(STEP, max(1, rows)) == 1 else 1
    positives = dict.fromkeys(nih.FINDINGS, 0) if positives is None else positives
    for start in range(0, rows, PIECE):
        images = np.arange(start, min(start + PIECE, rows)) * step % rows
        findings = random.random((len(images), len(nih.FINDINGS)), np.float32) < PREVALENCE
        for name, count in zip(nih.FINDINGS, findings.sum(axis=0).tolist(), strict=True):
            positives[name] += count
        patient, follow_up = patients + images // IMAGES_PER_PATIENT + 1, images % IMAGES_PER_PATIENT
        columns = [
            _names(patient, follow_up),
            pa.array(patient, pa.int32()),
            pa.array(np.array(["PA", "AP"], object)[patient % 2]),
            pa.array(20 + patient % 60, pa.int32()),
            pa.array(np.array(["M", "F"], object)[patient // 2 % 2]),
            pa.array(follow_up, pa.int32()),
            pa.FixedSizeListArray.from_arrays(pa.array(findings.reshape(-1)), len(nih.FINDINGS)),
        ]
        yield pa.table(columns, schema=nih.LABELS_SCHEMA)


def _names(patient: npt.NDArray[np.int64], follow_up: npt.NDArray[np.int64]) -> pa.StringArray:
    """`00000001_000.png` for each, without a Python object for any."""
    text = np.empty((len(patient), 16), np.uint8)
    text[:] = np.frombuffer(b"00000000_000.png", np.uint8)
    for place in range(8):
        text[:, 7 - place] += (patient // 10**place % 10).astype(np.uint8)
    for place in range(3):
        text[:, 11 - place] += (follow_up // 10**place % 10).astype(np.uint8)
    offsets = np.arange(len(patient) + 1, dtype=np.int32) * 16
    return pa.StringArray.from_buffers(len(patient), pa.py_buffer(offsets), pa.py_buffer(text))
