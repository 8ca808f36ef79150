"""Save models as folders that transformers reads: all of a folder appears at once, or nothing of it."""

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from blip2.base import Blip2Base
from blip2.errors import CheckpointError
from blip2.layout import DIGESTS, NOVELTY, stored_name, write_config
from blip2.packed import unpacked
from blip2.processing import Processor
from blip2.representation import Blip2Representation
from blip2.shards import VARIANT

# what a new checkpoint replaces; novelty and digests are of the old one's weights, a template of its words
WEIGHTS = re.compile(
    r"(model|pytorch_model)[.-].*(safetensors|bin|json)|chat_template\.jinja|"
    rf"{re.escape(NOVELTY)}|{re.escape(DIGESTS)}"
)


def save(
    model: Blip2Base,
    processor: Processor,
    folder: str | Path,
    *,
    weights_dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a folder that transformers (4.4x and 5) and `load` read; all of it appears at once, or nothing.

    What transformers' `blip-2` or `instructblip` can express is saved as that. A checkpoint that lies there
    is replaced; other files beside it, such as a README, are kept.

    Args:
        model: what to save.
        processor: saved with it.
        folder: where to; a new name, an empty folder, or one that holds a checkpoint.
        weights_dtype: store floating-point weights so ("float16" halves a float32 model); config.json still
            names the dtype the model computes in.
        max_shard_size: of a weight file.

    Raises:
        CheckpointError: `folder` is a file, or holds other things than one; the model wears an adapter, or
            not all of it is in memory.
    """
    if model.wears_adapter:
        raise CheckpointError(
            "this model wears an adapter, which has no place in a checkpoint: save it with peft, or fold it "
            "in with blip2.adapters.merge"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError(
            "part of this model is on the disk, or waits in main memory for a GPU: load it without "
            "max_memory to save it"
        )
    target = Path(folder)
    if target.is_file() or (
        target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()
    ):
        raise CheckpointError(f"{target} is there already and is no checkpoint: choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        processor.save_pretrained(fresh)
        for file in fresh.rglob("tokenizer_config.json"):
            _write_json(file, _tokenizer_config(json.loads(file.read_text("utf-8"))))
        with unpacked(model):
            _write_model(model, fresh, weights_dtype, max_shard_size)
        if target.is_dir():
            _keep_others(target, fresh)
            old = fresh.with_name(f"{fresh.name}.old")
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def _keep_others(target: Path, fresh: Path) -> None:
    """Copy what lies beside an old checkpoint, such as a README, to its successor."""
    for kept in target.iterdir():
        if (fresh / kept.name).exists() or WEIGHTS.fullmatch(kept.name):
            continue
        if kept.is_dir():
            shutil.copytree(kept, fresh / kept.name)
        else:
            shutil.copy2(kept, fresh / kept.name)


def _tokenizer_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 in words that transformers 4 understands too."""
    machine = ("backend", "is_local", "local_files_only")  # how it was loaded, not what it is
    raw = {name: value for name, value in raw.items() if name not in machine}
    if raw.get("tokenizer_class") == "TokenizersBackend":
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(raw.get("extra_special_tokens"), list):
        raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
    return raw


def _write_model(model: Blip2Base, folder: Path, weights_dtype: str | None, max_shard_size: str) -> None:
    stage1 = isinstance(model, Blip2Representation)
    language_model: Any = getattr(model, "language_model", None)
    tied_t5 = None
    if language_model is not None and language_model.config.model_type == "t5":
        tied_t5 = language_model.lm_head.weight is language_model.shared.weight
    raw = write_config(model.config, stage1, str(model.dtype).removeprefix("torch."), tied_t5)
    _write_json(folder / "config.json", raw)
    if language_model is not None:
        _write_json(folder / "generation_config.json", _generation_config(model))

    state, metadata = _state_dict(model, raw)
    if weights_dtype is not None:
        dtype = getattr(torch, weights_dtype)
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
        }
    middle = f".{VARIANT}" if raw["model_type"] == "blip2-any" else ""
    shards = split_torch_state_dict_into_shards(
        state, filename_pattern=f"model{middle}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name].contiguous().cpu() for name in names}, folder / file, metadata)
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors hides files from others
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / f"model.safetensors.index{middle}.json", index)


def _state_dict(model: Blip2Base, raw: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, under its stored name."""
    metadata = {"format": "pt"}
    quantizer = getattr(model, "hf_quantizer", None)
    state: dict[str, Tensor] = model.state_dict()
    if quantizer is not None:
        state, extra = quantizer.get_state_dict_and_metadata(model)
        metadata |= extra
        state = state if state is not None else model.state_dict()
    for copy, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if copy in state and source in state and state[copy].data_ptr() == state[source].data_ptr():
            if copy.endswith("lm_head.weight") and raw["text_config"].get("tie_word_embeddings") is False:
                state[copy] = state[copy].clone()  # transformers 4 would not tie it
            else:
                del state[copy]
    return {stored_name(name, raw["model_type"]): tensor for name, tensor in state.items()}, metadata


def _generation_config(model: Any) -> dict[str, Any]:
    """The language model's special tokens, in a file that any version of transformers reads."""
    raw = model.language_model.generation_config.to_diff_dict()
    return {name: value for name, value in raw.items() if name != "_from_model_config"}


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", "utf-8")
