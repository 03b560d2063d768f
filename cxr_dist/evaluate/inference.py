"""From a checkpoint to a score table: every row of a split once, decoded and scored in one Ray Data pipeline."""

import logging
import math
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.util.annotations import RayDeprecationWarning

from cxr_dist import storage
from cxr_dist.cluster import free_cpus
from cxr_dist.config import Config
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS
from cxr_dist.data.plan import EMPTY, Split
from cxr_dist.data.rows import CORRUPT, OK, PADDING, Journal, RowDecoder, fixed_rows
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import ConfigError, DataError, RunError
from cxr_dist.evaluate.scores import ScoreTable, from_logits
from cxr_dist.model import weights
from cxr_dist.model.network import Network
from cxr_dist.placement import ACTOR_RETRIES, decoding
from cxr_dist.preflight import check_pixels
from cxr_dist.train.checkpoint import load_checkpoint

__all__ = ["DecodeGroups", "Scorer", "pipeline", "pixels_of", "score_split", "score_with", "scorers", "with_outputs"]

log = logging.getLogger(__name__)

Decode = Callable[[dict[str, Any]], Iterator[pa.Table]]
"""{"item": [task number]} to the decoded rows of the task."""

ToTable = Callable[[pa.Table, str, tuple[str, ...], npt.NDArray[np.float32], npt.NDArray[np.bool_]], ScoreTable]
"""The manifest's rows, split, findings, what the network gave and the labels to a score table."""

TASK_IMAGES = 256

TASK_RETRIES = 8
"""Attempts after the first at a decoding task whose process died; Ray's default is to try for ever."""


def score_split(
    config: Config, checkpoint_uri: str, split: str, *, use_gpu: bool = False, max_images: int | None = None
) -> tuple[ScoreTable, dict[str, str]]:
    """Scores of a split by a checkpoint, and the images that could not be read with the reason.

    RunError unless each readable image has exactly one score.

    The model is the one that the checkpoint was trained as, whatever `config` says; the dataset is `config.data.uri`.
    """
    manifest = Manifest.load(config.data.uri)
    checkpoint = load_checkpoint(checkpoint_uri)
    check_fits(manifest, checkpoint, split)
    return score_with(
        Scorer,
        (checkpoint_uri, config.train.threads_per_worker),
        config,
        manifest,
        split,
        tuple(checkpoint["findings"]),
        use_gpu=use_gpu,
        max_images=max_images,
    )


def score_with(
    score: type,
    arguments: tuple[Any, ...],
    config: Config,
    manifest: Manifest,
    split: str,
    findings: tuple[str, ...],
    *,
    use_gpu: bool,
    max_images: int | None = None,
    to_table: ToTable = from_logits,
) -> tuple[ScoreTable, dict[str, str]]:
    """Scores of a split by actors of `score`, of which `Scorer` is one, as `score_split` gives them.

    `to_table` makes the table out of the manifest's rows of the readable images and what the actors gave for them.
    """
    rows = manifest.rows(split)
    num_rows = rows.num_rows if max_images is None else min(max_images, rows.num_rows)
    decode = DecodeGroups(
        RowDecoder(
            source=ShardReader.from_manifest(manifest, split, config.data),
            split=Split(num_rows=rows.num_rows, row_group=manifest.row_group),
            size=manifest.size,
            encoding=manifest.encoding,
            findings=tuple(FINDINGS.index(finding) for finding in findings),
        ),
        token=uuid.uuid4().hex,
        groups_per_task=max(1, TASK_IMAGES // manifest.row_group),
        num_groups=math.ceil(num_rows / manifest.row_group),
    )
    blocks = pipeline(
        decode,
        range(decode.num_tasks),
        score,
        arguments,
        rows_per_task=decode.groups_per_task * manifest.row_group,
        num_scorers=scorers(config, use_gpu=use_gpu),
        use_gpu=use_gpu,
    )
    parts = list(blocks.iter_batches(batch_size=None, batch_format="pyarrow"))
    return _checked(pa.concat_tables(parts), rows, split, findings, num_rows, config.data.max_corrupt, to_table)


def pipeline(
    decode: Decode,
    tasks: Sequence[int],
    score: type,
    arguments: tuple[Any, ...],
    *,
    rows_per_task: int,
    num_scorers: int,
    use_gpu: bool,
) -> ray.data.Dataset:
    """Tasks decoded on CPUs by `decode`, at most as many at once as there are CPUs, then handed to actors of `score`.

    An actor gets `rows_per_task` rows at a time: where every task gives as many, exactly those of one task.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    decoders = max(1, min(len(tasks), free_cpus(0 if use_gpu else num_scorers)))
    items = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
    with warnings.catch_warnings():
        # Ray 2.60 calls the retries' arguments deprecated and has no other name for them
        warnings.simplefilter("ignore", RayDeprecationWarning)
        blocks = items.map_batches(
            decode,
            batch_size=1,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=decoders),
            max_retries=TASK_RETRIES,
            **decoding(),
        ).map_batches(
            score,
            fn_constructor_args=arguments,
            batch_size=rows_per_task,  # Ray wants a number where GPUs are asked for
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_scorers),
            num_gpus=1 if use_gpu else 0,
            num_cpus=0 if use_gpu else 1,
            max_restarts=-1,
            max_task_retries=ACTOR_RETRIES,
        )
    blocks.context.target_max_block_size = None
    return blocks


def scorers(config: Config, *, use_gpu: bool) -> int:
    """Number of scoring actors that fit the cluster; ConfigError if none does."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    if use_gpu and not gpus:
        raise ConfigError(
            "train.use_gpu: found no GPU in the cluster, expected at least one; set it to no or add nodes"
        )
    if cpus < (1 if use_gpu else 2):
        raise ConfigError(
            f"cluster: found {cpus:g} CPUs, expected one to decode and, without a GPU, one to score; add nodes"
        )
    return min(config.train.workers[1], gpus) if use_gpu else 1


def check_fits(manifest: Manifest, checkpoint: dict[str, Any], split: str) -> None:
    """The split is one that the checkpoint may be judged on; DataError otherwise.

    Test images of another dataset are fair, images of its validation split may be what the model was trained on.
    """
    check_pixels(manifest)
    where = storage.shown(manifest.uri)
    if manifest.size != checkpoint["size"]:
        raise DataError(
            f"data.uri {where}: found images of {manifest.size} pixels, expected {checkpoint['size']}, which the "
            "checkpoint was trained on; ingest that size to another data.uri"
        )
    if manifest.hash != checkpoint["manifest_sha256"]:
        if split != "test":
            raise DataError(
                f"data.uri {where}: found the dataset with manifest {manifest.hash[:12]}…, expected "
                f"{checkpoint['manifest_sha256'][:12]}…, which the checkpoint was trained on: another dataset's {split} "
                "split may hold its training images; give that dataset"
            )
        log.warning("data.uri %s is not the dataset that the checkpoint was trained on", where)


def _checked(
    scored: pa.Table,
    rows: pa.Table,
    split: str,
    findings: tuple[str, ...],
    num_rows: int,
    max_corrupt: float,
    to_table: ToTable = from_logits,
) -> tuple[ScoreTable, dict[str, str]]:
    scored = scored.filter(pa.compute.not_equal(scored["state"], PADDING)).sort_by("row")
    found = scored["row"].to_numpy()
    found = found[found < num_rows]
    scored = scored.slice(0, len(found))
    if not np.array_equal(found, np.arange(num_rows)):
        raise RunError(
            f"{split}: found {len(found)} scored rows ({len(np.unique(found))} different), expected each of {num_rows} once"
        )
    unreadable = scored.filter(pa.compute.equal(scored["state"], CORRUPT))
    names = unreadable["image_id"].to_pylist()
    corrupt = dict(zip(names, unreadable["reason"].to_pylist(), strict=True))
    if corrupt:
        log.warning("%s: %d unreadable images are not scored: %s", split, len(names), ", ".join(names[:10]))
        if len(names) > max_corrupt * num_rows:
            raise RunError(
                f"{split}: {len(names)} of {num_rows} images are unreadable, allowed are data.max_corrupt = "
                f"{max_corrupt:g} of them; first {', '.join(names[:5])}"
            )
    scored = scored.filter(pa.compute.equal(scored["state"], OK)).combine_chunks()
    logits = fixed_rows(scored["logits"], np.dtype("<f4")).copy()
    labels = fixed_rows(scored["labels"], np.uint8) == 1
    return to_table(rows.take(scored["row"]), split, findings, logits, labels), corrupt


@dataclass(frozen=True)
class DecodeGroups:
    """A Ray Data task: {"item": [task number]} to the decoded rows of a run of row groups."""

    decoder: RowDecoder
    token: str
    groups_per_task: int
    num_groups: int
    padded: bool = False
    """Whether the last task has as many rows as the others, those past the end marked as padding."""

    @property
    def num_tasks(self) -> int:
        return math.ceil(self.num_groups / self.groups_per_task)

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            first = int(number) * self.groups_per_task
            groups = np.arange(first, min(first + self.groups_per_task, self.num_groups))
            if self.padded:
                groups = np.pad(groups, (0, self.groups_per_task - len(groups)), constant_values=EMPTY)
            with Journal(self.token, int(number)) as journal:
                yield self.decoder.rows(groups, journal)


class Scorer:
    """A Ray Data actor: decoded rows to logits, with the model of one checkpoint."""

    def __init__(self, checkpoint_uri: str, threads: int):
        use_gpu = bool(ray.get_gpu_ids())
        if not use_gpu:
            torch.set_num_threads(threads)
        self.network = load_network(checkpoint_uri, torch.device("cuda" if use_gpu else "cpu"))

    def logits(self, table: pa.Table) -> npt.NDArray[np.float32]:
        """float32 [rows, findings]; an image's logits do not depend on its neighbours."""
        return np.ascontiguousarray(self.network.score(pixels_of(table)), dtype="<f4")

    def __call__(self, table: pa.Table) -> pa.Table:
        return with_outputs(table, self.logits(table))


def pixels_of(table: pa.Table) -> npt.NDArray[np.uint8]:
    """Grey levels of decoded rows, [rows, size, size]."""
    size = math.isqrt(table.schema.field("image").type.byte_width)
    return fixed_rows(table["image"], np.uint8).reshape(len(table), size, size)


def with_outputs(table: pa.Table, outputs_NK: npt.NDArray[np.float32]) -> pa.Table:
    """Decoded rows with what a network gave for them in place of their pixels."""
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * outputs_NK.shape[1]), len(outputs_NK), [None, pa.py_buffer(outputs_NK)]
    )
    return table.drop_columns(["image", "draws"]).append_column("logits", column)


def load_network(checkpoint_uri: str, device: torch.device, *, precision: str = "") -> Network:
    """The network of a checkpoint, ready to score; in the precision that it was trained in if none is given."""
    checkpoint = load_checkpoint(checkpoint_uri)
    where = storage.join(checkpoint["folder"], "initial.pt")
    initial = weights.restore(storage.read_bytes(where), storage.shown(where))
    return Network.restore(initial, checkpoint | {"precision": precision or checkpoint["precision"]}, device)
