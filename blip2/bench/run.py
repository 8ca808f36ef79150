"""A whole benchmark: folders, a process for each table, and the findings of all.

Each table is measured in a process of its own with `OMP_WAIT_POLICY=passive` and its number of threads set
before torch starts: threads that spin while they wait make figures of a machine that others use worthless.
"""

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blip2.bench.folders import RELEASED, SIZES, make_folder
from blip2.bench.measures import NAMES, wanted
from blip2.bench.worker import Job
from blip2.checkpoint import CheckpointError, locate
from blip2.devices import accelerator_memory, choose_device, main_memory
from blip2.layout import read_layout
from blip2.quantize import choose_precision

EMBEDDED = {"generate": "scenes-opt", "match": "scenes-itm"}
ALL_SIZES = ("embedded", *(size for size in SIZES if size != "mid-itm"))
PARTS = {"mid": {"generate": "mid", "match": "mid-itm"}, "itm": {"match": "itm"}}  # others only generate
BYTES = {"float32": 4.0, "int8": 1.2, "nf4": 0.8}  # a weight, roughly; 2 in 16 bits
LOADS = 3  # of each side, each in a fresh process
Pair = dict[str, str]
DEFAULTS: Pair = {"ours": "auto", "theirs": "float32"}


@dataclass(frozen=True)
class Options:
    """What to measure; see `blip2 bench --help`."""

    sizes: Sequence[str] = ("embedded",)
    model: str | None = None
    random: bool = False
    pairs: Sequence[Pair] = ({"ours": "float32", "theirs": "float32"}, DEFAULTS)
    threads: Sequence[int] = (0,)
    repeats: int | None = None
    only: Sequence[str] | None = None
    device: str = "auto"
    pictures: int = 8
    keep: Path | None = None
    note: Callable[[str], None] = field(default=print)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for size in self.sizes:
            if size not in ALL_SIZES:
                raise ValueError(f"unknown size {size!r}: choose {', '.join(ALL_SIZES)}")
        for name in self.only or ():
            if name not in NAMES:
                raise ValueError(f"unknown measure {name!r}: choose {', '.join(NAMES)}")
        for name in ("repeats", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if min(self.threads) < 0:
            raise ValueError(f"threads is {min(self.threads)}, it must be at least 1; or 0 for all")


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure, and yield the findings of a table after the other: see `blip2.bench.worker.Findings`.

    Raises:
        ValueError: a model that is not there, or two that do not fit into memory.
        OSError: no room on the disk for random weights.
    """
    with _stopped_by_sigterm(), tempfile.TemporaryDirectory(prefix="blip2-bench-") as scratch:
        for size in [options.model] if options.model else options.sizes:
            folders, weights = _folders(size, options, Path(scratch))
            pairs = _different(options.pairs, folders, options.device)
            for threads, pair in itertools.product(options.threads, pairs):
                job = Job(
                    str(Path(scratch) / "findings.json"),
                    _suited(folders, pair),
                    dict(pair),
                    threads,
                    options.device,
                    options.repeats,
                    None if options.only is None else list(options.only),
                    options.pictures,
                )
                _check_memory(job)
                options.note(f"{size}, {_words(pair)}, {f'threads: {threads}' if threads else 'all threads'}")
                found = {"size": size, "weights": weights, **_work(job, options.note)}
                if options.only is None or "load" in options.only:
                    found["loads"] = _loads(job, options.note)
                yield found
            for part in folders.values():
                if Path(part).is_relative_to(scratch):  # room for the next size
                    shutil.rmtree(part)


def _words(pair: Pair) -> str:
    return " against ".join(f"{side} {precision}" for side, precision in pair.items())


def _suited(folders: dict[str, str], pair: Pair) -> dict[str, str]:
    """Those of a size that a precision is for: 8 and 4 bits are for language models."""
    quantized = not {"int8", "nf4"}.isdisjoint(pair.values())
    return {
        k: folder for k, folder in folders.items() if k == "generate" or not quantized or len(folders) == 1
    }


def _different(pairs: Sequence[Pair], folders: dict[str, str], device: str) -> list[Pair]:
    """The pairs without those that "auto" makes the same as another: small models stay in float32."""
    found: dict[tuple[str, ...], Pair] = {}
    for pair in pairs:
        chosen = (
            _precision(value, Path(folder), device) for value in pair.values() for folder in folders.values()
        )
        found.setdefault((*pair, *chosen), pair)
    return list(found.values())


def _precision(precision: str, folder: Path, device: str) -> str:
    """What `blip2.load` makes of a precision."""
    if precision != "auto":
        return precision
    return choose_precision(precision, read_layout(folder), choose_device(device))


def _check_memory(job: Job) -> None:
    """Notice before anything is loaded that the models of both sides do not fit.

    Raises:
        ValueError: they do not, with what would.
    """
    memory = accelerator_memory(job.device) or main_memory()
    for folder in map(Path, job.folders.values()):
        chosen = [_precision(precision, folder, job.device) for precision in job.precisions.values()]
        needed = read_layout(folder).num_parameters * sum(BYTES.get(precision, 2) for precision in chosen)
        if needed + 1e9 > memory.free:
            raise ValueError(
                f"{folder.name}, {_words(job.precisions)}, takes {needed / 1e9:.1f} GB, and 1 GB to work in, "
                f"but {memory.free / 1e9:.1f} GB are free: choose a lower --precision, a smaller size, or "
                "--side ours"
            )


def _folders(size: str, options: Options, scratch: Path) -> tuple[dict[str, str], str]:
    """The folders of a size or model by kind, and a word on what weights they hold."""
    if options.model:
        name, folder = locate(options.model)
        return {"match" if read_layout(folder).stage1 else "generate": str(folder)}, name
    if size == "embedded":
        return {kind: str(locate(name)[1]) for kind, name in EMBEDDED.items()}, "embedded"
    if size in RELEASED and not options.random:
        try:
            name, folder = locate(RELEASED[size], local_files_only=True)
            return {"match" if size == "itm" else "generate": str(folder)}, name
        except CheckpointError:
            options.note(f"{RELEASED[size]} is not in the cache: its random twin is measured")
    folders = {}
    for kind, part in PARTS.get(size, {"generate": size}).items():
        folder = (options.keep or scratch) / part
        if wanted(options.only, kind) or "load" in (options.only or ()):
            if not folder.is_dir():
                options.note(f"writing {part} with random weights to {folder}")
                make_folder(part, folder, max_shard_size="2GB")
            folders[kind] = str(folder)
    return folders, "random"


def _loads(job: Job, note: Callable[[str], None]) -> dict[str, Any]:
    """Medians of load time and peak memory, a fresh process each, by side."""
    kind = next(iter(job.folders))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in job.precisions}
    for number in range(min(job.repeats or LOADS, LOADS)):
        for side in sorted(found, reverse=number % 2 == 1):
            one = replace(
                job, load=True, folders={kind: job.folders[kind]}, precisions={side: job.precisions[side]}
            )
            found[side].append(_work(one, note))
    return {
        side: {name: statistics.median(one[name] for one in many) for name in many[0]}
        for side, many in found.items()
    }


def _work(job: Job, note: Callable[[str], None]) -> dict[str, Any]:
    """Run a job in a process of its own.

    Raises:
        ValueError: what stopped it, as a sentence for users.
        RuntimeError: it failed otherwise; with the end of what it said.
    """
    out = Path(job.out)
    out.unlink(missing_ok=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    if job.threads:
        environment |= {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "blip2.bench.worker", job.to_json()]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                note(line.strip())
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        errors.seek(0)
        said = errors.read()
    found = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    if "error" in found:
        raise ValueError(found["error"])
    if process.returncode:
        if process.returncode == -signal.SIGKILL:
            raise MemoryError("the measuring process was killed, as happens when memory does not suffice")
        raise RuntimeError(f"the measuring process failed:\n{said[-4000:]}")
    return found


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let a termination clean up as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
