"""Where the parts of a model go that one device does not hold: several GPUs, main memory, the disk.

What moves are blocks of the language model and of the image encoder. The rest (queries, Q-Former, embeddings,
heads, norms) stays with the device that computes: it is small, and some of it is used outside of its own
forward. accelerate brings blocks in, and hidden states to them.
"""

import re
from collections.abc import Mapping

import torch
from torch import nn

from blip2.devices import choose_device
from blip2.errors import DoesNotFitError
from blip2.fitting import memory, needed
from blip2.layout import Layout
from blip2.presets import LIBRARIES, OVERHEAD
from blip2.quantize import QUANTIZED, T5_OUTPUT, compute_dtype, empty_model, weight_bytes

Budget = dict[int | str, int]  # device, a GPU's number or "cpu": bytes of weights
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def read_budget(max_memory: Mapping[int | str, int | str] | str) -> Budget:
    """How many bytes of weights each device may hold, GPUs first.

    Args:
        max_memory: {"cuda:0": "20GB", "cpu": "8GB"}, a GPU also by its number, or "cuda:0=20GB,cpu=8GB".

    Raises:
        ValueError: a device or a size that cannot be read, or none.
    """
    if isinstance(max_memory, str):
        parts = [part.partition("=") for part in max_memory.split(",") if part.strip()]
        max_memory = {device.strip(): size for device, _, size in parts}
    budget: Budget = {}
    for device, size in max_memory.items():
        found = re.fullmatch(r"(?:cuda:|gpu:)?(\d+)|cuda|cpu", str(device).strip().lower())
        amount = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", str(size).strip().upper())
        if not found or not amount or amount[2] not in UNITS or amount[1].count(".") > 1:
            raise ValueError(
                f"max_memory {device}={size} cannot be read: name devices and sizes, such as "
                "cpu=8GB,cuda:0=20GB"
            )
        key = "cpu" if found[0] == "cpu" else int(found[1] or 0)
        budget[key] = int(float(amount[1]) * UNITS[amount[2]])
    if not budget:
        raise ValueError("max_memory names no device: name some, such as cpu=8GB,cuda:0=20GB")
    return {device: budget[device] for device in sorted(budget, key=lambda key: (key == "cpu", key))}


def main_device(budget: Budget | None, device: str | torch.device) -> torch.device:
    """The device that computes: the first that `max_memory` names, else as `choose_device` has it.

    Raises:
        ValueError: a device that is not there, or another than the first of `max_memory`.
    """
    if budget is None:
        return choose_device(device)
    named = [choose_device(_name(key)) for key in budget]
    if str(device) != "auto" and choose_device(device) != named[0]:
        raise ValueError(
            f"device {device} is not the first that max_memory names, {named[0]}: leave device out, or put "
            "it into max_memory"
        )
    return named[0]


def spread(layout: Layout, precision: str, device: torch.device, quantize_vision: bool) -> Budget | None:
    """What each GPU may hold where there are several and one is not enough; else None."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    if needed(layout, precision, device, quantize_vision) <= memory(device).free:
        return None
    free = {index: memory(f"cuda:{index}").free for index in range(torch.cuda.device_count())}
    return {index: int((there - LIBRARIES) / OVERHEAD) for index, there in free.items()}


def make_device_map(
    layout: Layout, precision: str, device: torch.device, quantize_vision: bool, budget: Budget, disk: bool
) -> dict[str, int | str]:
    """Where each part of a folder's model goes; see `place`.

    Raises:
        DoesNotFitError: the budget is too small.
        ValueError: weights in 8 or 4 bits would leave the device that computes.
    """
    model = empty_model(layout)
    text = layout.config.text_config.model_type
    untied = text == "t5" and T5_OUTPUT in layout.shapes
    sizes = weight_bytes(model, precision, compute_dtype(precision, device, text), quantize_vision, untied)
    found = place(model, sizes, budget, disk)
    away = {"disk"} if device.type == "cpu" else {"disk", "cpu"}
    if precision in QUANTIZED and away & set(found.values()):
        raise ValueError(
            f"weights in {precision} stay where they are computed with: raise max_memory, or choose bfloat16"
        )
    return found


def blocks(model: nn.Module) -> list[str]:
    """What may move: the language model's blocks first, as they are needed for every token."""
    found: dict[str, None] = {}
    for part in ("language_model", "vision_model"):
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and path.startswith(f"{part}."):
                inner = any(path.startswith(f"{block}.") for block in found)
                found |= {} if inner else {f"{path}.{i}": None for i in range(len(module))}
    return list(found)


def place(model: nn.Module, sizes: dict[str, int], budget: Budget, disk: bool) -> dict[str, int | str]:
    """Give every part of a model a device, as transformers' `device_map` wants it.

    Args:
        model: on the meta device.
        sizes: bytes of each parameter.
        budget: see `read_budget`; the first device computes, with what other GPUs hold computed there.
        disk: whether the rest may go to the disk.

    Returns:
        A GPU's number, "cpu" or "disk" for every module that is not split, and for parameters outside of any.

    Raises:
        DoesNotFitError: the budget is too small.
    """
    movable = blocks(model)
    weights = dict.fromkeys(movable, 0)
    rest = 0
    for name, size in sizes.items():
        block = next((block for block in movable if name.startswith(f"{block}.")), None)
        if block is None:
            rest += size
        else:
            weights[block] += size
    main, largest = next(iter(budget)), max(weights.values(), default=0)
    for reserved in (0, largest):  # a block that is brought in needs a place too
        left = budget | {main: budget[main] - rest - reserved}
        map_: dict[str, int | str] = {}
        for block, size in weights.items():
            device: int | str | None = next((d for d, free in left.items() if size <= free), None)
            if device is None and disk:
                device = "disk"
            elif device is None:
                break
            else:
                left[device] -= size
            map_[block] = device
        away = {"disk"} | ({"cpu"} - {main})
        if left[main] >= 0 and len(map_) == len(weights) and (reserved or not away & set(map_.values())):
            return map_ | _others(model, set(movable), main)
    total, most = rest + sum(weights.values()), sum(budget.values())
    if budget[main] < rest + largest:
        raise DoesNotFitError(
            f"max_memory leaves {budget[main] / 1e9:.2f} GB on {_name(main)}, and at least "
            f"{(rest + largest) / 1e9:.2f} GB have to be there: what is not split, and a block at a time"
        )
    raise DoesNotFitError(
        f"the weights take {total / 1e9:.2f} GB, and max_memory allows {most / 1e9:.2f} GB in all: raise it, "
        "or keep the rest on the disk with offload_folder (--offload-folder)"
    )


def _others(model: nn.Module, movable: set[str], main: int | str, path: str = "") -> dict[str, int | str]:
    """Everything but the blocks, by the largest modules that hold none of them."""
    found: dict[str, int | str] = {}
    here = f"{path}." if path else ""
    for name, _ in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
        found[here + name] = main
    for name, child in model.named_children():
        if here + name in movable:
            continue
        if any(block.startswith(f"{here}{name}.") for block in movable):
            found |= _others(child, movable, main, here + name)
        else:
            found[here + name] = main
    return found


def _name(device: int | str) -> str:
    return device if isinstance(device, str) else f"cuda:{device}"
