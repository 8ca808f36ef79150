"""Which device to compute on, and one sentence when torch and the machine do not fit each other."""

import gc
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    import torch

CUDA_13_DRIVER = 580  # the first driver series that runs CUDA 13 builds; CUDA 12.6 builds run from 525 on


Item = TypeVar("Item")
Result = TypeVar("Result")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, on any device; torch says so in several ways."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def in_halves(work: Callable[[Sequence[Item]], list[Result]], batch: Sequence[Item]) -> list[Result]:
    """What `work` makes of a batch, a result an item; in halves, as often as memory does not suffice."""
    if not batch:
        return []
    try:
        return work(batch)
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    half = len(batch) // 2  # outside of the handler, which holds what the error held
    return in_halves(work, batch[:half]) + in_halves(work, batch[half:])


def choose_device(device: "str | torch.device" = "auto") -> "torch.device":
    """Turn a wish into a device that is there.

    Args:
        device: "auto" (CUDA, else MPS, else the CPU), "cpu", "mps", "cuda" or "cuda:1".

    Raises:
        ValueError: the device is unknown to torch, or is not on this machine.
    """
    import torch

    if str(device) == "auto":
        return torch.device(_present()[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {str(device)!r}; choose auto, {', '.join(_present())}") from None
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if chosen.type not in _present() or (chosen.index or 0) >= count:
        hint = device_advice() if chosen.type == "cuda" else None
        raise ValueError(
            f"device {str(device)!r} is not on this machine; choose auto, {', '.join(_present())}"
            + (f". {hint}" if hint else "")
        )
    return chosen


def _present() -> list[str]:
    """Kinds of device that torch can use here, the fastest first."""
    import torch

    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, there in kinds.items() if there]


@dataclass(frozen=True)
class Memory:
    """Bytes of a memory: all there are, and those that a program can have now."""

    total: int
    free: int


CONTROL_GROUPS = (  # (limit, in use, statistics): version 2, then 1; containers are limited by them
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def main_memory(groups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The machine's memory, or the part that this container may use."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used, statistics in CONTROL_GROUPS:
        try:
            most, now = int((groups / limit).read_text()), int((groups / used).read_text())
            kept = re.search(
                r"^(?:total_)?inactive_file (\d+)", (groups / statistics).read_text(), re.MULTILINE
            )
        except (OSError, ValueError):  # no such version, or "max": no limit
            continue
        now -= int(kept[1]) if kept else 0  # the page cache gives way
        total, free = min(total, most), min(free, max(0, most - now))
    return Memory(total, free)


def accelerator_memory(device: "str | torch.device" = "auto") -> Memory | None:
    """The memory of the device that models go to; None if that is the CPU, or an unknown kind."""
    import torch

    device = choose_device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(total, free + unused)
    if device.type == "mps":  # a share of the machine's own
        total = torch.mps.recommended_max_memory()
        return Memory(total, min(max(0, total - torch.mps.driver_allocated_memory()), main_memory().free))
    return None


def device_name(device: "str | torch.device" = "auto") -> str:
    """What to call a device: the GPU's own name, "Apple GPU", or "CPU"."""
    import torch

    device = choose_device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"mps": "Apple GPU", "cpu": "CPU"}.get(device.type, device.type)


def half_precision(device: "torch.device", language_model: str = "opt") -> str:
    """The 16-bit precision that a device computes in: bfloat16, float16, or float32 where neither serves."""
    import torch

    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if language_model == "t5" else "float16"  # Flan-T5 overflows in float16
    if device.type == "mps":
        return "bfloat16"
    fast = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    )
    return "bfloat16" if fast else "float32"


def nearest_folder(path: str | Path) -> Path:
    """The nearest one above that is there: what is made at `path` will lie on its disk."""
    path = Path(path).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def free_unused() -> None:
    """Give back what models that are gone took: collect circles, and empty torch's caches."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def why_not_quantized(device: "str | torch.device" = "auto") -> str | None:
    """Why 8-bit and 4-bit weights do not work here, in a sentence; None if they do."""
    kind = choose_device(device).type
    if kind not in ("cuda", "cpu"):
        return f"8-bit and 4-bit weights need an NVIDIA GPU or a CPU, and this machine computes on {kind}"
    if find_spec("bitsandbytes") is None:
        return "8-bit and 4-bit weights need bitsandbytes: pip install bitsandbytes"
    return None


@cache
def device_advice() -> str | None:
    """One sentence, with the one command that mends it, if torch's build does not fit the machine.

    Three cases: an NVIDIA GPU under a CPU build of torch; a CUDA build that the GPU's driver is too old for;
    a CUDA build (gigabytes) on a machine without a GPU. None if all is well.
    """
    import torch

    if torch.cuda.is_available() or torch.version.hip or torch.backends.mps.is_available():
        return None
    gpu, built_for = _nvidia_gpu(), torch.version.cuda
    if gpu is None:
        if built_for is None:
            return None
        return (
            f"torch {torch.__version__} is built for CUDA but this machine shows no NVIDIA GPU, so the CPU "
            f"is used; the CPU build is gigabytes smaller: {_command('cpu')}"
        )
    name, driver = gpu
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    tag = "cu130" if driver >= CUDA_13_DRIVER and release >= (2, 9) else "cu126"
    if built_for is None:
        return (
            f"{name} is present but torch {torch.__version__} is a CPU build, so the CPU is used; "
            f"to use the GPU: {_command(tag)}"
        )
    if tag == "cu126" and built_for.startswith("13"):
        return (
            f"{name} has driver {driver}, too old for torch {torch.__version__} (CUDA {built_for}), so the "
            f"CPU is used; to use the GPU: {_command(tag)}"
        )
    return None  # hidden by CUDA_VISIBLE_DEVICES, or in use by another: no package would mend that


def _command(tag: str) -> str:
    import torch

    version = torch.__version__.split("+")[0]
    python = Path(sys.executable)  # not a bare `pip`: that may be another Python's
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f'{shlex.quote(str(python))} -m pip install "torch=={version}+{tag}" --index-url https://download.pytorch.org/whl/{tag}'


def _nvidia_gpu() -> tuple[str, int] | None:
    """The first GPU's name and its driver's major version, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\s*(.+?),\s*(\d+)\.", answer)
    return (found[1], int(found[2])) if found else None
