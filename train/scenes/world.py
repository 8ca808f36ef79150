"""The drawn world: scenes of one to four colored shapes, how they are sampled, drawn and labeled.

    sample(seed, split) -> Scene        what is where; the same seed always gives the same scene
    render(scene, size) -> pixels       the picture, (size, size, 3) uint8 RGB
    labels(scene, size, patch) -> dict  what each patch shows, to pretrain the image encoder
    relation(a, b) -> str | None        "left of", "right of", "above", "below", or None where it is arguable

Coordinates are fractions of the picture: x to the right, y down, radius that of the circle around a thing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
PALETTE = {
    "red": (215, 30, 35),
    "green": (35, 150, 55),
    "blue": (35, 75, 215),
    "yellow": (248, 215, 30),
    "orange": (250, 130, 15),
    "purple": (125, 40, 175),
    "pink": (250, 140, 195),
    "brown": (115, 65, 30),
    "cyan": (45, 205, 220),
}
COLORS = tuple(PALETTE)
RADII = {"small": (0.095, 0.12), "large": (0.165, 0.205)}
SIZES = tuple(RADII)
STYLES = ("filled", "bordered", "outlined", "sketched")
BACKGROUNDS = ("plain", "gradient", "cloudy", "striped", "checked")
STROKES = (0.07, 0.3)  # thickness of a drawn line, of the radius
THICK_CIRCLE = 0.17  # a circle drawn with a thicker line is a ring
RELATIONS = ("left of", "right of", "above", "below")
# (color, shape) pairs that no training scene shows: what is said of them must come from the parts.
HELD_OUT = frozenset({("blue", "heart"), ("green", "star"), ("yellow", "cross"), ("purple", "ring")})

SPLITS = ("train", "validation", "test")
SEEDS_PER_SPLIT = 10**9
MAX_THINGS = 4
OVERLAP = 0.06  # of the sum of two radii
MIN_STEP_X = 0.05  # things differ at least this much in x, so that "left to right" orders them visibly
CLEAR_RATIO = 1.5  # a relation is clear where one axis dominates the other this much
OVERSAMPLE = 3  # masks are drawn this much larger, then averaged down


@dataclass(frozen=True)
class Thing:
    """One colored shape.

    `x`, `y`, `radius` are fractions of the picture, `rotation` is in degrees, `stroke` is the thickness of
    its lines, of the radius, where it is outlined or sketched.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float
    style: str
    rgb: tuple[int, int, int]
    stroke: float = 0.3


@dataclass(frozen=True)
class Background:
    """Two colors and how one passes into the other.

    `angle` (radians) is the direction of a gradient or of stripes, `period` the width of a stripe, of the
    picture.
    """

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    period: float = 0.1


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `things` are in reading order: left to right."""

    seed: int
    things: tuple[Thing, ...]
    background: Background
    noise: float  # standard deviation of the sensor noise, in gray levels of 255
    blur: float = 0.0  # radius of a Gaussian, in hundredths of the picture


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` is, seen from `b`: one of RELATIONS, or None where neither direction clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= CLEAR_RATIO * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= CLEAR_RATIO * abs(dx):
        return "above" if dy < 0 else "below"
    return None


# ---------------------------------------------------------------- sampling


def sample(seed: int, split: str = "train") -> Scene:
    """Draw the scene of a seed: splits never share a scene, and HELD_OUT pairs are not in "train"."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ValueError(f"seed is {seed}; it must be from 0 to {SEEDS_PER_SPLIT - 1}")
    seed += SPLITS.index(split) * SEEDS_PER_SPLIT
    rng = random.Random(seed)
    count = rng.choices(range(1, MAX_THINGS + 1), weights=(3, 7, 6, 4))[0]
    things = None
    while things is None:
        things = _place(rng, count, split)
    ground = _background(rng, things)
    blur = rng.uniform(0.4, 1.1) if rng.random() < 0.25 else 0.0
    return Scene(seed, things, ground, rng.uniform(0, 7) * (rng.random() < 0.8), blur)


def _place(rng: random.Random, count: int, split: str) -> tuple[Thing, ...] | None:
    """Things one after another; None where one of them found no room."""
    things: list[Thing] = []
    for color, shape in _kinds(rng, count, split):
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADII[size])
        margin = 0.92 * radius  # a corner may leave the picture a little
        for _ in range(20):
            x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
            thing = Thing(shape, color, size, x, y, radius, *_look(rng, shape, color))
            if _fits(thing, things):
                things.append(thing)
                break
        else:
            return None
    return tuple(sorted(things, key=lambda thing: thing.x))


def _kinds(rng: random.Random, count: int, split: str) -> list[tuple[str, str]]:
    """`count` different (color, shape) pairs; often two share a shape or a color, so that names need both."""
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        chance = rng.random()
        if kinds and chance < 0.3:
            shape = rng.choice(kinds)[1]
        elif kinds and chance < 0.45:
            color = rng.choice(kinds)[0]
        if (color, shape) not in kinds and not (split == "train" and (color, shape) in HELD_OUT):
            kinds.append((color, shape))
    return kinds


def _look(rng: random.Random, shape: str, color: str) -> tuple[float, str, tuple[int, int, int], float]:
    style = rng.choices(STYLES, weights=(40, 18, 17, 25))[0]
    thinnest, thickest = STROKES
    stroke = rng.uniform(thinnest, THICK_CIRCLE if shape in ("circle", "ring") else thickest)
    turn = 180 if shape == "star" else 15  # a square turned by 45 degrees is a diamond
    light = rng.uniform(-14, 14)
    rgb = tuple(min(255, max(0, round(c + light + rng.uniform(-10, 10)))) for c in PALETTE[color])
    return rng.uniform(-turn, turn), style, rgb, stroke  # type: ignore[return-value]


def _fits(thing: Thing, others: list[Thing]) -> bool:
    """Hardly any overlap, a visible order from left to right, and a clear relation to at least one other."""
    for other in others:
        gap = math.hypot(thing.x - other.x, thing.y - other.y)
        if gap < (1 - OVERLAP) * (thing.radius + other.radius) or abs(thing.x - other.x) < MIN_STEP_X:
            return False
    return not others or any(relation(thing, other) for other in others)


def _background(rng: random.Random, things: tuple[Thing, ...]) -> Background:
    """Pale, dark or gray, far in color from every thing (white or near black always are)."""
    kind = rng.choice(BACKGROUNDS)
    first, second = _ground(rng, things), _ground(rng, things)
    for _ in range(8):  # a picture is light or dark: halfway between the two all things would lose contrast
        if math.dist(first, second) < 110:
            break
        second = _ground(rng, things)
    else:
        second = first
    return Background(kind, first, second, rng.uniform(0, 2 * math.pi), rng.uniform(0.03, 0.2))


def _ground(rng: random.Random, things: tuple[Thing, ...]) -> tuple[int, int, int]:
    white = rng.random() < 0.15  # as paper is
    for _ in range(12):
        if white:
            break
        level = rng.choice((rng.uniform(190, 250), rng.uniform(15, 60), rng.uniform(110, 170)))
        tint = 30 if level > 100 else 15
        rgb = tuple(min(255, max(0, round(level + rng.uniform(-tint, tint)))) for _ in range(3))
        if all(math.dist(rgb, thing.rgb) > 105 for thing in things):
            return rgb  # type: ignore[return-value]
    return (255, 255, 255)


# ---------------------------------------------------------------- drawing


@cache
def _contour(shape: str) -> np.ndarray:
    """Corner points (N, 2) of a shape in the unit circle; y down. A ring is a circle here, see `_masks`."""
    if shape in ("circle", "ring"):
        angles = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * 0.92
    if shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.46)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 16.5, -(y + 2) / 15.5], 1)
    if shape == "cross":
        a, b = 0.34, 0.97
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return np.array(corners + [(-x, -y) for x, y in corners])
    if shape == "triangle":
        return np.array([(0.0, -1.0), (0.95, 0.72), (-0.95, 0.72)])
    if shape == "diamond":
        return np.array([(0.0, -1.08), (0.66, 0.0), (0.0, 1.08), (-0.66, 0.0)])
    return np.array([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)])  # square


def _outline(thing: Thing, wobble: np.random.Generator) -> np.ndarray:
    """Contour points (N, 2) in fractions of the picture, about the thing's center."""
    points = _contour(thing.shape)
    if thing.style == "sketched":  # a hand draws neither straight nor round: bent edges, displaced corners
        if len(points) < 20:
            points = np.stack([points, (points + np.roll(points, -1, 0)) / 2], 1).reshape(-1, 2)
        points = points + wobble.normal(0, 0.045 if len(points) < 20 else 0.025, points.shape)
    angle = math.radians(thing.rotation)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return points @ turn * thing.radius


def _masks(thing: Thing, size: int, wobble: np.random.Generator) -> tuple[int, int, list[Image.Image]]:
    """Left and top corner in pixels, and masks: the thing, its border, the silhouette (hole included)."""
    scale = size * OVERSAMPLE
    half = math.ceil(thing.radius * 1.3 * size)
    left, top = round(thing.x * size) - half, round(thing.y * size) - half
    center = np.array([thing.x * scale - left * OVERSAMPLE, thing.y * scale - top * OVERSAMPLE])
    points = _outline(thing, wobble)
    polygon = [tuple(p) for p in (points * scale + center).tolist()]
    full = (2 * half * OVERSAMPLE,) * 2

    whole = Image.new("L", full)
    ImageDraw.Draw(whole).polygon(polygon, fill=255)
    stroke = round(max(thing.radius * thing.stroke, 1.2 / size) * scale)
    hollow = thing.style in ("outlined", "sketched") and (thing.shape != "ring" or thing.size == "large")
    body = Image.new("L", full) if hollow else whole.copy()
    draw = ImageDraw.Draw(body)
    hole = [tuple(p) for p in (points * scale * 0.52 + center).tolist()]
    if hollow:
        for edge in (polygon, hole) if thing.shape == "ring" else (polygon,):
            draw.line([*edge, edge[0], edge[1]], fill=255, width=stroke, joint="curve")
    elif thing.shape == "ring":
        draw.polygon(hole, fill=0)
    masks = [body, Image.new("L", full), whole]
    if thing.style == "bordered":
        draw, width = ImageDraw.Draw(masks[1]), round(max(thing.radius * 0.11, 0.9 / size) * scale)
        for edge in (polygon, hole) if thing.shape == "ring" else (polygon,):
            draw.line([*edge, edge[0], edge[1]], fill=255, width=width, joint="curve")
    return left, top, [mask.reduce(OVERSAMPLE) for mask in masks]


def _ground_pixels(background: Background, size: int, rng: np.random.Generator) -> np.ndarray:
    """Background (size, size, 3) float32."""
    first, second = (np.array(c, np.float32) for c in (background.first, background.second))
    if background.kind == "plain":
        return np.broadcast_to(first, (size, size, 3)).copy()
    if background.kind == "gradient":
        along = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        mix = along * math.cos(background.angle) + along[:, None] * math.sin(background.angle)
        mix = mix / 1.42 + 0.5
    elif background.kind in ("striped", "checked"):
        along = np.linspace(0, math.pi / background.period, size, dtype=np.float32)
        cos, sin = math.cos(background.angle), math.sin(background.angle)
        mix = np.sin(along * cos + along[:, None] * sin)
        if background.kind == "checked":
            mix = mix * np.sin(along[:, None] * cos - along * sin)
        mix = 0.35 * np.clip(3 * mix, -1, 1) + 0.35  # faint: lines must stand out against it
    else:
        mix = np.zeros((size, size), np.float32)
        for cells, weight in ((4, 0.65), (9, 0.35)):
            grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
            mix += weight * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        mix = np.clip(mix * 1.5 - 0.25, 0, 1)
    return first + mix[..., None] * (second - first)


def _generator(scene: Scene, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([scene.seed, stream]))


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The picture of a scene: (size, size, 3) uint8 RGB. About one millisecond at 64 pixels."""
    rng, wobble = _generator(scene, 0), _generator(scene, 1)
    ground = _ground_pixels(scene.background, size, rng)
    picture = Image.fromarray(ground.astype(np.uint8))
    dark = sum(scene.background.first) < 380
    for thing in scene.things:
        left, top, (body, border, _) = _masks(thing, size, wobble)
        picture.paste(thing.rgb, (left, top), body)
        if thing.style == "bordered":
            picture.paste((240, 240, 235) if dark else (20, 20, 25), (left, top), border)
    if scene.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.blur * size / 100))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * scene.noise
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


def labels(scene: Scene, size: int = 64, patch: int = 8) -> dict[str, np.ndarray]:
    """What each of the P = (size / patch)^2 patches shows, row by row; only to pretrain the image encoder.

    `thing` (P,) index into scene.things, -1 where no thing covers an eighth of the patch; `shape`, `color`,
    `size` (P,) class numbers with 0 for nothing, else 1 + the index in SHAPES, COLORS, SIZES; `offset` (P, 2)
    from the patch's middle to the thing's center in (x, y) fractions of the picture, 0 where there is none.
    """
    if size % patch:
        raise ValueError(f"patch is {patch}; it must divide the picture's {size} pixels")
    side, wobble = size // patch, _generator(scene, 1)
    cover = np.zeros((len(scene.things) + 1, side, side), np.float32)
    cover[0] = 1 / 8
    for index, thing in enumerate(scene.things, 1):
        left, top, (_, _, whole) = _masks(thing, size, wobble)
        canvas = Image.new("L", (size, size))
        canvas.paste(whole, (left, top))
        cover[index] = np.asarray(canvas.reduce(patch), np.float32) / 255
    owner = cover.argmax(0).ravel()

    def per_patch(values: list[int]) -> np.ndarray:
        return np.array([0, *values], np.int64)[owner]

    middle = (np.arange(side, dtype=np.float32) + 0.5) / side
    where = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
    centers = np.array([(0, 0), *((thing.x, thing.y) for thing in scene.things)], np.float32)[owner]
    return {
        "thing": owner - 1,
        "shape": per_patch([1 + SHAPES.index(thing.shape) for thing in scene.things]),
        "color": per_patch([1 + COLORS.index(thing.color) for thing in scene.things]),
        "size": per_patch([1 + SIZES.index(thing.size) for thing in scene.things]),
        "offset": np.where(owner[:, None] > 0, centers - where, 0).astype(np.float32),
    }
