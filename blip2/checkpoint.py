"""Load models: from a name, a folder or a Hub id, in a chosen precision, strictly. Saving is `blip2.saving`.

Nothing is ever filled in silently: a tensor that is missing, superfluous or of another shape stops the load,
except for those that `blip2.layout` lists by name. Folders are transformers' own (see `blip2.layout`).
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from blip2.adapters import asked_for, put_on, strangeness
from blip2.devices import half_precision
from blip2.download import Watch
from blip2.encoders import CallableEncoder
from blip2.errors import CheckpointError
from blip2.fitting import check
from blip2.hub import is_available, locate
from blip2.layout import EXTERNAL, LEFTOVERS, STAGE1_EXTRAS, Layout, describe, read_layout
from blip2.model import Blip2
from blip2.novelty import Novelty, UnknownPictureError
from blip2.novelty import read as read_novelty
from blip2.packed import pack
from blip2.placement import main_device, make_device_map, read_budget, spread
from blip2.presets import PRECISIONS, PRESETS, Preset
from blip2.processing import Processor, question_prompt
from blip2.progress import quiet, watched
from blip2.quantize import (
    DTYPES,
    QUANTIZED,
    SMALL,
    awkward,
    choose_precision,
    compute_dtype,
    final_dtypes,
    is_kept,
    quantization,
    skipped,
    stored_precision,
)
from blip2.representation import Blip2Representation
from blip2.saving import save
from blip2.shards import open_tensors, weight_files
from blip2.vision import ImageFeatures

__all__ = [
    "DTYPES",
    "CheckpointError",
    "Loaded",
    "half_precision",
    "is_available",
    "load",
    "locate",
    "quantization",
    "quiet",
    "save",
]


@dataclass
class Loaded:
    """What `load` gives: the model in eval mode, its processor, and how it was loaded.

    Attributes:
        precision: "float32", "bfloat16", "float16", "int8" or "nf4", as computed with, never "auto".
        notes: sentences worth showing, such as what an older file lacks.
        offloaded: whether parts of the model lie elsewhere than on `device`: on other GPUs or the disk.
        novelty: tells pictures of a kind that the model does not know; None if it takes any.
        adapter: the folder of the adapter that the model wears.
    """

    model: Blip2 | Blip2Representation
    processor: Processor
    name: str
    precision: str
    device: torch.device
    folder: Path
    notes: list[str]
    novelty: Novelty | None = None
    offloaded: bool = False
    adapter: Path | None = None

    @property
    def preset(self) -> Preset | None:
        """The embedded or released checkpoint that this is, or that an adapter is on; None for others."""
        return PRESETS.get(self.name.partition("+")[0] if self.adapter else self.name)

    @property
    def caption_prompt(self) -> str:
        """What its captions go on from, as it was fine-tuned or released; "" for most."""
        usual = self.preset.prompt if self.preset else ""
        return str(getattr(self.model.config, "caption_prompt", usual))

    def unknown(self, image: ImageFeatures) -> list[str]:
        """Why the model should not speak of each of B pictures that it has encoded: "" for kinds it knows."""
        if self.novelty is None:
            return [""] * len(image)
        reason = f"{self.name} knows {self.novelty.knows} only, and this picture does not look like one"
        return [reason if unknown else "" for unknown in self.novelty.is_unknown(image).tolist()]

    def check_known(self, image: ImageFeatures) -> None:
        """Refuse pictures, encoded by this model, of a kind that it does not know.

        Raises:
            UnknownPictureError: one of them is; the message says what the model knows.
        """
        for reason in filter(None, self.unknown(image)):
            raise UnknownPictureError(reason)


def load(
    name_or_path: str | Path | None = None,
    *,
    precision: str = "auto",
    device: str | torch.device = "auto",
    quantize_vision: bool = False,
    language_precision: str | None = None,
    max_memory: Mapping[int | str, int | str] | str | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    local_files_only: bool = False,
    check_memory: bool = True,
    watch: Watch | None = None,
) -> Loaded:
    """Load a model and its processor.

    Args:
        name_or_path: an embedded or released checkpoint's name (`blip2.PRESETS`), a folder, or a Hub id. What
            the cache holds is used as it is, without asking the Hub again. An adapter's folder stands for the
            model it was trained on, with the adapter. None is that of `adapter`, else the embedded default.
        precision: "float32", "bfloat16", "float16", "int8", "nf4"; "auto" is float32 below 100 million
            parameters, or what a folder was saved in, else bfloat16 where the device computes in it. float16
            keeps the Q-Former, the queries and Flan-T5's `wo` in float32; int8 and nf4 quantize the language
            model alone.
        device: "auto" (CUDA, else MPS, else the CPU; several GPUs where one is not enough), "cpu", "mps",
            "cuda", "cuda:1".
        quantize_vision: int8 and nf4 for the image encoder, too.
        language_precision: float32, bfloat16 or float16 for the language model alone, which is read straight
            into it, beside another `precision` of these three. For training: no matrix is laid out for use.
        max_memory: bytes of weights that devices may hold, such as {"cuda:0": "20GB", "cpu": "8GB"}. A model
            that the first of them, a GPU before the CPU, does not hold is spread over the others.
        offload_folder: keep what `max_memory` does not allow on the disk, in this folder, as long as the
            model lives. It is read again for every token.
        revision: a branch, tag or commit of a Hub repository.
        adapter: a folder with a LoRA adapter, of `train.lora` or peft, which the model then wears.
        local_files_only: never download.
        check_memory: refuse a model that the free memory does not hold.
        watch: told how many tensors are in place, of how many; to cancel, it raises.

    Raises:
        CheckpointError: it cannot be found, is incomplete, or contradicts itself.
        DoesNotFitError: it needs more memory than is free, or than `max_memory` allows.
        ValueError: an unknown name, precision or device, or options that exclude each other.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose auto, {', '.join(PRECISIONS)}")
    beside = language_precision is not None
    if beside and (not {language_precision, precision} <= DTYPES.keys() or max_memory is not None):
        raise ValueError(
            f"language_precision {language_precision!r} with precision {precision!r}: both have to be of "
            f"{', '.join(DTYPES)}, and max_memory left out"
        )
    whole = "an adapter needs a model in one piece: leave out max_memory"
    if adapter is not None and max_memory is not None:
        raise ValueError(whole)
    name_or_path, worn = asked_for(name_or_path, adapter)
    budget = None if max_memory is None else read_budget(max_memory)
    if offload_folder is not None and budget is None:
        raise ValueError("offload_folder goes with max_memory, which says what may stay in memory")
    if worn is not None and budget is not None:
        raise ValueError(whole)
    where = main_device(budget, device)
    kept = "float32" if quantize_vision else precision  # a small folder has the encoder in 16 bits
    name, folder = locate(name_or_path, revision=revision, local_files_only=local_files_only, precision=kept)
    layout = read_layout(folder)
    if worn is not None and layout.stage1:
        raise CheckpointError(f"{name} scores texts: adapters go on models that make captions and answers")
    precision = choose_precision(precision, layout, where, quantize_vision)
    processor = Processor.from_pretrained(folder, layout.config, local_files_only=True)
    if layout.config.image_token_index is None and not layout.stage1:
        # Early revisions lack it; newer ones appended <image> at the first free id.
        layout.config.image_token_index = _image_token(processor)
    if budget is None and device == "auto" and worn is None and not beside:
        budget = spread(layout, precision, where, quantize_vision)
    device_map: dict[str, Any] = {"": where}
    if budget is not None:
        disk = offload_folder is not None
        device_map = make_device_map(layout, precision, where, quantize_vision, budget, disk)
    elif check_memory:
        check(name, layout, precision, where, quantize_vision, language_precision)
    with _scratch(name, offload_folder if "disk" in device_map.values() else None) as scratch:
        with watched(watch):
            model = _load_model(
                layout, precision, device_map, where, quantize_vision, scratch, language_precision
            )
        weakref.finalize(model, _remove, scratch)
    if worn is not None:
        put_on(model, worn, name)
        processor.question_prompt = question_prompt(model.config)
    if budget is None and not beside:  # accelerate moves the weights of models in pieces
        pack(model)
    novelty = read_novelty(folder, layout.config.qformer_config.encoder_hidden_size)
    notes, offloaded = _notes(layout, precision), len(set(device_map.values())) > 1
    if name in PRESETS and folder in PRESETS[name].small_folders():
        notes.append(f"{name} is read from {folder}, which `blip2 download --precision` wrote")
    loaded = Loaded(model.eval(), processor, name, precision, where, folder, notes, novelty, offloaded)
    if worn is not None:
        loaded.name, loaded.adapter = f"{name}+{worn.name}", worn.folder
        notes += strangeness(worn, folder)
    return loaded


@contextmanager
def _scratch(name: str, folder: str | Path | None) -> Iterator[Path | None]:
    """A new folder in `folder` for what stays on the disk; nothing is left of it after an error."""
    if folder is None:
        yield None
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{Path(name).name}-", dir=folder))
    try:
        yield made
    except BaseException:
        _remove(made)
        raise


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _load_model(
    layout: Layout,
    precision: str,
    device_map: dict[str, Any],
    device: torch.device,
    quantize_vision: bool = False,
    offload_folder: Path | None = None,
    language_precision: str | None = None,
) -> Blip2 | Blip2Representation:
    """Build the model and fill it; strict.

    Args:
        layout: of the folder.
        precision: to load in, not "auto".
        device_map: where each part goes.
        device: to compute on.
        quantize_vision: see `load`.
        offload_folder: for what `device_map` puts on the disk.
        language_precision: see `load`.
    """
    model_class: type[Any] = Blip2Representation if layout.stage1 else Blip2
    options: dict[str, Any] = {}
    dtype = compute_dtype(precision, device, layout.config.text_config.model_type)
    language_dtype = None
    if language_precision is not None and not layout.stage1:
        options["language_dtype"] = language_dtype = DTYPES[language_precision]
    if precision in QUANTIZED and stored_precision(layout) is None:
        options["quantization_config"] = quantization(
            precision, dtype, skipped(quantize_vision), awkward(layout, device)
        )
    source: Any = layout.folder
    files = weight_files(layout.folder, layout.variant)
    if files[0].suffix == ".safetensors":
        source = None
        options["state_dict"] = {
            name: tensor
            for name, tensor in open_tensors(files, final_dtypes(layout, dtype, language_dtype)).items()
            if not name.startswith(EXTERNAL)
        }
    with quiet(progress=layout.num_parameters > SMALL):
        model, info = model_class.from_pretrained(
            source,
            config=layout.config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload_folder,
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
    for key, parameter in model.named_parameters():
        if parameter.is_meta and dtype == torch.float16 and is_kept(key):
            parameter.data = parameter.data.float()  # accelerate casts what it brings in to what was there
    model.config.dtype = dtype
    model.config.name_or_path = model.name_or_path = str(layout.folder)
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
            f"{len(differ)} names differ: {_shown(differ)}"
        )
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(layout.folder, layout.variant) if stored else []:
        weights |= {n.removeprefix(EXTERNAL): t for n, t in load_file(file).items() if n.startswith(EXTERNAL)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{layout.folder}: {' '.join(str(error).split())}") from error
    module.to(device=device, dtype=dtype).requires_grad_(False)


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
            parts.append(f"{len(keys)} {word} key{'s'[: len(keys) > 1]}: {_shown(sorted(keys))}")
    if mismatched:
        shown = [f"{key} {list(stored)} instead of {list(expected)}" for key, stored, expected in mismatched]
        parts.append(f"{len(mismatched)} mis-shaped key{'s'[: len(shown) > 1]}: {_shown(shown)}")
    if info.get("error_msgs"):
        parts.append(_shown([str(message) for message in info["error_msgs"]]))
    if parts:
        raise CheckpointError(f"{layout.folder}: {'; '.join(parts)}. {describe(layout.shapes)}".strip())


def _shown(items: list[str]) -> str:
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
