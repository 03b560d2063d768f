"""The boxes that NIH's radiologist drew: `BBox_List_2017.csv`, 984 boxes of eight findings in 880 test images.

The file's header is broken as shipped (`Bbox [x,y,w,h],,,` in one row of CSV makes seven cells, `[x` to three empty ones)
and it calls Infiltration `Infiltrate`. Its coordinates are pixels of the PNG files of the release, 1024 x 1024 whatever
the radiograph's own size was (`OriginalImage[Width,Height]` of the label CSV is of no use here): x and y of the upper left
corner, width, height. A `Box` holds them as parts of the image's side, so that they are right at any size.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cxr_dist import storage
from cxr_dist.config import EvaluateConfig
from cxr_dist.data import texts
from cxr_dist.data.nih import FINDINGS
from cxr_dist.errors import DataError

__all__ = ["NIH_SIDE", "Box", "given_boxes", "read_boxes"]

NIH_SIDE = 1024
"""Side of the images that NIH's coordinates are pixels of."""

_HEADER = ("image index", "finding label", "bbox [x", "y", "w", "h]")
_COLUMNS = ("Image Index", "Finding Label", "x", "y", "w", "h")
_OTHER_NAMES = {"Infiltrate": "Infiltration"}
_NUMBER = re.compile(r"-?\d{1,9}(\.\d*)?([eE][-+]?\d{1,2})?")


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a finding is seen in an image; edges in parts of the image's side, from its upper left corner."""

    image_id: str
    finding: str
    left: float
    top: float
    right: float
    bottom: float


def given_boxes(config: EvaluateConfig) -> tuple[Box, ...]:
    """The boxes at `evaluate.boxes`; none if it is empty. DataError if they are not there or cannot be read."""
    if not config.boxes:
        return ()
    where = f"evaluate.boxes {storage.shown(config.boxes)}"
    try:
        data = storage.read_bytes(config.boxes)
    except FileNotFoundError:
        raise DataError(
            f"{where}: found no file, expected NIH's BBox_List_2017.csv; correct the URI or leave it empty"
        ) from None
    return read_boxes(data, where, config.box_side)


def read_boxes(data: bytes, name: str, side: int = NIH_SIDE) -> tuple[Box, ...]:
    """The boxes of a `BBox_List_2017.csv`, plain or gzipped, in its order; `side` is that of the images it speaks of.

    `name` is what errors call the file. DataError for other columns, an unknown finding, a number that is none, a box
    without area or beyond the image, and one that is there twice, each with its row (the header being row 1) and column.
    """
    text, _ = texts.decode(data, name)
    rows = texts.csv_rows(text, name)
    header = [cell.strip().lower() for cell in next(rows, [])]
    if tuple(header[: len(_HEADER)]) != _HEADER or any(header[len(_HEADER) :]):
        raise DataError(
            f"{name}: row 1: found columns {texts.shown(','.join(header))}, expected NIH's Image Index, Finding Label, "
            "Bbox [x,y,w,h]; give BBox_List_2017.csv"
        )
    seen: dict[Box, int] = {}
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < len(_HEADER) or any(cell.strip() for cell in row[len(_HEADER) :]):
            raise DataError(f"{name}: row {number}: found {len(row)} columns, expected 6; mend the row")
        box = _box(row, side, f"{name}: row {number}")
        if seen.setdefault(box, number) != number:
            raise DataError(f"{name}: row {number}: found the box of row {seen[box]} again; keep one of them")
    if not seen:
        raise DataError(f"{name}: found a header and no rows, expected one row a box")
    return tuple(seen)


def _box(row: Sequence[str], side: int, where: str) -> Box:
    image_id = texts.image_name(row[0], f"{where}, column Image Index")
    x, y, width, height = (_pixels(cell, where, column) for cell, column in zip(row[2:6], _COLUMNS[2:], strict=True))
    for column, start, extent, of in (("w", x, width, "x"), ("h", y, height, "y")):
        if extent <= 0:
            raise DataError(f"{where}, column {column}: found {extent:g} pixels, expected more than 0; mend the row")
        if start + extent > side:
            raise DataError(
                f"{where}, columns {of} and {column}: found a box that ends at {start + extent:g}, expected {side} pixels at "
                "most; mend the row, or give evaluate.box_side as the boxes' images have it"
            )
    return Box(
        image_id=image_id,
        finding=_finding(row[1].strip(), where),
        left=x / side,
        top=y / side,
        right=(x + width) / side,
        bottom=(y + height) / side,
    )


def _finding(cell: str, where: str) -> str:
    finding = _OTHER_NAMES.get(cell, cell)
    if finding not in FINDINGS:
        near = difflib.get_close_matches(cell, FINDINGS, n=1, cutoff=0.0)[0]
        raise DataError(f"{where}, column Finding Label: found {texts.shown(cell)}, expected a finding such as {near}")
    return finding


def _pixels(cell: str, where: str, column: str) -> float:
    cell = cell.strip()
    if not _NUMBER.fullmatch(cell) or float(cell) < 0:
        raise DataError(f"{where}, column {column}: found {texts.shown(cell)}, expected a number of pixels from 0 on")
    return float(cell)
