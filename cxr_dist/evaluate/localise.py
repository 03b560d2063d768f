"""How well heat maps find the boxes that a radiologist drew: the pointing game, and boxes against boxes at thresholds.

Pointing game (Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016): of the images with a finding's
boxes, the part whose map has its maximum in one of them; no tolerance. Boxes against boxes (Wang et al., ChestX-ray8,
CVPR 2017): a map times 255 is cut at 60 and at 180, the boxes around the connected regions of both are the computed ones,
and a drawn box is found if a computed one has an overlap with it above T: intersection over union (IoU), or over the
computed box alone (IoBB). docs/saliency.md says what of the paper this is and what not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cxr_dist.data.boxes import Box
from cxr_dist.model.gradcam import upsampled

__all__ = ["IOBB", "IOU", "computed_boxes", "localise", "point", "wilson"]

IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
IOBB = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The paper's thresholds, of its supplement and of its table 4."""
CUTS = (60 / 255, 180 / 255)
GRID = 512
"""Side that maps are drawn at before they are cut: two pixels of an NIH image."""
Z = 1.959963984540054
"""Of a 95 % interval."""

Floats = NDArray[np.float64]
Key = tuple[str, str]
"""Image id, finding."""


def localise(
    maps: Mapping[Key, NDArray[np.float32]],
    boxes: Sequence[Box],
    patients: Mapping[str, int],
    findings: Sequence[str],
) -> dict[str, Any]:
    """The figures of each of the findings, as plain JSON types; None where there is no box, with the reason.

    `maps` holds the heat [h, w] of each image and finding that any of the boxes is of. Intervals are Wilson's at 95 %, with
    (sum m)^2 / (sum m^2) trials, m being a patient's: as many as there are patients, if each has the same number. That is
    right if all that is a patient's hits or misses together, and too wide, never too narrow, if it does not.
    """
    return {finding: _finding(finding, maps, boxes, patients) for finding in findings}


def point(heat_hw: NDArray[np.float32]) -> tuple[float, float] | None:
    """x and y of the centre of the map's greatest cell (where a bilinear enlargement of it is greatest), in parts of the
    image's side; the first in reading order of equal ones, None for a map of zeros."""
    if not heat_hw.max() > 0:
        return None
    row, column = np.unravel_index(int(heat_hw.argmax()), heat_hw.shape)
    return (int(column) + 0.5) / heat_hw.shape[1], (int(row) + 0.5) / heat_hw.shape[0]


def computed_boxes(heat_hw: NDArray[np.float32]) -> Floats:
    """Boxes [M, 4] (left, top, right, bottom in parts of the side) around the regions above each cut, each box once.

    Regions touch along edges, not corners. None for a map of zeros.
    """
    large = upsampled(heat_hw, GRID)
    found: dict[tuple[float, ...], None] = {}
    for cut in CUTS:
        regions, _ = ndimage.label(large > cut)
        for rows, columns in ndimage.find_objects(regions):
            found[(columns.start / GRID, rows.start / GRID, columns.stop / GRID, rows.stop / GRID)] = None
    return np.array(list(found)).reshape(-1, 4)


def wilson(hits: int, n: int, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of hits / n, as if from `trials` independent ones."""
    part = hits / n
    centre = (part + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(part * (1 - part) / trials + Z**2 / (4 * trials**2))
    return max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < n else 1.0


def _finding(
    finding: str, maps: Mapping[Key, NDArray[np.float32]], boxes: Sequence[Box], patients: Mapping[str, int]
) -> dict[str, Any]:
    drawn: dict[str, list[tuple[float, float, float, float]]] = {}
    for box in boxes:
        if box.finding == finding:
            drawn.setdefault(box.image_id, []).append((box.left, box.top, box.right, box.bottom))
    counts = {"n_boxes": sum(map(len, drawn.values())), "n_images": len(drawn)}
    counts["n_patients"] = len({patients[image_id] for image_id in drawn})
    if not drawn:
        return {**counts, "pointing": None, "iou": None, "iobb": None, "reason": "no boxes in the images judged"}
    of_image = [patients[image_id] for image_id in drawn]
    truth = [np.array(of) for of in drawn.values()]
    heat = [maps[image_id, finding] for image_id in drawn]
    overlaps = [_overlaps(computed_boxes(one), of) for one, of in zip(heat, truth, strict=True)]
    of_box = [patient for patient, of in zip(of_image, truth, strict=True) for _ in of]
    return {
        **counts,
        "pointing": _pointing(heat, truth, of_image),
        "iou": {f"{cut:g}": _accuracy([iou > cut for iou, _ in overlaps], of_box) for cut in IOU},
        "iobb": {f"{cut:g}": _accuracy([iobb > cut for _, iobb in overlaps], of_box) for cut in IOBB},
        "reason": None,
    }


def _pointing(heat: list[NDArray[np.float32]], truth: list[Floats], patients: list[int]) -> dict[str, Any]:
    """The pointing game, and what there is to beat: a cell at random, and the image's centre.

    reachable: the part of the images where any cell's centre lies in a box; no map of this size can hit the others.
    """
    hit = [(at := point(one)) is not None and _inside(at, of) for one, of in zip(heat, truth, strict=True)]
    height, width = heat[0].shape
    centres = [((x + 0.5) / width, (y + 0.5) / height) for y in range(height) for x in range(width)]
    cells = np.array([[_inside(at, of) for at in centres] for of in truth])
    return {
        **_rate(np.array(hit), patients),
        "chance": float(cells.mean()),
        "centre": float(np.mean([_inside((0.5, 0.5), of) for of in truth])),
        "reachable": float(cells.any(axis=1).mean()),
    }


def _accuracy(enough: list[NDArray[np.bool_]], patients: list[int]) -> dict[str, Any]:
    """Drawn boxes found, and the computed boxes per image that find none; `enough` is [computed, drawn] of each image."""
    found = np.concatenate([of.any(axis=0) for of in enough])
    wrong = sum(int((~of.any(axis=1)).sum()) for of in enough)
    return {**_rate(found, patients), "false_positives": wrong / len(enough)}


def _rate(hit: NDArray[np.bool_], patients: list[int]) -> dict[str, Any]:
    hits, n = int(hit.sum()), len(hit)
    _, times = np.unique(patients, return_counts=True)
    lower, upper = wilson(hits, n, n**2 / int((times**2).sum()))
    return {"hits": hits, "n": n, "value": hits / n, "lower": lower, "upper": upper}


def _inside(at: tuple[float, float], boxes_M4: Floats) -> bool:
    x, y = at
    left, top, right, bottom = boxes_M4.T
    return bool(((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any())


def _overlaps(computed_M4: Floats, drawn_K4: Floats) -> tuple[Floats, Floats]:
    """IoU and IoBB [M, K]."""
    one, other = computed_M4[:, None], drawn_K4[None]
    width = np.minimum(one[..., 2], other[..., 2]) - np.maximum(one[..., 0], other[..., 0])
    height = np.minimum(one[..., 3], other[..., 3]) - np.maximum(one[..., 1], other[..., 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    area, drawn = (np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1) for boxes in (one, other))
    return common / (area + drawn - common), common / np.broadcast_to(area, common.shape)
