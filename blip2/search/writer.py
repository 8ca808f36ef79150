"""An index that grows: what is added is on the disk at once, and seen by searches when all is done."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from blip2.search.encode import Picture
from blip2.search.store import HEAD, Head, damaged, files_of, map_rows, read_head, replay, take
from blip2.search.vectors import SearchError, Vectors
from blip2.sidecars import replace_text

LOCK = ".lock"
DEAD = 64  # so many rows and lines of no use are let lie in any case
COPIED = 4096  # rows at a time


@dataclass
class Writer:
    """An index that grows, in the hands of `writing`.

    Attributes:
        place: its folder.
        head: what it is of, and what a search sees of it.
        pictures: by name, those too that a search does not see yet.
    """

    place: Path
    head: Head
    pictures: dict[str, Picture] = field(default_factory=dict)

    def _recover(self) -> None:
        """Read what earlier runs have done, and cut off what the last did not finish."""
        path, *_ = files_of(self.place, self.head.number)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if len(lines) < self.head.lines:
            raise damaged(self.place, f"{len(lines)} of {self.head.lines} lines")
        try:
            self.pictures, rows = replay(lines)
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(self.place, error) from error
        self._lines, self._rows = len(lines), rows
        for file, size in zip(
            files_of(self.place, self.head.number), (len(whole), *self._sizes(rows)), strict=True
        ):
            with file.open("ab") as opened:
                if opened.tell() < size:
                    raise damaged(self.place, f"{file.name} is too short")
                opened.truncate(size)
        for file in self.place.glob("*-*.*"):
            if file not in files_of(self.place, self.head.number):
                file.unlink(missing_ok=True)  # of a number that was, or that did not come to be

    def _sizes(self, rows: int) -> tuple[int, int]:
        """Bytes of so many rows' features and means."""
        return 2 * rows * self.head.queries * self.head.width, 2 * rows * self.head.width

    def add(self, pictures: Sequence[Picture], vectors: Vectors | None = None) -> list[Picture]:
        """Add pictures; they are on the disk when this returns.

        Args:
            pictures: with the row that they have already, or none.
            vectors: of the last len(vectors) of them, which get new rows.

        Returns:
            The pictures as they were added.
        """
        new = 0 if vectors is None else len(vectors)
        kept = len(pictures) - new
        rows = range(self._rows, self._rows + new)
        added = [*pictures[:kept], *(replace(p, row=r) for p, r in zip(pictures[kept:], rows, strict=True))]
        path, *files = files_of(self.place, self.head.number)
        if vectors is not None:
            for file, values in zip(files, (vectors.features, vectors.means), strict=True):
                _append(file, np.ascontiguousarray(values).tobytes())
        _append(path, b"".join(map(_line, added)))
        self._rows += new
        self._lines += len(added)
        for picture in added:
            take(self.pictures, picture)
        return added

    def publish(self, gone: Iterable[str] = ()) -> None:
        """Let searches see all that was added, and no more those pictures that are `gone`."""
        if leaving := [Picture(image) for image in gone]:
            self.add(leaving)
        used = {picture.row for picture in self.pictures.values()} - {None}
        head = self.head
        if self._rows > 2 * len(used) + DEAD or self._lines > 2 * len(self.pictures) + DEAD:
            head = replace(head, number=self.head.number + 1)
            self._rewrite(head)
        before, self.head = self.head.number, replace(head, lines=self._lines)
        replace_text(self.place / HEAD, json.dumps(asdict(self.head), indent=1) + "\n")
        if before != self.head.number:
            for file in files_of(self.place, before):
                try:
                    file.unlink(missing_ok=True)
                except OSError:  # Windows: someone searches in it; the next run deletes it
                    continue

    def _rewrite(self, head: Head) -> None:
        """Write what is alive to the files of another number."""
        rows = sorted({picture.row for picture in self.pictures.values() if picture.row is not None})
        places = {row: place for place, row in enumerate(rows)}
        old = map_rows(self.place, self.head, self._rows)
        path, *files = files_of(self.place, head.number)
        for file, values in zip(files, (old.features, old.means), strict=True):
            file.unlink(missing_ok=True)
            _append(file, b"")
            for start in range(0, len(rows), COPIED):
                _append(file, values[rows[start : start + COPIED]].tobytes())
        self.pictures = {
            image: picture if picture.row is None else replace(picture, row=places[picture.row])
            for image, picture in self.pictures.items()
        }
        path.unlink(missing_ok=True)
        _append(path, b"".join(map(_line, self.pictures.values())))
        self._rows, self._lines = len(rows), len(self.pictures)


def _line(picture: Picture) -> bytes:
    return json.dumps(asdict(picture)).encode() + b"\n"


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(place: Path, head: Head) -> Iterator[Writer]:
    """An index to add to: the one there, or a new one.

    Args:
        place: its folder; made if need be.
        head: what it is to be of; one that is there must be of the same weights and folder.

    Raises:
        SearchError: it is of something else, damaged, or another run is at work on it.
    """
    from filelock import FileLock, Timeout  # torch's own dependency

    if place.is_file() or _is_other(place):
        raise SearchError(f"{place} is there already and is no index: choose another --out")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"cannot make {place}: {error.strerror}; --out has the index elsewhere") from error
    try:
        with FileLock(place / LOCK, timeout=0):
            if (place / HEAD).exists():
                found = read_head(place)
                check_same(found, head, place)
                head = replace(found, model=head.model, files=head.files, recursive=head.recursive)
            else:
                replace_text(place / HEAD, json.dumps(asdict(head), indent=1) + "\n")
            writer = Writer(place, head)
            writer._recover()
            yield writer
    except Timeout:
        raise SearchError(f"another run is at work on {place}: wait for its end, or stop it") from None


def _is_other(place: Path) -> bool:
    """Whether a folder holds other things than an index; hidden files may be of one that was hardly begun."""
    if not place.is_dir() or (place / HEAD).exists():
        return False
    return any(not name.startswith(".") for name in os.listdir(place))


def check_same(found: Head, wanted: Head, place: Path) -> None:
    """Refuse to mix what cannot be compared.

    Raises:
        SearchError: the index that was found is of another model, precision or folder.
    """
    other = "choose another --out, or delete it to index anew"
    if found.weights != wanted.weights:
        same = " with other weights" if found.model == wanted.model else ""
        raise SearchError(f"{place} was made with {found.model}, and this is {wanted.model}{same}: {other}")
    if found.precision != wanted.precision:
        raise SearchError(f"{place} was made in {found.precision}, and this is {wanted.precision}: {other}")
    if found.folder != wanted.folder:
        raise SearchError(f"{place} is of the pictures in {found.folder}, not in {wanted.folder}: {other}")
