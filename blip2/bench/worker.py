"""One process of a benchmark: threads are set before torch starts, and memory is given back at its end.

`python -m blip2.bench.worker JOB` reads what to do as JSON and writes what it found to the file it is told.
"""

import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        out: where the findings go.
        folders: of the models, by kind, "generate" and "match".
        precisions: by side.
        threads: of torch; 0: as many as it takes by itself.
        device: as `blip2.load` takes it.
        repeats: see `blip2.bench.measures.measure`.
        only: names of measures; None: all.
        pictures: in a batch.
        load: instead of them, load the one model of the one side, and caption with it.
    """

    out: str
    folders: dict[str, str]
    precisions: dict[str, str]
    threads: int = 0
    device: str = "auto"
    repeats: int | None = None
    only: list[str] | None = None
    pictures: int = 8
    load: bool = False

    def to_json(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))


@dataclass
class Findings:
    """What a process found; see `blip2.bench.measures.measure` for rows."""

    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    precisions: dict[str, str] = field(default_factory=dict)


def main(job: Job) -> dict[str, Any]:
    """Do it."""
    import torch

    from blip2.devices import choose_device

    if job.threads:
        torch.set_num_threads(job.threads)
    device = choose_device(job.device)
    return _load(job, device) if job.load else _measure(job, device)


def _load(job: Job, device: Any) -> dict[str, Any]:
    """Seconds of a load, and the most memory that it, and a caption after it, took."""
    import torch

    from blip2.bench.machine import wait
    from blip2.bench.measures import TOKENS, make_inputs
    from blip2.bench.sides import Ours, Theirs

    [(name, precision)], [(kind, folder)] = job.precisions.items(), job.folders.items()
    make: Any = {"ours": Ours, "theirs": Theirs}[name]
    wait(device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the driver's start belongs to neither side
    import_done = psutil.Process().memory_info().rss
    start = time.perf_counter()
    side = make(Path(folder), precision, device)
    wait(device)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "before": import_done, "load": _peak(device)}
    inputs = make_inputs(side.processor.tokenizer)
    if kind == "generate":
        side.caption(inputs.pictures[:1], inputs.prompt, TOKENS)
    else:
        side.match(inputs.pictures[0], inputs.texts[:1])
    weights = {id(part): part.nbytes for part in (*side.model.parameters(), *side.model.buffers())}
    return found | {"use": _peak(device), "weights": sum(weights.values())}


def _peak(device: Any) -> int:
    """The most bytes held so far: on a GPU the GPU's, else the process's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(job: Job, device: Any) -> dict[str, Any]:
    from blip2.bench import machine
    from blip2.bench.measures import bytes_per_token, make_inputs, measure, wanted
    from blip2.bench.sides import Ours, Theirs
    from blip2.devices import free_unused
    from blip2.layout import read_layout

    makes: dict[str, Any] = {"ours": Ours, "theirs": Theirs}
    findings = Findings(machine.describe(device))
    for kind, folder in job.folders.items():
        todo = wanted(job.only, kind)
        if not todo:
            continue
        sides = {name: makes[name](Path(folder), job.precisions[name], device) for name in job.precisions}
        findings.precisions |= {name: side.precision for name, side in sides.items()}
        inputs = make_inputs(next(iter(sides.values())).processor.tokenizer, job.pictures)
        for what in todo:
            print(what.label.format(pictures=job.pictures), flush=True)
            row = measure(what, sides, inputs, device, job.repeats)
            if what.name == "decode":
                shapes = read_layout(Path(folder)).shapes
                row["bytes"] = {n: bytes_per_token(shapes, side.precision) for n, side in sides.items()}
            findings.rows.append(row)
        del sides
        free_unused()
    return asdict(findings)


def run(job: Job) -> int:
    """Do a job, and write what came of it, or why nothing did; returns the exit code."""
    from transformers.utils import logging as transformers_logging

    from blip2.devices import is_out_of_memory

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    found, code = {}, 0
    try:
        found = main(job)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        found, code = {"error": str(error) or "out of memory"}, 1
    Path(job.out).write_text(json.dumps(found), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(run(Job(**json.loads(sys.argv[1]))))
