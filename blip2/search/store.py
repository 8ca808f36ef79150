"""An index of pictures on the disk: what is known of each, and its vectors.

    index.json         what the index is of: folder, model, weights; how much of the other files counts
    pictures-1.jsonl   a line a picture: size, time, digest, row; later lines replace earlier ones
    features-1.f16     float16 (Q, E) a row
    means-1.f16        float16 (E,) a row, for queries that are pictures

The last three only grow, and a line is written once its row is on the disk. What a search sees is what
index.json says, which is replaced as the last act of a run: a run that is killed leaves the index as it was,
and what it had done for the next one. Where more is dead than alive, files of the next number take their
place.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2.search.encode import Picture
from blip2.search.vectors import SearchError, Vectors

FORMAT = 1
HEAD, HIDDEN = "index.json", ".blip2-index"
UNFINISHED = -1


@dataclass(frozen=True)
class Head:
    """What index.json says.

    Attributes:
        folder: of the pictures; from the index if that lies in it.
        recursive: the folders in it were indexed, too.
        model: what made the vectors, as `blip2.load` takes it.
        precision: that it computed in.
        weights: sha256 over its weight files.
        files: name, size and time of each of them: while these stay, the digest need not be computed again.
        queries: Q.
        width: E.
        number: of the three other files.
        lines: of pictures-N.jsonl that count; UNFINISHED before a first run has come to its end.
    """

    folder: str
    recursive: bool
    model: str
    precision: str
    weights: str
    files: list[list[Any]]
    queries: int
    width: int
    number: int = 1
    lines: int = UNFINISHED
    format: int = FORMAT


def find_index(path: str | Path) -> Path:
    """The index at a path: its folder, or the one in a folder of pictures.

    Raises:
        SearchError: there is none.
    """
    path = Path(path).expanduser()
    for place in (path, path / HIDDEN):
        if (place / HEAD).is_file():
            return place
    what = "is not a folder" if not path.is_dir() else "has no index"
    raise SearchError(f"{path} {what}: make one with `blip2 index FOLDER`")


def read_head(place: Path) -> Head:
    """What an index is of.

    Raises:
        SearchError: it is damaged, or of a version to come.
    """
    try:
        raw = json.loads((place / HEAD).read_text("utf-8"))
        if raw["format"] != FORMAT:
            raise SearchError(
                f"{place} has format {raw['format']}, and this version reads {FORMAT}: update blip2, or "
                "index the folder anew"
            )
        return Head(**raw)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise damaged(place, error) from error


def damaged(place: Path, error: object) -> SearchError:
    """The error for an index whose files do not fit together."""
    return SearchError(f"the index {place} is damaged ({error}): delete it, and index the folder anew")


def files_of(place: Path, number: int) -> tuple[Path, Path, Path]:
    """Where pictures, features and means of a number lie."""
    names = (f"pictures-{number}.jsonl", f"features-{number}.f16", f"means-{number}.f16")
    return place / names[0], place / names[1], place / names[2]


def replay(lines: Iterable[bytes]) -> tuple[dict[str, Picture], int]:
    """Pictures by name, and how many rows were written."""
    pictures: dict[str, Picture] = {}
    rows = 0
    for line in lines:
        picture = Picture(**json.loads(line))
        rows = max(rows, 0 if picture.row is None else picture.row + 1)
        take(pictures, picture)
    return pictures, rows


def take(pictures: dict[str, Picture], picture: Picture) -> None:
    """A later line replaces an earlier one, and one without digest takes it away."""
    pictures.pop(picture.image, None)
    if picture.digest:
        pictures[picture.image] = picture


def map_rows(place: Path, head: Head, rows: int) -> Vectors:
    """The first rows of the files, not read before they are used."""
    _, *paths = files_of(place, head.number)
    shapes = [(rows, head.queries, head.width), (rows, head.width)]
    if rows == 0:
        return Vectors(np.empty(shapes[0], np.float16), np.empty(shapes[1], np.float16))
    features, means = (
        np.memmap(path, np.float16, "r", shape=shape) for path, shape in zip(paths, shapes, strict=True)
    )
    return Vectors(features, means)


class Index:
    """An index, opened to be searched; what a run adds meanwhile is not seen.

    Args:
        path: the index, or the folder of pictures that it lies in.

    Attributes:
        place: its folder.
        head: what it is of.
        pictures: by name, those that have no vectors included.
        vectors: rows; some may be dead.
        images: the pictures of each row that is alive.

    Raises:
        SearchError: there is none, it is damaged, or its first run was not finished.
    """

    def __init__(self, path: str | Path):
        self.place = find_index(path)
        while True:
            self.head = read_head(self.place)
            if self.head.lines == UNFINISHED:
                raise SearchError(
                    f"the first run over {self.folder} was not finished: `blip2 index` goes on with it"
                )
            try:
                self._open()
                return
            except (OSError, ValueError, TypeError, KeyError) as error:
                if read_head(self.place) == self.head:  # else a run has just put other files in their place
                    raise damaged(self.place, error) from error

    def _open(self) -> None:
        lines = files_of(self.place, self.head.number)[0].read_bytes().splitlines()
        if len(lines) < self.head.lines:
            raise ValueError(f"{len(lines)} of {self.head.lines} lines")
        self.pictures, _ = replay(lines[: self.head.lines])
        self.images: dict[int, list[str]] = {}
        for picture in self.pictures.values():
            if picture.row is not None:
                self.images.setdefault(picture.row, []).append(picture.image)
        self.vectors = map_rows(self.place, self.head, max(self.images, default=-1) + 1)
        self.alive = np.zeros(len(self.vectors), bool)
        self.alive[list(self.images)] = True

    @property
    def folder(self) -> Path:
        """Of the pictures."""
        return Path(os.path.normpath(self.place.absolute() / self.head.folder))

    def path(self, image: str) -> Path:
        """A picture's file."""
        return self.folder / image

    def __len__(self) -> int:
        """How many pictures can be found."""
        return sum(map(len, self.images.values()))
