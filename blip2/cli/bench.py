"""`blip2 bench`: this package against transformers, on this machine."""

import argparse
import json
from pathlib import Path
from typing import Any

from blip2.bench import run as benchmark
from blip2.bench.table import lines
from blip2.cli.console import Console, UsageError


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print the tables, and write what was asked for."""
    draw: Any = None
    if args.plot:
        try:
            from blip2.bench.plot import draw
        except ImportError:
            raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    precisions = args.precision or ([] if args.defaults else ["float32"])
    pairs = [{"ours": precision, "theirs": precision} for precision in precisions]
    if args.defaults or not args.precision:
        pairs.append(benchmark.DEFAULTS)
    if args.side != "both":
        pairs = [{args.side: pair[args.side]} for pair in pairs]
    try:
        options = benchmark.Options(
            sizes=args.size, model=args.model, random=args.random, pairs=pairs, threads=args.threads,
            repeats=args.repeats, only=args.only, device=args.device,
            pictures=args.pictures,
            keep=Path(args.keep) if args.keep else None, note=console.note,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    tables: list[dict[str, Any]] = []
    try:
        for table in benchmark.run(options):
            tables.append(table)
            if not args.json:
                console.show(table, [*lines(table), ""])
    finally:  # what was measured is kept, whatever ended the rest
        if tables and args.out:
            Path(args.out).write_text(json.dumps({"tables": tables}, indent=2) + "\n", "utf-8")
    if args.json:
        console.show({"tables": tables}, ())
    if draw:
        draw(tables, Path(args.plot))
    return 0
