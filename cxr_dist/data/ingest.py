"""From an NIH release to a dataset: Parquet shards and a manifest, in parallel over a Ray cluster.

Each image is decoded wholly once, and an image that cannot be is left out with its reason, before rows get their places:
row groups stay full.

- PNG files can be read at random, so one task makes one shard straight from them. If any turn out unreadable, they are
  noted, the rows are placed again without them, and every shard of their split from the first of them on is made again:
  half of the split for one such image, most of it for many.
- Archives cannot, so there are two passes (`archives`): each archive's images are decoded into staged runs, sorted by
  split and place; then shards are put together from byte ranges of the runs. Staging needs about the output's size.

Either way a shard is a function of its rows alone, so both give the same bytes. A finished shard has a sidecar that says
what it was made from; a run that was killed goes on from those, and the manifest is written last. A dataset that lost a
shard or a table is mended in the same way, keeping what is there. In-place manifests touch no image: what cannot be read
there is found, masked and counted while streaming.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cxr_dist import storage
from cxr_dist.config import Config, DataConfig
from cxr_dist.data import archives, assemble, nih, record
from cxr_dist.data.assemble import ShardInfo, ShardSpec
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.release import Labelled, Release, find_images, read_labelled
from cxr_dist.data.tasks import run as _run
from cxr_dist.errors import ConfigError, DataError, InputError

STAGING = ".staging"
CLEANED = "cleaned"

log = logging.getLogger(__name__)


def labels_only(config: Config) -> dict[str, Any]:
    """The cleaning and audit of a label set without any image: counts of the official lists, and of the split."""
    labelled = read_labelled(config.data)
    kept = nih.clean(labelled.labels, config.data.label_set)
    splits = _split(config.data, labelled, kept)
    official = {"train_val": np.concatenate([splits["train"], splits["validation"]]), "test": splits["test"]}
    result = nih.audit(kept, official, config.data.label_set, labelled.hashes)
    cut = nih.audit(kept, splits, config.data.label_set, {})
    return {**result, "train": cut["train"], "validation": cut["validation"], "patients_shared": cut["patients_shared"]}


def ingest(config: Config) -> dict[str, Any]:
    """Make the dataset of `config.data`, or go on making it. Gives counts for the job's result."""
    started = time.monotonic()
    data = config.data
    for name in ("release", "uri"):
        if not getattr(data, name):
            raise ConfigError(f"data.{name}: found nothing, expected a URI")
    data = dataclasses.replace(data, release=storage.absolute(data.release), uri=storage.absolute(data.uri))
    labelled = read_labelled(data)
    kept = nih.clean(labelled.labels, data.label_set)
    splits = _split(data, labelled, kept)
    release = find_images(data.release)
    settings = record.settings_of(data, labelled)
    staging = storage.join(data.uri, STAGING)
    if done := record.complete(data, settings, release):
        storage.delete_dir(staging)
        return record.result_of(done, started, unchanged=True)
    record.claim(data, staging, settings)
    work = _Work(data, settings, labelled, kept, splits, release, staging)
    try:
        if data.in_place:
            manifest = work.in_place()
        elif release.archives:
            manifest = work.from_archives()
        else:
            manifest = work.from_files()
    except DataError:
        finished = [path for path, _ in storage.list_files(staging) if path.endswith(archives.INDEX)]
        if not finished and not _shard_files(data.uri):
            storage.delete_dir(staging)
        raise
    named = {shard.path for split in manifest.splits.values() for shard in split.shards}
    for path in _shard_files(data.uri):
        if path.removesuffix(".json") not in named:
            storage.delete(storage.join(data.uri, path))
    storage.delete_dir(staging)
    return record.result_of(manifest, started, unchanged=False)


@dataclass(frozen=True)
class _Work:
    """One ingest under way: what was read of the release, and where the output goes."""

    data: DataConfig
    settings: dict[str, Any]
    labelled: Labelled
    kept: pa.Table
    splits: dict[str, np.ndarray]
    release: Release
    staging: str

    def in_place(self) -> Manifest:
        """A manifest over the PNG files where they lie, a row group an image."""
        where = self.release.images
        if not where:
            raise DataError(
                f"{storage.shown(self.release.uri)}: found archives, expected PNG files for data.in_place; unpack them"
            )
        rows = self._placed(where)
        groups: dict[str, pa.Table] = {}
        for split, table in rows.items():
            files = [where[name] for name in _ids(table)]
            none, one = [0] * len(files), [1] * len(files)
            groups[split] = record.row_group_table(
                [path for path, _ in files], none, one, none, [size for _, size in files]
            )
        no_shards: dict[str, list[ShardInfo]] = {split: [] for split in rows}
        return self._save(rows, no_shards, groups, self._left_out(where), set(where), self.release.duplicates)

    def from_files(self) -> Manifest:
        """Shards straight from PNG files, a task a shard; again for what changes if some cannot be read."""
        where = self.release.images
        unreadable = self._known_unreadable()
        self._note_unreadable(unreadable)
        while True:
            rows = self._placed([name for name in where if name not in unreadable])
            sources = {}
            for split, table in rows.items():
                files = [where[name] for name in _ids(table)]
                columns = [[path for path, _ in files], [-1] * len(files), [size for _, size in files]]
                sources[split] = pa.table(columns, schema=assemble.SOURCES_SCHEMA)
            num_bytes = sum(pc.sum(table["length"]).as_py() or 0 for table in sources.values())
            shards, found = self._shards(rows, sources, num_bytes)
            if not found:
                break
            log.warning("%d images cannot be read and are left out; placing the rest again", len(found))
            unreadable.update(found)
            self._note_unreadable(unreadable)
        left_out = {**self._left_out(where), **unreadable}
        return self._save(
            rows,
            shards,
            record.shard_groups(shards, self.data.row_group),
            left_out,
            set(where),
            self.release.duplicates,
        )

    def from_archives(self) -> Manifest:
        """Two passes: archives to staged runs, runs to shards."""
        files = self.release.archives
        total = sum(size for _, size in files)
        order = [name for split in self.splits for name in _ids(self._ordered(split))]
        pixels = min(len(order) * self.data.size**2, 16 * total)
        self._check_space(2 * (pixels if self.data.encoding == "pixels" else total))
        wanted = pa.table({"image_id": order, "place": np.arange(len(order), dtype=np.int64)})
        reasons = self._left_out(_ids(self.labelled.labels))
        reasons.update(dict.fromkeys(self._cleaned(), CLEANED))
        refused = pa.table(
            {"image_id": pa.array(reasons, pa.string()), "reason": pa.array(reasons.values(), pa.string())}
        )
        spec = archives.ScatterSpec(
            release=self.release.uri,
            staging=self.staging,
            encoding=self.data.encoding,
            size=self.data.size,
            run_bytes=self.data.shard_mb << 20,
            key=json.dumps(self.settings, sort_keys=True),
        )
        shared = [ray.put(spec), ray.put(wanted), ray.put(refused)]
        tasks = [(shared[0], path, size, *shared[1:]) for path, size in files]
        indexes = _run(archives.scatter, tasks, [max(1, size >> 20) for _, size in files], "MiB of archives")
        index, duplicates = archives.merge([path for path, _ in files], indexes)
        staged = {name: row for name, row in index.items() if row["reason"] is None}
        rows = self._placed(staged)
        sources = {
            split: pa.Table.from_pylist(
                [{"path": staged[i]["run"], **{k: staged[i][k] for k in ("offset", "length")}} for i in _ids(table)],
                assemble.SOURCES_SCHEMA,
            )
            for split, table in rows.items()
        }
        num_bytes = sum(staged[name]["file_bytes"] for table in rows.values() for name in _ids(table))
        shards, _ = self._shards(rows, sources, num_bytes)
        left_out = {name: row["reason"] for name, row in index.items() if row["reason"] not in (None, CLEANED)}
        return self._save(
            rows, shards, record.shard_groups(shards, self.data.row_group), left_out, set(index), duplicates
        )

    def _ordered(self, split: str) -> pa.Table:
        """All rows of a split, whether their images are there or not, in the order of their places."""
        part = self.kept.take(pa.array(self.splits[split]))
        return part.take(pa.array(assemble.place(_ids(part), self.data.split_seed)))

    def _placed(self, available: Iterable[str]) -> dict[str, pa.Table]:
        """Each split's rows that have an image, in their places."""
        here = set(available)
        rows = {}
        for split in self.splits:
            part = self._ordered(split)
            rows[split] = part.filter(pa.array([name in here for name in _ids(part)], pa.bool_()))
        if not any(table.num_rows for table in rows.values()):
            raise DataError(
                f"{storage.shown(self.release.uri)}: found {len(here)} readable images and none of them in labels and "
                "official lists, expected names such as 00000001_000.png; check data.release and data.labels"
            )
        return rows

    def _left_out(self, names: Iterable[str]) -> dict[str, str]:
        """Why an image that is there gets no row, if so; cleaned ones are not listed."""
        labelled, kept = set(_ids(self.labelled.labels)), set(_ids(self.kept))
        listed = {*self.labelled.train_val, *self.labelled.test}
        reasons = {name: "no label row" for name in names if name not in labelled}
        return reasons | {name: "in neither list" for name in names if name in kept and name not in listed}

    def _cleaned(self) -> set[str]:
        return set(_ids(self.labelled.labels)) - set(_ids(self.kept))

    def _shards(
        self, rows: dict[str, pa.Table], sources: dict[str, pa.Table], file_bytes: int
    ) -> tuple[dict[str, list[ShardInfo]], dict[str, str]]:
        """Every split's shards, and the reason of each image that could not be read."""
        record.withdraw(self.data.uri)
        data = self.data
        num_rows = sum(table.num_rows for table in rows.values())
        num_bytes = num_rows * data.size**2 if data.encoding == "pixels" else file_bytes
        self._check_space(num_bytes)
        step = assemble.rows_per_shard(num_rows, num_bytes, data.shard_mb, data.row_group)
        cuts = [(split, at) for split, table in rows.items() for at in range(0, table.num_rows, step)]
        counts = [min(step, rows[split].num_rows - at) for split, at in cuts]
        spec = ShardSpec(
            uri=data.uri,
            release=self.release.uri,
            encoding=data.encoding,
            size=data.size,
            row_group=data.row_group,
        )

        def task(split: str, at: int, count: int) -> tuple:
            part = pa.array(range(at, at + count))
            return spec, f"{split}/part-{at // step:05d}.parquet", rows[split].take(part), sources[split].take(part)

        tasks = (task(split, at, count) for (split, at), count in zip(cuts, counts, strict=True))
        shards: dict[str, list[ShardInfo]] = {split: [] for split in rows}
        unreadable: dict[str, str] = {}
        for (split, _), result in zip(cuts, _run(assemble.build_shard, tasks, counts, "images"), strict=True):
            if isinstance(result, ShardInfo):
                shards[split].append(result)
            else:
                unreadable.update(result)
        return shards, unreadable

    def _save(
        self,
        rows: dict[str, pa.Table],
        shards: dict[str, list[ShardInfo]],
        row_groups: dict[str, pa.Table],
        left_out: dict[str, str],
        found: set[str],
        duplicates: int,
    ) -> Manifest:
        counts = {
            "missing_images": len({*self.labelled.train_val, *self.labelled.test} - found),
            "duplicate_images": duplicates,
            "cleaned_images": len(self._cleaned() & found),
        }
        return record.write_manifest(
            self.data,
            self.settings,
            self.labelled,
            self.release,
            rows=rows,
            shards=shards,
            row_groups=row_groups,
            left_out=left_out,
            counts=counts,
        )

    def _check_space(self, num_bytes: int) -> None:
        free = storage.free_bytes(self.data.uri)
        if free is None:
            return
        needed = int(1.1 * num_bytes) - sum(size for _, size in storage.list_files(self.data.uri))
        if needed > free:
            raise InputError(
                f"{self.data.uri}: found {free >> 20} MiB free on its disk, expected {needed >> 20} MiB for shards and "
                "staging; free some, or put data.uri elsewhere"
            )

    def _known_unreadable(self) -> dict[str, str]:
        """What is known to be unreadable: noted by a run that was killed, or left out of a dataset that lost a file."""
        where = self.release.images
        try:
            noted = json.loads(storage.read_bytes(storage.join(self.staging, "unreadable.json")))
        except FileNotFoundError:
            known = set(where) - set(self._left_out(where))
            return {name: why for name, why in record.quarantined(self.data.uri).items() if name in known}
        return {name: reason for name, (reason, *file) in noted.items() if file == list(where.get(name, ()))}

    def _note_unreadable(self, unreadable: dict[str, str]) -> None:
        noted = {name: [reason, *self.release.images[name]] for name, reason in unreadable.items()}
        storage.put_atomic(storage.join(self.staging, "unreadable.json"), json.dumps(noted).encode())


def _split(data: DataConfig, labelled: Labelled, kept: pa.Table) -> dict[str, np.ndarray]:
    return nih.split_patients(kept, labelled.train_val, labelled.test, data.validation_fraction, data.split_seed)


def _shard_files(uri: str) -> list[str]:
    return [path for path, _ in storage.list_files(uri) if path.split("/")[0] in nih.SPLITS]


def _ids(table: pa.Table) -> list[str]:
    return table["image_id"].to_pylist()
