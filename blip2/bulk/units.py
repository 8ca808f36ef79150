"""The source of a run, found and cut into numbered units, the same whenever it is looked at.

Pictures and rows of tables are cut into equal parts; a tar shard is a unit as it is.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blip2.bulk.rows import lines
from blip2.bulk.settings import BulkError, Source
from blip2.bulk.store import Store
from blip2.bulk.tables import DATASET, dataset, num_rows
from blip2.bulk.tars import ShardError, index
from blip2.bulk.unit import Unit
from blip2.pictures import ENDINGS, counted

KINDS = {".tar": "tar", ".parquet": "parquet", ".txt": "lines"} | dict.fromkeys(ENDINGS, "pictures")
NOUNS = {"tar": "tar shard", "parquet": "parquet file", "lines": "text file", "pictures": "picture"}
UNITS = 64  # a run is cut into so many, or more: enough that actors end together
MOST_BATCHES = 32  # of a unit: what a stop may cost
MOST_UNITS = 20_000  # but for tar shards; each passes through Ray's scheduler
SAMPLED = 3  # tar shards that are counted, to say about how many pictures there are


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        kind, root, names: as of a `Unit`.
        rows: of each file; of a picture it is one. Empty for tars.
    """

    kind: str
    root: str
    names: tuple[str, ...]
    rows: tuple[int, ...] = ()

    @property
    def total(self) -> int | None:
        """Rows in all; None for tars."""
        if self.kind == "pictures":
            return len(self.names)
        return None if self.kind == "tar" else sum(self.rows)

    def only(self, names: Sequence[str]) -> "Found":
        """Of pictures, these."""
        return replace(self, names=tuple(names))

    def described(self) -> str:
        """In words."""
        if self.kind == "dataset":
            return f"{counted(self.total or 0, 'row')} of the data set {self.root}"
        files = counted(len(self.names), NOUNS[self.kind])
        return files if self.kind in ("pictures", "tar") else f"{counted(self.total or 0, 'row')} in {files}"


def find(source: Source, texts_only: bool = False) -> Found:
    """Look at a source.

    Args:
        source: where.
        texts_only: whether texts are wanted, not pictures.

    Raises:
        BulkError: nothing is there, or no one knows what of it is meant.
    """
    if source.address.startswith(DATASET):
        data = dataset(source)
        return Found("dataset", source.address.removeprefix(DATASET), (), (len(data),))
    root, names = _files(source.address)
    kinds = Counter(kind for name in names if (kind := KINDS.get(PurePosixPath(name).suffix.lower())))
    if not texts_only:
        del kinds["lines"]  # texts beside pictures
    if not kinds:
        wanted = "text or parquet files" if texts_only else "pictures, tar shards or parquet files"
        raise BulkError(f"{source.address} holds none of what can be read: {wanted}")
    if len(kinds) > 1:
        held = " and ".join(counted(count, NOUNS[kind]) for kind, count in sorted(kinds.items()))
        raise BulkError(f"{source.address} holds {held}: name one kind by a glob, such as '*.tar'")
    [kind] = kinds
    if texts_only and kind in ("pictures", "tar"):
        raise BulkError(f"{source.address} holds {NOUNS[kind]}s; texts come from text or parquet files")
    chosen = tuple(name for name in names if KINDS.get(PurePosixPath(name).suffix.lower()) == kind)
    if kind in ("pictures", "tar"):
        return Found(kind, root, chosen)
    count = num_rows if kind == "parquet" else lambda root, name: len(lines(root, name))
    with ThreadPoolExecutor(16) as pool:  # of a remote store each takes a moment
        rows = tuple(pool.map(lambda name: count(root, name), chosen))
    if not sum(rows):
        raise BulkError(f"{source.address} holds no rows")
    return Found(kind, root, chosen, rows)


def cut(found: Found, batch_size: int, per_file: int | None = None) -> list[Unit]:
    """The units of a source, each of `per_file` rows; by default of whole batches, by the source's size."""
    if found.kind == "tar":
        names = [name.removesuffix(".tar") for name in found.names]
        return [
            Unit(number, name, "tar", found.root, (file,))
            for number, (name, file) in enumerate(zip(names, found.names, strict=True))
        ]
    total = found.total or 0
    size = per_file
    if size is None:
        batches = max(
            1, min(-(-total // (UNITS * batch_size)), MOST_BATCHES), -(-total // (MOST_UNITS * batch_size))
        )
        size = batches * batch_size
    parts = list(_parts(found, size))
    width = max(5, len(str(len(parts) - 1)))
    return [
        Unit(number, f"{number:0{width}d}", found.kind, found.root, names, start, count)
        for number, (names, start, count) in enumerate(parts)
    ]


def _parts(found: Found, size: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Names, first row and number of rows of each part; a part never spans two tables."""
    if found.kind == "pictures":
        for start in range(0, len(found.names), size):
            names = found.names[start : start + size]
            yield names, start, len(names)
        return
    for names, rows in zip(_tables(found), found.rows, strict=True):
        for start in range(0, rows, size):
            yield names, start, min(size, rows - start)


def _tables(found: Found) -> list[tuple[str, ...]]:
    return [(name,) for name in found.names] or [()]


def about(found: Found) -> tuple[int, bool]:
    """How many rows there are, and whether that is exact: of tar shards a few are counted."""
    if found.total is not None:
        return found.total, True
    store = Store(found.root)
    samples, weighed = 0, 0
    sizes = {name: int(store.fs.size(store.path(name)) or 0) for name in found.names}
    for name in found.names[:SAMPLED]:
        try:
            with store.reading(name) as path:
                samples += len(index(path))
            weighed += sizes[name]
        except ShardError:
            continue  # the run says so, too
    exact = len(found.names) <= SAMPLED
    return samples if exact else int(samples * sum(sizes.values()) / max(1, weighed)), exact


def _files(address: str) -> tuple[str, list[str]]:
    """The folder of an address, absolute, and the files meant, sorted; hidden ones are left out."""
    whole = address if "://" in address else str(Path(address).expanduser().absolute())
    try:
        fs, path = fsspec.core.url_to_fs(whole)
        local = isinstance(fs, LocalFileSystem)
        if fs.isdir(path):
            root, found = path, _walk(path) if local else fs.find(path)
        elif fs.isfile(path):
            root, found = fs._parent(path), [path]
        elif re.search(r"[*?\[]", path):
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root, found = fixed.rpartition("/")[0] or "/", [one for one in fs.glob(path) if fs.isfile(one)]
        else:
            raise BulkError(f"there is no {address}: give a folder, a file or a glob")
    except (ImportError, ValueError) as error:
        if isinstance(error, BulkError):
            raise
        raise BulkError(f"cannot look at {address}: {error}") from error
    start = len(root.rstrip("/")) + 1
    names = [one[start:] for one in found if not any(part.startswith(".") for part in one[start:].split("/"))]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    return (root if local else fs.unstrip_protocol(root)), sorted(
        names, key=lambda name: (name.lower(), name)
    )


def _walk(folder: str) -> list[str]:
    """All files in a folder and its folders; links to folders are not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{Path(root).as_posix()}/{name}" for name in files]
    return found
