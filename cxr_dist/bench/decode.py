"""Stage `decode`: encoded bytes to what a network takes, on one core, beside the notebooks' pipeline and the limit.

All rates are images a second of one core's CPU time. The pipeline here ends at 8-bit grey pixels, for augmentation and
normalisation are the device's work; two rows do that on the CPU too, to be compared like for like. The limit is what no
order of the same work can beat: the fastest inflate of a wheel, undoing the PNG filters, and the resize, each measured
alone. (Undoing the filters is the decoder given the same filtered lines in stored blocks, so that nothing is inflated;
it checks and copies a megabyte more for that, about 0.1 ms.)
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist.bench.measure import Timing, in_turns
from cxr_dist.bench.options import BenchOptions, load_images
from cxr_dist.bench.report import Row, ratios
from cxr_dist.data.images import decode, resize, to_grey_many
from cxr_dist.data.plan import NUM_DRAWS
from cxr_dist.data.rows import fixed_rows
from cxr_dist.errors import DataError

__all__ = ["inflate", "pixel_shard", "run", "stored"]

STAGE = "decode"
TRAINING, EVALUATION = "notebooks, training", "notebooks, evaluation"
GREY = "cxr-dist, 8-bit grey (the rest is the device's)"
AUGMENTED, NORMALISED = "cxr-dist, augmented and normalised on the CPU", "cxr-dist, normalised on the CPU"
NUM_IMAGES = 96
BATCH = 16
"""Images that are augmented and normalised at once, the notebooks' batch."""
PIXEL_COPIES = 20
"""Pixel rows are this many times the images, for they take microseconds."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run(options: BenchOptions) -> list[Row]:
    """The notebooks' two pipelines, ours in three, the limit, and pixel shards."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(threads)


def _run(options: BenchOptions) -> list[Row]:
    images = load_images(options, NUM_IMAGES)
    encoded, size = list(images), options.config.data.size
    variants = {**_notebooks(encoded, size), **_ours(encoded, size, options.seed)}
    parts, inflated_by = _parts(encoded, size)
    pixels = pixel_shard(np.tile(to_grey_many(encoded, size), (PIXEL_COPIES, 1, 1)), options.config.data.row_group)
    found = in_turns({**variants, **parts, "pixels": pixels}, options.repeats, by_cpu=True)
    training, evaluation = (found[name].images_per_core_s for name in (TRAINING, EVALUATION))
    limit_ms = sum(found[part].cpu_ms_per_image for part in parts)
    of = {
        TRAINING: {"notebooks": training},
        EVALUATION: {"notebooks": training},
        GREY: {"notebooks": training, "notebooks_eval": evaluation, "limit": 1e3 / limit_ms},
        AUGMENTED: {"notebooks": training},
        NORMALISED: {"notebooks_eval": evaluation},
    }
    rows = [_row(name, found[name], of[name], images.num_bytes) for name in variants]
    limit = Row(
        stage=STAGE,
        name="limit: inflate + undo filters + resize",
        images=len(images),
        images_per_s=1e3 / limit_ms,
        ratios=ratios(1e3 / limit_ms, {"notebooks": training}),
        cpu_ms_per_image=limit_ms,
        extra={f"{part} ms": found[part].cpu_ms_per_image for part in parts} | {"inflated by": inflated_by},
    )
    return [*rows, limit, _row("pixel shards, 8-bit grey", found["pixels"], {"notebooks": training}, None)]


def _row(name: str, timing: Timing, of: dict[str, float], num_bytes: int | None) -> Row:
    return Row(
        stage=STAGE,
        name=name,
        images=timing.images,
        images_per_s=timing.images_per_core_s,
        ratios=ratios(timing.images_per_core_s, of),
        cpu_ms_per_image=timing.cpu_ms_per_image,
        bytes_read=num_bytes,
    )


def _notebooks(encoded: Sequence[bytes], size: int) -> dict[str, Callable[[], int]]:
    from cxr_dist.bench import notebooks

    def each(transform: object) -> int:
        for data in encoded:
            notebooks.load(data, transform)
        return len(encoded)

    return {
        TRAINING: functools.partial(each, notebooks.training_transform(size)),
        EVALUATION: functools.partial(each, notebooks.evaluation_transform(size)),
    }


def _ours(encoded: Sequence[bytes], size: int, seed: int) -> dict[str, Callable[[], int]]:
    import torch

    from cxr_dist.model.augment import IMAGENET, affine_coefficients, to_input

    draws = np.random.default_rng(seed).random((BATCH, NUM_DRAWS), dtype=np.float32)

    def work(*, normalised: bool, augmented: bool) -> int:
        for start in range(0, len(encoded), BATCH):
            pixels = to_grey_many(encoded[start : start + BATCH], size)
            if normalised:
                maps = torch.from_numpy(affine_coefficients(draws[: len(pixels)], size)) if augmented else None
                to_input(torch.from_numpy(pixels), IMAGENET, coefficients_B6=maps)
        return len(encoded)

    return {
        GREY: functools.partial(work, normalised=False, augmented=False),
        NORMALISED: functools.partial(work, normalised=True, augmented=False),
        AUGMENTED: functools.partial(work, normalised=True, augmented=True),
    }


def _parts(encoded: Sequence[bytes], size: int) -> tuple[dict[str, Callable[[], int]], str]:
    """The three parts of the work, each alone, and what inflates."""
    compressed = [image_data(data) for data in encoded]
    filtered = [stored(data) for data in encoded]
    greys = [decode(data) for data in encoded]
    unpack, inflated_by = inflate()

    def each(work: Callable[..., object], inputs: Sequence[object]) -> int:
        for one in inputs:
            work(one)
        return len(inputs)

    return {
        "inflate": functools.partial(each, unpack, compressed),
        "undo filters": functools.partial(each, decode, filtered),
        "resize": functools.partial(each, functools.partial(resize, size=size), greys),
    }, inflated_by


def inflate() -> tuple[Callable[[bytes], bytes], str]:
    """The fastest inflate that a wheel offers (Intel's ISA-L), or Python's, and which it is."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompress, "zlib (pip install cxr-dist[bench] for isal, twice as fast)"
    return isal_zlib.decompress, "isal"


def image_data(encoded: bytes) -> bytes:
    """The compressed pixels of a PNG: its IDAT chunks joined. DataError if it is none."""
    if encoded[:8] != _SIGNATURE:
        raise DataError("--images: found a file that is no PNG, expected PNG images alone; take it out")
    at, parts = 8, []
    while at + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if kind == b"IDAT":
            parts.append(encoded[at + 8 : at + 8 + length])
        at += length + 12
    return b"".join(parts)


def stored(encoded: bytes) -> bytes:
    """The same PNG with the same filtered lines, uncompressed."""
    lines = zlib.decompress(image_data(encoded))
    out = io.BytesIO()
    out.write(encoded[:33])
    for kind, data in ((b"IDAT", zlib.compress(lines, 0)), (b"IEND", b"")):
        out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return out.getvalue()


def pixel_shard(pixels_NSS: np.ndarray, row_group: int) -> Callable[[], int]:
    """Reading a shard of pixels, from memory and with its checksums, a row group at a time into rows of our own."""
    num_images, row_bytes = len(pixels_NSS), pixels_NSS[0].size
    buffers = [None, pa.py_buffer(pixels_NSS)]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), num_images, buffers)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"image": column}),
        sink,
        row_group_size=row_group,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    shard = sink.getvalue()

    def work() -> int:
        out = np.empty((row_group, row_bytes), np.uint8)
        with pq.ParquetFile(pa.BufferReader(shard), page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                rows = fixed_rows(file.read_row_group(group, use_threads=False)["image"], np.uint8)
                out[: len(rows)] = rows
        return num_images

    return work
