"""Pictures of the drawn world by another hand: SVG texts rasterized by resvg, never trained on.

    svg_pictures() -> [(picture, truth)]     80 pictures of one or two things; every color with every shape
    figures(loaded) -> {"color": ...}        what a model names of them, by question and by caption

Nothing of `world.render` is used. SVG brings what it lacks: curves instead of polygons, gradients within a
thing, rounded corners and line joins, shadows, and CSS's colors instead of the palette's.
"""

from __future__ import annotations

import io
import math
import random

import torch
from PIL import Image, ImageColor

from blip2.checkpoint import Loaded
from blip2.generation import Generation, describe, generate, num_descriptions
from train.scenes.evaluate import NAMED, Figures
from train.scenes.world import COLORS, SHAPES

SIDE = 256  # pixels
TWICE = 8  # pictures beyond one for every pair of color and shape
Truth = tuple[tuple[str, str], ...]  # (color, shape) of every thing; no color and no shape is there twice

# CSS color names that nobody would call otherwise.
NAMES = {
    "red": ("red", "crimson"),
    "green": ("green", "forestgreen", "seagreen"),
    "blue": ("blue", "royalblue", "mediumblue"),
    "yellow": ("yellow", "gold"),
    "orange": ("orange", "darkorange"),
    "purple": ("purple", "darkviolet", "darkorchid"),
    "pink": ("pink", "hotpink"),
    "brown": ("saddlebrown", "sienna"),
    "cyan": ("cyan", "turquoise", "darkturquoise"),
}
GROUNDS = ("white", "whitesmoke", "lightgray", "ivory", "aliceblue", "black", "darkslategray", "dimgray")
STYLES = ("filled", "stroked", "gradient", "shadow")
CONTRAST = 105  # least distance in RGB between a thing and its ground


def _mixed(name: str, other: str, share: float) -> str:
    """A color with a share of another in it, in CSS."""
    pairs = zip(ImageColor.getrgb(name), ImageColor.getrgb(other), strict=True)
    return "rgb({},{},{})".format(*(round(a + share * (b - a)) for a, b in pairs))


def _polygon(points: list[tuple[float, float]]) -> str:
    return '<polygon points="{}"'.format(" ".join(f"{x:.2f},{y:.2f}" for x, y in points))


def _element(shape: str, r: float, rng: random.Random) -> str:
    """A shape about (0, 0) without the end of its tag, which takes the paint."""
    if shape == "circle":
        return f'<circle r="{0.92 * r:.2f}"'
    if shape == "square":
        side = 1.6 * r
        return f'<rect x="{-side / 2:.2f}" y="{-side / 2:.2f}" width="{side:.2f}" height="{side:.2f}" ' + (
            f'rx="{side * rng.choice((0, 0.05, 0.1)):.2f}"'
        )
    if shape == "triangle":
        return _polygon([(0, -r), (0.92 * r, 0.7 * r), (-0.92 * r, 0.7 * r)])
    if shape == "diamond":
        return _polygon([(0, -1.05 * r), (0.65 * r, 0), (0, 1.05 * r), (-0.65 * r, 0)])
    if shape == "star":
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [r * (1.08 if i % 2 == 0 else 0.45) for i in range(10)]
        return _polygon([(a * math.cos(t), a * math.sin(t)) for a, t in zip(radii, turns, strict=True)])
    if shape == "cross":
        a, b = 0.33 * r, 0.95 * r
        arm = b - a
        return (
            f'<path d="M{-a:.2f} {-b:.2f}h{2 * a:.2f}v{arm:.2f}h{arm:.2f}v{2 * a:.2f}h{-arm:.2f}v{arm:.2f}'
            f'h{-2 * a:.2f}v{-arm:.2f}h{-arm:.2f}v{-2 * a:.2f}h{arm:.2f}z"'
        )
    if shape == "heart":
        return (
            f'<path transform="scale({r:.2f})" d="M0 .95C-.4 .55-1 .2-1-.35C-1-.75-.7-.9-.5-.9'
            'C-.25-.9-.08-.75 0-.5C.08-.75 .25-.9 .5-.9C.7-.9 1-.75 1-.35C1 .2 .4 .55 0 .95z"'
        )
    inner = rng.uniform(0.45, 0.6) * r
    outer = 0.95 * r
    arcs = "".join(  # a ring is a disc with a hole
        f"M{-a:.2f} 0a{a:.2f} {a:.2f} 0 1 0 {2 * a:.2f} 0a{a:.2f} {a:.2f} 0 1 0 {-2 * a:.2f} 0z"
        for a in (outer, inner)
    )
    return f'<path fill-rule="evenodd" d="{arcs}"'


def _thing(color: str, shape: str, x: float, y: float, r: float, number: int, rng: random.Random) -> str:
    style = rng.choice(STYLES)
    if shape == "ring" and style == "stroked":
        style = "filled"
    width = rng.uniform(0.1, 0.16 if shape == "circle" else 0.28) * (1 if shape == "heart" else r)
    paint, before = f'fill="{color}"', ""
    if style == "stroked":
        paint = f'fill="none" stroke="{color}" stroke-width="{width:.3f}" stroke-linejoin="round"'
    elif style == "gradient":
        ends = _mixed(color, "white", 0.2), _mixed(color, "black", 0.15)
        before = (
            f'<linearGradient id="g{number}" gradientTransform="rotate({rng.randrange(0, 90)})">'
            f'<stop stop-color="{ends[0]}"/><stop offset="1" stop-color="{ends[1]}"/></linearGradient>'
        )
        paint = f'fill="url(#g{number})"'
    turn = rng.uniform(0, 360) if shape == "star" else rng.uniform(-12, 12)
    element = _element(shape, r, rng)
    if style == "shadow":
        before = (
            f'<g transform="translate({x + 0.09 * r:.2f} {y + 0.12 * r:.2f}) rotate({turn:.1f})">'
            f'{element} fill="black" fill-opacity=".25"/></g>'
        )
    place = f"translate({x:.2f} {y:.2f}) rotate({turn:.1f})"
    return f'{before}<g transform="{place}">{element} {paint}/></g>'


def _background(colors: list[str], rng: random.Random) -> str:
    """A ground that all the colors stand out from: plain, or passing into a shade a little off."""
    others = [ImageColor.getrgb(color) for color in colors]
    fit = [g for g in GROUNDS if all(math.dist(ImageColor.getrgb(g), rgb) > CONTRAST for rgb in others)]
    ground = rng.choice(fit)
    kind = rng.choice(("plain", "linear", "radial"))
    if kind == "plain":
        return f'<rect width="100" height="100" fill="{ground}"/>'
    toward = "black" if sum(ImageColor.getrgb(ground)) > 380 else "white"
    end = _mixed(ground, toward, 0.1)
    return (
        f'<{kind}Gradient id="ground"><stop stop-color="{ground}"/><stop offset="1" stop-color="{end}"/>'
        f'</{kind}Gradient><rect width="100" height="100" fill="url(#ground)"/>'
    )


def svg_texts(seed: int = 0) -> list[tuple[str, Truth]]:
    """SVG documents and what they show; the same seed always gives the same."""
    rng = random.Random(seed)
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    firsts = pairs + rng.sample(pairs, TWICE)
    made = []
    for number, first in enumerate(firsts):
        things = [first]
        if number % 2:
            things.append(rng.choice([p for p in pairs if p[0] != first[0] and p[1] != first[1]]))
        paints = [rng.choice(NAMES[color]) for color, _ in things]
        across = rng.random() < 0.5
        parts = []
        for index, ((_, shape), paint) in enumerate(zip(things, paints, strict=True)):
            r = rng.uniform(10, 20)
            span = (r + 2, 98 - r) if len(things) == 1 else ((r + 2, 48 - r), (52 + r, 98 - r))[index]
            along, other = rng.uniform(min(span), max(span)), rng.uniform(r + 2, 98 - r)
            x, y = (along, other) if across else (other, along)
            parts.append(_thing(paint, shape, x, y, r, index, rng))
        body = _background(paints, rng) + "".join(parts)
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{body}</svg>'
        made.append((text, tuple(things)))
    return made


def svg_pictures() -> list[tuple[Image.Image, Truth]]:
    """The pictures, RGB of SIDE pixels a side, and what they show.

    Raises:
        ModuleNotFoundError: resvg-py is not installed; it comes with the `dev` extra.
    """
    import resvg_py

    made = []
    for text, truth in svg_texts():
        png = resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE, skip_system_fonts=True)
        made.append((Image.open(io.BytesIO(bytes(png))).convert("RGB"), truth))
    return made


def figures(loaded: Loaded) -> Figures:
    """Exact match of color and shape, asked for by each other; and the share of things that captions name."""
    pictures = svg_pictures()
    processor = loaded.processor
    image = loaded.model.encode_image(processor.images([picture for picture, _ in pictures]))
    things = [(row, color, shape) for row, (_, truth) in enumerate(pictures) for color, shape in truth]
    rows = torch.tensor([row for row, _, _ in things])
    asked = {
        "color": [(f"what color is the {shape}?", color) for _, color, shape in things],
        "shape": [(f"what shape is the {color} thing?", shape) for _, color, shape in things],
    }
    captions = describe(loaded.model, processor, image)
    read = describe(loaded.model, processor, image, num_descriptions(loaded.model))
    found: Figures = {}
    for name, questions in asked.items():
        prompts = [
            processor.prompt(question, processor.question_style, description=read[row])
            for (question, _), (row, _, _) in zip(questions, things, strict=True)
        ]
        said = generate(loaded.model, processor, image[rows], prompts, Generation(max_new_tokens=6))
        right = [text.strip(" .") == answer for (_, answer), [text] in zip(questions, said, strict=True)]
        found[name] = sum(right) / len(right)
    named = [set(NAMED.findall(text)) for text in captions]
    found["things captioned"] = sum((c, s) in named[row] for row, c, s in things) / len(things)
    return found
