"""Where results go, and what is known of a run there: texts beside pictures, JSONL, parquet, tar shards.

OUT/00000.jsonl ...     a file a unit, in the source's order; or, where OUT is a .jsonl or .parquet file,
OUT                     all of them in one, in OUT.bulk/ until the end
bulk.json               settings, and figures at the end       (in OUT, or in OUT.bulk)
errors.jsonl            rows that could not be used, and why
.units/                 the plan, and a report of every unit that is done
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blip2.bulk.settings import BulkError, Settings
from blip2.bulk.store import Store
from blip2.bulk.tars import ShardWriter
from blip2.bulk.unit import Unit
from blip2.sidecars import SIDECARS, Entry, Sidecars

NOTE, ERRORS, PLAN = "bulk.json", "errors.jsonl", "plan.jsonl"
ENDINGS = {"jsonl": ".jsonl", "parquet": ".parquet", "shards": ".tar"}


class Writer(Protocol):
    """Takes a unit's records, as `blip2.bulk.tasks` makes them, in order."""

    def add(self, record: Mapping[str, Any], sample: Any, sample_key: str) -> None:
        """A record, the sample that it is of, and what that goes by in a tar."""

    def close(self) -> None:
        """End the file."""


class Lines:
    """JSON, a line a record."""

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8", newline="\n")

    def add(self, record: Mapping[str, Any], sample: Any, sample_key: str) -> None:
        """See `Writer`."""
        self.file.write(json.dumps(record, ensure_ascii=False, default=np.ndarray.tolist) + "\n")

    def close(self) -> None:
        """See `Writer`."""
        self.file.close()


class Columns:
    """A parquet file: a row a record."""

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        self.records: list[Mapping[str, Any]] = []

    def add(self, record: Mapping[str, Any], sample: Any, sample_key: str) -> None:
        """See `Writer`."""
        self.records.append(record)

    def close(self) -> None:
        """See `Writer`."""
        import pyarrow as pa
        from pyarrow import parquet

        schema = self._schema(pa)
        arrays = []
        for name in schema.names:
            values = [record.get(name) for record in self.records]
            if name == "embedding":
                stacked = (
                    np.stack([record[name] for record in self.records])
                    if values
                    else np.zeros((0, 1), self.settings.dtype)
                )
                flat = pa.array(stacked.reshape(-1))
                shape = stacked.shape[1:]
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))))
                schema = schema.set(schema.names.index(name), pa.field(name, arrays[-1].type))
                schema = schema.with_metadata({"embedding_shape": json.dumps(shape)})
            else:
                arrays.append(pa.array(values, schema.field(name).type))
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), self.path, compression="zstd")

    def _schema(self, pa: Any) -> Any:
        """Columns of the task, those alone that the settings ask for."""
        texts, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
        s = self.settings
        if s.task == "embed":
            embedding = ("embedding", pa.list_(pa.float32()))
            text = [("key", pa.string()), ("text", pa.string()), embedding]
            return pa.schema(text if s.texts_only else [("image", pa.string()), embedding])
        columns = [("image", pa.string()), ("captions" if s.task == "caption" else "texts", texts)]
        if s.task == "score":
            return pa.schema([*columns, *((head, numbers) for head in s.heads)])
        columns += [("prompts", texts)] * (len(s.captioning.prompts) > 1)
        columns += [("match", numbers)] * bool(s.scorer)
        columns += [("answers", pa.map_(pa.string(), pa.string()))] * bool(s.captioning.questions)
        return pa.schema(columns)


class Tar:
    """A tar shard: the samples as they were, the record added to the json of each."""

    def __init__(self, path: Path):
        self.shard = ShardWriter(path)

    def add(self, record: Mapping[str, Any], sample: Any, sample_key: str) -> None:
        """See `Writer`."""
        text = json.dumps({**sample.metadata, **record}, ensure_ascii=False).encode()
        self.shard.add(sample_key, {sample.extension: sample.image, **sample.files, "json": text})

    def close(self) -> None:
        """See `Writer`."""
        self.shard.close()


class Beside:
    """A text file beside each picture."""

    def __init__(self, sidecars: Sidecars):
        self.sidecars = sidecars

    def add(self, record: Mapping[str, Any], sample: Any, sample_key: str) -> None:
        """See `Writer`."""
        entry = Entry(record["image"], tuple(record["captions"]), answers=record.get("answers", {}))
        self.sidecars.path(entry.image).parent.mkdir(parents=True, exist_ok=True)
        self.sidecars.write(entry)

    def close(self) -> None:
        """See `Writer`."""


class Destination:
    """Where a run's results go.

    Args:
        settings: of the run.

    Raises:
        BulkError: results cannot go there.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.beside = settings.to in SIDECARS
        self.single = not self.beside and settings.out.lower().endswith(ENDINGS[settings.to])
        if self.beside and "://" in settings.out:
            raise BulkError(
                f"texts beside pictures are written to folders of this machine, not {settings.out}"
            )
        if self.single and settings.to == "shards":
            raise BulkError(
                f"--out is {settings.out}: shards go to a folder, a tar for each part of the source"
            )
        self.home = Store(f"{settings.out}.bulk" if self.single else settings.out)
        self.units = Store(f"{settings.out}{'.bulk' if self.single else ''}/.units")
        where, _, self.name = settings.out.rpartition("/")
        self.around = Store(where or ("/" if settings.out.startswith("/") else "."))
        self.sidecars = Sidecars(settings.out, settings.to) if self.beside else None

    # --- one unit ---

    @contextlib.contextmanager
    def writing(self, unit: Unit) -> Iterator[Writer]:
        """A writer of a unit's records; the file is there, whole, when the block ends well."""
        if self.sidecars is not None:
            yield Beside(self.sidecars)
            return
        with self.home.writing(self.part(unit)) as path:
            makers: dict[str, Callable[[Path], Writer]] = {"jsonl": Lines, "shards": Tar}
            makers["parquet"] = partial(Columns, settings=self.settings)
            writer = makers[self.settings.to](path)
            yield writer
            writer.close()

    def part(self, unit: Unit) -> str:
        """Name of a unit's file."""
        return unit.name + ENDINGS[self.settings.to]

    def report(self, unit: Unit, report: dict[str, Any]) -> None:
        """Say that a unit is done."""
        self.units.write_json(f"{unit.name}.json", report)

    # --- the run ---

    def note(self) -> dict[str, Any] | None:
        """What an earlier call wrote of its run: "settings", and "summary" once it was finished.

        Raises:
            BulkError: results are there of something else.
        """
        if self.home.fs.exists(self.home.path(NOTE)):
            return self.home.read_jsons([NOTE])[0]
        if self.single and self.around.fs.exists(self.around.path(self.name)):
            raise BulkError(f"{self.settings.out} is there, and not of a bulk run: choose another name")
        ending = ENDINGS.get(self.settings.to, "")
        if ending and not self.single and self.home.fs.exists(self.home.root) and self.home.names(ending):
            raise BulkError(
                f"{self.settings.out} holds {ending} files, and not of a bulk run: choose another folder"
            )
        return None

    def is_complete(self, units: Sequence[Unit]) -> bool:
        """Whether the results of a finished run are still there."""
        if self.single:
            return bool(self.around.fs.exists(self.around.path(self.name)))
        there = set(self.home.names(ENDINGS[self.settings.to]))
        return all(self.part(unit) in there for unit in _with_rows(units, self.reports(units)))

    def write_note(self, summary: Mapping[str, Any] | None = None) -> None:
        """Make the destination this run's; with the summary, once it is finished."""
        content: dict[str, Any] = {"settings": self.settings.lasting()}
        self.home.write_json(NOTE, content | ({} if summary is None else {"summary": summary}))

    def write_plan(self, units: Sequence[Unit]) -> None:
        """Keep the units: when the run goes on they are the same, whatever has come to the source since."""
        with self.units.writing(PLAN) as path:
            path.write_text("".join(unit.json() + "\n" for unit in units), "utf-8")

    def plan(self) -> list[Unit]:
        """The units kept."""
        text = self.units.fs.cat_file(self.units.path(PLAN)).decode()
        return [Unit.from_json(line) for line in text.splitlines()]

    def done(self) -> set[str]:
        """Names of the units that are done."""
        return {name.removesuffix(".json") for name in self.units.names(".json")}

    def reports(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Reports of units that are done."""
        return self.units.read_jsons([f"{unit.name}.json" for unit in units])

    def write_errors(self, reports: Sequence[Mapping[str, Any]]) -> int:
        """List what could not be used, in the source's order; returns how many rows."""
        errors = [error for report in reports for error in report["errors"]]
        with self.home.writing(ERRORS) as path:
            path.write_text(
                "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors), "utf-8"
            )
        return len(errors)

    def join(self, units: Sequence[Unit], reports: Sequence[Mapping[str, Any]]) -> None:
        """Make one file of the units', in the source's order."""
        if not self.single:
            return
        parts = self._parts(_with_rows(units, reports))
        with self.around.writing(self.name) as path:
            if self.settings.to == "jsonl":
                _join_lines(parts, path)
            elif not _join_parquet(parts, path):
                Columns(path, self.settings).close()

    def _parts(self, units: Sequence[Unit]) -> Iterator[Path]:
        for unit in units:
            with self.home.reading(self.part(unit)) as part:
                yield part

    def tidy(self, units: Sequence[Unit]) -> None:
        """Remove what was joined, and what killed runs left half-written."""
        (self.units if self.beside else self.home).remove_parts()
        if self.single:
            for unit in units:
                if self.home.fs.exists(self.home.path(self.part(unit))):
                    self.home.fs.rm_file(self.home.path(self.part(unit)))

    def forget(self) -> None:
        """Remove what is known of a run, to begin anew."""
        if self.units.fs.exists(self.units.root):
            self.units.fs.rm(self.units.root, recursive=True)


def _with_rows(units: Sequence[Unit], reports: Sequence[Mapping[str, Any]]) -> list[Unit]:
    """Units that have a result: a file that could not be read at all has none."""
    rows = {report["unit"]: report["rows"] for report in reports}
    return [unit for unit in units if rows.get(unit.name)]


def _join_lines(parts: Iterator[Path], path: Path) -> None:
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, file)


def _join_parquet(parts: Iterator[Path], path: Path) -> bool:
    """Whether there was anything to join."""
    from pyarrow import parquet

    writer = None
    for part in parts:
        table = parquet.read_table(part)
        writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return writer is not None
