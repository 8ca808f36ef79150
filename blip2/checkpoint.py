"""Load models: from a name, a folder or a Hub id, in a chosen precision, strictly. Saving is `blip2.saving`.

Nothing is ever filled in silently: a tensor that is missing, superfluous or of another shape stops the load,
except for those that `blip2.layout` lists by name. Folders are transformers' own (see `blip2.layout`).
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from blip2.devices import choose_device
from blip2.download import Watch, command, download
from blip2.encoders import CallableEncoder
from blip2.layout import (
    LEFTOVERS,
    STAGE1_EXTRAS,
    CheckpointError,
    Layout,
    describe,
    is_complete,
    read_layout,
    weight_files,
)
from blip2.model import Blip2
from blip2.novelty import Novelty, UnknownPictureError
from blip2.novelty import read as read_novelty
from blip2.packed import pack
from blip2.presets import DEFAULT, PRECISIONS, resolve, suggestions
from blip2.processing import Processor
from blip2.representation import Blip2Representation
from blip2.saving import save
from blip2.vision import ImageFeatures

__all__ = ["CheckpointError", "Loaded", "half_precision", "is_available", "load", "locate", "save"]

SMALL = 100_000_000  # parameters; below this a model is so quick that "auto" stays exact
# Heads and bridges are small and matter most; `lm_head` breaks generation when quantized while tied.
# transformers adds the Q-Former and T5's `wo` (`_keep_in_fp32_modules`).
UNQUANTIZED = (
    "lm_head",
    "embed_out",
    "language_projection",
    "vision_projection",
    "text_projection",
    "itm_head",
)
EXTERNAL = "vision_model.external."  # weights of an image encoder that is a callable
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """What `load` gives: the model in eval mode, its processor, and how it was loaded.

    Attributes:
        precision: "float32", "bfloat16", "float16", "int8" or "nf4", as computed with, never "auto".
        notes: sentences worth showing, such as what an older file lacks.
        novelty: tells pictures of a kind that the model does not know; None if it takes any.
    """

    model: Blip2 | Blip2Representation
    processor: Processor
    name: str
    precision: str
    device: torch.device
    folder: Path
    notes: list[str]
    novelty: Novelty | None = None

    def check_known(self, image: ImageFeatures) -> None:
        """Refuse pictures, encoded by this model, of a kind that it does not know.

        Raises:
            UnknownPictureError: one of them is; the message says what the model knows.
        """
        if self.novelty is not None and self.novelty.is_unknown(image).any():
            raise UnknownPictureError(
                f"{self.name} knows {self.novelty.knows} only, and this picture does not look like one"
            )


def load(
    name_or_path: str | Path = DEFAULT,
    *,
    precision: str = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    local_files_only: bool = False,
    watch: Watch | None = None,
) -> Loaded:
    """Load a model and its processor.

    Args:
        name_or_path: an embedded or released checkpoint's name (`blip2.PRESETS`), a folder, or a Hub id. What
            the cache holds is used as it is, without asking the Hub again.
        precision: "float32", "bfloat16", "float16", "int8", "nf4"; "auto" is float32 below 100 million
            parameters, else bfloat16 where the processor or GPU computes in it. float16 keeps the Q-Former,
            the queries and Flan-T5's `wo` in float32; int8 and nf4 quantize the image encoder and the
            language model alone.
        device: "auto" (CUDA, else MPS, else the CPU), "cpu", "mps", "cuda", "cuda:1".
        revision: a branch, tag or commit of a Hub repository.
        adapter: a folder with a LoRA adapter (peft), put on top.
        local_files_only: never download.
        watch: told how many tensors are in place, of how many; to cancel, it raises.

    Raises:
        CheckpointError: it cannot be found, is incomplete, or contradicts itself.
        ValueError: an unknown name, precision or device.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose auto, {', '.join(PRECISIONS)}")
    where = choose_device(device)
    name, folder = locate(name_or_path, revision=revision, local_files_only=local_files_only)
    layout = read_layout(folder)
    precision = _choose_precision(precision, layout, where)
    processor = Processor.from_pretrained(folder, layout.config, local_files_only=True)
    if layout.config.image_token_index is None and not layout.stage1:
        # Early revisions lack it; newer ones appended <image> at the first free id.
        layout.config.image_token_index = _image_token(processor)
    with _watched(watch):
        model = _load_model(layout, precision, where)
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{adapter} holds no adapter_config.json: an adapter is a folder that peft saved"
            )
        model.load_adapter(str(adapter))
    else:
        pack(model)
    novelty = read_novelty(folder, layout.config.qformer_config.encoder_hidden_size)
    return Loaded(model.eval(), processor, name, precision, where, folder, _notes(layout, precision), novelty)


def locate(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[str, Path]:
    """Find a checkpoint: its name, and the folder with its files, downloaded if need be and allowed.

    Raises:
        CheckpointError: a folder that is not there, or a repository that cannot be had.
        ValueError: a name that is not known; the message holds the nearest ones.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, a checkpoint is a folder: give its folder, or bring a LAVIS .pth in with "
            "`blip2 convert`"
        )
    try:
        preset = resolve(text)
    except ValueError:
        if (
            isinstance(name_or_path, Path)
            or text.startswith((".", "/", "~"))
            or (os.sep != "/" and os.sep in text)
        ):
            raise CheckpointError(f"there is no folder {text}. {suggestions(text)}") from None
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            raise
        return text, _cached_or_downloaded(text, revision, local_files_only)
    if preset.folder is not None:
        if not preset.folder.is_dir():
            raise CheckpointError(
                f"the embedded checkpoint {preset.name} is not in this installation ({preset.folder})"
            )
        return preset.name, preset.folder
    assert preset.repo_id is not None
    return preset.name, _cached_or_downloaded(preset.repo_id, revision, local_files_only)


def is_available(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint can be loaded without a download."""
    try:
        locate(name_or_path, revision=revision, local_files_only=True)
    except ValueError:
        return False
    return True


def _cached_or_downloaded(repo_id: str, revision: str | None, local_files_only: bool) -> Path:
    """The local copy of a Hub repository."""
    found: str | None
    try:
        found = snapshot_download(repo_id, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        found = getattr(error, "snapshot_path", None)  # files are missing, maybe on purpose
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a Hub id: {error}") from error
    if found is not None and is_complete(Path(found)):  # and no download that was broken off
        return Path(found)
    if local_files_only or constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{repo_id} is not in the cache, and downloading is off. "
            f"Get it with: {command(repo_id, revision)}"
        )
    return download(repo_id, revision)


def _choose_precision(precision: str, layout: Layout, device: torch.device) -> str:
    """The precision to compute in; that of a quantized folder is the folder's own."""
    saved = getattr(layout.config, "quantization_config", None)
    if saved:
        saved = saved if isinstance(saved, dict) else saved.to_dict()
        stored = "int8" if saved.get("load_in_8bit") else "nf4"
        if precision not in ("auto", stored):
            raise CheckpointError(
                f"{layout.folder} is stored in {stored}, it cannot be loaded as {precision}"
            )
        return stored
    if precision != "auto":
        return precision
    return (
        "float32"
        if layout.num_parameters < SMALL
        else half_precision(device, layout.config.text_config.model_type)
    )


def half_precision(device: torch.device, language_model: str = "opt") -> str:
    """The 16-bit precision that a device computes in: bfloat16, float16, or float32 where neither serves."""
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


def _load_model(layout: Layout, precision: str, device: torch.device) -> Blip2 | Blip2Representation:
    """Build the model and fill it; strict."""
    model_class: type[Any] = Blip2Representation if layout.stage1 else Blip2
    options: dict[str, Any] = {}
    if precision in DTYPES:
        dtype = DTYPES[precision]
    else:
        dtype = DTYPES[half_precision(device, layout.config.text_config.model_type)]
        if not getattr(layout.config, "quantization_config", None):
            options["quantization_config"] = quantization(precision, dtype, _awkward(layout, device))
    with quiet(progress=layout.num_parameters > SMALL):
        model, info = model_class.from_pretrained(
            layout.folder,
            config=layout.config,
            dtype=dtype,
            device_map={"": device},
            key_mapping=layout.renames,
            variant=layout.variant,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that `check_loading` can report all of them
            output_loading_info=True,
            **options,
        )
    encoder = model.vision_model
    if isinstance(encoder, CallableEncoder):
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.startswith(EXTERNAL)}
    check_loading(layout, info)
    if isinstance(encoder, CallableEncoder):
        _attach(encoder, layout, dtype, device)
    model.config.dtype = dtype
    return model


def _attach(encoder: CallableEncoder, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    """Bring the callable that an image encoder is, and the weights it was trained with; strict."""
    try:
        encoder.attach()
    except ValueError as error:
        raise CheckpointError(f"{layout.folder}: {error}") from error
    stored = {name.removeprefix(EXTERNAL) for name in layout.shapes if name.startswith(EXTERNAL)}
    module = encoder.external if isinstance(encoder.external, torch.nn.Module) else torch.nn.Module()
    if stored != set(module.state_dict()):
        differ = sorted(stored ^ set(module.state_dict()))
        raise CheckpointError(
            f"{layout.folder}: the weights of {encoder.config.source} are not those that were saved; "
            f"{len(differ)} names differ: {_first(differ)}"
        )
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(layout.folder, layout.variant) if stored else []:
        weights |= {n.removeprefix(EXTERNAL): t for n, t in load_file(file).items() if n.startswith(EXTERNAL)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{layout.folder}: {' '.join(str(error).split())}") from error
    module.to(device=device, dtype=dtype).requires_grad_(False)


def _awkward(layout: Layout, device: torch.device) -> list[str]:
    """Layers that bitsandbytes cannot compute in 4 bits on a CPU: it works in tiles of 32 x 64."""
    if device.type != "cpu":
        return []
    return [
        name.removesuffix(".weight")
        for name, shape in layout.shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and (shape[0] % 32 or shape[1] % 64)
    ]


def quantization(precision: str, dtype: torch.dtype, awkward: list[str]) -> Any:
    """How transformers is told to load in int8 or nf4.

    Args:
        precision: one of them.
        dtype: what else is computed in.
        awkward: layers that stay as they are.

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
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*UNQUANTIZED, *awkward],
    )


def check_loading(layout: Layout, info: dict[str, Any]) -> None:
    """Stop unless every tensor found its place and every place its tensor."""
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if layout.stage1 and missing >= STAGE1_EXTRAS:
        missing -= STAGE1_EXTRAS
    unexpected = {key for key in unexpected if not LEFTOVERS.match(key)}
    mismatched = sorted(info["mismatched_keys"])
    parts = []
    for keys, word in ((missing, "missing"), (unexpected, "unexpected")):
        if keys:
            parts.append(f"{len(keys)} {word} key{'s'[: len(keys) > 1]}: {_first(sorted(keys))}")
    if mismatched:
        shown = [f"{key} {list(stored)} instead of {list(expected)}" for key, stored, expected in mismatched]
        parts.append(f"{len(mismatched)} mis-shaped key{'s'[: len(shown) > 1]}: {_first(shown)}")
    if info.get("error_msgs"):
        parts.append(_first([str(message) for message in info["error_msgs"]]))
    if parts:
        raise CheckpointError(f"{layout.folder}: {'; '.join(parts)}. {describe(layout.shapes)}".strip())


def _first(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _image_token(processor: Processor) -> int:
    vocabulary = processor.tokenizer.get_vocab()
    return vocabulary.get("<image>", len(processor.tokenizer))


def _notes(layout: Layout, precision: str) -> list[str]:
    notes = list(layout.notes)
    if layout.stage1 and "temperature" not in layout.shapes:
        notes.append(
            "this file has no temperature and no language model head (released matching checkpoints drop "
            "them): scores are unaffected, training would start them anew"
        )
    if precision == "float16" and layout.config.text_config.model_type == "t5" and not layout.stage1:
        notes.append("Flan-T5 was trained in bfloat16 and can overflow in float16")
    return notes


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def _watched(watch: Watch | None) -> Iterator[None]:
    """Tell `watch` of each tensor that transformers puts in place, in this thread alone."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _progress_bar(make: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """What transformers gets as a progress bar: its own, around items that are counted."""
    watch = _watch.get()
    if watch is None or not arguments or not hasattr(arguments[0], "__len__"):
        return make(*arguments, **settings)

    def counted(items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            watch(number, len(items))
            yield item

    return make(counted(arguments[0]), *arguments[1:], **{"total": len(arguments[0]), **settings})


transformers_logging.set_tqdm_hook(_progress_bar)


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Silence what transformers says about keys, as we report them ourselves."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what bitsandbytes repeats at every int8 product, and what it misses that is optional."""
    return not any(words in record.getMessage() for words in ("inputs will be cast", "kernels-community"))


for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):  # before it is imported
    logging.getLogger(_name).addFilter(_is_news)
