"""Rows of tables: parquet files, and Hugging Face data sets.

A cell holds a picture's file, its path, its http(s) address, or bytes and path as Hugging Face has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from blip2.bulk.settings import BulkError, Source
from blip2.bulk.store import Store
from blip2.bulk.tars import ShardError
from blip2.bulk.unit import Row, Sample, Unit, read_file
from blip2.errors import ImageError
from blip2.fetch import FetchError, fetch

DATASET = "dataset:"
IMAGE_COLUMNS = (
    "image", "img", "picture", "jpg", "png", "image_bytes", "bytes", "content",
    "image_path", "path", "file_path", "file_name", "filename", "file", "image_url", "url",
)  # fmt: skip
TEXT_COLUMNS = ("caption", "captions", "text", "texts")
SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


@contextmanager
def parquet(root: str, name: str) -> Iterator[Any]:
    """A parquet file, open.

    Raises:
        BulkError: pyarrow is not installed.
        ShardError: it is damaged.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BulkError("parquet files need pyarrow: pip install pyarrow") from error
    store = Store(root)
    with store.fs.open(store.path(name), "rb") as file:
        try:
            yield ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise ShardError(f"{name} is no readable parquet file ({error})") from error


def num_rows(root: str, name: str) -> int:
    """How many rows a parquet file has."""
    with parquet(root, name) as file:
        return int(file.metadata.num_rows)


@lru_cache(maxsize=1)
def _row_group(root: str, name: str, group: int, columns: tuple[str, ...]) -> Any:
    with parquet(root, name) as file:
        return file.read_row_group(group, columns=list(columns))


def dataset(source: Source) -> Any:
    """A Hugging Face data set, or one that `save_to_disk` wrote.

    Raises:
        BulkError: the library is not installed, or has no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise BulkError(
            f"{source.address} needs Hugging Face's library: pip install datasets. Without it, parquet files "
            "on the Hub can be read as hf://datasets/USER/NAME/**/*.parquet"
        ) from error
    name = source.address.removeprefix(DATASET)
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(name, source.subset, split=source.split)
    except (ValueError, OSError) as error:
        raise BulkError(f"cannot load {source.address}, split {source.split}: {error}") from error


_dataset = cache(dataset)  # an actor opens it once


def choose_columns(names: Sequence[str], source: Source, images: bool, texts: bool) -> dict[str, str]:
    """Which columns of a table are the "image", the "text" and the "key", as far as they are wanted.

    Raises:
        BulkError: one is not there.
    """
    chosen = {}
    usual = {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}
    for role, wanted in (("image", images), ("text", texts)):
        if not wanted:
            continue
        own = getattr(source, f"{role}_column")
        found = next((name for name in ((own,) if own else usual[role]) if name in names), None)
        if found is None:
            looked = f"no column {own!r}" if own else f"no column that looks like {role}s"
            there = f"its columns are {', '.join(names)}"
            raise BulkError(f"{source.address} has {looked}: {there}; choose with --{role}-column")
        chosen[role] = found
    if source.key_column:
        if source.key_column not in names:
            raise BulkError(
                f"{source.address} has no column {source.key_column!r}: its columns are {', '.join(names)}"
            )
        chosen["key"] = source.key_column
    return chosen


def table_rows(unit: Unit, source: Source, store: Store | None, images: bool, texts: bool) -> Iterator[Row]:
    """The rows of a part of a table; see `blip2.bulk.rows.rows` for the arguments."""
    if store is None:
        data = _dataset(source)
        chosen = choose_columns(data.column_names, source, images, texts)
        values = _of_dataset(data, chosen, unit)
        where = source.split
    else:
        where = unit.names[0]
        with parquet(unit.root, where) as file:
            chosen = choose_columns(file.schema_arrow.names, source, images, texts)
            ends = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        values = _of_parquet(unit, ends, tuple(dict.fromkeys(chosen.values())))
    for place, value in enumerate(values, unit.start):
        key = str(value(chosen["key"])) if "key" in chosen else f"{where}:{place}"
        yield Row(key, partial(_of_table, store, value, chosen), f"{place:09d}")


Value = Callable[[str], Any]  # a column's name -> what stands there


def _of_parquet(unit: Unit, sizes: Sequence[int], columns: tuple[str, ...]) -> Iterator[Value]:
    first, end = 0, unit.start + unit.count
    for group, size in enumerate(sizes):
        low, high = max(unit.start, first), min(end, first + size)
        if low < high:
            table = _row_group(unit.root, unit.names[0], group, columns)
            for place in range(low - first, high - first):
                yield partial(_cell, table, place)
        first += size


def _cell(table: Any, place: int, column: str) -> Any:
    return table[column][place].as_py()


def _of_dataset(data: Any, chosen: dict[str, str], unit: Unit) -> Iterator[Value]:
    data = data.select_columns(sorted(set(chosen.values())))
    if "image" in chosen and type(data.features[chosen["image"]]).__name__ == "Image":
        import datasets

        data = data.cast_column(chosen["image"], datasets.Image(decode=False))
    for row in data.select(range(unit.start, unit.start + unit.count)):
        yield row.__getitem__


def _of_table(store: Store | None, value: Value, chosen: dict[str, str]) -> Sample:
    texts: tuple[str, ...] = ()
    if "text" in chosen:
        said = value(chosen["text"])
        said = [said] if isinstance(said, str) else said if isinstance(said, list) else []
        texts = tuple(" ".join(one.split()) for one in said if isinstance(one, str) and one.strip())
        if not texts:
            raise ImageError("the row has no text")
    if "image" not in chosen:
        return Sample(texts=texts)
    data = _image_bytes(store, value(chosen["image"]))
    extension = next((name for start, name in SIGNATURES.items() if data.startswith(start)), "webp")
    return Sample(data, extension, texts)


def _image_bytes(store: Store | None, value: Any) -> bytes:
    """A picture's file from a cell: its bytes, its path or address, or both as Hugging Face has it."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ImageError("the row has no picture")
    if value.startswith(("http://", "https://")):
        try:
            return fetch(value)
        except FetchError as error:
            raise ImageError(str(error)) from error
    if "://" in value:
        root, _, name = value.rpartition("/")
        return read_file(Store(root), name)
    if store is None or (store.local and Path(value).is_absolute()):
        return read_file(Store("/"), str(Path(value).absolute()).removeprefix("/"))
    return read_file(store, value)
