"""What training makes of a web image and its caption, as the reference code does, on Pillow and NumPy alone.

Everything random comes from the generator passed in, so that a resumed run sees the same crops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.images import CLIP_MEAN, CLIP_STD

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
TRIES = 10  # at a crop, before the middle of the image is taken


def clean_caption(text: str, max_words: int = 50) -> str:
    """A caption in lower case, without . ! " ( ) * # : ; ~, cut after `max_words` words."""
    text = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """A question likewise; but the signs vanish, where a caption's become spaces."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).rstrip(" ").split(" ")[:max_words])


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, a flip, and the encoder's normalization.

    Attributes:
        image_size: S, pixels.
        scale: least and greatest share of the image's area that a crop takes.
        ratio: least and greatest width by height of a crop.
        flip: chance of a mirror image; 0 wherever captions tell left from right.
        mean: of each channel, in [0, 1].
        std: likewise.
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop of an image of that size: left, upper, right, lower, pixels."""
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

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """An RGB image -> float32 (3, S, S)."""
        crop = image.crop(self.box(*image.size, random))
        crop = crop.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if random.random() < self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(crop, dtype=np.float32) / 255
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
