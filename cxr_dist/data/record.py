"""What an ingest leaves on record: its claim on a URI while it works, and the manifest at the end."""

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data import images, nih
from cxr_dist.data.assemble import ShardInfo
from cxr_dist.data.manifest import MANIFEST, ROW_GROUPS_SCHEMA, Manifest, Shard, Split
from cxr_dist.data.release import Labelled, Release
from cxr_dist.errors import DataError


def settings_of(data: DataConfig, labelled: Labelled) -> dict[str, Any]:
    """What decides a dataset's rows and bytes, as its manifest records it."""
    names = ("label_set", "size", "encoding", "in_place", "row_group", "shard_mb", "validation_fraction", "split_seed")
    hashes = {f"{name} sha256": digest for name, digest in labelled.hashes.items()}
    return {**{f"data.{name}": getattr(data, name) for name in names}, "pixels": images.PIXELS_VERSION, **hashes}


def complete(data: DataConfig, settings: dict[str, Any], release: Release) -> Manifest | None:
    """The manifest that is there already, if it is of these settings and this release, and its files are there too."""
    if not storage.exists(storage.join(data.uri, MANIFEST)):
        return None
    manifest = Manifest.load(data.uri)
    _compare(storage.shown(data.uri), manifest.settings, settings)
    if manifest.sources["release"] != release.source:
        raise DataError(
            f"{storage.shown(data.uri)}: found a dataset of {manifest.sources['release']['files']} release files, and now "
            f"{release.source['files']} other ones in {storage.shown(release.uri)}; choose another data.uri, or delete its {MANIFEST} to take them in"
        )
    there = dict(storage.list_files(data.uri))
    files = {shard.path: shard.bytes for split in manifest.splits.values() for shard in split.shards}
    files |= {table.path: table.bytes for table in manifest.tables.values()}
    return manifest if files.items() <= there.items() else None


def quarantined(uri: str) -> dict[str, str]:
    """The images that the dataset at `uri` left out, with their reasons; none if there is no dataset that can say."""
    try:
        return {row["image_id"]: row["reason"] for row in Manifest.load(uri).all_quarantined().to_pylist()}
    except DataError:
        return {}


def withdraw(uri: str) -> None:
    """Take away the manifest of a dataset that lost a file, while its shards may change: nobody reads half of one."""
    storage.delete(storage.join(uri, MANIFEST))


def claim(data: DataConfig, staging: str, settings: dict[str, Any]) -> None:
    """Note the settings of an ingest that begins, or see that the one it goes on with had the same."""
    uri = storage.join(staging, "settings.json")
    try:
        _compare(storage.shown(data.uri), json.loads(storage.read_bytes(uri)), settings)
    except FileNotFoundError:
        storage.put_atomic(uri, json.dumps(settings).encode())


def write_manifest(
    data: DataConfig,
    settings: dict[str, Any],
    labelled: Labelled,
    release: Release,
    *,
    rows: dict[str, pa.Table],
    shards: dict[str, list[ShardInfo]],
    row_groups: dict[str, pa.Table],
    left_out: dict[str, str],
    counts: dict[str, int],
) -> Manifest:
    """Audit the placed rows of every split and save the manifest with its side tables."""
    placed = pa.concat_tables(list(rows.values()))
    ends = np.cumsum([table.num_rows for table in rows.values()])
    parts = {split: np.arange(end - t.num_rows, end) for (split, t), end in zip(rows.items(), ends, strict=True)}
    audit = nih.audit(placed, parts, data.label_set, labelled.hashes)
    splits = {
        split: Split(
            shards=tuple(Shard(path=s.path, bytes=s.bytes, sha256=s.sha256, rows=s.rows) for s in shards[split]),
            num_rows=table.num_rows,
            num_row_groups=row_groups[split].num_rows,
            patients=audit[split]["patients"],
            positives=audit[split]["positives"],
        )
        for split, table in rows.items()
    }
    manifest = Manifest(
        label_set=data.label_set,
        findings=nih.LABEL_SETS[data.label_set],
        encoding="png" if data.in_place else data.encoding,
        size=data.size,
        pixels_version=images.PIXELS_VERSION,
        row_group=1 if data.in_place else data.row_group,
        in_place=data.in_place,
        root=storage.absolute(release.uri) if data.in_place else "",
        seed=data.split_seed,
        validation_fraction=data.validation_fraction,
        splits=splits,
        audit=audit,
        sources={**labelled.sources, "release": release.source},
        settings=settings,
        counts={**counts, "quarantined": len(left_out)},
        quarantine=(),
    )
    return manifest.save(data.uri, rows, row_groups, sorted(left_out.items()))


def shard_groups(shards: dict[str, list[ShardInfo]], row_group: int) -> dict[str, pa.Table]:
    """The row group tables of finished shards."""
    tables = {}
    for split, infos in shards.items():
        places = [(info, number) for info in infos for number in range(len(info.offsets))]
        tables[split] = row_group_table(
            [info.path for info, _ in places],
            [number for _, number in places],
            [min(row_group, info.rows - number * row_group) for info, number in places],
            [info.offsets[number] for info, number in places],
            [info.lengths[number] for info, number in places],
        )
    return tables


def row_group_table(*columns: list) -> pa.Table:
    """A row group table from its columns: path, row_group_in_file, rows, offset, bytes."""
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, ROW_GROUPS_SCHEMA, strict=True)], schema=ROW_GROUPS_SCHEMA
    )


def result_of(manifest: Manifest, started: float, unchanged: bool) -> dict[str, Any]:
    """The job's result: counts of what is in the dataset and of what was left out."""
    wall_s = time.monotonic() - started
    num_images = sum(split.num_rows for split in manifest.splits.values())
    return {
        "uri": storage.shown(manifest.uri),
        "manifest_sha256": manifest.hash,
        "unchanged": unchanged,
        "label_set": manifest.label_set,
        "encoding": manifest.encoding,
        "size": manifest.size,
        "splits": {
            name: {
                "images": split.num_rows,
                "patients": split.patients,
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "positives": split.positives,
            }
            for name, split in manifest.splits.items()
        },
        "patients_shared": manifest.audit["patients_shared"],
        **manifest.counts,
        "quarantine": list(manifest.quarantine[:10]),
        "wall_s": round(wall_s, 2),
        "images_per_s": round(num_images / wall_s, 1),
    }


def _compare(where: str, found: dict[str, Any], asked: dict[str, Any]) -> None:
    different = [
        f"{name} {found.get(name)!r}, now {asked.get(name)!r}"
        for name in {**found, **asked}
        if found.get(name) != asked.get(name)
    ]
    if different:
        raise DataError(
            f"{where}: found a dataset made with {'; '.join(different)}; choose another data.uri, or delete it there"
        )
