"""Curves of runs: losses by part against steps, from the runs' log.jsonl.

python -m train.curves runs/scenes/stage1 runs/scenes/stage2-opt --out losses.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses of a run's folder by name, training and evaluation, as (step, value).

    Raises:
        ValueError: there is no log, or no loss in it.
    """
    path = run / "log.jsonl"
    if not path.exists():
        raise ValueError(f"{run} has no log.jsonl: is it a run's folder?")
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if name.removeprefix("eval/").startswith("loss_") and value is not None:
                found.setdefault(name, []).append((values["step"], value))
    if not found:
        raise ValueError(f"{path} holds no losses yet")
    return found


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write a picture with a panel for every run: lines are training, points evaluation."""
    from matplotlib import pyplot, ticker

    found = [read(run) for run in runs]
    figure, axes = pyplot.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 3.6), layout="constrained", squeeze=False
    )
    for axis, run, losses in zip(axes[0], runs, found, strict=True):
        for number, name in enumerate(name for name in losses if not name.startswith("eval/")):
            steps, values = zip(*losses[name], strict=True)
            axis.plot(steps, values, color=f"C{number}", label=name.removeprefix("loss_").upper())
            if f"eval/{name}" in losses:
                axis.scatter(*zip(*losses[f"eval/{name}"], strict=True), color=f"C{number}", s=9, zorder=3)
        axis.set(title=run.name, xlabel="step", yscale="log")
        for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            part(ticker.FormatStrFormatter("%g"))
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2: there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m train.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="picture file to write")
    given = parser.parse_args(arguments)
    try:
        draw(given.runs, given.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
