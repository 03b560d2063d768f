"""An NIH release as it lies: label file, official lists, and either PNG files or the twelve tar archives.

Layouts: `images/*.png`, Kaggle's `images_*/images/*.png`, PNG files in the folder itself, or `images_*.tar.gz`; in a
folder or under an object-store prefix. Any part of the release is a release: what is missing is counted, not refused.
"""

import hashlib
from dataclasses import dataclass

import pyarrow as pa

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data import nih
from cxr_dist.errors import ConfigError, DataError

ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Labelled:
    """Label table and official lists, with the names and SHA-256 of their files."""

    labels: pa.Table
    train_val: list[str]
    test: list[str]
    sources: dict[str, dict[str, str]]
    """`labels`, `train_val_list`, `test_list`: {name, sha256}; the labels' hash is of the unpacked CSV."""

    @property
    def hashes(self) -> dict[str, str]:
        return {name: source["sha256"] for name, source in self.sources.items()}


@dataclass(frozen=True)
class Release:
    """The image files of a release, by path relative to its URI."""

    uri: str
    images: dict[str, tuple[str, int]]
    """Image name to (path, bytes); empty if the images are in archives."""
    archives: list[tuple[str, int]]
    """(path, bytes) of each archive, sorted."""
    duplicates: int
    """Further copies of an image, equal to the one in `images`."""
    source: dict[str, str | int]
    """kind, files, bytes, and the SHA-256 of the file list."""


def read_labelled(config: DataConfig) -> Labelled:
    """Label table and lists of a release, or from where the config says they are."""
    listing: list[str] = []
    if not (config.labels and config.train_val_list and config.test_list):
        if not config.release:
            raise ConfigError("data.release: found nothing, expected the URI of an NIH release")
        listing = [path for path, _ in storage.list_files(config.release, recursive=False)]
    labels_uri = config.labels or _the_labels(config.release, listing)
    uris = {
        "labels": labels_uri,
        "train_val_list": config.train_val_list or _the_list(config.release, listing, "train_val_list"),
        "test_list": config.test_list or _the_list(config.release, listing, "test_list"),
    }
    data = {name: _read(uri) for name, uri in uris.items()}
    labels = nih.read_labels(data["labels"], storage.shown(labels_uri))
    sources = {
        name: {"name": storage.shown(uri).rsplit("/", 1)[-1], "sha256": hashlib.sha256(data[name]).hexdigest()}
        for name, uri in uris.items()
    }
    sources["labels"]["sha256"] = labels.schema.metadata[b"sha256"].decode()
    return Labelled(
        labels,
        nih.read_list(data["train_val_list"], storage.shown(uris["train_val_list"])),
        nih.read_list(data["test_list"], storage.shown(uris["test_list"])),
        sources,
    )


def find_images(uri: str) -> Release:
    """The images of the release at `uri`. Raises DataError if there are none, or both files and archives."""
    listing = [
        (path, size)
        for path, size in storage.list_files(uri)
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    ]
    files = [(path, size) for path, size in listing if path.lower().endswith(".png")]
    archives = [
        (path, size) for path, size in listing if path.endswith(ARCHIVES) and path.split("/")[-1].startswith("images")
    ]
    if files and archives:
        raise DataError(
            f"{storage.shown(uri)}: found {len(files)} PNG files and {len(archives)} archives (e.g. {archives[0][0]}), expected one kind; "
            "point data.release at a folder with one of them, and data.labels and the lists at their files"
        )
    used = files or archives
    if not used:
        raise DataError(
            f"{storage.shown(uri)}: found no images, expected images/*.png, images_*/images/*.png or images_*.tar.gz; check data.release"
        )
    digest = hashlib.sha256("".join(f"{path}\t{size}\n" for path, size in used).encode()).hexdigest()
    source: dict[str, str | int] = {
        "kind": "files" if files else "archives",
        "files": len(used),
        "bytes": sum(size for _, size in used),
        "sha256": digest,
    }
    images: dict[str, tuple[str, int]] = {}
    duplicates = 0
    for path, size in files:
        name = path.rsplit("/", 1)[-1]
        if name in images:
            _check_copy(uri, name, images[name], (path, size))
            duplicates += 1
        else:
            images[name] = (path, size)
    return Release(uri, images, archives, duplicates, source)


def different_copies(name: str, first: str, second: str) -> DataError:
    """The error of two different images of one name."""
    return DataError(f"{name}: found two different images of this name, {first} and {second}; keep the right one")


def _check_copy(uri: str, name: str, first: tuple[str, int], second: tuple[str, int]) -> None:
    same = first[1] == second[1] and (
        storage.read_bytes(storage.join(uri, first[0])) == storage.read_bytes(storage.join(uri, second[0]))
    )
    if not same:
        raise different_copies(name, first[0], second[0])


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        raise DataError(f"{storage.shown(uri)}: found no file; check data.release, data.labels and the lists") from None


def _the_labels(release: str, listing: list[str]) -> str:
    found = [name for name in listing if name.startswith("Data_Entry_2017") and name.endswith((".csv", ".csv.gz"))]
    if len(found) != 1:
        what = f"{len(found)} label files ({', '.join(found)})" if found else "no label file"
        raise DataError(
            f"{storage.shown(release)}: found {what}, expected one Data_Entry_2017*.csv; name it in data.labels"
        )
    return storage.join(release, found[0])


def _the_list(release: str, listing: list[str], name: str) -> str:
    if f"{name}.txt" not in listing:
        raise DataError(
            f"{storage.shown(release)}: found no {name}.txt, expected NIH's official list; name it in data.{name}"
        )
    return storage.join(release, f"{name}.txt")
