"""Precisions: which one to compute in, what weights take in it, and 8 and 4 bits through bitsandbytes.

int8 and nf4 shrink the linear layers of the language model's blocks; those of the image encoder by choice.
Heads, bridges, queries and the Q-Former are small and matter most: they stay as they are.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from blip2.devices import half_precision
from blip2.errors import CheckpointError
from blip2.layout import EXTERNAL, Layout
from blip2.model import Blip2
from blip2.presets import BYTES
from blip2.representation import Blip2Representation
from blip2.shards import weight_files

SMALL = 100_000_000  # parameters; below this a model is so quick that "auto" stays exact
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("int8", "nf4")
# `lm_head` breaks generation when it is quantized while tied to the embeddings, as OPT's is. transformers
# adds T5's `wo` (`_keep_in_fp32_modules`).
UNQUANTIZED = (
    "lm_head",
    "embed_out",
    "language_projection",
    "vision_projection",
    "text_projection",
    "itm_head",
    "qformer",
)
VISION, LANGUAGE = "vision_model", "language_model."
KEPT = ("qformer", "query_tokens", "wo")  # what float16 keeps in float32
T5_OUTPUT = "language_model.lm_head.weight"


def choose_precision(
    precision: str, layout: Layout, device: torch.device, quantize_vision: bool = False
) -> str:
    """The precision to compute in; that of a quantized folder is the folder's own.

    Args:
        precision: one of `blip2.PRECISIONS`, or "auto".
        layout: of the folder.
        device: to compute on.
        quantize_vision: whether 8 and 4 bits are meant for the image encoder, too.

    Raises:
        CheckpointError: the folder is stored in another; or it has no language model to quantize.
        ValueError: `quantize_vision` with a precision that quantizes nothing.
    """
    config = layout.config
    stored = stored_precision(layout)
    if stored is not None:
        if precision not in ("auto", stored):
            raise CheckpointError(
                f"{layout.folder} is stored in {stored}, it cannot be loaded as {precision}"
            )
        if quantize_vision and VISION in _saved(layout).get("llm_int8_skip_modules", ()):
            raise CheckpointError(
                f"{layout.folder} is stored in {stored} but for the image encoder, which cannot be quantized "
                "any more: load what it was made from with quantize_vision"
            )
        return stored
    if precision == "auto":
        said = str(config.dtype).removeprefix("torch.")
        if layout.num_parameters < SMALL:  # what was saved in 16 bits stays so
            precision = said if said in ("float16", "bfloat16") else "float32"
        else:
            precision = half_precision(device, config.text_config.model_type)
    if quantize_vision and precision not in QUANTIZED:
        raise ValueError(f"quantize_vision goes with precision int8 or nf4, not with {precision}")
    if precision in QUANTIZED and layout.stage1 and not quantize_vision:
        raise CheckpointError(
            f"{layout.folder} has no language model, which is what {precision} quantizes: choose bfloat16, "
            "or quantize the image encoder with quantize_vision (--quantize-vision)"
        )
    return precision


def _saved(layout: Layout) -> dict[str, Any]:
    """The quantization that a folder is stored in, as transformers words it; empty if in none."""
    saved = getattr(layout.config, "quantization_config", None) or {}
    return saved if isinstance(saved, dict) else saved.to_dict()


def stored_precision(layout: Layout) -> str | None:
    """How few bits a folder was saved in, "int8" or "nf4"; None if in 16 or more."""
    saved = _saved(layout)
    return ("int8" if saved.get("load_in_8bit") else "nf4") if saved else None


def compute_dtype(precision: str, device: torch.device, language_model: str = "opt") -> torch.dtype:
    """What activations are, and the weights that int8 and nf4 leave alone.

    Args:
        precision: one of `blip2.PRECISIONS`.
        device: to compute on.
        language_model: its model type.
    """
    return DTYPES[half_precision(device, language_model) if precision in QUANTIZED else precision]


def skipped(quantize_vision: bool = False) -> list[str]:
    """Names of modules that int8 and nf4 leave alone, as `quantization` wants them."""
    return [*UNQUANTIZED, *(() if quantize_vision else (VISION,))]


def is_kept(name: str) -> bool:
    """Whether float16 keeps a parameter in float32."""
    return not {*KEPT}.isdisjoint(name.split("."))


def final_dtypes(
    layout: Layout, dtype: torch.dtype, language_dtype: torch.dtype | None = None
) -> Callable[[str], torch.dtype | None]:
    """What each tensor of a folder becomes before it is quantized; None where only transformers knows.

    Args:
        layout: of the folder.
        dtype: what is computed in.
        language_dtype: what the language model is in, if in another.
    """
    if stored_precision(layout) is not None or layout.config.text_config.model_type not in ("opt", "t5"):
        return lambda name: None  # other language models may keep more in float32

    def final(name: str) -> torch.dtype:
        if language_dtype is not None and name.startswith(LANGUAGE):
            return language_dtype
        return torch.float32 if dtype == torch.float16 and is_kept(name) else dtype

    return final


def awkward(layout: Layout, device: torch.device) -> list[str]:
    """Layers that bitsandbytes cannot compute in 4 bits on a CPU: it works in tiles of 32 x 64."""
    if device.type != "cpu":
        return []
    return [
        name.removesuffix(".weight")
        for name, shape in layout.shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and (shape[0] % 32 or shape[1] % 64)
    ]


def quantization(precision: str, dtype: torch.dtype, skip: list[str], awkward: Sequence[str] = ()) -> Any:
    """How transformers is told to load in int8 or nf4.

    Args:
        precision: one of them.
        dtype: what else is computed in.
        skip: modules that stay as they are, see `skipped`.
        awkward: layers that 4 bits, too, leave as they are.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError:
        raise ValueError(
            f"precision {precision!r} needs bitsandbytes: pip install bitsandbytes, or choose bfloat16"
        ) from None
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*skip, *awkward],
    )


# --- what it takes ---


def empty_model(layout: Layout) -> Blip2 | Blip2Representation:
    """The model of a folder without its weights, on the meta device."""
    with torch.device("meta"):
        return (Blip2Representation if layout.stage1 else Blip2)(layout.config)


def weight_bytes(
    model: nn.Module,
    precision: str,
    dtype: torch.dtype = torch.bfloat16,
    quantize_vision: bool = False,
    untied: bool = False,
    language_precision: str | None = None,
) -> dict[str, int]:
    """Bytes that each parameter takes in memory, tied ones once.

    Args:
        model: any device will do, the meta device too.
        precision: one of `blip2.PRECISIONS`.
        dtype: under int8 and nf4, that of what is not quantized.
        quantize_vision: as for `blip2.load`.
        untied: Flan-T5's output matrix is its own, as in the releases; transformers builds it tied.
        language_precision: as for `blip2.load`.
    """
    skip = {*skipped(quantize_vision), *KEPT}
    dtype = DTYPES.get(precision, dtype)
    shrunk = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if precision in QUANTIZED and isinstance(module, nn.Linear) and not skip & set(path.split("."))
    }
    parameters = dict(model.named_parameters())
    if untied:
        parameters[T5_OUTPUT] = model.get_parameter(T5_OUTPUT)
    sizes = {}
    for name, parameter in parameters.items():
        size: float = dtype.itemsize
        if name in shrunk:
            size = BYTES[precision]
        elif language_precision is not None and name.startswith(LANGUAGE):
            size = DTYPES[language_precision].itemsize
        elif dtype == torch.float16 and is_kept(name):
            size = 4
        sizes[name] = math.ceil(size * parameter.numel())
    return sizes


def total_bytes(
    layout: Layout,
    precision: str,
    dtype: torch.dtype = torch.bfloat16,
    quantize_vision: bool = False,
    language_precision: str | None = None,
) -> int:
    """Bytes that the weights of a folder take in memory; see `weight_bytes`."""
    if stored_precision(layout) is not None:
        return sum(file.stat().st_size for file in weight_files(layout.folder, layout.variant))
    t5 = layout.config.text_config.model_type == "t5" and T5_OUTPUT in layout.shapes
    sizes = weight_bytes(empty_model(layout), precision, dtype, quantize_vision, t5, language_precision)
    others = sum(math.prod(shape) for name, shape in layout.shapes.items() if name.startswith(EXTERNAL))
    return sum(sizes.values()) + others * DTYPES.get(precision, dtype).itemsize


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what bitsandbytes repeats at every int8 product, and what it misses that is optional."""
    return not any(words in record.getMessage() for words in ("inputs will be cast", "kernels-community"))


for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):  # before it is imported
    logging.getLogger(_name).addFilter(_is_news)
