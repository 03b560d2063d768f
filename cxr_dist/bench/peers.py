"""Other loaders on the same images, decoder and S3 server: torch's DataLoader, mosaicml-streaming, LitData, WebDataset.

Each reads from the server what it would read in the first epoch of a run: its own kind of shards of the same PNG files
(the DataLoader: ours), shuffled, in as many worker processes as the stream has decoders; every image goes through
`to_grey`, and batches come to the process that made the loader. Each makes two whole passes, as a run of two epochs does:
the first begins with empty caches and the loader's start, the second is from storage again, or from the node's disk with
loaders that keep what they read there. A rate within a pass would say little: a loader that reads far ahead before its
first batch seems fast after it.
"""

import importlib.util
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist import storage
from cxr_dist.bench.measure import Usage
from cxr_dist.bench.options import BenchOptions, scratch
from cxr_dist.bench.s3 import upload
from cxr_dist.data.images import to_grey, to_grey_many
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import RunError

__all__ = ["Peer", "PeerRun", "measured", "written"]

log = logging.getLogger(__name__)

BATCH = 128
SHARD_BYTES = 64 << 20
"""Size of the others' shards, which each of them recommends about."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a loader is given."""

    uri: str
    """Where its shards lie."""
    cache: str
    """An empty folder of its own."""
    size: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """Two passes of a loader over all images."""

    images: int
    """Of both."""
    first_batch_s: float
    """From making the loader to its first batch."""
    first_pass_images_per_s: float
    """From making the loader to the last batch."""
    second_pass_images_per_s: float
    """From the first pass's last batch on."""


def dataloader(task: Task) -> Iterable[Any]:
    """torch's DataLoader: an item is a batch, its row groups read from our shards as our stream reads them."""
    from torch.utils.data import DataLoader

    steps = _Steps(task)
    storage.forget_filesystems()  # workers that inherit an open connection get one another's bytes
    return DataLoader(steps, batch_size=None, num_workers=task.workers, prefetch_factor=4, persistent_workers=True)


class _Steps:
    """A map-style dataset of the plan's batches."""

    def __init__(self, task: Task):
        manifest = Manifest.load(task.uri)
        split = Split(num_rows=manifest.splits["train"].num_rows, row_group=manifest.row_group)
        self.plan = Plan(train=split, validation=split, seed=0, epochs=1, global_batch=BATCH)
        self.reader = ShardReader.from_manifest(manifest, "train")
        self.size = task.size

    def __len__(self) -> int:
        return self.plan.train_steps

    def __getitem__(self, index: int) -> Any:
        import torch

        table = self.reader.read(self.plan.step(index).groups)
        return torch.from_numpy(to_grey_many(table["image"].to_pylist(), self.size))


def mosaicml(task: Task) -> Iterable[Any]:
    """mosaicml-streaming: MDS shards, sampled over shards, batches made by the DataLoader."""
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return torch.from_numpy(to_grey(super().__getitem__(at)["image"], task.size))

    images = Images(remote=task.uri, local=task.cache, shuffle=True, batch_size=BATCH)
    for stream in images.streams:
        stream._downloader.clean_up()  # its connection too
    return DataLoader(images, batch_size=BATCH, num_workers=task.workers, prefetch_factor=4)


def litdata(task: Task) -> Iterable[Any]:
    """LitData: its chunks, its StreamingDataLoader; told that a server may speak plain http."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    options: dict[str, Any] = vars(downloader)
    options["_OBSTORE_CLIENT_OPTIONS"] = {**options["_OBSTORE_CLIENT_OPTIONS"], "allow_http": True}

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return torch.from_numpy(to_grey(bytes(super().__getitem__(at)), task.size))

    images = Images(task.uri, cache_dir=task.cache, shuffle=True)
    return StreamingDataLoader(images, batch_size=BATCH, num_workers=task.workers, prefetch_factor=4)


def webdataset(task: Task) -> Iterable[Any]:
    """WebDataset: tar files, each streamed by boto3, a shuffle buffer, batches made in the workers."""
    import torch
    import webdataset as wds
    from torch.utils.data import DataLoader

    def opened(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
        import boto3

        bucket, key = url.removeprefix("s3://").split("/", 1)
        return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]

    sys.modules["webdataset.gopen"].gopen_schemes["s3"] = opened
    urls = [storage.join(task.uri, name) for name, _ in storage.list_files(task.uri)]
    images = (
        wds.WebDataset(urls, shardshuffle=len(urls), workersplitter=wds.split_by_worker)
        .shuffle(256)
        .to_tuple("png")
        .map_tuple(lambda data: torch.from_numpy(to_grey(data, task.size)))
        .batched(BATCH)
        .map(lambda batch: batch[0])
    )
    return DataLoader(images, batch_size=None, num_workers=task.workers, prefetch_factor=4, persistent_workers=True)


def write_mosaicml(images: Iterator[bytes], folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit=SHARD_BYTES) as writer:
        for image in images:
            writer.write({"image": image})


def write_litdata(images: Iterator[bytes], folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes=SHARD_BYTES)
    for number, image in enumerate(images):
        writer[number] = image
    writer.done()
    writer.merge()


def write_webdataset(images: Iterator[bytes], folder: Path) -> None:
    import webdataset as wds

    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:06d}", "png": image})


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another loader."""

    name: str
    module: str
    """What has to be installed."""
    batches: Callable[[Task], Iterable[Any]]
    write: Callable[[Iterator[bytes], Path], None] | None
    """Writes its shards into a new folder; None if it reads ours."""
    keeps: bool = False
    """Whether it keeps what it read on the node's disk."""


PEERS = (
    Peer(name="DataLoader", module="torch", batches=dataloader, write=None),
    Peer(name="mosaicml-streaming", module="streaming", batches=mosaicml, write=write_mosaicml, keeps=True),
    Peer(name="LitData", module="litdata", batches=litdata, write=write_litdata, keeps=True),
    Peer(name="WebDataset", module="webdataset", batches=webdataset, write=write_webdataset),
)


def written(options: BenchOptions, uri: str, prefix: str) -> dict[Peer, str]:
    """Where the shards of every installed loader lie, made from the training images of the dataset at `uri`."""
    found = {}
    for peer in PEERS:
        if importlib.util.find_spec(peer.module) is None:
            log.warning("%s is not measured: it is not installed (pip install .[bench])", peer.name)
        elif peer.write is None:
            found[peer] = uri
        else:
            with scratch(options, "peer") as folder:
                peer.write(_images(uri), folder / "shards")
                found[peer] = upload(str(folder / "shards"), storage.join(prefix, peer.module))
    return found


def _images(uri: str) -> Iterator[bytes]:
    manifest = Manifest.load(uri)
    reader = ShardReader.from_manifest(manifest, "train")
    groups = -(-manifest.splits["train"].num_rows // manifest.row_group)
    for table in reader.stream([[group] for group in range(groups)]):
        yield from table["image"].to_pylist()


def measured(options: BenchOptions, peer: Peer, uri: str) -> tuple[PeerRun, Usage]:
    """Two passes of a loader, in a process of its own."""
    context: Any = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.out) as cache, Usage() as usage:
        task = Task(uri=uri, cache=cache, size=options.config.data.size, workers=options.cpus)
        ours, theirs = context.Pipe()
        process = context.Process(target=_pass, args=(peer, task, theirs))
        process.start()
        theirs.close()
        try:
            found: PeerRun = ours.recv()
        except EOFError:
            raise RunError(
                f"{peer.name}: found no result, expected two passes over {uri}; its error is above"
            ) from None
        finally:
            process.join()
    return found, usage


def _pass(peer: Peer, task: Task, pipe: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as each of them starts its workers on Linux
    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")  # mosaicml-streaming's name for it
    began, loader = time.time(), peer.batches(task)
    first, images = _timed(loader)
    second, more = _timed(loader)
    pipe.send(
        PeerRun(
            images=images + more,
            first_batch_s=first[0] - began,
            first_pass_images_per_s=images / (first[-1] - began),
            second_pass_images_per_s=more / (second[-1] - first[-1]),
        )
    )


def _timed(loader: Iterable[Any]) -> tuple[list[float], int]:
    """When each batch came, and the images of all of them."""
    came = [(time.time(), len(batch)) for batch in loader]
    return [when for when, _ in came], sum(images for _, images in came)
