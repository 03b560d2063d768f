"""Where a checkpoint looks: heat maps of its surest images per finding, and how well they find drawn boxes.

Which images are shown is a function of the score table alone. Their pixels are read by name out of the dataset, and the
maps computed in this process, in fp32: a few hundred images are seconds.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_dist import storage
from cxr_dist.config import Config
from cxr_dist.data.boxes import Box, given_boxes
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.picked import picked_images
from cxr_dist.evaluate.inference import load_network
from cxr_dist.evaluate.localise import Key, localise
from cxr_dist.evaluate.overlay import overlay, thumbnail
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.thresholds import DEFAULT_THRESHOLD, fit
from cxr_dist.model.gradcam import cams
from cxr_dist.model.network import Network
from cxr_dist.scrub import scrub

__all__ = ["FORMAT", "KINDS", "Pick", "Picture", "add_saliency", "pick"]

FORMAT = "cxr-dist/saliency/1"
FOLDER = "saliency"

Kind = Literal["true positive", "false positive", "false negative"]
KINDS: tuple[Kind, ...] = ("true positive", "false positive", "false negative")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pick:
    """An image to be shown for a finding, and what the model said of it."""

    finding: str
    image_id: str
    probability: float
    label: bool
    kind: Kind


class Picture(TypedDict):
    """A pick as a report shows it; no overlay where the map is zero everywhere: nothing speaks for the finding."""

    finding: str
    image_id: str
    probability: float
    label: bool
    kind: Kind
    thumbnail_png: bytes
    overlay_png: bytes | None


def add_saliency(
    directory: str | Path, config: Config, checkpoint_uri: str, judged: ScoreTable, validation: ScoreTable | None
) -> list[Picture]:
    """Write saliency/FINDING/KIND_NUMBER_IMAGE.png, saliency.json and, where boxes are given, localisation.json into a
    report's directory, and return the pictures, the surest of a kind first.

    `judged` is the table that is reported, of images at `config.data.uri`; thresholds are those of Youden's J on
    `validation`, 0.5 where there are none. What fails here is logged, written to saliency.json, and no error: the report
    of a trained run is worth more than its pictures.
    """
    folder = Path(directory)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear(folder)
        if not config.evaluate.saliency and not config.evaluate.boxes:
            return []
        return _write(folder, config, checkpoint_uri, judged, fit(validation) if validation is not None else {})
    except Exception as error:  # noqa: BLE001 - whatever it is, the report goes on without
        reason = scrub(f"{type(error).__name__}: {' '.join(str(error).split())}")[:500]
        log.warning("no saliency in this report (%s); jobs/evaluate.py --checkpoint makes it again", reason)
        with contextlib.suppress(OSError):
            _clear(folder)
            _write_json(folder / "saliency.json", {"format": FORMAT, "error": reason, "images": []})
        return []


def pick(scores: ScoreTable, thresholds: Mapping[str, float], count: int) -> list[Pick]:
    """The surest images of each finding and kind, at most `count` of each, of a patient one.

    True and false positives are called present (probability >= threshold), the most probable first; false negatives are
    not, the least probable first. Equal ones come by image id: the order of the table's rows is of no account.
    """
    picks = []
    for k, finding in enumerate(scores.findings):
        probability, label = scores.probabilities_NK[:, k], scores.labels_NK[:, k]
        called = probability >= thresholds[finding]
        of_kind = (label & called, ~label & called, label & ~called)
        for kind, of, sign in zip(KINDS, of_kind, (-1, -1, 1), strict=True):
            rows = np.flatnonzero(of)
            rows = rows[np.lexsort((scores.image_ids[rows], sign * probability[rows]))]
            _, first = np.unique(scores.patient_ids[rows], return_index=True)
            picks += [
                Pick(
                    finding=finding,
                    image_id=str(scores.image_ids[row]),
                    probability=float(probability[row]),
                    label=bool(label[row]),
                    kind=kind,
                )
                for row in rows[np.sort(first)][:count]
            ]
    return picks


def _clear(folder: Path) -> None:
    """Take away what an earlier report, or half of this one, left in the directory."""
    for name in ("saliency.json", "localisation.json"):
        (folder / name).unlink(missing_ok=True)
    for picture in (folder / FOLDER).glob("*/*_*_*.png"):
        picture.unlink()


def _write(
    folder: Path, config: Config, checkpoint_uri: str, judged: ScoreTable, fitted: Mapping[str, Any]
) -> list[Picture]:
    """`add_saliency`, with errors."""
    thresholds = {}
    for finding in judged.findings:
        value = (fitted.get(finding) or {}).get("youden")
        thresholds[finding] = DEFAULT_THRESHOLD if value is None else value
    picks = pick(judged, thresholds, config.evaluate.saliency)
    given = given_boxes(config.evaluate)
    row_of = {image_id: row for row, image_id in enumerate(judged.image_ids.tolist())}
    boxes = [box for box in given if box.image_id in row_of and box.finding in judged.findings]
    wanted: dict[str, dict[str, None]] = {}
    for image_id, finding in [(one.image_id, one.finding) for one in picks] + [
        (box.image_id, box.finding) for box in boxes
    ]:
        wanted.setdefault(image_id, {})[finding] = None

    maps: dict[Key, NDArray[np.float32]] = {}
    pixels: dict[str, NDArray[np.uint8]] = {}
    shown = {one.image_id for one in picks}
    if wanted:
        network = load_network(checkpoint_uri, torch.device("cpu"), precision="fp32")
        manifest = Manifest.load(config.data.uri)
        for images in picked_images(manifest, judged.split, wanted, config.data):
            maps.update(_maps(network, images, wanted, judged.findings))
            pixels.update((image_id, image) for image_id, image in images.items() if image_id in shown)

    pictures = [_picture(one, pixels[one.image_id], maps[one.image_id, one.finding], boxes) for one in picks]
    _write_pictures(folder, config, checkpoint_uri, judged.split, pictures, thresholds)
    if config.evaluate.boxes:
        patients = {box.image_id: int(judged.patient_ids[row_of[box.image_id]]) for box in boxes}
        found = localise(maps, boxes, patients, judged.findings)
        _write_json(
            folder / "localisation.json",
            {
                "format": "cxr-dist/localisation/1",
                "split": judged.split,
                "checkpoint": storage.shown(checkpoint_uri),
                "boxes": storage.shown(config.evaluate.boxes),
                "n_boxes": len(given),
                "n_used": len(boxes),
                "n_other_images": sum(box.image_id not in row_of for box in given),
                "n_other_findings": sum(box.image_id in row_of and box.finding not in judged.findings for box in given),
                "map": list(next(iter(maps.values())).shape) if maps else None,
                "findings": found,
            },
        )
        print(_table(found))
    return pictures


def _maps(
    network: Network,
    images: Mapping[str, NDArray[np.uint8]],
    wanted: Mapping[str, Mapping[str, None]],
    findings: Sequence[str],
) -> Iterator[tuple[Key, NDArray[np.float32]]]:
    """The map of each of these images and of each finding that is wanted of it."""
    pairs = [(image_id, finding, image) for image_id, image in images.items() for finding in wanted[image_id]]
    columns = np.array([findings.index(finding) for _, finding, _ in pairs], np.int64)
    heat = cams(network, np.stack([image for *_, image in pairs]), columns)
    return (((image_id, finding), one) for (image_id, finding, _), one in zip(pairs, heat, strict=True))


def _picture(one: Pick, image: NDArray[np.uint8], heat: NDArray[np.float32], boxes: Sequence[Box]) -> Picture:
    of = [box for box in boxes if (box.image_id, box.finding) == (one.image_id, one.finding)]
    return {
        "finding": one.finding,
        "image_id": one.image_id,
        "probability": one.probability,
        "label": one.label,
        "kind": one.kind,
        "thumbnail_png": thumbnail(image),
        "overlay_png": overlay(image, heat, of) if heat.any() else None,
    }


def _write_pictures(
    folder: Path,
    config: Config,
    checkpoint_uri: str,
    split: str,
    pictures: Sequence[Picture],
    thresholds: Mapping[str, float],
) -> None:
    images, number = [], 0
    previous: tuple[str, str] | None = None
    for picture in pictures:
        number = number + 1 if previous == (picture["finding"], picture["kind"]) else 1
        previous = picture["finding"], picture["kind"]
        path = None
        if picture["overlay_png"] is not None:
            stem = Path(picture["image_id"]).stem
            path = f"{FOLDER}/{picture['finding']}/{picture['kind'].replace(' ', '_')}_{number}_{stem}.png"
            (folder / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / path).write_bytes(picture["overlay_png"])
        facts = {key: value for key, value in picture.items() if not key.endswith("_png")}
        images.append({**facts, "overlay": path})
    _write_json(
        folder / "saliency.json",
        {
            "format": FORMAT,
            "error": None,
            "method": "Grad-CAM of the finding's logit at the last feature map, each map over its own maximum",
            "split": split,
            "checkpoint": storage.shown(checkpoint_uri),
            "thresholds": dict(thresholds),
            "images": images,
        },
    )


def _table(found: Mapping[str, Any]) -> str:
    """The pointing game and the accuracy at two thresholds, as text for a terminal."""
    lines = [f"{'finding':<18}  boxes  pointing  95 % interval  chance  IoU > 0.1  IoU > 0.5"]
    for finding, one in found.items():
        if one["pointing"] is None:
            lines.append(f"{finding:<18}  {0:>5}  {one['reason']}")
            continue
        game, iou = one["pointing"], one["iou"]
        lines.append(
            f"{finding:<18}  {one['n_boxes']:>5}  {game['value']:>8.3f}  {game['lower']:.3f} - {game['upper']:.3f}  "
            f"{game['chance']:>6.3f}  {iou['0.1']['value']:>9.3f}  {iou['0.5']['value']:>9.3f}"
        )
    return "\n".join(lines)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
