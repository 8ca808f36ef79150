"""How fast `blip2 bulk caption` is beside a bare loop that only encodes and generates, in the same batches.

    python tests/bulk_speed.py --scenes 5000 --repeats 3

The loop has its pictures decoded and preprocessed beforehand, in as many processes of as many threads as the
command has workers. Both leave out what comes before the end of a process's first batch. They take turns.
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from raying import ENVIRONMENT, ROOT, draw


def bare(number: int, args: argparse.Namespace, together: Any, results: Any) -> None:
    """A process of the loop: every batch whose number is its own modulo the processes."""
    import torch

    from blip2 import load, open_image
    from blip2.generation import generate
    from blip2.presets import PRESETS

    torch.set_num_threads(args.threads)
    loaded = load(args.model, device="cpu")
    generation = PRESETS[args.model].captioning.with_(method=args.method)
    names = sorted(args.pictures.glob("*.png"))
    size = args.batch_size
    batches = [names[start : start + size] for start in range(0, len(names), size)][number :: args.workers]
    ready = [loaded.processor.images([open_image(name) for name in batch]) for batch in batches]
    together.wait()
    rows = 0
    with torch.inference_mode():
        for place, pixel_values in enumerate(ready):
            generate(loaded.model, loaded.processor, loaded.model.encode_image(pixel_values), "", generation)
            if place == 0:
                start = time.perf_counter()
            else:
                rows += len(pixel_values)
    results.put(rows / (time.perf_counter() - start))


def loop(args: argparse.Namespace) -> float:
    """Pictures a second of the loop."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(args.workers), context.Queue()
    processes = [
        context.Process(target=bare, args=(number, args, together, results)) for number in range(args.workers)
    ]
    for process in processes:
        process.start()
    rates = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def bulk(args: argparse.Namespace) -> dict[str, float]:
    """What the command says of itself."""
    out = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "blip2", "bulk", "caption", str(args.pictures)]
    flags = {
        "out": out / "x.jsonl",
        "model": args.model,
        "method": args.method,
        "batch-size": args.batch_size,
    }
    flags |= {"workers": args.workers}
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    try:
        done = subprocess.run(
            [*command, "--json", "--force"],
            cwd=ROOT,
            env=ENVIRONMENT,
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)["this_call"]
    finally:
        shutil.rmtree(out)


def main() -> None:
    """Take turns, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--pictures", type=Path, help="folder of the drawn scenes (a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker: cores / workers")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--method", default="beam", choices=("beam", "greedy"))
    parser.add_argument("--model", default="scenes-opt")
    args = parser.parse_args()
    args.pictures = args.pictures or Path(tempfile.mkdtemp()) / "scenes"
    draw(args.pictures, args.scenes)
    ratios, starts = [], []
    for _ in range(args.repeats):
        of_loop, found = loop(args), bulk(args)
        ratios.append(found["rows_per_second"] / of_loop)
        starts.append(found["start_seconds"])
        print(
            f"{args.method}: bare loop {of_loop:.1f} images/s, bulk {found['rows_per_second']:.1f} images/s: "
            f"{ratios[-1]:.3f}; {found['start_seconds']:.1f} s to start, {found['seconds']:.1f} s in all",
            flush=True,
        )
    print(f"median of {args.repeats}: {median(ratios):.3f} of the loop, {median(starts):.1f} s to start")


if __name__ == "__main__":
    main()
