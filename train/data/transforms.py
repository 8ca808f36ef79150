"""What training makes of a web image and its caption, as the reference code does, on Pillow and NumPy alone.

Everything random comes from the generator passed in, so that a resumed run sees the same crops. Evaluation's
transform is `blip2.images.preprocess`: the whole picture, resized to a square.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.images import CLIP_MEAN, CLIP_STD, MAX_ASPECT, MAX_PIXELS, open_image

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
TRIES = 10  # at a crop, before the middle of the image is taken


def clean_caption(text: str, max_words: int = 50) -> str:
    """A caption in lower case, without . ! " ( ) * # : ; ~, cut after `max_words` words."""
    text = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """A question likewise; but the signs vanish, where a caption's become spaces."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).rstrip(" ").split(" ")[:max_words])


def decode(data: bytes, wanted: int) -> Image.Image:
    """An image file as RGB, upright; a JPEG at half, a quarter or an eighth of its size where that suffices.

    A reduced JPEG takes a fraction of the time (libjpeg scales while it decodes), and is used only where both
    sides of the result stay at least `wanted` pixels.

    Args:
        data: bytes of the file; untrusted.
        wanted: least width and height, pixels, unless the image is smaller.

    Raises:
        ImageError: no usable picture.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
        width, height = image.size
        if width * height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
            return open_image(data)
        if min(image.size) >= 2 * wanted:
            image.draft("RGB", (wanted, wanted))
        image.load()
    except Exception:  # hostile data raises almost anything; open_image says what is wrong
        return open_image(data)
    upright = image.mode == "RGB" and "exif" not in image.info
    return image if upright else open_image(image)  # which copies


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, a flip, and the encoder's normalization.

    Attributes:
        image_size: S, pixels.
        scale: least and greatest share of the image's area that a crop takes; None: no crop.
        ratio: least and greatest width by height of a crop.
        flip: chance of a mirror image; 0 wherever captions tell left from right.
        mean: of each channel, in [0, 1].
        std: likewise.
    """

    image_size: int = 224
    scale: tuple[float, float] | None = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop of an image of that size: left, upper, right, lower, pixels."""
        if self.scale is None:
            return 0, 0, width, height
        low, high = map(math.log, self.ratio)
        for _ in range(TRIES):
            area = width * height * random.uniform(*self.scale)
            aspect = math.exp(random.uniform(low, high))
            wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < wide <= width and 0 < tall <= height:
                upper, left = (int(random.integers(room + 1)) for room in (height - tall, width - wide))
                return left, upper, left + wide, upper + tall
        wide, tall = width, height
        if width / height < self.ratio[0]:
            tall = min(height, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            wide = min(width, round(height * self.ratio[1]))
        left, upper = (width - wide) // 2, (height - tall) // 2
        return left, upper, left + wide, upper + tall

    @property
    def wanted(self) -> int:
        """Pixels a side that an image needs for every crop to have at least twice those of the result."""
        least = self.scale[0] if self.scale else 1.0
        return math.ceil(2 * self.image_size / math.sqrt(least * min(1.0, self.ratio[0])))

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """An RGB image -> float32 (3, S, S)."""
        crop = image.crop(self.box(*image.size, random))  # resize(box=...) would blend in pixels beyond it
        crop = crop.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return normalize(crop, self.mean, self.std, mirror=random.random() < self.flip)


def normalize(
    image: Image.Image,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    mirror: bool = False,
) -> Tensor:
    """An RGB image -> float32 (3, H, W), rounded bit for bit as `blip2.images.preprocess` does."""
    levels = _levels(tuple(mean), tuple(std))
    pixels = np.asarray(image)
    if mirror:
        pixels = pixels[:, ::-1]
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.take(levels[channel], pixels[:, :, channel], out=values[channel], mode="clip")
    return torch.from_numpy(values)


@functools.cache
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of the 256 values of each channel becomes: float32 (3, 256)."""
    scaled = (np.arange(256) * np.float64(1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
