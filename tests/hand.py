"""Shapes drawn on the app's sketch pad by mouse, as a hand would: along a contour, never quite true.

    for attempt in ATTEMPTS:
        draw_attempt(page, attempt)

The contours here are not those of the training renderer, and nothing was chosen by what a model made of it.
"""

import math
import random
from dataclasses import dataclass
from itertools import pairwise

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")


@dataclass(frozen=True)
class Attempt:
    """One thing on an empty sheet; x, y and radius are fractions of the sheet."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    full: bool  # scribbled full, not only outlined
    seed: int


def attempts(seed: int = 1) -> list[Attempt]:
    """Ten: every shape once and two more, every color once and one more, every third scribbled full."""
    rng = random.Random(seed)
    colors = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "cyan"]
    shapes = list(SHAPES)
    for names in (colors, shapes):
        rng.shuffle(names)
        names += rng.sample(names, 10 - len(names))
    made = []
    for number, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        radius = rng.uniform(0.12, 0.26)
        x, y = (rng.uniform(radius + 0.05, 0.95 - radius) for _ in "xy")
        made.append(Attempt(shape, color, x, y, radius, number % 3 == 2, number))
    return made


ATTEMPTS = attempts()


def corners(shape: str) -> list[list[tuple[float, float]]]:
    """Closed lines about (0, 0), y down, within a circle of about 1: what a pen goes along."""

    def circle(radius: float) -> list[tuple[float, float]]:
        turns = [2 * math.pi * i / 28 - math.pi / 2 for i in range(28)]
        return [(radius * math.cos(t), radius * math.sin(t)) for t in turns]

    if shape == "circle":
        return [circle(0.95)]
    if shape == "ring":
        return [circle(0.95), circle(0.5)]
    if shape == "square":
        return [[(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]]
    if shape == "triangle":
        return [[(0, -0.95), (0.9, 0.75), (-0.9, 0.75)]]
    if shape == "diamond":
        return [[(0, -1), (0.65, 0), (0, 1), (-0.65, 0)]]
    if shape == "star":
        turns = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
        radii = [1.05 if i % 2 == 0 else 0.43 for i in range(10)]
        return [[(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]]
    if shape == "cross":
        a, b = 0.32, 0.95
        right = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return [right + [(-x, -y) for x, y in right]]
    assert shape == "heart", shape
    left = [(0, 0.95), (-0.55, 0.45), (-0.95, -0.05), (-0.95, -0.5), (-0.65, -0.8), (-0.3, -0.75), (0, -0.4)]
    return [left + [(-x, y) for x, y in left[-2:0:-1]]]


def strokes(attempt: Attempt) -> list[list[tuple[float, float]]]:
    """Where the pen goes from down to up, in fractions of the sheet."""
    rng = random.Random(attempt.seed)
    tilt = math.radians(rng.uniform(-8, 8))
    lines = []
    for corner in corners(attempt.shape):
        path, steps = [*corner, corner[0]], max(1, 28 // len(corner))
        points = []
        for (x0, y0), (x1, y1) in pairwise(path):
            points += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps)]
        points.append(path[0])
        drift, line = [0.0, 0.0], []
        for point in points:  # a hand strays, and comes back
            drift = [0.8 * d + rng.gauss(0, 0.02) for d in drift]
            x, y = (value + stray for value, stray in zip(point, drift, strict=True))
            line.append((x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)))
        lines.append(line)
    if attempt.full:
        lines += hatching(lines, 0.018 / attempt.radius, rng)
    r = attempt.radius
    return [[(attempt.x + r * x, attempt.y + r * y) for x, y in line] for line in lines]


def hatching(
    lines: list[list[tuple[float, float]]], gap: float, rng: random.Random
) -> list[list[tuple[float, float]]]:
    """Level strokes, `gap` apart, wherever a point is inside an odd number of the closed lines."""
    made, y = [], -1.2
    while y < 1.2:
        y += gap * rng.uniform(0.8, 1.2)
        crossings = sorted(
            x0 + (y - y0) / (y1 - y0) * (x1 - x0)
            for line in lines
            for (x0, y0), (x1, y1) in zip(line, [*line[1:], line[0]], strict=True)
            if (y0 <= y) != (y1 <= y)
        )
        for left, right in zip(crossings[::2], crossings[1::2], strict=False):
            if right - left > gap:
                middle = ((left + right) / 2, y + rng.gauss(0, 0.1 * gap))
                made.append([(left + gap / 3, y), middle, (right - gap / 3, y)])
    return made


def draw_attempt(page, attempt: Attempt, *, clear: bool = True) -> None:
    """Clear the sheet, draw on it by mouse, and wait until the drawing is the page's picture."""
    pad = page.locator("#pad .pad")
    if clear:
        pad.get_by_role("button", name="Clear sheet").click()
    pad.get_by_role("radio", name=attempt.color, exact=True).check(force=True)  # its label takes the click
    sheet = pad.locator("canvas")
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()

    def place(point):
        return box["x"] + point[0] * box["width"], box["y"] + point[1] * box["height"]

    for line in strokes(attempt):
        page.mouse.move(*place(line[0]))
        page.mouse.down()
        for point in line[1:]:
            page.mouse.move(*place(point))
        page.mouse.up()
    page.locator("#pad .pad[data-state=ready]").wait_for()
