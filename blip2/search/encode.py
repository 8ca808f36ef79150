"""Pictures to vectors, a batch at a time; those that cannot be used are told of, and spoil nothing."""

import hashlib
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip2 import folder
from blip2.checkpoint import Loaded
from blip2.devices import in_halves
from blip2.errors import ImageError
from blip2.generation import StopSignal
from blip2.images import open_image
from blip2.pictures import read_ahead
from blip2.representation import Blip2Representation
from blip2.search.vectors import Vectors

BATCH = 8  # pictures at a time; halved where memory does not suffice
NO_NUMBERS = "the model computed no numbers for it (NaN): try another precision"


@dataclass(frozen=True)
class Picture:
    """A picture that an index knows.

    Attributes:
        image: its path within the folder, with forward slashes.
        size: of the file, bytes.
        time: when the file was changed, nanoseconds.
        digest: sha256 of its bytes; "" for a line that says that it is gone.
        row: where its vectors are; None if it has none.
        reason: why it has none.
        unknown: because the model does not know its kind.
    """

    image: str
    size: int = 0
    time: int = 0
    digest: str = ""
    row: int | None = None
    reason: str = ""
    unknown: bool = False


@dataclass(frozen=True)
class _Read:
    picture: Picture
    pixel_values: Tensor | None = None  # float (1, 3, S, S); None where nothing is to be encoded


def encode_pictures(
    loaded: Loaded,
    paths: Mapping[str, Path],
    rows: Mapping[str, int],
    *,
    force: bool = False,
    batch_size: int = BATCH,
    stop: StopSignal | None = None,
) -> Iterator[tuple[list[Picture], Vectors | None]]:
    """Read and encode pictures, a batch at a time, while the next batch is read.

    Args:
        loaded: a stage-1 checkpoint.
        paths: files, by the names that pictures are to have.
        rows: of contents that have been encoded, by digest; may grow meanwhile.
        force: encode pictures of a kind that the model does not know, too.
        batch_size: pictures at a time.
        stop: once set, the next batch is not begun.

    Yields:
        What became of a batch's pictures, those that were encoded last, and the vectors of these.
    """
    stop = stop or threading.Event()
    names = list(paths)
    batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]

    def read(batch: Sequence[str]) -> list[_Read]:
        return [_read(image, paths[image], rows, loaded) for image in batch]

    for batch in read_ahead(batches, read):
        if stop.is_set():
            return
        yield _encoded(loaded, batch, force)


def _read(image: str, path: Path, rows: Mapping[str, int], loaded: Loaded) -> _Read:
    try:
        file = path.stat()
        if not stat.S_ISREG(file.st_mode):  # a pipe could block for ever
            return _Read(Picture(image, reason=f"{image} is no regular file."))
        data = path.read_bytes()
    except OSError as error:
        return _Read(Picture(image, reason=f"cannot read {image}: {error.strerror or error}."))
    digest = hashlib.sha256(data).hexdigest()
    picture = Picture(image, file.st_size, file.st_mtime_ns, digest, rows.get(digest))
    if picture.row is not None:
        return _Read(picture)
    try:
        return _Read(picture, loaded.processor.images(open_image(data)))
    except ImageError as error:
        return _Read(replace(picture, reason=str(error).replace("the image data", image, 1)))


def _encoded(loaded: Loaded, batch: list[_Read], force: bool) -> tuple[list[Picture], Vectors | None]:
    pictures = [one.picture for one in batch if one.pixel_values is None]
    going = [one for one in batch if one.pixel_values is not None]
    if not going:
        return pictures, None
    fine, feats = [], []
    for one, (own, unknown) in zip(going, in_halves(partial(_encode, loaded), going), strict=True):
        if not own.isfinite().all():
            pictures.append(replace(one.picture, reason=f"{one.picture.image}: {NO_NUMBERS}."))
        elif unknown and not force:
            pictures.append(replace(one.picture, reason=unknown, unknown=True))
        else:
            fine.append(one.picture)
            feats.append(own)
    return pictures + fine, Vectors.of(torch.stack(feats)) if feats else None


@torch.no_grad()
def _encode(loaded: Loaded, batch: Sequence[_Read]) -> list[tuple[Tensor, str]]:
    """Of each picture its features, float (Q, E), and why the model does not know it, or ""."""
    assert isinstance(loaded.model, Blip2Representation)
    seen = folder.encode_pictures(loaded, [one.pixel_values for one in batch])
    assert seen.query_output is not None
    feats = loaded.model.image_feats(seen.query_output).cpu()
    return list(zip(feats, loaded.unknown(seen), strict=True))
