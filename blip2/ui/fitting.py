"""What fits into this machine: the precisions it can compute in, the memory a model takes, the best model."""

import shutil

from huggingface_hub import constants

from blip2 import fitting
from blip2.devices import (
    Memory,
    accelerator_memory,
    choose_device,
    main_memory,
    nearest_folder,
    why_not_quantized,
)
from blip2.presets import PRESETS, best, find_preset, gigabytes
from blip2.ui.cards import BITS, FULL, full_precision, join


def memory() -> Memory:
    """The memory that models go to: the accelerator's, else the machine's."""
    return fitting.memory()


def space() -> int:
    """Bytes of it that are free."""
    return memory().free


def precisions(base: str) -> list[tuple[str, str]]:
    """(label, precision) that a released checkpoint or a folder can be loaded in here."""
    preset = find_preset(base)
    full = f"Full ({full_precision(preset)})" if preset else "Full"
    return [(full, FULL), *([] if why_not_quantized() else [(text, value) for value, text in BITS.items()])]


def needed(base: str, precision: str) -> int:
    """Bytes of memory that a model takes, with what it computes in.

    Raises:
        CheckpointError: a folder or Hub id that is not here.
    """
    from blip2.hub import locate  # takes torch: the page is served before
    from blip2.layout import read_layout
    from blip2.quantize import choose_precision

    preset = find_preset(base)
    if preset is not None and preset.repo_id:
        return fitting.needed(preset, full_precision(preset) if precision == FULL else precision)
    layout = read_layout(locate(base, local_files_only=True)[1])
    return fitting.needed(layout, choose_precision(precision, layout, choose_device()))


def advice(base: str, precision: str) -> str:
    """What to choose in place of a model that does not fit."""
    most = needed(base, precision)
    others = [
        f"{text} ({gigabytes(needed(base, value))})"
        for text, value in precisions(base)
        if value != FULL and needed(base, value) < most
    ]
    return f"choose {' or '.join([*others, 'a smaller model'])}"


def best_here() -> str | None:
    """The released checkpoint that answers best on this machine, as a name; None if none fits."""
    from blip2.checkpoint import is_available

    accelerator, cache = accelerator_memory(), nearest_folder(constants.HF_HUB_CACHE)
    opt, t5 = (full_precision(PRESETS[name]) for name in ("blip2-opt-2.7b", "blip2-flan-t5-xl"))
    found = best(
        main_memory().free,
        accelerator.free if accelerator else None,
        shutil.disk_usage(cache).free,
        full={"opt": opt, "t5": t5},
        quantized=why_not_quantized() is None,
        cached=[
            preset.name
            for preset in PRESETS.values()
            if preset.repo_id and is_available(preset.name, precision="float32")
        ],
    )
    if found is None:
        return None
    name, precision = found
    return join(name, FULL if precision == full_precision(PRESETS[name]) else precision)
