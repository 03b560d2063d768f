"""One pass of the frozen prefix over images: shards of features computed once, by actors of Ray Data, and stored.

Without a GPU an actor does all of a shard by itself: read, decode, prefix, write. With GPUs decoding and writing are
tasks beside the actors that hold them. A shard is whole once its sidecar is there, so a pass that was cut off goes on
with the rest; an image is decoded once, however many views of it are missing.
"""

import dataclasses
import json
import logging
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from cxr_dist.cluster import free_cpus
from cxr_dist.data.features import FeatureSet, FeatureShard, shard_groups, write_shard
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import NUM_DRAWS, Split, draws
from cxr_dist.data.rows import PADDING, Journal, RowDecoder, fixed_rows
from cxr_dist.errors import RunError
from cxr_dist.evaluate.inference import scorers
from cxr_dist.model.features import to_bytes
from cxr_dist.placement import ACTOR_RETRIES, decoding
from cxr_dist.train.job import TrainJob
from cxr_dist.train.survey import network_of

__all__ = ["Name", "Place", "Task", "compute"]

log = logging.getLogger(__name__)

TASK_RETRIES = 8
"""Attempts after the first at decoding or writing a shard, in a task whose process died."""

Name = tuple[str, int]
"""A set of features: split and view."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one set of features lies or will lie."""

    folder: str
    key: str
    inputs: dict[str, Any]
    split: Split
    whole: FeatureSet | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard's images, and the views of them that are to be computed."""

    split: str
    shard: int
    views: tuple[int, ...]


def compute(job: TrainJob, places: Mapping[Name, Place], tasks: list[Task]) -> Iterator[tuple[Name, FeatureShard]]:
    """Compute and store the tasks' shards; each as soon as it is whole."""
    decode, write = DecodeShard(job, tasks, token=uuid.uuid4().hex), WriteShards(tasks, places)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
    retries: dict[str, Any] = {"max_restarts": -1, "max_task_retries": ACTOR_RETRIES}
    with warnings.catch_warnings():
        # Ray 2.60 calls the retries' arguments deprecated and has no other name for them
        warnings.simplefilter("ignore", RayDeprecationWarning)
        if job.use_gpu:
            rows = decode.shard_rows
            actors = ray.data.ActorPoolStrategy(size=scorers(job.config, use_gpu=True))
            where = decoding()
            rows_of = items.map_batches(decode, batch_size=1, num_cpus=1, max_retries=TASK_RETRIES, **where)
            blocks = rows_of.map_batches(
                ComputeFeatures,
                fn_constructor_args=(job, tasks),
                batch_size=rows,
                batch_format="pyarrow",
                compute=actors,
                num_gpus=1,
                **retries,
            )
            blocks = blocks.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=1, **where)
        else:
            actors = ray.data.ActorPoolStrategy(size=max(1, min(len(tasks), free_cpus(0))))
            blocks = items.map_batches(
                ComputeAlone,
                fn_constructor_args=(job, tasks, decode, write),
                batch_size=1,
                compute=actors,
                num_cpus=1,
                **retries,
            )
    blocks.context.target_max_block_size = None
    done, began = 0, time.perf_counter()
    for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in block.to_pylist():
            shard = FeatureShard.from_json(json.loads(row["shard"]))
            done += shard.rows
            yield (row["split"], row["view"]), shard
        log.info("features: %d images, %.1f images/s", done, done / (time.perf_counter() - began))


class DecodeShard:
    """{"item": [task number]} to the decoded rows of a shard, padded to a full one, with every stored finding."""

    def __init__(self, job: TrainJob, tasks: list[Task], token: str):
        self.tasks, self.token = tasks, token
        self.decoders = {
            name: RowDecoder(
                source=source,
                split=split,
                size=job.size,
                encoding=job.encoding,
                findings=tuple(range(len(FINDINGS))),
            )
            for name, source, split in (
                ("train", job.train, job.plan.train),
                ("validation", job.validation, job.plan.validation),
            )
        }
        self.shard_rows = len(shard_groups(job.plan.train, 0)) * job.plan.train.row_group

    def __call__(self, batch: Mapping[str, npt.NDArray[np.int64]]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            task, decoder = self.tasks[int(number)], self.decoders[self.tasks[int(number)].split]
            with Journal(self.token, int(number)) as journal:
                table = decoder.rows(shard_groups(decoder.split, task.shard), journal)
            yield table.append_column("item", pa.array(np.full(len(table), number)))


class ComputeFeatures:
    """A Ray Data actor: the decoded rows of a shard to their features, all missing views one after the other."""

    def __init__(self, job: TrainJob, tasks: list[Task]):
        self.tasks, self.seed, self.kind = tasks, job.plan.seed, job.config.train.features_type
        self.network = network_of(job)
        self.size = job.size

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables(self.views(table)).combine_chunks()

    def views(self, table: pa.Table) -> Iterator[pa.Table]:
        """A table of features for each view of the task that the rows belong to."""
        task = self.tasks[table["item"][0].as_py()]
        images = fixed_rows(table["image"], np.uint8).reshape(-1, self.size, self.size)
        ids = table["image_id"].to_pylist()
        for view in task.views:
            draws_B6 = None
            if view:
                drawn = b"".join(
                    draws(self.seed, image_id, view) if image_id else bytes(4 * NUM_DRAWS) for image_id in ids
                )
                draws_B6 = np.frombuffer(drawn, "<f4").reshape(-1, NUM_DRAWS)
            stored = self.stored(images, draws_B6, ids)
            content = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(stored.shape[1]), len(stored), [None, pa.py_buffer(stored)]
            )
            rows = table.drop_columns(["image", "draws"]).append_column("image", content)
            yield rows.append_column("view", pa.array(np.full(len(rows), view, np.int32)))

    def stored(
        self, images: npt.NDArray[np.uint8], draws_B6: npt.NDArray[np.float32] | None, ids: list[str]
    ) -> npt.NDArray[np.uint8]:
        try:
            return to_bytes(self.network.features(images, draws_B6), self.kind)
        except ValueError as error:
            raise RunError(
                f"features of {ids[int(str(error))]}: found values that {self.kind} cannot hold; set train.features_type "
                "to bf16, or look at model.weights"
            ) from None


class WriteShards:
    """Computed features to stored shards: one row {split, view, shard} for each."""

    def __init__(self, tasks: list[Task], places: Mapping[Name, Place]):
        self.tasks, self.places = tasks, places

    def __call__(self, table: pa.Table) -> pa.Table:
        """Store every view in the table; padding is left out."""
        task = self.tasks[table["item"][0].as_py()]
        written = []
        for view in pa.compute.unique(table["view"]).to_pylist():
            mine = pa.compute.and_(pa.compute.equal(table["view"], view), pa.compute.not_equal(table["state"], PADDING))
            rows = table.filter(mine).combine_chunks()
            place = self.places[task.split, view]
            stored = fixed_rows(rows["image"], np.uint8)
            shard = write_shard(place.folder, place.key, task.shard, place.split.row_group, rows, stored)
            written.append({"split": task.split, "view": view, "shard": json.dumps(dataclasses.asdict(shard))})
        return pa.Table.from_pylist(written)


class ComputeAlone:
    """A Ray Data actor that does all of a shard: {"item": [task number]} to one row {split, view, shard} for each view."""

    def __init__(self, job: TrainJob, tasks: list[Task], decode: DecodeShard, write: WriteShards):
        self.decode, self.features, self.write = decode, ComputeFeatures(job, tasks), write

    def __call__(self, batch: Mapping[str, npt.NDArray[np.int64]]) -> Iterator[pa.Table]:
        for table in self.decode(batch):
            for view in self.features.views(table):
                yield self.write(view)
