"""A run: what of a source is done, what is left, on which actors, how fast, and what comes of it."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2.bulk import cluster
from blip2.bulk.results import ERRORS, Destination
from blip2.bulk.settings import BulkError, Settings
from blip2.bulk.unit import Unit
from blip2.bulk.units import Found, cut, find
from blip2.bulk.worker import Worker
from blip2.pictures import counted
from blip2.sidecars import FolderError

SMALL = 400_000_000  # bytes of weights: of smaller models a core each, of others one copy for several cores
CORES = 8  # of an actor that holds a large model


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        units, of_units: done of all.
        rows: done, of earlier calls too.
        of_rows: of all; None where no one has counted them.
        per_second: rows, in this call, since the first actor was ready.
        left: seconds, as things go.
    """

    units: int
    of_units: int
    rows: int
    of_rows: int | None
    per_second: float
    left: float


Watch = Callable[[Progress], None]
Say = Callable[[str], None]


def run(
    settings: Settings, say: Say = lambda text: None, watch: Watch = lambda progress: None
) -> dict[str, Any]:
    """Do what is left to do; returns the summary, which is in bulk.json, too.

    Args:
        settings: what.
        say: told what is worth knowing.
        watch: told after every unit.

    Raises:
        BulkError: a source, a destination or a setting does not fit; nothing has been touched.
        StoppedError: it ended early.
    """
    begun = time.time()
    settings = anywhere(settings)
    out = Destination(settings)
    units, summary = _claim(settings, out, say)
    with _alone(out):
        out.tidy(units if summary else ())
        if summary:
            say("nothing is left to do; for what has come to the source since, choose another --out")
            return dict(summary) | {"this_call": Tally(units).figures(begun)}
        done = out.done()
        before = out.reports([unit for unit in units if unit.name in done])
        left = [unit for unit in units if unit.name not in done]
        tally = Tally(units, before)
        if done:
            say(
                f"{len(done):,} of {counted(len(units), 'part')} done, {counted(tally.rows, 'row')}: going on"
            )
        try:
            if left:
                with closing((_here if settings.workers == 0 else _on_ray)(settings, left, say)) as going:
                    for report in going:
                        if "failed" in report:
                            raise cluster.StoppedError(f"{report['failed']}. The same command goes on")
                        tally.add(report)
                        watch(tally.progress())
        finally:
            finished = out.done()
            reports = out.reports([unit for unit in units if unit.name in finished])
            failed = out.write_errors(reports)
        out.join(units, reports)
        summary = {
            "rows": sum(report["rows"] for report in reports),
            "failed": failed,
            "errors": out.home.path(ERRORS),
            "files": len(units),
            "seconds_in_all": round(sum(report["seconds"] for report in reports), 1),
        }
        out.write_note(summary)
        out.tidy(units)
    return summary | {"this_call": tally.figures(begun)}


def anywhere(settings: Settings) -> Settings:
    """The same with local paths as they are called on every machine that shares them."""

    def absolute(place: str, known: bool = False) -> str:
        path = Path(place).expanduser()
        return str(path.absolute()) if "://" not in place and (known or path.exists()) else place

    source = replace(settings.source, address=absolute(settings.source.address))
    adapter = settings.model.adapter and absolute(settings.model.adapter)
    model = replace(settings.model, name=absolute(settings.model.name), adapter=adapter)
    scorer = settings.scorer and absolute(settings.scorer)
    return replace(
        settings, source=source, model=model, scorer=scorer, out=absolute(settings.out, known=True)
    )


def look(settings: Settings, out: Destination) -> Found:
    """What a source holds that is to be done.

    Raises:
        BulkError: nothing.
    """
    found = find(settings.source, settings.texts_only)
    if out.sidecars is None:
        if found.kind == "tar" and os.path.realpath(found.root) == os.path.realpath(out.home.address):
            raise BulkError(f"the output is the source, {settings.out}: name another folder")
        return found
    if found.kind != "pictures":
        raise BulkError(
            f"texts go beside pictures, and {settings.source.address} holds none: choose another --to"
        )
    try:
        left = out.sidecars.missing(found.names)
    except FolderError as error:
        raise BulkError(str(error)) from error
    return found.only(left)


def _claim(settings: Settings, out: Destination, say: Say) -> tuple[list[Unit], Mapping[str, Any] | None]:
    """Make the destination this run's, or check that it is; its units, and the summary if it is finished.

    Raises:
        BulkError: it is another run's.
    """
    note = out.note()
    if note is not None:
        wanted = settings.lasting()
        other = list(_differences(note["settings"], _as_json(wanted)))
        if other:
            raise BulkError(
                f"{settings.out} was made with other settings ({'; '.join(other)}): choose another --out, or "
                "go on with those"
            )
        units = out.plan()
        if "summary" not in note:
            return units, None
        if not out.beside and out.is_complete(units):
            return units, note["summary"]
        out.forget()  # of texts beside pictures what is missing is done; of others, what was removed
    found = look(settings, out)
    units = cut(found, settings.batch_size, settings.per_file)
    say(f"{found.described()}, in {counted(len(units), 'part')}")
    out.write_plan(units)
    out.write_note()
    return units, None


def _as_json(value: Any) -> Any:
    """As it is when it has been written to JSON and read again."""
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        before = found.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(before, value, f"{prefix}{name}.")
        elif before != value:
            yield f"{prefix}{name} {before!r}, now {value!r}"


@contextmanager
def _alone(out: Destination) -> Iterator[None]:
    """Refuse a second run at the same local destination while the block lasts; a killed one holds nothing."""
    if not out.units.local:
        yield
        return
    from filelock import FileLock, Timeout  # torch's own dependency

    Path(out.units.root).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.units.path("lock"), timeout=0):
            yield
    except Timeout:
        raise BulkError(f"another run is writing to {out.settings.out}: wait for it, or stop it") from None


# ---------------------------------------------------------------- where


def _here(settings: Settings, units: Sequence[Unit], say: Say) -> Generator[dict[str, Any]]:
    """One unit after another in this process."""
    worker = Worker(settings, settings.device)
    for unit in units:
        yield worker.report(unit)


def _on_ray(settings: Settings, units: Sequence[Unit], say: Say) -> Generator[dict[str, Any]]:
    """Units on a pool of actors, reports as they come."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise BulkError(
            f"actors take their own GPU, or the CPU: --device {settings.device} goes with --workers 0"
        )
    with cluster.connected(settings.address) as machines:
        pool = choose_pool(settings, machines, None if settings.address else free_memory())
        threads = "1 thread" if pool.cpus == 1 else f"{pool.cpus} threads"
        on = f"a GPU and {threads}" if pool.gpus else threads
        say(f"{pool.actors} workers of {on} each" if pool.actors > 1 else f"1 worker of {on}")
        arguments = (settings, "auto" if pool.gpus else "cpu", pool.cpus)
        yield from cluster.reports(Worker, arguments, [unit.json() for unit in units], pool, ahead=2)


def choose_pool(
    settings: Settings, machines: Sequence[Mapping[str, float]], free: int | None = None
) -> cluster.Pool:
    """Actors for a model on such machines: one a GPU, or as many as the cores and the memory allow.

    Args:
        settings: of the run.
        machines: what each has, CPU and GPU.
        free: bytes of memory; None: not known.

    Raises:
        BulkError: there is no room for so many.
    """
    with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if with_gpus and settings.device != "cpu":
        cpus = max(1, min(int(machine["CPU"] // machine["GPU"]) for machine in with_gpus))
        room = cluster.room(with_gpus, 1.0, cpus)
        kind, gpus = "GPU", 1.0
    else:
        if settings.device == "cuda":
            raise BulkError("there is no GPU: leave out --device cuda")
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        kind, gpus = "CPU core", 0.0
        if settings.workers:
            cpus = max(1, min(sum(cores) // settings.workers, max(cores)))
        else:
            weights = weight_bytes(settings.model.name, settings.model.precision)
            small = weights is not None and weights < SMALL
            cpus = 1 if small else max(1, min(CORES, *(count for count in cores if count)))
            if free is not None and weights:
                cpus = max(cpus, sum(cores) // max(1, int(free // (1.3 * weights))))
            cpus = min(cpus, max(cores))
        room = cluster.room(machines, gpus, cpus)
    wanted = settings.workers or room
    if not room or wanted > room:
        raise BulkError(f"--workers is {wanted}; a {kind} each, there is room for {room}")
    return cluster.Pool(wanted, gpus, cpus)


def weight_bytes(name: str, precision: str = "auto") -> int | None:
    """How large a model's weights are, roughly; None where its name alone does not say."""
    from blip2.presets import find_preset

    preset = find_preset(name)
    if preset is not None:
        small = preset.repo_id is None
        return preset.memory({"auto": "float32" if small else "bfloat16"}.get(precision, precision))
    folder = Path(name).expanduser()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    return sum(file.stat().st_size for file in files) or None


def free_memory() -> int:
    """Bytes that this machine has free."""
    from blip2.devices import main_memory

    return main_memory().free


# ---------------------------------------------------------------- figures


class Tally:
    """Counts reports, and tells how fast it goes.

    Args:
        units: of the run.
        before: reports of earlier calls.
    """

    def __init__(self, units: Sequence[Unit], before: Sequence[Mapping[str, Any]] = ()):
        self.units = units
        self.done = len(before)
        self.rows = sum(report["rows"] + len(report["errors"]) for report in before)
        self.new = 0
        counts = [unit.count for unit in units]
        self.of_rows = sum(counts) if all(counts) else None
        self.ready: dict[str, float] = {}  # by actor: when its model was loaded
        self.ends: dict[str, list[tuple[float, int]]] = {}  # and its batches

    def add(self, report: Mapping[str, Any]) -> None:
        """Count one that has just come."""
        rows = report["rows"] + len(report["errors"])
        self.done += 1
        self.rows += rows
        self.new += rows
        self.ready.setdefault(report["actor"], report["ready"])
        self.ends.setdefault(report["actor"], []).extend(report["batches"])

    def progress(self) -> Progress:
        """How far it is."""
        seconds = max(1e-3, time.time() - min(self.ready.values()))
        rate = self.new / seconds
        if self.of_rows is None:
            left = seconds / max(1, self.done) * (len(self.units) - self.done)
        else:
            left = (self.of_rows - self.rows) / rate if rate else 0.0
        return Progress(self.done, len(self.units), self.rows, self.of_rows, rate, left)

    def figures(self, begun: float) -> dict[str, Any]:
        """Of this call: seconds to start, that is until the last actor was ready, and rows a second after.

        The rate is the sum of the actors', each from the end of its first batch to that of its last.
        """
        now = time.time()
        figures: dict[str, Any] = {
            "rows": self.new,
            "seconds": round(now - begun, 1),
            "workers": len(self.ready),
        }
        if self.ready:
            figures["start_seconds"] = round(max(self.ready.values()) - begun, 1)
        rates = [
            sum(rows for _, rows in own[1:]) / (own[-1][0] - own[0][0])
            for own in map(sorted, self.ends.values())
            if len(own) > 1 and own[-1][0] > own[0][0]
        ]
        if rates and len(rates) == len(self.ends):
            figures["rows_per_second"] = round(sum(rates), 2)
            figures["seconds_for_a_million"] = round(1e6 / sum(rates))
        return figures
