"""The rows of a unit of work: pictures with what is said of them, from wherever they lie.

A row is read when it is needed, in whatever thread decodes it, and what is wrong with it is its own fault
alone: an `ImageError`. What is wrong with a whole file is a `ShardError`; a store that fails is an OSError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from blip2.bulk.settings import Source
from blip2.bulk.store import Store
from blip2.bulk.tables import table_rows
from blip2.bulk.tars import Entry, captions_of, index
from blip2.bulk.unit import Row, Sample, Unit, read_file
from blip2.errors import ImageError


@contextmanager
def rows(unit: Unit, source: Source, images: bool = True, texts: bool = False) -> Iterator[list[Row]]:
    """The rows of a unit, which can be read while the block lasts.

    Args:
        unit: of `blip2.bulk.units.cut`.
        source: what it was cut from, for the names of columns.
        images: whether pictures are wanted.
        texts: whether texts are.

    Raises:
        ShardError: a file that cannot be read at all.
        BulkError: a table without the columns.
    """
    store = Store(unit.root) if unit.kind != "dataset" else None
    if unit.kind == "tar":
        assert store is not None
        with store.reading(unit.names[0]) as path:
            yield [
                Row(f"{unit.name}/{entry.key}", partial(_of_tar, path, entry), entry.key)
                for entry in index(path)
            ]
    elif unit.kind == "pictures":
        assert store is not None
        yield [
            Row(name, partial(_picture, store, name, texts), f"{unit.start + place:09d}")
            for place, name in enumerate(unit.names)
        ]
    elif unit.kind == "lines":
        some = lines(unit.root, unit.names[0])[unit.start : unit.start + unit.count]
        yield [Row(f"{unit.names[0]}:{number}", partial(Sample, texts=(text,))) for number, text in some]
    else:
        yield list(table_rows(unit, source, store, images, texts))


# ---------------------------------------------------------------- pictures, tars, text files


def _picture(store: Store, name: str, texts: bool) -> Sample:
    data = read_file(store, name)
    said: tuple[str, ...] = ()
    if texts:
        try:
            beside = read_file(store, PurePosixPath(name).with_suffix(".txt").as_posix())
        except ImageError:
            raise ImageError(f"there is no text file beside {name}") from None
        said = tuple(
            line for line in beside.decode("utf-8-sig", errors="replace").splitlines() if line.strip()
        )
    return Sample(data, PurePosixPath(name).suffix.lower().removeprefix("."), said)


def _of_tar(path: Path, entry: Entry) -> Sample:
    if (extension := entry.image) is None:
        raise ImageError("the sample has no image")
    metadata = entry.metadata(path)
    if metadata is None:
        raise ImageError("the sample's json is damaged")
    text = entry.read(path, "txt")
    said = captions_of(text.decode(errors="replace"), metadata)
    files = {"txt": text} if "txt" in entry.files else {}
    return Sample(entry.read(path, extension), extension, tuple(said), metadata, files)


@lru_cache(maxsize=1)  # the units of a file come one after the other
def lines(root: str, name: str) -> tuple[tuple[int, str], ...]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    store = Store(root)
    text = store.fs.cat_file(store.path(name)).decode("utf-8-sig", errors="replace")
    return tuple((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())
