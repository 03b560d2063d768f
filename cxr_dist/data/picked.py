"""The pixels of a few named images of a dataset, without reading the rest of it."""

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data import images
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import DataError

__all__ = ["picked_images"]

ROWS = 32
"""Images whose row groups are read together: 256 images of NIH's PNG in row groups of eight, 100 MB."""


def picked_images(
    manifest: Manifest, split: str, image_ids: Collection[str], config: DataConfig | None = None
) -> Iterator[dict[str, npt.NDArray[np.uint8]]]:
    """The named images of the split, each once, a few at a time: image id to pixels [S, S], in the dataset's order.

    Only the row groups that hold them are read, only they are decoded, in this process. DataError for an id that the split
    has not, and for an image that cannot be read: name those that a score table holds, which all could be.
    """
    wanted = set(image_ids)
    ids = _rows_of(manifest, split, wanted)
    rows = np.array(list(ids), np.int64)
    if missing := wanted - set(ids.values()):
        raise DataError(
            f"{storage.shown(manifest.uri)}: found no image {min(missing)} in the {split} split ({len(missing)} such), expected "
            "those of its score table; give the dataset that was scored"
        )
    reader = ShardReader.from_manifest(manifest, split, config)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        groups = np.unique(part // manifest.row_group)
        # all row groups are full but the split's last, which is the last here too
        at = np.searchsorted(groups, part // manifest.row_group) * manifest.row_group + part % manifest.row_group
        table = reader.read(groups).take(at)
        names = table["image_id"].to_pylist()
        if names != (expected := [ids[row] for row in part]):
            raise DataError(
                f"{storage.shown(manifest.uri)}: found {names[0]} … in {split}, expected {expected[0]} … there; the dataset was "
                "changed, ingest again"
            )
        yield {
            name: _pixels(image, manifest, name) for name, image in zip(names, table["image"].to_pylist(), strict=True)
        }


def _rows_of(manifest: Manifest, split: str, wanted: Collection[str]) -> dict[int, str]:
    """Row and name of each wanted image that the split has, in its order."""
    names, found, first = pa.array(sorted(wanted), pa.string()), {}, 0
    for batch in manifest.row_batches(split, ["image_id"]):
        column = batch["image_id"].combine_chunks()
        for row in np.flatnonzero(pc.is_in(column, value_set=names).to_numpy(zero_copy_only=False)).tolist():
            found[first + row] = column[row].as_py()
        first += len(column)
    return found


def _pixels(image: bytes, manifest: Manifest, image_id: str) -> npt.NDArray[np.uint8]:
    if manifest.encoding == "pixels":
        return np.frombuffer(image, np.uint8).reshape(manifest.size, manifest.size)
    try:
        return images.to_grey(image, manifest.size)
    except images.ImageError as error:
        raise DataError(
            f"{image_id}: cannot be read ({error}), expected an image that was scored; leave it out"
        ) from None
