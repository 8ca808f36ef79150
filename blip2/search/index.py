"""Index a folder's pictures, so that a text or a picture finds them: only new and changed ones are encoded.

    summary = index_folder(loaded, "pictures")            # or, to see it go on:
    with indexing(loaded, "pictures") as run:
        for picture in run: ...

A file of the same size and time is taken for the same; one that differs is read, and encoded if its bytes are
new to the index: a moved or touched file is not. What is encoded is on the disk before the next pictures are
looked at; a search sees it when all are done.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from blip2.checkpoint import Loaded, locate
from blip2.generation import StopSignal
from blip2.pictures import find_pictures
from blip2.representation import Blip2Representation
from blip2.search.encode import BATCH, Picture, encode_pictures
from blip2.search.store import HEAD, HIDDEN, Head, Index, read_head
from blip2.search.vectors import SearchError
from blip2.search.writer import Writer, check_same, writing
from blip2.shards import read_json, variant_of, weight_files


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        place: the index.
        pictures: that can be found now.
        encoded: by this run.
        kept: as they were, or moved, or touched.
        gone: that left.
        bad: pictures without vectors, and why; those of earlier runs, too.
    """

    place: Path
    pictures: int
    encoded: int
    kept: int
    gone: list[str]
    bad: list[Picture]


class Run:
    """One pass over a folder; iterate over it once, to the end.

    Attributes:
        left: pictures that are new or have changed; iterating gives what became of each.
        gone: those that are there no more.
        summary: once all are done.
    """

    summary: Summary

    def __init__(
        self, loaded: Loaded, folder: Path, found: list[str], writer: Writer, stop: StopSignal, **options: Any
    ):
        self.folder = folder
        self._loaded, self._writer, self._stop, self._options = loaded, writer, stop, options
        self.left = changed(folder, found, writer.pictures, options["force"])
        self.gone = sorted(writer.pictures.keys() - set(found))

    def __iter__(self) -> Iterator[Picture]:
        writer, encoded = self._writer, 0
        rows = {
            picture.digest: picture.row for picture in writer.pictures.values() if picture.row is not None
        }
        paths = {image: self.folder / image for image in self.left}
        unreadable = []
        for pictures, vectors in encode_pictures(self._loaded, paths, rows, stop=self._stop, **self._options):
            known = [p for p in pictures if p.digest or p.image in writer.pictures]  # else there is no record
            new = 0 if vectors is None else len(vectors)
            for picture in writer.add(known, vectors):
                if picture.row is not None:
                    rows[picture.digest] = picture.row
            encoded += new
            unreadable += [picture for picture in pictures if not picture.digest]
            yield from pictures
        if self._stop.is_set():
            return  # the next run goes on
        writer.publish(self.gone)
        bad = [p for p in writer.pictures.values() if p.row is None] + unreadable
        able = sum(p.row is not None for p in writer.pictures.values())
        self.summary = Summary(writer.place, able, encoded, able - encoded, self.gone, bad)


@contextmanager
def indexing(
    loaded: Loaded,
    folder: str | Path,
    out: str | Path | None = None,
    *,
    recursive: bool = False,
    force: bool = False,
    batch_size: int = BATCH,
    stop: StopSignal | None = None,
) -> Iterator[Run]:
    """A pass over a folder of pictures, as long as it lasts alone at its index.

    Args:
        loaded: a stage-1 checkpoint; that of the index if there is one.
        folder: of the pictures.
        out: the index; by default a hidden folder in `folder`.
        recursive: the folders in it, too, from now on.
        force: pictures of a kind that the model does not know, too.
        batch_size: pictures at a time.
        stop: once set, the run ends, without a summary, and searches see nothing of it.

    Raises:
        FolderError: no such folder, or no pictures in it.
        SearchError: the index is of something else, or cannot be used; the model scores no texts.
    """
    folder = Path(folder).expanduser()
    place = Path(out).expanduser() if out else folder / HIDDEN
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    before = read_head(place) if (place / HEAD).is_file() else None
    recursive = recursive or (before is not None and before.recursive)
    found = find_pictures(folder, recursive)  # before anything is made in it
    with writing(place, head_of(loaded, folder, place, recursive, before)) as writer:
        yield Run(loaded, folder, found, writer, stop or Event(), force=force, batch_size=batch_size)


def index_folder(
    loaded: Loaded, folder: str | Path, out: str | Path | None = None, **options: Any
) -> Summary:
    """Index a folder's pictures, or bring its index up to date; arguments and errors are `indexing`'s."""
    with indexing(loaded, folder, out, **options) as run:
        for _ in run:
            pass
        return run.summary


# --- which model, which pictures ---


def head_of(loaded: Loaded, folder: Path, place: Path, recursive: bool, before: Head | None = None) -> Head:
    """What an index made with a model would say of itself."""
    model = loaded.model
    if not isinstance(model, Blip2Representation):
        raise SearchError(
            f"{loaded.name} writes texts; pictures are found by a model that scores them: scenes-itm"
        )
    folder, place = (Path(os.path.normpath(path.absolute())) for path in (folder, place))
    source = os.path.relpath(folder, place) if place.is_relative_to(folder) else str(folder)
    weights, files = weights_of(loaded.folder, before)
    return Head(
        folder=source,
        recursive=recursive,
        model=_name_of(loaded),
        precision=loaded.precision,
        weights=weights,
        files=files,
        queries=model.query_tokens.shape[1],
        width=model.vision_projection.out_features,
    )


def _name_of(loaded: Loaded) -> str:
    """What finds the model again, from wherever: its name, or its folder if the name stands for another."""
    name = loaded.name.partition("@")[0]  # the app's names may carry a precision
    try:
        _, found = locate(name, local_files_only=True, precision=loaded.precision)
    except ValueError:
        return str(loaded.folder.absolute())
    own = found.resolve() == loaded.folder.resolve() and not Path(name).expanduser().is_dir()
    return name if own else str(loaded.folder.absolute())


def weights_of(folder: Path, before: Head | None = None) -> tuple[str, list[list[Any]]]:
    """The sha256 over a checkpoint's weight files, and their names, sizes and times.

    Args:
        folder: the checkpoint's.
        before: of an index; where its files are these, its digest is taken.
    """
    paths = weight_files(folder, variant_of(read_json(folder / "config.json")))
    facts = [(path.name, path.stat()) for path in paths]
    files = [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]
    if before is not None and before.files == files:
        return before.weights, files
    made = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest(), files


def check_model(index: Index, loaded: Loaded) -> None:
    """Refuse a model that did not make the index.

    Raises:
        SearchError: it did not.
    """
    wanted = head_of(loaded, index.folder, index.place, index.head.recursive, index.head)
    check_same(index.head, replace(wanted, folder=index.head.folder), index.place)


def changed(
    folder: Path, images: Sequence[str], known: Mapping[str, Picture], force: bool = False
) -> list[str]:
    """Those of the pictures that are new, or whose files have another size or time than an index knows.

    Args:
        folder: of the pictures.
        images: their paths in it.
        known: what the index knows.
        force: those, too, that the model did not know.
    """
    left = []
    for image in images:
        before = known.get(image)
        try:
            now = (folder / image).stat()
        except OSError:  # what is wrong with it is said when it is read
            before = None
        if (
            before is None
            or (before.size, before.time) != (now.st_size, now.st_mtime_ns)
            or (force and before.unknown)
        ):
            left.append(image)
    return left
