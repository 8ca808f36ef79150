"""What a run reads: drawn scenes, or folders of image-text shards and how each is read.

Sources beside numbers: [C] the reference code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tyro


class RecipeError(ValueError):
    """A recipe that cannot run: something it names is not there, or two of its numbers do not go together."""


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes with captions, made on the fly; no question is ever among them."""

    num_scenes: int = 200_000
    """Training scenes; a new caption is drawn each time one comes up."""
    num_validation: int = 500
    """Held-out scenes, on which the evaluation takes the losses."""
    image_size: int = 64
    """Pixels."""
    telling: bool = False
    """Only captions that fit few other scenes, for ITC and ITM take all other pairs for mismatches."""
    features: str | None = None
    """File of the training scenes as the frozen encoder sees them; None draws and encodes them."""
    num_asked: int = 0
    """Validation scenes about which the evaluation of stage 2 asks questions, besides taking losses."""

    def missing(self) -> list[str]:
        lacking = self.features is not None and not Path(self.features).exists()
        return [f"cached features: there is no file {self.features}"] if lacking else []


@dataclass(frozen=True)
class Source:
    """How one data set's images and captions become samples; the defaults are those of pre-training [C]."""

    max_words: int = 50
    """A caption ends after so many; `max_text_length` of the recipe then counts tokens."""
    clean: bool = True
    """Captions in lower case and without most signs (`train.data.transforms.clean_caption`)."""
    prefix: str = ""
    """Put before every caption, after cleaning; a blank at its end is yours to add."""
    flip: float = 0.5
    """Chance of a mirror image; 0 wherever captions tell left from right."""
    crop: float = 0.5
    """Least share of a picture that a random crop keeps; 1 keeps all of it, wherever captions count things or
    tell where they are."""
    mean: tuple[float, float, float] | None = None
    """Of the channels, in [0, 1]; None takes the image encoder's."""
    std: tuple[float, float, float] | None = None
    """Likewise."""
    decoder: str | None = None
    """"module:function" that turns the bytes of an image file into an RGB PIL image; None opens the common
    formats (`blip2.images.open_image`). It raises ValueError for what it cannot read."""

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise RecipeError(f"max_words is {self.max_words}; a caption has at least 1")
        if not 0 <= self.flip <= 1:
            raise RecipeError(f"flip is {self.flip}; it is a chance, 0 to 1")
        if not 0 < self.crop <= 1:
            raise RecipeError(f"crop is {self.crop}; it is a share, above 0 to 1")
        if self.decoder is not None and self.decoder.count(":") != 1:
            raise RecipeError(f"decoder is {self.decoder!r}; write it as module:function")


@dataclass(frozen=True)
class Shards:
    """Folders of image-text tar shards, mixed by weight; `python -m train.data prepare` makes them."""

    weights: Mapping[str, float]
    """Folder (or msc:// address) to its share of the samples; the shares need not add up to 1."""
    settings: tyro.conf.Suppress[Mapping[str, Source]] = field(default_factory=dict)
    """Folder to how it is read; folders that are not named are read as `Source()` says."""
    validation: tuple[str, ...] = ()
    """Folders whose validation split the evaluation reads; none means those of `weights` that have one."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise RecipeError("the data names no folder of shards; it takes at least one")
        if wrong := [f"{folder}: {weight}" for folder, weight in self.weights.items() if not weight > 0]:
            raise RecipeError(f"weights of shards must be above 0; {', '.join(wrong)}")
        if unknown := sorted(self.settings.keys() - self.weights.keys() - set(self.validation)):
            raise RecipeError(f"settings name folders that the data does not have: {', '.join(unknown)}")

    def missing(self) -> list[str]:
        return [
            line for folder in {**self.weights, **dict.fromkeys(self.validation)} for line in _lacking(folder)
        ]


def _lacking(folder: str) -> list[str]:
    if "://" in folder:  # the loader asks the store itself
        return []
    root, what = Path(folder), "image-text shards:"
    if not any(root.glob("**/*.tar")):
        return [f"{what} no .tar file in {folder}; docs/data.md says how to fetch and prepare each data set"]
    info = root / ".nv-meta" / ".info.json"
    if not (info.exists() and (root / ".nv-meta" / "dataset.yaml").exists()):
        return [
            f"{what} {folder} is not prepared; run `python -m train.data prepare img2dataset {folder}` for a "
            "folder that img2dataset wrote, else the command that began it"
        ]
    lost = [name for name in json.loads(info.read_text())["shard_counts"] if not (root / name).exists()]
    if lost:
        shown = ", ".join(lost[:3])
        return [f"{what} {len(lost)} shard(s) of {folder} are gone, such as {shown}; restore or prepare them"]
    return []
