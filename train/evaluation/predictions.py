"""A results folder: what it was made with, predictions as they come, scores; and the loop that fills it.

    settings.json              task, model, settings, files by digest; a folder is one evaluation's alone
    predictions.jsonl          a line an example, in the data set's order
    predictions-0-of-3.jsonl   what process 0 of 3 has predicted so far, while it runs
    scores.json                the figures, how many examples they are of, and what to know beside them

A data set is cut into units, some pictures and everything asked about them, by its own order alone, and unit
u is done by process u modulo their number. So a picture meets the same others in a batch whatever the number
of processes, and predictions are the same to the last bit. A unit's predictions are written together; what a
killed run left is read by the next, of any number of processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blip2.checkpoint import Loaded
from blip2.devices import is_out_of_memory
from blip2.errors import ImageError
from blip2.settings import Generation
from train import distributed
from train.data.shards import write_atomically
from train.evaluation.annotations import DataSet, Example

READERS = 4  # threads that open pictures
SETTINGS, SCORES = "settings.json", "scores.json"

Record = dict[str, Any]
Unit = list[Example]
Work = Callable[[Unit, Tensor, dict[str, int]], list[Record]]
Stop = Callable[[], bool]


class ResultsError(RuntimeError):
    """An evaluation that cannot go on: its folder, a picture, its memory. The message says what to change."""


# ---------------------------------------------------------------- the folder


def claim(folder: Path, made_of: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Make a folder this evaluation's, or check that it is.

    Args:
        folder: of the results.
        made_of: what decides the predictions: compared with what the folder holds.
        made_with: versions and the like: kept beside it.

    Raises:
        ResultsError: it holds another evaluation.
    """
    path = folder / SETTINGS
    if path.exists():
        found = {name: value for name, value in read(path).items() if name != "made_with"}
        ours, theirs = _flat(json.loads(json.dumps(made_of))), _flat(found)
        differing = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if differing:
            shown = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in differing[:5])
            raise ResultsError(
                f"{folder} holds another evaluation ({shown}): give another --output, or delete it"
            )
    elif folder.is_dir() and any(folder.glob("*.jsonl")):
        raise ResultsError(f"{folder} holds predictions but no {SETTINGS}: give another --output")
    distributed.barrier()  # none writes before all have compared
    if distributed.rank() == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, {**made_of, "made_with": dict(made_with)})
    distributed.barrier()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}.{key}" if prefix else key).items()}


def read(path: Path) -> Any:
    """A JSON file of a results folder.

    Raises:
        ResultsError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}): delete the folder, or give another") from error


def write(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


class Predictions:
    """Records by id: those that a folder holds already, and those that this process adds.

    Args:
        folder: of the results.
        stem: of the files.

    Attributes:
        done: all that was there when this began, of any process.
    """

    def __init__(self, folder: Path, stem: str = "predictions"):
        self.folder, self.stem = folder, stem
        self.own = folder / f"{stem}-{distributed.rank()}-of-{distributed.world_size()}.jsonl"
        self.done = self.read()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}-*-of-*.jsonl"))

    def read(self) -> dict[int | str, Record]:
        """All that the folder holds by now."""
        found = {}
        for path in [self.folder / f"{self.stem}.jsonl", *self._parts()]:
            for record in _lines(path):
                found[record["id"]] = record
        return found

    def add(self, records: Sequence[Record]) -> None:
        """Append records to this process's file."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        mend = self.own.exists()
        with self.own.open("ab+") as file:
            if mend:  # a line that a kill cut short goes
                _cut(file)
            file.write(text.encode())

    def finish(self, records: Sequence[Record]) -> None:
        """Put all records, in their final order, into one file in place of the processes'."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(self.folder / f"{self.stem}.jsonl", lines.encode())
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the processes' files."""
        for path in self._parts():
            path.unlink()


def _lines(path: Path) -> Iterator[Record]:
    """Records of a file; a last line without its end was cut short by a kill."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


def _cut(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


# ---------------------------------------------------------------- the loop


def units(examples: Sequence[Example], pictures: int) -> list[Unit]:
    """A data set by so many pictures at a time, each with all that is asked about it."""
    by_picture: dict[str, Unit] = {}
    for example in examples:
        by_picture.setdefault(example.image, []).append(example)
    groups = list(by_picture.values())
    return [
        [example for group in groups[start : start + pictures] for example in group]
        for start in range(0, len(groups), pictures)
    ]


def mine(parts: Sequence[Any]) -> list[Any]:
    """Those of a list that this process does."""
    return list(parts[distributed.rank() :: distributed.world_size()])


def predict(
    data: DataSet,
    loaded: Loaded,
    work: Work,
    predictions: Predictions,
    *,
    batch_size: int,
    skip_unusable: bool,
    stop: Stop,
    title: str,
) -> None:
    """Do what is left of this process's share.

    Args:
        data: the whole data set.
        loaded: model and processor.
        work: predicts a unit, from float (pictures, 3, S, S) and the row of each picture by its name.
        predictions: get the records.
        batch_size: pictures of a unit.
        skip_unusable: write down that a picture cannot be opened, and go on.
        stop: asked before every unit; once it says yes, the rest is left for another time.
        title: of the progress bar.

    Raises:
        ResultsError: a picture cannot be opened, or memory does not suffice.
    """
    done = predictions.done
    share = mine(units(data.examples, batch_size))
    left = [unit for unit in share if any(example.id not in done for example in unit)]
    with progress(title, len(data.examples), sum(e.id in done for e in data.examples), "example") as bar:
        for unit, opened in opened_ahead(left, data, loaded):
            if stop():
                return
            unusable = {name: reason for name, reason in opened.items() if isinstance(reason, str)}
            if unusable and not skip_unusable:
                name, reason = next(iter(unusable.items()))
                raise ResultsError(f"{name}: {reason} --skip-missing does without such pictures")
            usable = {name: pixels for name, pixels in opened.items() if isinstance(pixels, Tensor)}
            rows = {name: row for row, name in enumerate(usable)}
            asked = [example for example in unit if example.image in rows]
            records = _guarded(work, asked, torch.cat(list(usable.values())), rows) if asked else []
            records += [
                {"id": example.id, "image": example.image, "unusable": unusable[example.image]}
                for example in unit
                if example.image in unusable
            ]
            predictions.add([record for record in records if record["id"] not in done])
            bar.update(min(len(unit) * distributed.world_size(), max(0, bar.total - bar.n)))


def _guarded(work: Work, unit: Unit, pixel_values: Tensor, rows: dict[str, int]) -> list[Record]:
    try:
        return work(unit, pixel_values, rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResultsError(
            f"memory does not suffice for {len(rows)} pictures at a time ({str(error).splitlines()[0]}): "
            "what is done is kept; lower --batch-size and start again"
        ) from error


def opened_ahead(
    parts: Sequence[Unit], data: DataSet, loaded: Loaded
) -> Iterator[tuple[Unit, dict[str, Tensor | str]]]:
    """Units with their pictures by name, float (1, 3, S, S) each, or why one cannot be opened.

    The next unit's pictures are opened while the caller works on this one's.
    """
    processor = loaded.processor

    def open_one(name: str) -> Tensor | str:
        try:
            return processor.images(data.picture(name, processor.image_size))
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:

        def begin(unit: Unit) -> dict[str, Future[Tensor | str]]:
            return {name: pool.submit(open_one, name) for name in dict.fromkeys(e.image for e in unit)}

        ahead = [begin(unit) for unit in parts[:1]]
        for index, unit in enumerate(parts):
            current = ahead.pop()
            ahead += [begin(following) for following in parts[index + 1 : index + 2]]
            yield unit, {name: future.result() for name, future in current.items()}


def progress(title: str, total: int, done: int, unit: str) -> tqdm:
    """A bar with the time that is left, of process 0; where there is no terminal, a line in half a minute."""
    return tqdm(
        desc=title, total=total, initial=done, unit=unit, disable=distributed.rank() != 0, dynamic_ncols=True,
        file=sys.stderr, mininterval=0.2 if sys.stderr.isatty() else 30,
    )  # fmt: skip


def complete(data: DataSet, predictions: Predictions) -> list[Record]:
    """Every example's record, in the data set's order.

    Raises:
        ResultsError: some are missing.
    """
    found = predictions.read()
    lacking = [example.id for example in data.examples if example.id not in found]
    if lacking:
        raise ResultsError(
            f"{predictions.folder} lacks {len(lacking)} of {len(data.examples)} predictions: start again to "
            "make them; all processes need the same folder, on a file system that they share"
        )
    return [found[example.id] for example in data.examples]


def decoding(settings: Mapping[str, Any]) -> Generation:
    """Beam search, or greedy with one beam."""
    names = ("max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty")
    chosen = {name: settings[name] for name in names}
    if settings["num_beams"] == 1:
        return Generation(**chosen)
    return Generation.caption(num_beams=settings["num_beams"], **chosen)


def stopped(stop: Stop) -> bool:
    """Whether any process was asked to stop; waits for all."""
    return any(distributed.all_gather_object(bool(stop())))
