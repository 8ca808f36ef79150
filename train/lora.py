"""LoRA (arXiv 2106.09685): small matrices beside a frozen model's own, the only thing that is trained.

They go beside linear layers of the language model and, by choice, of the Q-Former; what is under them may be
in float32, in 16 bits, or quantized to int8 or nf4. `save_adapter` writes what `blip2.load` and peft, on
transformers' own BLIP-2, read; `merge` folds it into the weights, for a checkpoint without adapters.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from blip2.adapters import CONFIG, MANNERS, PREFIX, SETTINGS, WEIGHTS, base_name, import_peft, inject, merge
from blip2.model import Blip2
from blip2.packed import unpack
from train.datasets import RecipeError

__all__ = ["LoRA", "Share", "merge", "save_adapter", "share", "wear"]

QFORMER = ("query", "value")  # of self-attention and cross-attention


@dataclass(frozen=True)
class LoRA:
    """Which layers learn, and how much they can; defaults are common, the paper has no LoRA."""

    rank: int = 16
    """Width of the matrices beside a layer."""
    alpha: float = 32
    """What they add is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Of their input, in training."""
    qformer: bool = False
    """Beside the Q-Former's queries and values, too."""
    targets: tuple[str, ...] | None = None
    """Linear layers of the language model, by their own names, such as q_proj k_proj v_proj out_proj fc1 fc2;
    None: those that ask and answer in attention, q_proj and v_proj of OPT, q and v of T5."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise RecipeError(f"LoRA's rank ({self.rank}) must be at least 1, alpha ({self.alpha}) above 0")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"LoRA's dropout is {self.dropout}; it is a chance, 0 to below 1")
        if self.targets == ():
            raise RecipeError("LoRA's targets name no layer: name some, or leave them out")


@dataclass(frozen=True)
class Share:
    """How much of a model an adapter trains, in parameters."""

    language: int
    """Trained beside the language model."""
    qformer: int
    """Trained beside the Q-Former."""
    language_model: int
    """That the language model has itself."""

    @property
    def percent(self) -> float:
        """Of the language model's parameters, those trained beside it."""
        return 100 * self.language / self.language_model

    def __str__(self) -> str:
        more = f", and {self.qformer:,} beside the Q-Former" if self.qformer else ""
        return (
            f"{self.language:,} parameters beside the language model's {self.language_model:,} "
            f"({self.percent:.2f} %){more}"
        )


def wear(model: Blip2, lora: LoRA) -> None:
    """Put trainable adapters on a model, and freeze all else; in training, only they use dropout.

    The model computes as before until they are trained.

    Args:
        model: on the device it trains on; its language model may be in int8 or nf4.
        lora: which layers, how wide.

    Raises:
        RecipeError: it wears one already, or has no layers of the names wanted.
        ValueError: peft is not installed.
    """
    if model.wears_adapter:
        raise RecipeError("this model wears an adapter already: merge it first, or load the model without")
    unpack(model)
    config = import_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_pattern(model, lora)
    )
    model.requires_grad_(False)
    inject(model, config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on some CPUs bitsandbytes lays 4 bits out anew when nothing is trained, as in an evaluation
            # between steps; no gradient passes that layout, so none may be used, and `state_dict` undoes it
            module.state_dict()
            module.support_avx512bf16_for_cpu = False


def _pattern(model: Blip2, lora: LoRA) -> str:
    """Which layers, as a regular expression that means the same in transformers' BLIP-2.

    Names alone would not do: an image encoder may have layers of the same names.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    language: Any = model.language_model
    head = model.get_output_embeddings()  # may be the embeddings, too
    names = {
        path.rpartition(".")[2]
        for path, layer in language.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    kind = language.config.model_type
    wanted = lora.targets or tuple(USUAL.get(kind, ()))
    if not wanted:
        raise RecipeError(f"which layers of {kind} learn is not known: name targets from {sorted(names)}")
    if unknown := [name for name in wanted if name not in names]:
        raise RecipeError(
            f"the language model has no linear layer {' or '.join(unknown)}; LoRA's targets may be "
            f"{', '.join(sorted(names))}"
        )
    pattern = rf"language_model\.(.+\.)?({'|'.join(map(re.escape, wanted))})"
    if lora.qformer:
        pattern += rf"|qformer\.encoder\..+\.({'|'.join(QFORMER)})"
    return pattern


def share(model: Blip2) -> Share:
    """How much of a model that wears an adapter is trained."""
    counts = {"language": 0, "qformer": 0, "language_model": 0}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if ".lora_" in name:
            counts["qformer" if part == "qformer" else "language"] += parameter.numel()
        elif part == "language_model":
            state = getattr(parameter, "quant_state", None)  # of 4 bits, which lie two in a byte
            counts[part] += parameter.numel() if state is None else math.prod(state.shape)
    return Share(**counts)


def save_adapter(model: Blip2, folder: str | Path, base: str | None = None) -> Path:
    """Save the adapter that a model wears as peft does; all of it appears at once, or nothing.

    How the model wants to be asked goes along, where its configuration says so: `num_descriptions`, 0 where
    questions were trained without captions before them, `caption_prompt`, what captions go on from, and
    `question_prompt`, the frame of a question.

    Args:
        model: wearing one.
        folder: a new name, an empty folder, or one that holds an adapter, which is replaced.
        base: the model it was trained on, as `blip2.load` takes it; by default the folder the model was
            loaded from, by its preset's or Hub name if it has one.

    Raises:
        RecipeError: the model wears none; its base has no name; or other things lie in `folder`.
    """
    if not model.wears_adapter:
        raise RecipeError("this model wears no adapter: put one on with train.lora.wear")
    base = base or (base_name(model.name_or_path) if model.name_or_path else None)
    if not base:
        raise RecipeError("an adapter names the model it was trained on: pass its folder or name as base")
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file()):
        raise RecipeError(f"{target} is there already and is no adapter: choose another folder")
    state = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        tensors = {PREFIX + name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, fresh / WEIGHTS, {"format": "pt"})
        config = copy.deepcopy(next(iter(model.peft_config.values())))
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(fresh))
        settings = {name: getattr(model.config, name) for name in SETTINGS if hasattr(model.config, name)}
        if settings:
            (fresh / MANNERS).write_text(json.dumps(settings) + "\n", "utf-8")
        (fresh / WEIGHTS).chmod((fresh / CONFIG).stat().st_mode)  # safetensors hides files from others
        if target.is_dir():
            old = fresh.with_name(f"{fresh.name}.old")
            target.rename(old)
            fresh.rename(target)
            for kept in old.iterdir():  # what else lies there
                if not (target / kept.name).exists():
                    kept.rename(target / kept.name)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target
