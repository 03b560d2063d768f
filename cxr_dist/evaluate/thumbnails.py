"""Pictures of examples out of a dataset: what the network sees of each image."""

import io
import logging
import uuid
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.plan import Split
from cxr_dist.data.rows import OK, Journal, RowDecoder, fixed_rows
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import InputError
from cxr_dist.evaluate.worst import Example

__all__ = ["encoded", "pixels_of", "with_thumbnails"]

log = logging.getLogger(__name__)


def pixels_of(
    manifest: Manifest, split: str, image_ids: Iterable[str], config: DataConfig | None = None
) -> dict[str, NDArray[np.uint8]]:
    """Grey pixels [size, size] of images of a split, by id; those that are not there or cannot be read are left out.

    Reads a row group an image.
    """
    wanted = set(image_ids)
    ids = manifest.rows(split)["image_id"].to_pylist()
    groups = sorted({row // manifest.row_group for row, name in enumerate(ids) if name in wanted})
    if not groups:
        return {}
    decoder = RowDecoder(
        source=ShardReader.from_manifest(manifest, split, config),
        split=Split(num_rows=len(ids), row_group=manifest.row_group),
        size=manifest.size,
        encoding=manifest.encoding,
        findings=(),
    )
    with Journal(uuid.uuid4().hex, 0) as journal:
        rows = decoder.rows(np.array(groups, np.int64), journal)
    pixels = fixed_rows(rows["image"], np.uint8).reshape(-1, manifest.size, manifest.size)
    found = zip(rows["image_id"].to_pylist(), rows["state"].to_pylist(), pixels, strict=True)
    return {name: image.copy() for name, state, image in found if state == OK and name in wanted}


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """Grey or RGB pixels as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def with_thumbnails(
    examples: Sequence[Example], dataset: str, split: str, config: DataConfig | None = None
) -> list[Example]:
    """The examples with their thumbnails, as far as the dataset at this URI has the images and gives them."""
    try:
        found = pixels_of(Manifest.load(dataset), split, (one["image_id"] for one in examples), config)
    except (OSError, InputError) as error:
        log.warning("the report has no thumbnails: %s", error)
        return list(examples)
    pngs = {name: encoded(pixels) for name, pixels in found.items()}
    return [{**one, "thumbnail_png": pngs.get(one["image_id"])} for one in examples]
