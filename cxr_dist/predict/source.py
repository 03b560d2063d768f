"""What is predicted: image files under a folder or object-store prefix, or the splits of an ingested dataset."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import MANIFEST, Manifest
from cxr_dist.data.nih import SPLITS
from cxr_dist.data.plan import Split
from cxr_dist.data.ranges import AHEAD_BYTES, ByteRanges
from cxr_dist.data.shards import FileReader, ShardReader, reading
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.preflight import check_pixels

__all__ = ["LISTING_SCHEMA", "MAX_IMAGE_BYTES", "ImageReader", "Section", "Source", "open_source"]

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_IMAGE_BYTES = 256 << 20
"""Longest file that is read as an image; of a longer one the beginning is."""
READ_LONG = 64 << 10
"""How much of a longer one."""
RUN_BYTES = 32 << 20
"""Bytes of images that are read together, where they are more than one: what bounds memory when images are large."""

LISTING_SCHEMA = pa.schema([("image_id", pa.string()), ("bytes", pa.int64())])

_CHANGED = "the folder changed since it was listed; let nothing write there, and give another --out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """Images that are read alike, in a fixed order: those of a prefix, or a split's."""

    image_ids: pa.StringArray
    reader: "ImageReader | ShardReader | FileReader"
    split: Split
    encoding: str

    def uri(self, row: int) -> str:
        """The file that an image is read from, as it may be printed."""
        ranges = self.reader.ranges
        return storage.shown(ranges.uri(int(ranges.file_index[row // self.split.row_group])))


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """All images that are predicted, and what tells whether they are still the same."""

    kind: str
    """`prefix` or `dataset`."""
    uri: str
    split: str
    """Of a dataset; `all` for every one of its splits. Empty for a prefix."""
    sha256: str
    """Of a prefix's listing (paths and sizes), of a dataset's manifest."""
    sections: tuple[Section, ...]
    listing: pa.Table | None
    """LISTING_SCHEMA of a prefix, sorted by path."""
    left_out: int = 0
    """Images that ingest left out of the dataset."""

    @property
    def num_images(self) -> int:
        return sum(section.split.num_rows for section in self.sections)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageReader:
    """Image files under a prefix, each a row group of its own; an image's id is its path below the prefix."""

    ranges: ByteRanges

    @classmethod
    def of(cls, uri: str, listing: pa.Table, identity: str, config: DataConfig | None = None) -> "ImageReader":
        """The reader of the listed files (LISTING_SCHEMA); `identity` is the listing's SHA-256."""
        num_bytes = listing["bytes"].to_numpy().copy()
        ranges = ByteRanges(
            root=uri,
            paths=listing["image_id"].combine_chunks(),
            file_bytes=num_bytes,
            file_sha256=None,
            identity=identity,
            file_index=np.arange(len(listing), dtype=np.int32),
            offset=np.zeros(len(listing), np.int64),
            length=np.where(num_bytes > MAX_IMAGE_BYTES, READ_LONG, num_bytes),
            missing=f"expected an image; {_CHANGED}",
            mend=_CHANGED,
            **reading(config),
        )
        return cls(ranges=ranges)

    def read(self, groups: npt.NDArray[np.int64]) -> pa.Table:
        """Rows of the images in the given order: image_id, findings (one, False: none is known), image as it lies."""
        return pa.concat_tables(self.stream([groups]))

    def stream(self, runs: Iterable[npt.ArrayLike], ahead_bytes: int = AHEAD_BYTES) -> Iterator[pa.Table]:
        """`read` of each run in turn, in pieces of at most RUN_BYTES, while the bytes of the next are in flight."""
        for numbers, pieces in self.ranges.stream(self._short(runs), ahead_bytes):
            none = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(numbers), np.bool_)), 1)
            names = self.ranges.paths.take(pa.array(numbers))
            yield pa.table([names, none, pa.array(pieces, pa.binary())], names=["image_id", "findings", "image"])

    def _short(self, runs: Iterable[npt.ArrayLike]) -> Iterator[npt.NDArray[np.int64]]:
        for run in runs:
            numbers = np.asarray(run, np.int64)
            begin, held = 0, 0
            for at, length in enumerate(self.ranges.length[numbers].tolist()):
                if held and held + length > RUN_BYTES:
                    yield numbers[begin:at]
                    begin, held = at, 0
                held += length
            yield numbers[begin:]


def open_source(uri: str, split: str | None, config: DataConfig, *, size: int) -> Source:
    """The images at `uri`: those of a dataset of ours, if its manifest lies there, else the image files under it.

    `size` is the model's, pixels. ConfigError for a split of a prefix or none of a dataset, DataError for no images, and
    for a dataset of other pixels than the model's.
    """
    uri = storage.absolute(uri)
    if storage.exists(storage.join(uri, MANIFEST)):
        return _dataset(uri, split, config, size)
    if split is not None:
        raise ConfigError(
            f"--split: found {split!r} for {storage.shown(uri)}, which has no {MANIFEST}; expected none for a folder of images"
        )
    listing = list_images(uri)
    digest = digest_of(listing)
    section = Section(
        image_ids=listing["image_id"].combine_chunks(),
        reader=ImageReader.of(uri, listing, digest, config),
        split=Split(num_rows=len(listing), row_group=1),
        encoding="png",
    )
    return Source(kind="prefix", uri=uri, split="", sha256=digest, sections=(section,), listing=listing)


def list_images(uri: str) -> pa.Table:
    """The .png and .jpg files under a prefix (LISTING_SCHEMA), sorted by path; DataError if there are none.

    Hidden files and folders are left out, and __MACOSX, as in a release.
    """
    try:
        files = storage.list_files(uri)
    except (NotADirectoryError, OSError) as error:
        raise DataError(f"--images {storage.shown(uri)}: cannot be listed ({error}); give a folder or prefix") from None
    found = [
        (path, size)
        for path, size in files
        if path.lower().endswith(SUFFIXES)
        and not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    ]
    if not found:
        raise DataError(
            f"--images {storage.shown(uri)}: found no images among {len(files)} files, expected {', '.join(SUFFIXES)} under "
            f"it, or a dataset's {MANIFEST} (unpack archives, or ingest them)"
        )
    paths, sizes = zip(*found, strict=True)
    return pa.table([pa.array(paths, pa.string()), pa.array(sizes, pa.int64())], schema=LISTING_SCHEMA)


def digest_of(listing: pa.Table) -> str:
    """SHA-256 of a listing: paths and sizes."""
    digest = hashlib.sha256()
    for batch in listing.to_batches(max_chunksize=1 << 16):
        pairs = zip(batch["image_id"].to_pylist(), batch["bytes"].to_pylist(), strict=True)
        digest.update("".join(f"{path}\t{size}\n" for path, size in pairs).encode())
    return digest.hexdigest()


def _dataset(uri: str, split: str | None, config: DataConfig, size: int) -> Source:
    manifest = Manifest.load(uri)
    check_pixels(manifest)
    allowed = (*manifest.splits, "all")
    if split not in allowed:
        raise ConfigError(
            f"--split: found {split or 'none'}, expected one of {', '.join(allowed)} of {storage.shown(uri)}"
        )
    if manifest.size != size:
        raise DataError(
            f"--images {storage.shown(uri)}: found a dataset of {manifest.size} pixels, expected {size} as the model was "
            "trained on; give the image files themselves, or ingest that size"
        )
    names = [name for name in SPLITS if split in (name, "all") and manifest.splits[name].num_rows]
    config = dataclasses.replace(config, uri=uri)
    sections = tuple(
        Section(
            image_ids=manifest.rows(name)["image_id"].combine_chunks(),
            reader=ShardReader.from_manifest(manifest, name, config),
            split=Split(num_rows=manifest.splits[name].num_rows, row_group=manifest.row_group),
            encoding=manifest.encoding,
        )
        for name in names
    )
    if not sections:
        raise DataError(f"--split: found no images in split {split} of {storage.shown(uri)}, expected some")
    return Source(
        kind="dataset",
        uri=uri,
        split=split,
        sha256=manifest.hash,
        sections=sections,
        listing=None,
        left_out=manifest.counts["quarantined"],
    )
