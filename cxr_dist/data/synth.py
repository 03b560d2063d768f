"""A synthetic NIH-shaped release: drawn chest radiographs with their label file, lists and boxes.

Nobody's images, so it may be made anywhere and shown to anyone; findings are drawn so that a network can learn them.
Nothing measured on it says anything about real radiographs. The same arguments give byte-identical files (with the same
versions of numpy and Pillow).
"""

import io
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_dist.data.synth_film import render_with_boxes
from cxr_dist.data.synth_findings import DRAW, Box
from cxr_dist.errors import ConfigError, DataError

__all__ = ["write_release"]

DRAWING_VERSION = 1
"""Part of a release's identity: raised when the same arguments give other pixels."""

LABEL_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
BOX_NAMES = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Effusion",
    "Infiltration": "Infiltrate",
    "Mass": "Mass",
    "Nodule": "Nodule",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
"""The findings of NIH's box file, under the names it gives them."""

_DETECTORS = ((2500, 2048, 0.171), (2992, 2991, 0.143), (2048, 2500, 0.168), (3056, 2544, 0.139))
_UNFINISHED = "synth.unfinished.json"
_PNG = {"compress_level": 1, "compress_type": 2}
"""Huffman coding alone: grain leaves nothing for string matching to find."""


def write_release(
    directory: str | Path,
    *,
    num_patients: int,
    seed: int,
    findings: Sequence[str] = tuple(DRAW),
    prevalence: float | Mapping[str, float] = 0.12,
    test_fraction: float = 0.23,
    contrast: float = 1.0,
    size: int = 1024,
    processes: int = 0,
) -> dict[str, object]:
    """Write a release under `directory`: images/, Data_Entry_2017.csv, the two lists, BBox_List_2017.csv, synth.json.

    prevalence: part of the images that show a finding, one for all or one each.  test_fraction: part of the patients in
    test_list.txt.  contrast: of the findings, above 0 to 1.  size: side in pixels.  processes: 0 for one per usable CPU.
    Returns counts: images, patients, train_val, test, boxes, positives of each finding, and whether it was there already.
    A complete release of the same arguments is kept, a broken-off one drawn again; DataError where anything else lies.
    """
    rates = {
        name: prevalence if isinstance(prevalence, int | float) else prevalence.get(name, 0.0) for name in findings
    }
    named = set(findings) | (set(prevalence) if isinstance(prevalence, Mapping) else set())
    if unknown := sorted(named - set(DRAW)):
        raise ConfigError(f"findings: found {', '.join(unknown)}, expected names out of {', '.join(DRAW)}")
    if num_patients < 2 or not 0 < test_fraction < 1 or not all(0 <= rate <= 1 for rate in rates.values()):
        raise ConfigError(
            f"num_patients, test_fraction, prevalence: found {num_patients}, {test_fraction}, {prevalence}, "
            "expected 2 or more patients and fractions between 0 and 1"
        )
    if not 0 < contrast <= 1 or not 16 <= size <= 4096:
        raise ConfigError(f"contrast, size: found {contrast}, {size}, expected above 0 to 1 and 16 to 4096 pixels")
    folder = Path(directory)
    arguments = {
        "drawing_version": DRAWING_VERSION,
        "num_patients": num_patients,
        "seed": seed,
        "prevalence": {name: rates[name] for name in DRAW if name in rates},
        "test_fraction": test_fraction,
        "contrast": contrast,
        "size": size,
    }
    kept = _begin(folder, arguments)
    if kept is not None:
        return {**kept, "already_there": True}
    shots = [shot for patient in range(1, num_patients + 1) for shot in _patient(patient, seed, rates, contrast)]
    boxes = _draw_all(shots, folder / "images", size, processes)
    test = _test_patients(num_patients, seed, test_fraction)
    names = {part: [shot.name for shot in shots if (shot.patient in test) == part] for part in (False, True)}
    _put(folder / "Data_Entry_2017.csv", _label_file(shots))
    _put(folder / "BBox_List_2017.csv", _box_file(shots, boxes))
    _put(folder / "train_val_list.txt", "\n".join(names[False]).encode())
    _put(folder / "test_list.txt", "\n".join(names[True]).encode())
    counts: dict[str, object] = {
        "images": len(shots),
        "patients": num_patients,
        "train_val": len(names[False]),
        "test": len(names[True]),
        "boxes": sum(box.finding in BOX_NAMES for of_image in boxes for box in of_image),
        "positives": {name: sum(name in shot.findings for shot in shots) for name in DRAW if name in rates},
    }
    _put(folder / "synth.json", json.dumps({"arguments": arguments, "counts": counts}, indent=1).encode())
    (folder / _UNFINISHED).unlink()
    return {**counts, "already_there": False}


@dataclass(frozen=True)
class _Shot:
    """One image of the release before it is drawn."""

    name: str
    patient: int
    follow_up: int
    age: int
    sex: str
    view: str
    findings: tuple[str, ...]
    detector: tuple[int, int, float]
    seed: int
    anatomy_seed: int
    contrast: float


def _hash(seed: int, what: str) -> int:
    return int.from_bytes(blake2b(f"{seed}:{what}".encode(), digest_size=8).digest(), "big")


def _patient(patient: int, seed: int, rates: Mapping[str, float], contrast: float) -> list[_Shot]:
    """One to six images of a patient; a finding that changes does so half as often as chance would have it."""
    anatomy_seed = _hash(seed, f"patient {patient}")
    rng = np.random.default_rng(anatomy_seed)
    sex, age = str(rng.choice(("M", "F"), p=(0.56, 0.44))), int(np.clip(rng.normal(47, 17), 5, 92))
    count = int(rng.choice(6, p=(0.40, 0.22, 0.14, 0.10, 0.08, 0.06))) + 1
    rate = np.array([rates.get(name, 0.0) for name in DRAW])
    present = rng.random(len(DRAW)) < rate
    shots = []
    for follow_up in range(count):
        if follow_up:
            redrawn = rng.random(len(DRAW)) < 0.5
            present = np.where(redrawn, rng.random(len(DRAW)) < rate, present)
            age += int(rng.random() < 0.3)
        name = f"{patient:08d}_{follow_up:03d}.png"
        shots.append(
            _Shot(
                name=name,
                patient=patient,
                follow_up=follow_up,
                age=age,
                sex=sex,
                view="AP" if rng.random() < 0.35 else "PA",
                findings=tuple(finding for finding, shown in zip(DRAW, present, strict=True) if shown),
                detector=_DETECTORS[int(rng.integers(len(_DETECTORS)))],
                seed=_hash(seed, name),
                anatomy_seed=anatomy_seed,
                contrast=contrast * rng.uniform(0.75, 1.0),
            )
        )
    return shots


def _begin(folder: Path, arguments: Mapping[str, object]) -> dict[str, object] | None:
    """Claim the folder for these arguments; the counts of a release that is complete already, else None."""
    finished, unfinished = folder / "synth.json", folder / _UNFINISHED
    for path in (finished, unfinished):
        if path.exists():
            found = json.loads(path.read_bytes())
            if found["arguments"] != arguments:
                differing = sorted(key for key in arguments if found["arguments"].get(key) != arguments[key])
                raise DataError(
                    f"{path}: found a synthetic release with another {', '.join(differing)}, expected the same arguments; "
                    "choose another directory or delete this one"
                )
            if path == finished:
                return dict(found["counts"])
    if not unfinished.exists():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder}: found files that are no synthetic release, expected an empty or new directory")
        (folder / "images").mkdir(parents=True)
        _put(unfinished, json.dumps({"arguments": arguments}).encode())
    return None


def _draw_all(shots: Sequence[_Shot], images: Path, size: int, processes: int) -> list[list[Box]]:
    """Draw and write every image; the boxes of each."""
    images.mkdir(parents=True, exist_ok=True)
    draw = partial(_draw, images=images, size=size)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(processes or usable, -(-len(shots) // 32))
    if workers <= 1:
        return [draw(shot) for shot in shots]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(draw, shots, chunksize=8)


def _draw(shot: _Shot, images: Path, size: int) -> list[Box]:
    pixels, boxes = render_with_boxes(
        shot.seed,
        shot.findings,
        shot.view,
        shot.sex,
        shot.age,
        size,
        anatomy_seed=shot.anatomy_seed,
        contrast=shot.contrast,
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **_PNG)
    _put(images / shot.name, buffer.getvalue())
    return boxes


def _put(path: Path, data: bytes) -> None:
    """Write the whole file or none of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _label_file(shots: Sequence[_Shot]) -> bytes:
    rows = [LABEL_HEADER]
    for shot in shots:
        width, height, spacing = shot.detector
        labels = "|".join(shot.findings) or "No Finding"
        rows.append(
            f"{shot.name},{labels},{shot.follow_up},{shot.patient},{shot.age},{shot.sex},{shot.view},"
            f"{width},{height},{spacing},{spacing}"
        )
    return ("\n".join(rows) + "\n").encode()


def _box_file(shots: Sequence[_Shot], boxes: Sequence[Sequence[Box]]) -> bytes:
    rows = [BOX_HEADER] + [
        f"{shot.name},{BOX_NAMES[box.finding]},{box.x},{box.y},{box.width},{box.height}"
        for shot, of_image in zip(shots, boxes, strict=True)
        for box in of_image
        if box.finding in BOX_NAMES
    ]
    return ("\n".join(rows) + "\n").encode()


def _test_patients(num_patients: int, seed: int, fraction: float) -> set[int]:
    """The patients of the test list: those with the lowest hashes, at least one and never all."""
    order = sorted(range(1, num_patients + 1), key=lambda patient: _hash(seed, f"test {patient}"))
    return set(order[: min(num_patients - 1, max(1, round(fraction * num_patients)))])
