"""What the drawn world's checkpoints do not know: fit the score of `blip2.novelty`, and see what it marks.

    fit(loaded, folder)   a linear score between training scenes and pictures of nothing the world has; the
                          threshold is one that 1% of validation scenes exceed. Writes the file.
    figures(loaded)       shares of photographs and of scenes that are marked as unknown

The other pictures are made up: empty backgrounds, patches of clouded textures, heaps of leaves. They stand in
for photographs, whose statistics they share (1/f spectra; occlusion by things of all sizes), so that no
photograph enters the score or its threshold, and photographs remain to measure both. Without them, by
Mahalanobis distance from the training scenes alone, a tenth of the photographs pass.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from blip2.checkpoint import Loaded
from blip2.images import open_image
from blip2.novelty import Novelty, statistics
from blip2.vision import ImageFeatures
from train.scenes.world import render, sample

BATCH = 64
KNOWS = "drawn scenes"
KNOWN_SHARE = 0.99  # of validation scenes below the threshold
DECAY = 1e-4  # of the score's weights, on standardized statistics
CROPS = 25  # of each photograph
MEASURED = 10_000  # first seed of the scenes in the figures; the threshold comes from others
# Photographs among the sample pictures of two packages, as their wheels hold them; drawings are left out.
PACKAGES = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
        "grass.png gravel.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png "
        "motorcycle_right.png page.png retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
SHIPPED = Path("examples/photos")


def fit(loaded: Loaded, folder: Path, scenes: int = 2000, validation: int = 1000) -> Novelty:
    """Fit the score to a checkpoint, write it into its folder, and let `loaded` use it.

    Args:
        loaded: the checkpoint, as it is used: with the weights that lie in `folder`, rounding included.
        folder: where to.
        scenes: how many training scenes, and how many other pictures.
        validation: how many validation scenes the threshold is chosen on.
    """
    size = loaded.processor.image_size
    known = _statistics(loaded, drawn(scenes, "train", size))
    other = _statistics(loaded, others(scenes, size))
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    weight = _separate((known - mean) / deviation, (other - mean) / deviation) / deviation
    scores = _statistics(loaded, drawn(validation, "validation", size)) @ weight
    loaded.novelty = Novelty(weight, scores.quantile(KNOWN_SHARE).item(), KNOWS)
    loaded.novelty.save(folder)
    return loaded.novelty


def figures(loaded: Loaded, scenes: int = 1000, split: str = "test", crops: int = CROPS) -> dict[str, float]:
    """Shares marked as unknown, of photographs (whole and in crops) and of scenes; counts beside them."""
    novelty = loaded.novelty
    if novelty is None:
        raise ValueError(f"{loaded.name} has no novelty score: it takes every picture")
    files = photographs()
    shown = [picture for file in files for picture in crop(file, crops)]
    size = loaded.processor.image_size
    return {
        "photographs": len(files),
        "pictures of them": len(shown),
        "photographs unknown": _unknown(loaded, novelty, shown),
        "scenes unknown": _unknown(loaded, novelty, drawn(scenes, split, size, MEASURED)),
    }


# ---------------------------------------------------------------- pictures


@cache
def drawn(count: int, split: str, size: int, first: int = 0) -> list[Image.Image]:
    """Scenes of a split from seed `first` on, `size` pixels a side."""
    return [Image.fromarray(render(sample(seed, split), size)) for seed in range(first, first + count)]


@cache
def others(count: int, size: int) -> list[Image.Image]:
    """Pictures that are none of the drawn world: a fifth empty backgrounds, the rest textures and leaves."""
    pictures = []
    for seed in range(count):
        if seed % 5 == 0:
            pictures.append(Image.fromarray(render(replace(sample(seed, "train"), things=()), size)))
        else:
            rng = np.random.default_rng(seed)
            pictures.append(_finish((_patchwork if seed % 5 < 3 else _leaves)(size, rng), rng))
    return pictures


def photographs() -> list[Path]:
    """The shipped photographs, and those of the packages that are installed."""
    files = sorted(SHIPPED.glob("*.jpg"))
    for package, (folder, names) in PACKAGES.items():
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            files += [Path(found.origin).parent / folder / name for name in names.split()]
    return files


def crop(file: Path, count: int) -> Iterator[Image.Image]:
    """A photograph, whole and in square pieces of 35 to 100% of its shorter side."""
    picture, rng = open_image(file), random.Random(file.name)
    yield picture
    for _ in range(count):
        side = int(rng.uniform(0.35, 1) * min(picture.size))
        left, top = rng.randint(0, picture.width - side), rng.randint(0, picture.height - side)
        yield picture.crop((left, top, left + side, top + side))


def _field(size: int, power: float, rng: np.random.Generator) -> np.ndarray:
    """Noise with a spectrum of 1 / frequency^power: (size, size), of mean 0 and deviation 1."""
    stretch = rng.uniform(0.6, 1.6)
    frequency = np.hypot(stretch * np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) / frequency**power).real
    return (noise - noise.mean()) / noise.std()


def _texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """A color with clouds of light and of hue, lit from one side: (size, size, 3), about 0 to 255."""
    color = rng.uniform(0, 255) + rng.normal(0, rng.choice([0, 8, 35]), 3)
    light = (
        rng.uniform(3, 60) * (1 + rng.normal(0, 0.15, 3)) * _field(size, rng.uniform(0.3, 2), rng)[..., None]
    )
    hue = _field(size, rng.uniform(1, 2), rng)[..., None] * rng.normal(0, rng.choice([0, 12]), 3)
    along, (x, y) = np.linspace(-1, 1, size), rng.normal(0, 25, 2)
    return color + light + hue + (x * along[None] + y * along[:, None])[..., None]


def _patchwork(size: int, rng: np.random.Generator) -> np.ndarray:
    """Textures that meet in ragged lines, as land and sky."""
    pixels = _texture(size, rng)
    for _ in range(rng.integers(0, 9)):
        height = _field(size, rng.uniform(1.5, 3), rng) - rng.uniform(0, 1.5)
        mask = np.clip(height * rng.uniform(2, 30), 0, 1)[..., None]
        pixels += mask * (_texture(size, rng) - pixels)
    return pixels


def _leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Ellipses and polygons of all sizes, one over another."""
    pixels = _texture(size, rng)
    for _ in range(round(5 * 30 ** rng.random())):
        radius = size * min(0.47, 0.04 * (1 - rng.random()) ** -0.7)
        flat, (x, y) = radius * rng.uniform(0.3, 1), rng.uniform(0, size, 2)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7) if rng.random() < 0.6 else 40))
        corners = [(2 * (x + radius * np.cos(a)), 2 * (y + flat * np.sin(a))) for a in angles]
        drawing = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(drawing).polygon(corners, fill=255)
        mask = np.asarray(drawing.reduce(2), np.float32)[..., None] / 255
        plain = rng.uniform(0, 255) + rng.normal(0, 20, 3)
        pixels += mask * ((plain if radius < 0.1 * size else _texture(size, rng)) - pixels)
    return pixels


def _finish(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Out of focus, gray or noisy, as photographs may be."""
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.04) * picture.width))
    if rng.random() < 0.25:
        picture = picture.convert("L").convert("RGB")
    noise = rng.normal(0, rng.uniform(0, 6), (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- scores


@torch.no_grad()
def _features(loaded: Loaded, pictures: Iterable[Image.Image]) -> Iterator[ImageFeatures]:
    many = list(pictures)
    for start in range(0, len(many), BATCH):
        pixels = loaded.processor.images(many[start : start + BATCH]).to(loaded.device)
        yield ImageFeatures(loaded.model.image_embeds(pixels))  # the queries need not read them


def _statistics(loaded: Loaded, pictures: Iterable[Image.Image]) -> Tensor:
    return torch.cat([statistics(part).cpu() for part in _features(loaded, pictures)])


def _unknown(loaded: Loaded, novelty: Novelty, pictures: Iterable[Image.Image]) -> float:
    marked = torch.cat([novelty.is_unknown(part).cpu() for part in _features(loaded, pictures)])
    return marked.float().mean().item()


def _separate(known: Tensor, other: Tensor) -> Tensor:
    """Logistic regression: weights (2V,) of a score that is higher for `other`; rows are pictures."""
    rows = torch.cat([known, other])
    target = torch.cat([torch.zeros(len(known)), torch.ones(len(other))])
    weight = torch.zeros(rows.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            F.binary_cross_entropy_with_logits(rows @ weight + bias, target) + DECAY * weight.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()
