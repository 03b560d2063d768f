"""NIH's fourteen findings, drawn into a scene so that each resembles its namesake.

A finding first may reshape the body (`reshape`: a wider heart, a raised diaphragm), then alters the scene (`DRAW`): it
takes air away (opacities), adds air (pneumothorax, emphysema) or draws tissue. Each returns the boxes of what it drew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cxr_dist.data.synth_anatomy import Body, Grid, Scene, noise, step

__all__ = ["DRAW", "Box", "reshape"]


@dataclass(frozen=True)
class Box:
    """Where a finding was drawn: left, top, width, height in pixels."""

    finding: str
    x: float
    y: float
    width: float
    height: float

    def scaled(self, factor: float) -> "Box":
        """The same box in an image `factor` times as large."""
        return Box(self.finding, self.x * factor, self.y * factor, self.width * factor, self.height * factor)


def reshape(finding: str, body: Body, rng: np.random.Generator, contrast: float) -> None:
    """Change the patient's build as the finding does; most findings leave it as it is."""
    if finding == "Cardiomegaly":
        body.heart *= 1 + contrast * rng.uniform(0.32, 0.55)
    elif finding == "Emphysema":
        body.air *= 1 + 0.16 * contrast
        body.vessels *= 1 - 0.55 * contrast
        body.dome = (body.dome[0] * (1 - 0.75 * contrast), body.dome[1] * (1 - 0.75 * contrast))
        body.heart *= 1 - 0.18 * contrast
        body.half_width *= 1 + 0.05 * contrast
    elif finding == "Fibrosis":
        body.base = (body.base[0] - 0.05 * contrast, body.base[1] - 0.05 * contrast)
    elif finding == "Edema":
        body.heart *= 1 + 0.15 * contrast
        body.vessels *= 1 + 0.25 * contrast


def _box(finding: str, mask: Grid) -> list[Box]:
    """The box around the pixels where the mask is above a third of its peak; none for an empty mask."""
    seen = mask > max(0.05, float(mask.max()) / 3)
    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    if columns.size == 0:
        return []
    left, top = int(columns[0]), int(rows[0])
    return [Box(finding, left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)]


def _fill(scene: Scene, mask: Grid, amount: float) -> None:
    """Fill the masked part of the lung: its air, and with it its vessels, go."""
    keep = 1 - np.clip(mask * amount, 0, 1)
    scene.air *= keep
    scene.vessels *= keep


def _clouds(rng: np.random.Generator, cells: int, sharpness: float) -> Grid:
    """Patches between 0 and 1."""
    return step(noise(rng, cells) + 0.5 * noise(rng, 2 * cells), 1 / sharpness)


def _ellipse(scene: Scene, x: float, y: float, rx: float, ry: float, edge: float) -> Grid:
    """A soft ellipse in anatomy units; `edge` is the part of the radius over which it fades."""
    return step(1 - np.hypot((scene.x - x) / rx, (scene.y - y) / ry), edge)


def _pneumothorax(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    body, distance = scene.body, np.abs(scene.x)
    gap = rng.uniform(0.055, 0.11)
    top = body.apex + 1.2 * gap
    edge = body.outer(np.maximum(scene.y - gap, body.apex)) - gap
    inside = np.minimum(edge - distance, scene.y - top)
    lower = step(rng.uniform(0.62, 0.75) - scene.y, 0.06)
    rim = scene.cavity[left] * step(-inside, 0.004) * lower * step(distance - 0.07, 0.02)
    lung = scene.cavity[left] * step(inside, 0.004) * lower
    line = np.exp(-((inside / 0.0035) ** 2)) * scene.cavity[left] * lower
    scene.air *= 1 - 0.16 * contrast * lung
    scene.air += contrast * rim * (1.16 - scene.air)
    scene.vessels *= 1 - contrast * rim
    scene.tissue += 0.10 * contrast * line
    return _box("Pneumothorax", rim)


def _round(
    finding: str, scene: Scene, rng: np.random.Generator, contrast: float, radius: tuple[float, float], count: int
) -> list[Box]:
    boxes = []
    for _ in range(count):
        left = int(rng.integers(2))
        x, y = scene.lung_point(rng, left, 0.2, 0.95)
        size = rng.uniform(*radius)
        angle = np.arctan2(scene.y - y, scene.x - x)
        wobble = 1 + 0.08 * np.sin(2 * angle + rng.uniform(0, 6.3)) + 0.025 * np.sin(3 * angle + rng.uniform(0, 6.3))
        mask = step(1 - np.hypot(scene.x - x, scene.y - y) / (size * wobble), 0.0045 / size)
        scene.vessels *= 1 - mask * contrast
        scene.tissue += contrast * rng.uniform(0.24, 0.32) * mask * np.clip(scene.air + 0.15, 0, 1)
        boxes += _box(finding, mask)
    return boxes


def _mass(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    return _round("Mass", scene, rng, contrast, (0.055, 0.090), 1)


def _nodule(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    return _round("Nodule", scene, rng, contrast, (0.020, 0.032), int(rng.integers(2, 6)))


def _atelectasis(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    sign = 1 if left else -1
    body, along = scene.body, np.abs(scene.x)
    floor = body.base[left] - body.dome[left]
    lift = rng.uniform(0.06, 0.11)
    raised = scene.cavity[left] * step(scene.y - body.diaphragm(along, left) + lift, 0.006)
    _fill(scene, raised, contrast)
    total = raised
    for index in range(int(rng.integers(2, 4))):
        y = floor - lift - rng.uniform(0.03, 0.05) - 0.055 * index
        x, tilt = rng.uniform(0.16, 0.24), rng.uniform(-0.45, 0.1)
        off = scene.y - y - tilt * (along - x)
        reach = step(rng.uniform(0.08, 0.14) - np.abs(along - x), 0.02)
        plate = step(rng.uniform(0.007, 0.012) - np.abs(off), 0.004) * reach * scene.cavity[left]
        scene.tissue += 0.22 * contrast * plate * scene.air
        total = np.maximum(total, plate)
    wedge = scene.cavity[left] * step(floor - lift + 0.02 - scene.y, 0.02)
    wedge = wedge * step(scene.y - (floor - lift - 0.22) - 1.1 * np.maximum(sign * scene.x - 0.06, 0), 0.02)
    _fill(scene, wedge, 0.55 * contrast)
    return _box("Atelectasis", total)


def _consolidation(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    x, y = scene.lung_point(rng, left, 0.25, 0.85)
    rx, ry = rng.uniform(0.13, 0.18), rng.uniform(0.10, 0.14)
    ragged = 0.22 * noise(rng, 12)
    mask = step(1 - np.hypot((scene.x - x) / rx, (scene.y - y) / ry) + ragged, 0.14) * scene.cavity[left]
    _fill(scene, mask, 0.86 * contrast)
    angle = np.arctan2(scene.y - y + 0.03, np.abs(scene.x) - 0.05)
    tubes = np.maximum(np.sin(angle * 13 + rng.uniform(0, 6.3)), 0) ** 6
    scene.tissue -= 0.05 * contrast * tubes * mask
    return _box("Consolidation", mask)


def _infiltration(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    patches = _clouds(rng, 11, 2.2) * (0.55 + 0.45 * _clouds(rng, 34, 2.0))
    total = np.zeros_like(scene.air)
    for left in (0, 1):
        x, y = scene.lung_point(rng, left, 0.35, 0.8)
        total += scene.cavity[left] * np.exp(-(((scene.x - x) / 0.16) ** 2) - ((scene.y - y) / 0.20) ** 2)
    mask = np.asarray(total * patches, np.float32)
    scene.air *= 1 - 0.75 * contrast * mask
    return _box("Infiltration", total * (patches > 0.3))


def _effusion(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    body, distance = scene.body, np.abs(scene.x)
    level = body.base[left] - body.dome[left] - rng.uniform(0.0, 0.13)
    curve = rng.uniform(0.10, 0.16) * (np.clip((distance - 0.08) / (body.half_width - 0.08), 0, 1.1) ** 3)
    mask = scene.cavity[left] * step(scene.y - level + curve, 0.012)
    _fill(scene, mask, contrast)
    scene.tissue += 0.05 * contrast * mask
    return _box("Effusion", mask)


def _pleural_thickening(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    body, distance = scene.body, np.abs(scene.x)
    thickness = rng.uniform(0.022, 0.036) * (1 + 0.35 * noise(rng, 9))
    from_wall = np.minimum(body.outer(scene.y) - distance, 1.1 * (scene.y - body.apex))
    lowest = rng.uniform(0.55, 0.8)
    mask = scene.cavity[left] * step(thickness - from_wall, 0.006) * step(lowest - scene.y, 0.04)
    mask = mask * step(distance - 0.06, 0.02)
    _fill(scene, mask, 0.95 * contrast)
    scene.tissue += 0.10 * contrast * mask
    return _box("Pleural_Thickening", mask)


def _cardiomegaly(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    body = scene.body
    floor = body.base[1] - body.dome[1]
    mask = _ellipse(scene, 0.25 * body.heart, floor - 0.09, body.heart * 1.3, 0.19, 0.02)
    return _box("Cardiomegaly", mask)


def _emphysema(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    for _ in range(4):
        x, y = scene.lung_point(rng, int(rng.integers(2)), 0.05, 0.5)
        bulla = _ellipse(scene, x, y, rng.uniform(0.04, 0.07), rng.uniform(0.04, 0.07), 0.25)
        scene.air *= 1 + 0.12 * contrast * bulla
        scene.vessels *= 1 - 0.8 * contrast * bulla
    return _box("Emphysema", scene.cavity[0] + scene.cavity[1])


def _hernia(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    body = scene.body
    radius = rng.uniform(0.075, 0.10)
    x, y = rng.uniform(-0.01, 0.05), body.base[1] - body.dome[1] - 0.8 * radius
    sac = np.hypot(scene.x - x, (scene.y - y) / 0.9)
    mask = step(radius - sac, 0.006)
    wall = np.exp(-(((sac - radius) / 0.007) ** 2))
    gas = step(radius - 0.012 - sac, 0.005) * step(y - 0.1 * radius - scene.y, 0.003)
    scene.air *= 1 - contrast * mask
    scene.tissue += contrast * (0.07 * wall + 0.05 * mask - 0.32 * gas)
    return _box("Hernia", mask)


def _edema(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    middle = scene.body.apex + 0.52 * (scene.body.base[0] - scene.body.apex)
    wing = np.exp(-(((np.abs(scene.x) - 0.15) / 0.10) ** 2) - ((scene.y - middle) / 0.17) ** 2)
    mask = wing * (scene.cavity[0] + scene.cavity[1]) * (0.65 + 0.35 * _clouds(rng, 24, 1.5))
    scene.air *= 1 - 0.85 * contrast * mask
    return _box("Edema", mask)


def _fibrosis(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    mesh = np.exp(-((noise(rng, 56) / 0.28) ** 2)) + 0.7 * np.exp(-((noise(rng, 80) / 0.25) ** 2))
    rim = step(np.abs(scene.x) - 0.55 * scene.body.outer(scene.y), 0.06)
    lower = step(scene.y - 0.5, 0.15)
    where = (scene.cavity[0] + scene.cavity[1]) * np.maximum(0.8 * lower, 0.6 * rim)
    scene.tissue += 0.14 * contrast * mesh * where * scene.air
    return _box("Fibrosis", where)


def _pneumonia(scene: Scene, rng: np.random.Generator, contrast: float) -> list[Box]:
    left = int(rng.integers(2))
    upper = bool(rng.integers(2))
    body = scene.body
    fissure = body.apex + 0.50 * (body.base[left] - body.dome[left] - body.apex)
    tilt = 0.10 * (np.abs(scene.x) - 0.2)
    below = step(scene.y - fissure + tilt, 0.006)
    lobe = (1 - below) * step(scene.y - fissure + 0.20, 0.05) if upper else below
    mask = scene.cavity[left] * lobe * (0.75 + 0.25 * _clouds(rng, 10, 1.5))
    _fill(scene, mask, 0.65 * contrast)
    return _box("Pneumonia", mask)


DRAW: dict[str, Callable[[Scene, np.random.Generator, float], list[Box]]] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Effusion": _effusion,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Hernia": _hernia,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pleural_Thickening": _pleural_thickening,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
}
