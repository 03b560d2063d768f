"""The healthy half of a drawn chest radiograph: a patient's build, a pose, and the scene that findings alter.

The picture is made as X-rays make it: tissue adds, air in the lungs takes away. Smooth tissue is computed on a 256 grid,
bones and vessels are drawn on a 512 grid. Anatomy coordinates: `x` runs from the midline to the patient's left (the
right of the image), `y` downwards, both in units of the image's side.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["FINE", "SMOOTH", "Body", "Grid", "Pose", "Scene", "build_body", "build_scene", "noise", "resized", "step"]

Grid = NDArray[np.floating]

SMOOTH = 256
FINE = 512


def step(values: Grid, width: float) -> Grid:
    """A soft edge: 0 far below zero, 1 far above, most of the change within `width`."""
    return np.asarray(0.5 + 0.5 * np.tanh(values / width), np.float32)


def resized(grid: Grid, size: int) -> Grid:
    """`grid` at [size, size], bicubic."""
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), np.float32)


def noise(rng: np.random.Generator, cells: int) -> Grid:
    """Smooth noise [SMOOTH, SMOOTH] of about unit variance with `cells` independent values along a side."""
    return resized(rng.standard_normal((cells, cells), dtype=np.float32), SMOOTH)


@dataclass
class Body:
    """A patient's chest; lengths in anatomy units."""

    half_width: float
    """Midline to the outer edge of a lung at its widest."""
    apex: float
    """Height of the lungs' tops."""
    base: tuple[float, float]
    """Height of the costophrenic angles, patient's right and left."""
    dome: tuple[float, float]
    """Rise of each half of the diaphragm above its angle."""
    heart: float
    """Half width of the heart."""
    shift: float
    """Sideways displacement of heart and trachea."""
    fat: float
    """Thickness of the chest wall's soft tissue."""
    breast: float
    """Radius of a breast's shadow; 0: none."""
    air: float
    """How much air the lungs hold, 1 for a healthy chest."""
    calcium: float
    """How bright bones are."""
    vessels: float
    """How bright the vessels of the lung are."""
    arm_gap: float
    """Gap between arm and trunk; negative: the arm lies on the trunk."""

    def outer(self, y: Grid | float) -> Grid:
        """Distance from the midline to the lung's lateral edge at height y."""
        t = np.clip((np.asarray(y, np.float32) - self.apex) / 0.52, 0, 1)
        return np.asarray(self.half_width * (0.36 + 0.58 * (1 - (1 - t) ** 2) ** 0.6 + 0.06 * t), np.float32)

    def diaphragm(self, x: Grid, left: int) -> Grid:
        """Height of one half of the diaphragm at distance x from the midline; left: 0 or 1."""
        across = (x - 0.40 * self.half_width) / (0.62 * self.half_width)
        across = np.where(across < 0, 0.55 * across, across)
        return np.asarray(self.base[left] - self.dome[left] * (1 - across**2), np.float32)

    def breathe(self, rng: np.random.Generator) -> None:
        """Change what differs between two images of one patient: the depth of the breath and the arms."""
        depth = rng.normal(0, 0.012)
        self.base = (self.base[0] + depth, self.base[1] + depth)
        self.arm_gap += rng.normal(0, 0.02)


def build_body(rng: np.random.Generator, view: str, sex: str, age: int) -> Body:
    """A patient's chest: the same generator state gives the same build, wider-hearted and shallower in AP."""
    supine, female = view == "AP", sex == "F"
    base = rng.uniform(0.80, 0.88) - 0.05 * supine
    dome = rng.uniform(0.09, 0.13)
    half_width = rng.uniform(0.35, 0.41) - 0.015 * female
    return Body(
        half_width=half_width,
        apex=rng.uniform(0.09, 0.15) + 0.02 * supine,
        base=(base, base + rng.uniform(0.0, 0.03)),
        dome=(dome + 0.015, dome),
        heart=half_width * (rng.uniform(0.33, 0.40) + 0.05 * supine + 0.0006 * max(age - 40, 0)),
        shift=rng.normal(0, 0.006),
        fat=rng.uniform(0.02, 0.07),
        breast=rng.uniform(0.10, 0.16) if female and age > 14 else 0.0,
        air=rng.uniform(0.88, 1.0),
        calcium=rng.uniform(0.7, 1.15) - 0.002 * max(age - 50, 0),
        vessels=rng.uniform(0.8, 1.2),
        arm_gap=rng.uniform(-0.03, 0.08) - 0.05 * supine,
    )


@dataclass(frozen=True)
class Pose:
    """Where the chest lies in the image: anatomy → image is turn, scale, shift."""

    turn: float
    scale: float
    dx: float
    dy: float

    @staticmethod
    def draw(rng: np.random.Generator, view: str) -> "Pose":
        """A pose, less careful in AP."""
        spread = 1.5 if view == "AP" else 1.0
        return Pose(
            turn=np.radians(rng.normal(0, 1.5 * spread)),
            scale=rng.uniform(0.94, 1.06),
            dx=rng.normal(0.5, 0.012 * spread),
            dy=rng.normal(0.0, 0.012 * spread),
        )

    def grid(self, size: int) -> tuple[Grid, Grid]:
        """Anatomy coordinates x, y of the pixel centres, each [size, size]."""
        line = (np.arange(size, dtype=np.float32) + 0.5) / size
        u, v = (line[None, :] - self.dx) / self.scale, (line[:, None] - 0.5 - self.dy) / self.scale
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        return cos * u + sin * v, cos * v - sin * u + np.float32(0.5)

    def points(self, x: Grid, y: Grid, size: int) -> list[tuple[float, float]]:
        """Anatomy points as (column, row) in an image of this size."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        u, v = cos * x - sin * (y - 0.5), sin * x + cos * (y - 0.5)
        columns, rows = size * (self.scale * u + self.dx), size * (self.scale * v + 0.5 + self.dy)
        return list(zip(columns.tolist(), rows.tolist(), strict=True))


@dataclass
class Scene:
    """What is between the tube and the film, on the SMOOTH grid unless said otherwise."""

    body: Body
    pose: Pose
    x: Grid
    y: Grid
    cavity: Grid
    """The chest cavity of each half, [2, SMOOTH, SMOOTH]: where a lung may lie, heart not counted."""
    air: Grid
    """Air in the lungs: 0 none, about 1 a healthy lung."""
    tissue: Grid
    """Brightness without any air."""
    vessels: Grid
    """How much of the vessels and the lung's fine texture is to be seen."""
    texture: Grid
    """Brightness of hila and fine markings, seen where vessels are."""
    bones: Grid
    """Brightness that bones add, [FINE, FINE]."""
    tree: Grid
    """Brightness that vessels add, [FINE, FINE]."""

    def lung_point(self, rng: np.random.Generator, left: int, low: float, high: float) -> tuple[float, float]:
        """A point of the lung, in anatomy units, at a part `low` to `high` of the way from apex to angle."""
        body = self.body
        y = body.apex + rng.uniform(low, high) * (body.base[left] - body.dome[left] - body.apex)
        inner = 0.10 + 0.6 * body.heart * left * (y > 0.5)
        x = rng.uniform(inner, max(inner + 0.02, float(body.outer(y)) - 0.05))
        return (x if left else -x), y


def _torso(body: Body, x: Grid, y: Grid) -> Grid:
    """Where the body is: neck, sloping shoulders, trunk and arms."""
    distance = np.abs(x)
    shoulder = 0.65 * np.maximum(distance - 0.10, 0) ** 1.3 - 0.16 * step(0.105 - distance, 0.012)
    trunk = body.half_width + 0.035 + body.fat + 0.03 * step(y - 0.75, 0.2)
    arm_pit = 0.34
    gap = body.arm_gap * np.clip((y - arm_pit) / 0.2, 0, 1.5)
    in_trunk = step(trunk - distance, 0.008)
    in_arm = step(distance - trunk - gap, 0.008) * step(trunk + gap + 0.16 - distance, 0.01)
    upper = step(arm_pit + 0.04 - y, 0.02)
    return np.asarray(step(y - shoulder, 0.012) * np.maximum(in_trunk, np.maximum(0.72 * in_arm, upper)), np.float32)


def _heart(body: Body, x: Grid, y: Grid) -> Grid:
    """Heart, aortic knob and great vessels."""
    floor = body.base[1] - body.dome[1]
    centre_x, centre_y = 0.34 * body.heart + body.shift, floor - 0.055
    across, down = x - centre_x, y - centre_y
    turned = across * 0.82 + down * 0.57, down * 0.82 - across * 0.57
    muscle = 1 - (turned[0] / (body.heart * 1.30)) ** 2 - (turned[1] / (body.heart * 0.84 + 0.01)) ** 2
    right = 1 - ((x + 0.025 - body.shift) / 0.065) ** 2 - ((y - centre_y + 0.05) / 0.15) ** 2
    knob_y = body.apex + 0.20
    knob = 1 - ((x - 0.045 - body.shift) / 0.042) ** 2 - ((y - knob_y) / 0.045) ** 2
    stem = 0.052 + 0.03 * np.clip((y - knob_y) / 0.25, 0, 1) - np.abs(x - 0.008 - body.shift)
    descent = np.clip((y - knob_y) / (centre_y - knob_y), 0, 1) ** 1.3
    trunk = 0.03 + (0.75 * body.heart + 0.01) * descent - (x - body.shift)
    trunk = np.minimum(trunk, np.minimum(x + 0.03, centre_y + 0.05 - y))
    parts = (
        step(muscle, 0.14),
        step(right, 0.35),
        0.9 * step(knob, 0.35),
        0.9 * step(stem, 0.012),
        0.93 * step(trunk, 0.012),
    )
    return np.asarray(np.maximum.reduce(parts), np.float32)


def _ribs(body: Body, pose: Pose) -> Image.Image:
    """Ribs and clavicles as grey drawings on the FINE grid."""
    ink = Image.new("L", (FINE, FINE))
    pen = ImageDraw.Draw(ink)
    pitch = (body.base[0] - body.apex) / 9.2
    t = np.linspace(0, 1, 14, dtype=np.float32)
    for sign in (-1, 1):
        for index in range(10):
            start = body.apex + (index - 0.15) * pitch
            reach = float(body.outer(start + 0.9 * pitch)) + 0.004
            x = 0.05 + (reach - 0.05) * np.sin(t * np.pi / 2)
            y = start - 0.25 * pitch * np.sin(t * np.pi) + pitch * (0.9 + 0.08 * index) * t**2.2
            half = 0.30 * pitch * (1 - 0.25 * t)
            _band(pen, pose, sign * x, y, half, 62, 112)
        for index in range(1, 7):
            start = body.apex + (index + 0.75) * pitch
            reach = float(body.outer(start)) + 0.004
            x = reach - (reach - 0.13) * (1 - np.cos(t * np.pi / 2))
            y = start + pitch * 1.5 * t**0.9
            _band(pen, pose, sign * x, y, 0.25 * pitch * (1 + 0.1 * t), 26, 34)
        clavicle_x = 0.035 + (body.half_width - 0.06) * t
        clavicle_y = body.apex + 0.075 - 0.055 * t + 0.014 * np.sin(2 * np.pi * t)
        _band(pen, pose, sign * clavicle_x, clavicle_y, 0.013 + 0.006 * np.abs(2 * t - 1), 100, 135)
    return ink.filter(ImageFilter.GaussianBlur(1.1))


def _band(pen: ImageDraw.ImageDraw, pose: Pose, x: Grid, y: Grid, half: Grid, fill: int, edge: int) -> None:
    """A bone as a long flat tube: its edges brighter than its middle."""
    top, bottom = pose.points(x, y - half, FINE), pose.points(x, y + half, FINE)
    pen.polygon(top + bottom[::-1], fill=fill)
    pen.line(top, fill=edge, width=2)
    pen.line(bottom, fill=edge, width=3)


def _vessel_tree(body: Body, pose: Pose, rng: np.random.Generator) -> Image.Image:
    """Branching vessels that leave both hila, as a grey drawing on the FINE grid."""
    ink = Image.new("L", (FINE, FINE))
    pen = ImageDraw.Draw(ink)
    hilum = body.apex + 0.44 * (body.base[0] - body.apex)
    for sign in (-1, 1):
        for angle in np.linspace(-1.3, 1.45, 13) + rng.normal(0, 0.10, 13):
            x, y, heading, length = 0.075, hilum - 0.015 * sign + rng.normal(0, 0.03), angle, rng.uniform(0.17, 0.30)
            for part in range(6):
                nx, ny = x + length / 6 * np.cos(heading), y + length / 6 * np.sin(heading)
                line = pose.points(sign * np.array([x, nx]), np.array([y, ny]), FINE)
                pen.line(line, fill=int(112 - 12 * part), width=max(1, 4 - part))
                if part:
                    fork = heading + rng.choice((-0.6, 0.6))
                    fx, fy = nx + 0.06 * np.cos(fork), ny + 0.06 * np.sin(fork)
                    pen.line(pose.points(sign * np.array([nx, fx]), np.array([ny, fy]), FINE), fill=58, width=1)
                x, y, heading = nx, ny, heading + rng.normal(0, 0.16)
    return ink.filter(ImageFilter.GaussianBlur(1.4))


def build_scene(body: Body, pose: Pose, rng: np.random.Generator) -> Scene:
    """A healthy chest of this build in this pose."""
    x, y = pose.grid(SMOOTH)
    distance = np.abs(x)
    top = body.apex + 1.6 * (np.maximum(distance - 0.38 * body.half_width, 0)) ** 2
    inside = step(body.outer(y) - distance, 0.010) * step(y - top, 0.012) * step(distance - 0.035, 0.02)
    floors = np.stack([step(body.diaphragm(distance, left) - y, 0.006) for left in (0, 1)])
    side = step(x, 1e-4)
    cavity = np.stack([inside * (1 - side), inside * side]) * floors
    heart = _heart(body, x, y)
    torso = _torso(body, x, y)
    depth = 0.80 + 0.20 * np.sqrt(np.clip(1 - (distance / body.half_width) ** 2, 0, 1))
    air = body.air * (cavity[0] + cavity[1]) * (1 - 0.93 * heart) * depth

    blend = step(x, 0.04)
    below = 1 - (floors[0] * (1 - blend) + floors[1] * blend)
    trunk = np.sqrt(np.clip(1 - (distance / (body.half_width + 0.05 + body.fat)) ** 2, 0, 1))
    spine_y = (y - body.apex) / (0.055 + 0.02 * y)
    tissue = 0.50 + 0.26 * trunk + 0.10 * below * trunk + 0.10 * np.exp(-((x / 0.075) ** 2))
    tissue += (0.035 + 0.018 * np.cos(2 * np.pi * spine_y)) * step(0.048 - distance, 0.006) * body.calcium
    windpipe = np.exp(-(((x - 0.008 - 1.5 * body.shift) / 0.016) ** 2)) * step(0.26 - y, 0.05)
    tissue -= 0.12 * windpipe
    humerus = 1 - ((distance - body.half_width - 0.075) / 0.05) ** 2 - ((y - body.apex - 0.10) / 0.05) ** 2
    tissue += 0.10 * body.calcium * step(humerus, 0.4)
    if body.breast:
        centre_y = body.apex + 0.47
        breast = 1 - ((distance - 0.22) / (body.breast + 0.03)) ** 2 - ((y - centre_y) / (body.breast + 0.05)) ** 2
        tissue += 0.075 * step(breast, 0.22) * step(y - centre_y + 0.08, 0.10)
    hilum_y = body.apex + 0.44 * (body.base[0] - body.apex)
    hilum = np.exp(-(((distance - 0.085) / 0.028) ** 2) - ((y - hilum_y) / 0.06) ** 2)
    texture = body.vessels * (0.15 * hilum + 0.012 * noise(rng, 40) + 0.012 * noise(rng, 90))
    tissue = tissue * torso + 0.03 + 0.012 * noise(rng, 8)
    return Scene(
        body=body,
        pose=pose,
        x=x,
        y=y,
        cavity=np.asarray(cavity, np.float32),
        air=np.asarray(air, np.float32),
        tissue=np.asarray(tissue, np.float32),
        vessels=np.asarray(np.clip(air, 0, 1), np.float32),
        texture=np.asarray(texture, np.float32),
        bones=np.asarray(_ribs(body, pose), np.float32) * np.float32(body.calcium * 0.34 / 255),
        tree=np.asarray(_vessel_tree(body, pose, rng), np.float32) * np.float32(body.vessels * 0.30 / 255),
    )
