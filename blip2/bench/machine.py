"""The machine that was measured on: its names, what it can, and how fast its memory is read."""

import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from blip2.devices import half_precision, versions

PACKAGES = ("blip2", "torch", "transformers", "bitsandbytes")


def describe(device: torch.device) -> dict[str, Any]:
    """Facts for the table's first line and the JSON."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "half_precision": half_precision(device),
        "load_average": psutil.getloadavg()[0],
        "bandwidth": bandwidth(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    facts |= versions(PACKAGES)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def line(facts: dict[str, Any]) -> str:
    """The same as one sentence."""
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)
    where = facts.get("gpu") or facts["processor"]
    threads = f"{facts['threads']} of {facts['cores']} cores" if "gpu" not in facts else "1 GPU"
    half = facts["half_precision"]
    half = "no 16-bit arithmetic" if half == "float32" else f"computes in {half}"
    return (
        f"{where}, {threads}, {half}, memory read at {facts['bandwidth'] / 1e9:.1f} GB/s, "
        f"load average {facts['load_average']:.1f} before; "
        f"Python {facts['python']}, {versions}"
    )


def bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second at which memory is read with the threads at hand: the best of a sum, a product, a copy.

    Decoding one row reads all weights for each token, so this is its limit.
    """
    count = 2**28 if device.type == "cuda" else 2**26  # numbers; 1 GB or 256 MB, far beyond any cache
    numbers = torch.ones(count, device=device)
    matrix, row = numbers.view(-1, 4096), torch.ones(4096, device=device)
    copy = torch.empty_like(numbers)
    actions = [
        (numbers.nbytes, lambda: numbers.sum()),
        (numbers.nbytes, lambda: matrix @ row),
        (2 * numbers.nbytes, lambda: copy.copy_(numbers)),
    ]
    best = 0.0
    for size, action in actions:
        for _ in range(repeats):
            wait(device)
            start = time.perf_counter()
            action()
            wait(device)
            best = max(best, size / (time.perf_counter() - start))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done all it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if sys.platform == "linux" and names.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", names.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
