"""Which images are predicted, and how their files are read."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist.config import DataConfig
from cxr_dist.data.plan import Split
from cxr_dist.data.rows import CORRUPT, OK, PADDING, Journal, RowDecoder
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.predict import source
from cxr_dist.predict.source import ImageReader, digest_of, list_images, open_source
from cxr_dist.predict.workers import without_long
from tests.predicting import write_images
from tests.releases import noise, png


def test_images_of_a_prefix_are_all_png_and_jpg_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.PNG", "a/b/c.jpeg", "a.jpg", "notes.txt", ".hidden.png", ".git/x.png", "__MACOSX/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found = open_source(str(tmp_path), None, DataConfig(), size=224)
    names = ["a.jpg", "a/b/c.jpeg", "a/z.PNG", "b.png"]
    assert (found.kind, found.num_images, found.split, found.uri) == ("prefix", 4, "", str(tmp_path))
    [section] = found.sections
    assert section.image_ids.to_pylist() == names
    assert [section.uri(row) for row in range(4)] == [f"{tmp_path}/{name}" for name in names]
    assert found.listing.to_pydict() == {"image_id": names, "bytes": [5, 10, 7, 5]}
    assert found.sha256 == digest_of(found.listing)


def test_no_images_and_no_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    for uri, count in ((tmp_path, 1), (tmp_path / "none", 0)):
        with pytest.raises(DataError, match=f"found no images among {count} files, expected .png, .jpg, .jpeg"):
            list_images(str(uri))
    with pytest.raises(DataError, match=r"images.tar.gz: cannot be listed|found no images"):
        list_images(str(tmp_path / "images.tar.gz"))


def test_a_split_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"--split: found 'test' for .*, which has no manifest\.json"):
        open_source(str(tmp_path), "test", DataConfig(), size=224)


def reader_of(folder: Path) -> tuple[ImageReader, list[str]]:
    listing = list_images(str(folder))
    return ImageReader.of(str(folder), listing, digest_of(listing)), listing["image_id"].to_pylist()


def test_images_are_read_as_they_lie_in_pieces_of_bounded_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_images(tmp_path, 9)
    (tmp_path / "empty.png").write_bytes(b"")
    files["empty.png"] = b""
    sizes = {name: len(data) for name, data in files.items()}
    monkeypatch.setattr(source, "RUN_BYTES", 2 * max(sizes.values()) + 1)
    reader, names = reader_of(tmp_path)
    tables = list(reader.stream([np.arange(7), np.array([9, 8, 7])]))
    read = pa.concat_tables(tables)
    order = [*names[:7], names[9], names[8], names[7]]
    assert read["image_id"].to_pylist() == order
    assert read["image"].to_pylist() == [files[name] for name in order]
    assert [len(table) for table in tables[:3]] == [2, 2, 2]
    assert max(sum(map(len, table["image"].to_pylist())) for table in tables) <= source.RUN_BYTES
    assert reader.read(np.array([3]))["image_id"].to_pylist() == [names[3]]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"short")])
def test_a_file_that_changed_since_the_listing_is_an_error(tmp_path: Path, damage) -> None:
    write_images(tmp_path, 2)
    reader, names = reader_of(tmp_path)
    damage(tmp_path / names[1])
    with pytest.raises(DataError, match=names[1] + ".*the folder changed since it was listed; .* give another --out"):
        reader.read(np.array([0, 1]))


def test_a_file_too_long_for_an_image_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 300 MB, and one with a whole image at its start."""
    write_images(tmp_path, 2)
    with open(tmp_path / "long.png", "wb") as file:
        os.truncate(file.fileno(), 300 << 20)
    with open(tmp_path / "tail.png", "wb") as file:
        file.write(png(noise(1, 24)))
        os.truncate(file.fileno(), 257 << 20)
    reader, names = reader_of(tmp_path)
    assert [len(data) for data in reader.read(np.array([2, 3]))["image"].to_pylist()] == [source.READ_LONG] * 2
    decoder = RowDecoder(
        source=reader, split=Split(num_rows=len(names), row_group=1), size=16, encoding="png", findings=(0,)
    )
    with Journal("predict-long", 0) as journal:
        rows = decoder.rows(np.array([0, 2, 3, -1]), journal)
    marked = without_long(rows, reader.ranges.file_bytes)
    assert marked["state"].to_pylist() == [OK, CORRUPT, CORRUPT, PADDING]
    limit = f"more than the {256 << 20} that are read"
    assert marked["reason"].to_pylist() == [None, f"{300 << 20} bytes, {limit}", f"{257 << 20} bytes, {limit}", None]
