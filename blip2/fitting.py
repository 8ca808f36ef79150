"""What fits into memory: what a model needs in a precision, what is free, and what to choose instead."""

from typing import TYPE_CHECKING

from blip2.devices import (
    Memory,
    accelerator_memory,
    choose_device,
    half_precision,
    main_memory,
    why_not_quantized,
)
from blip2.errors import DoesNotFitError
from blip2.presets import Preset, room

if TYPE_CHECKING:  # the app's page is served before torch is imported
    import torch

    from blip2.layout import Layout

SAFE = 100_000_000  # bytes; nothing is asked about a model that is smaller in float32


def memory(device: "str | torch.device" = "auto") -> Memory:
    """The memory that models on a device go to: the accelerator's, else the machine's."""
    return accelerator_memory(device) or main_memory()


def needed(
    source: "Preset | Layout",
    precision: str,
    device: "str | torch.device" = "auto",
    quantize_vision: bool = False,
    language_precision: str | None = None,
) -> int:
    """Bytes of memory that a model takes, with what it computes in.

    Args:
        source: a released checkpoint, or a folder that was read.
        precision: one of `blip2.PRECISIONS`.
        device: to compute on.
        quantize_vision: as for `blip2.load`.
        language_precision: of a folder's language model, as for `blip2.load`.
    """
    device = choose_device(device)
    if isinstance(source, Preset):
        rest = half_precision(device, source.language_model)
        return room(source.memory(precision, quantize_vision=quantize_vision, rest=rest))
    from blip2.quantize import compute_dtype, total_bytes

    dtype = compute_dtype(precision, device, source.config.text_config.model_type)
    return room(total_bytes(source, precision, dtype, quantize_vision, language_precision))


def check(
    name: str,
    layout: "Layout",
    precision: str,
    device: "torch.device",
    quantize_vision: bool = False,
    language_precision: str | None = None,
) -> None:
    """Stop before a model is loaded that the free memory does not hold.

    Args:
        name: of the model, for the message.
        layout: of its folder.
        precision: to load it in, not "auto".
        device: to load it to.
        quantize_vision: as for `blip2.load`.
        language_precision: as for `blip2.load`.

    Raises:
        DoesNotFitError: it does not; the message says what is needed, what is free, and what fits.
    """
    free = memory(device).free
    if room(4 * layout.num_parameters) <= max(free, SAFE):
        return
    most = needed(layout, precision, device, quantize_vision, language_precision)
    if most > free:
        where = "memory" if device.type == "cpu" else f"the memory of {device}"
        raise DoesNotFitError(
            f"{name} needs {most / 1e9:.1f} GB in {precision}, and {free / 1e9:.1f} GB of {where} are free: "
            f"{advice(layout, precision, device, free)}; --no-memory-check loads it all the same"
        )


def advice(layout: "Layout", precision: str, device: "torch.device", free: int) -> str:
    """What to do about a model that does not fit: the best precision that does, or a part on the disk."""
    from blip2.quantize import QUANTIZED, stored_precision

    stage1 = layout.stage1
    ways = [("bfloat16", False), ("int8", stage1), ("nf4", stage1)]
    ways += [] if stage1 else [("nf4", True)]
    least = needed(layout, precision, device)
    for way, vision in ways if stored_precision(layout) is None else ():
        if way in QUANTIZED and why_not_quantized(device):
            continue
        size = needed(layout, way, device, vision)
        if size <= free and size < least:
            words = f"--precision {way}" + (" --quantize-vision" if vision else "")
            return f"{words} needs {size / 1e9:.1f} GB"
    if precision in QUANTIZED:
        return "choose a smaller model"
    return "choose a smaller model, or keep a part of it on the disk with --max-memory and --offload-folder"
