"""Film of a drawn chest: anatomy and findings put together, exposed, marked and grained."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cxr_dist.data.synth_anatomy import FINE, SMOOTH, Pose, Scene, build_body, build_scene, resized
from cxr_dist.data.synth_findings import DRAW, Box, reshape
from cxr_dist.errors import ConfigError

__all__ = ["render_with_boxes"]

_AIR_DEPTH = 0.47


def render_with_boxes(
    rng: int | np.random.Generator,
    findings: Collection[str],
    view: str,
    sex: str,
    age: int,
    size: int = 1024,
    *,
    anatomy_seed: int | None = None,
    contrast: float = 1.0,
) -> tuple[NDArray[np.uint8], list[Box]]:
    """One radiograph, uint8 [size, size], and the boxes of what was drawn in it, in its pixels.

    rng: a seed, or a generator that gives one; behind pose, exposure, grain and the findings' places. Each finding draws
    from a stream of its own, so that adding one moves no other.
    findings: names out of NIH's fourteen.  view: PA, or AP (wider heart, higher diaphragm, flatter).  sex: M or F.
    age: years.  anatomy_seed: the patient's build; None: the same seed.  contrast: of the findings, above 0 to 1.
    """
    unknown = sorted(set(findings) - set(DRAW))
    if unknown:
        raise ConfigError(f"findings: found {', '.join(unknown)}, expected names out of {', '.join(DRAW)}")
    if view not in ("PA", "AP") or sex not in ("M", "F"):
        raise ConfigError(f"view and sex: found {view!r} and {sex!r}, expected PA or AP and M or F")
    if not 0 < contrast <= 1 or not 16 <= size <= 4096:
        raise ConfigError(
            f"contrast and size: found {contrast} and {size}, expected above 0 to 1 and 16 to 4096 pixels"
        )
    seed = rng if isinstance(rng, int) else int(rng.integers(1 << 62))
    common = np.random.default_rng([seed, 0])
    streams = {name: np.random.default_rng([seed, 1 + index]) for index, name in enumerate(DRAW)}
    present = [name for name in DRAW if name in findings]
    body = build_body(np.random.default_rng([seed if anatomy_seed is None else anatomy_seed, 99]), view, sex, age)
    body.breathe(common)
    for name in present:
        reshape(name, body, streams[name], contrast)
    scene = build_scene(body, Pose.draw(common, view), common)
    boxes = [box for name in present for box in DRAW[name](scene, streams[name], contrast)]
    return _expose(scene, common, view, size), [box.scaled(size / SMOOTH) for box in boxes]


def _expose(scene: Scene, rng: np.random.Generator, view: str, size: int) -> NDArray[np.uint8]:
    """Scene → film: add up, apply exposure and gamma, collimate, stamp the markers, add grain."""
    supine = view == "AP"
    film = resized(scene.tissue + scene.texture * scene.vessels - np.float32(_AIR_DEPTH) * scene.air, FINE)
    film = film + scene.bones * resized(0.35 + 0.65 * np.clip(scene.air, 0, 1).astype(np.float32), FINE)
    film += scene.tree * resized(scene.vessels, FINE)
    darkest = rng.uniform(0.06, 0.12) - 0.06 * supine
    gain, gamma = rng.uniform(0.94, 1.07) * (0.92 if supine else 1.0), rng.uniform(0.85, 1.3)
    film = (np.clip((film - darkest) * gain / 0.90, 0.0, 1.0) ** np.float32(gamma)) * 250
    picture = Image.fromarray(np.asarray(film, np.uint8))
    _mark(picture, rng, supine)
    grown = picture.resize((size, size), Image.Resampling.BILINEAR)
    amplitude = 3 if supine else 2
    grain = rng.integers(0, 2 * amplitude + 1, (size, size), dtype=np.uint8)
    pixels = np.minimum(np.asarray(grown), np.uint8(255 - 2 * amplitude))
    return np.asarray(pixels + grain, np.uint8)


def _mark(picture: Image.Image, rng: np.random.Generator, supine: bool) -> None:
    """Collimator edges and the side marker, as technicians leave them."""
    pen = ImageDraw.Draw(picture)
    top, bottom, left, right = (int(max(0.0, value)) for value in rng.normal(0, 6, 4))
    pen.rectangle((0, 0, FINE, top), fill=0)
    pen.rectangle((0, FINE - bottom, FINE, FINE), fill=0)
    pen.rectangle((0, 0, left, FINE), fill=0)
    pen.rectangle((FINE - right, 0, FINE, FINE), fill=0)
    column, row = int(rng.integers(452, 484)), int(rng.integers(16, 60))
    pen.line([(column, row), (column, row + 16), (column + 9, row + 16)], fill=248, width=4)
    if supine:
        font = ImageFont.load_default()
        pen.text((column - 12, row + 26), "AP", fill=235, font=font)
        pen.text((24, 20 + row), "PORTABLE", fill=235, font=font)
