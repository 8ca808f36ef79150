"""The pictures of a folder, and what is wanted of each. Without torch, as `blip2.settings` is."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from blip2.errors import ImageError
from blip2.images import open_image
from blip2.settings import Generation
from blip2.sidecars import FolderError

Item = TypeVar("Item")
Made = TypeVar("Made")

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


@dataclass(frozen=True)
class Failure:
    """A picture that got no caption.

    Attributes:
        image: as in `Entry`.
        reason: why, in one sentence.
        unknown: it is of a kind that the model does not know, and would be captioned if forced.
    """

    image: str
    reason: str
    unknown: bool = False


@dataclass(frozen=True)
class Captioning:
    """What is wanted of every picture.

    Attributes:
        generation: settings of the captions.
        prompt: what captions go on from.
        prompts: several such instead; a picture gets the captions of each, one prompt after the other.
        keep_prompt: whether they begin with it.
        prefix: put before every caption as it is.
        suffix: put after it.
        questions: asked of every picture, too.
        answers: settings of the answers.
        style: frame of the questions; by default the model's own.
        batch_size: pictures at once; halved where memory does not suffice.
        force: caption pictures of a kind that the model does not know, too.
    """

    generation: Generation = field(default_factory=Generation.caption)
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    keep_prompt: bool = False
    prefix: str = ""
    suffix: str = ""
    questions: tuple[str, ...] = ()
    answers: Generation = field(default_factory=Generation.answer)
    style: Any = None
    batch_size: int = 8
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse an impossible batch size."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more")

    def worded(self, texts: Iterable[str], prompt: str | None = None) -> list[str]:
        """Captions from what a model said after a prompt, by default the one."""
        prompt = self.prompt if prompt is None else prompt
        begun = f"{prompt} " if self.keep_prompt and prompt else ""
        return [f"{self.prefix}{begun}{text}{self.suffix}" for text in texts]


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2,000 pictures`."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def find_pictures(folder: str | Path, recursive: bool = False) -> list[str]:
    """Paths within `folder` of the pictures there, sorted, with forward slashes; hidden ones are left out.

    Args:
        folder: where to look.
        recursive: in its folders, too; links to folders are not followed.

    Raises:
        FolderError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder")
    found, deeper = [], 0
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        names = [name for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
        if Path(root) == folder or recursive:
            found += [(Path(root) / name).relative_to(folder).as_posix() for name in names]
        else:
            deeper += len(names)
    if not found:
        hint = f"; its folders hold {deeper}, which --recursive takes in" if deeper else ""
        raise FolderError(f"{folder} has no pictures ({', '.join(ENDINGS)}){hint}")
    return sorted(found, key=lambda name: (name.lower(), name))


def read_ahead(items: Sequence[Item], read: Callable[[Item], Made]) -> Iterator[Made]:
    """What `read` makes of each item; while one is worked on the next is read, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read, item) for item in items[:1]]
        for place in range(len(items)):
            made = ahead.pop().result()
            ahead = [pool.submit(read, following) for following in items[place + 1 : place + 2]]
            yield made


def open_picture(image: str, path: Path) -> Image.Image:
    """Open a picture's file; what is wrong with it is said of its name, not of where it lies.

    Raises:
        ImageError: it is no usable picture, or gone.
    """
    try:
        if not path.is_file():  # a pipe could block for ever
            raise ImageError(f"{image} is not here any more, or no regular file: add it again.")
        return open_image(path.read_bytes())
    except ImageError as error:
        raise ImageError(str(error).replace("the image data", image, 1)) from error
    except OSError as error:
        raise ImageError(f"cannot read {image}: {error.strerror or error}.") from error
