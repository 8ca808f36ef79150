"""What a run reports: means since the last line, to the terminal, log.jsonl and accelerate's trackers.

On a terminal a bar shows how far it is; elsewhere the lines alone say so.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from train import distributed

tqdm.set_lock(threading.RLock())  # its own spans processes, and a killed one would never give it back


def say(text: str) -> None:
    """Print a line, above the bar if there is one; a reader that is gone does not end the run."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Window:
    """Sums of named device scalars, and the clock, since the last log line."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.steps, self.rows, self.waited, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, values: dict[str, Tensor], rows: int, waited: float) -> None:
        stacked = torch.stack([value.float() for value in values.values()])
        self.names, self.sums = list(values), stacked if self.sums is None else self.sums + stacked
        self.steps, self.rows, self.waited = self.steps + 1, self.rows + rows, self.waited + waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def close(self) -> dict[str, float]:
        """Means over steps and ranks, samples a second of all ranks, share of time spent waiting for data."""
        assert self.sums is not None
        means = distributed.all_reduce_(self.sums) / (self.steps * distributed.world_size())
        means_on_host = means.tolist()
        seconds = max(1e-9, time.perf_counter() - self.start)
        speed = {
            "samples_per_second": self.rows * distributed.world_size() / seconds,
            "data_wait": self.waited / seconds,
        }
        result = dict(zip(self.names, means_on_host, strict=True)) | speed
        self._restart()
        return result


class Log:
    """log.jsonl, the terminal and accelerate's trackers; rank 0 writes."""

    def __init__(
        self, folder: Path, step: int, total: int, accelerator: Accelerator, trackers: tuple[str, ...]
    ):
        self.path, self.accelerator, self.trackers = folder / "log.jsonl", accelerator, trackers
        self.main = distributed.rank() == 0
        if self.main and self.path.exists():  # forget what was logged after the state this run goes on from
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept))
        if trackers:
            accelerator.init_trackers(folder.name)
        hidden = None if self.main else True  # None: hidden where there is no terminal
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=hidden)

    def say(self, text: str) -> None:
        if self.main:
            say(text)

    def progress(self, step: int, total: int) -> None:
        """Move the bar."""
        self.bar.total = total
        self.bar.update(step - self.bar.n)

    def step(
        self, step: int, total: int, seconds: float, rate: float, means: dict[str, float]
    ) -> dict[str, float]:
        values = {"learning_rate": rate, "seconds": seconds, "total_steps": total, **means}
        parts = " ".join(
            f"{k.removeprefix('loss_')} {v:.4f}" for k, v in means.items() if k.startswith("loss")
        )
        left = timedelta(seconds=int(seconds / step * (total - step)))
        mfu = f"  MFU {means['mfu']:.0%}" if "mfu" in means else ""
        skipped = f"  skipped {means['skipped']:.0f}" if means.get("skipped") else ""
        self.say(
            f"step {step}/{total}  {parts}  lr {rate:.2e}  grad {means['grad_norm']:.3g}  "
            f"{means['samples_per_second']:.1f} samples/s{mfu}  wait {means['data_wait']:.0%}{skipped}  "
            f"left {left}"
        )
        self._write(step, values)
        return values

    def evaluation(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        values = {f"eval/{name}": value for name, value in metrics.items()}
        self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._write(step, values)
        return values

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.main:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no infinity
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.trackers:
            self.accelerator.log(values, step=step)

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers if self.trackers else []:
            tracker.finish()
