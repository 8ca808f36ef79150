"""Weights in the form that training reads: an image encoder under our names, a text model as safetensors.

Every tensor is accounted for: taken, or left out for a reason that is said; and held to the shapes that the
code builds and to finite values. One file is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Blip2VisionConfig

from blip2.errors import CheckpointError
from blip2.lavis_names import rename
from blip2.shards import read_pickle
from blip2.vision import VisionTransformer


def write_vision(source: Path, folder: Path, config: Blip2VisionConfig) -> list[str]:
    """Write an image encoder's folder.

    Args:
        source: LAVIS's file of an encoder, or a folder of CLIP or BLIP-2.
        folder: gets config.json and model.safetensors.
        config: says how many blocks are kept, and all sizes.

    Returns:
        What was left out, a line for each reason.

    Raises:
        CheckpointError: something is missing, has another shape, or is not finite.
    """
    if source.is_file():
        raw = read_pickle(source)
        raw = {k: v for k, v in raw.get("model", raw).items() if isinstance(v, Tensor)}
        raw = {f"visual_encoder.{name.removeprefix('visual_encoder.')}": value for name, value in raw.items()}
        state, dropped = rename(raw, config.num_hidden_layers, source=str(source))
        state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    else:
        state, dropped = _from_folder(source, config.num_hidden_layers)
    width = config.hidden_size  # BLIP-2's own norm behind the encoder starts anew
    state |= {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    with torch.device("meta"):
        expected = {name: value.shape for name, value in VisionTransformer(config).state_dict().items()}
    check(state, expected, source)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config.to_json_file(folder / "config.json", use_diff=False)
    reasons = sorted(set(dropped.values()))
    return [f"left out {sum(why == r for why in dropped.values())} tensors: {r}" for r in reasons]


def _from_folder(folder: Path, depth: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The image encoder of CLIP's or BLIP-2's own folder, and what is left out of it."""
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, value in _tensors(folder):
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        if not name.startswith("vision_model.") or name.endswith("position_ids"):
            dropped[name] = "not of the image encoder"
        elif block and int(block[1]) >= depth:
            dropped[name] = f"block {int(block[1]) + 1}: BLIP-2 uses the first {depth}"
        elif ".post_layernorm." in name:
            dropped[name] = "the norm behind the encoder, which BLIP-2 trains"
        else:
            new = name.removeprefix("vision_model.").replace("pre_layrnorm", "pre_layernorm")
            state[new.replace(".out_proj.", ".projection.")] = value
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{which}_proj.")) for which in "qkv"]
        state[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    for name in ("embeddings.class_embedding", "embeddings.position_embedding"):
        key = f"{name}.weight" if f"{name}.weight" in state else name
        if key in state:
            value = state.pop(key)
            state[name] = value.reshape(1, -1, value.shape[-1])
    return state, dropped


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for _, part in _files(folder):
        yield from part.items()


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every weight file of a folder, its name without ending and its tensors, one at a time in memory."""
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe or sorted(folder.glob("*.bin")):
        yield path.stem, load_file(path) if safe else read_pickle(path)


def write_text_model(
    source: Path, folder: Path, config: Any = None, precision: torch.dtype | None = None
) -> None:
    """Write a text model's folder: what lies beside the weights as it is, the weights as safetensors.

    Args:
        source: the folder of a BERT or a language model, in safetensors or .bin files.
        folder: gets the copy.
        config: sizes to hold a language model to; None checks none.
        precision: of the copy; None keeps the source's.

    Raises:
        CheckpointError: something is missing, has another shape, or is not finite.
    """
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    index: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for stem, part in _files(source):
        kept = {name: value for name, value in part.items() if value.is_floating_point()}
        shapes |= {name: value.shape for name, value in kept.items()}
        check(kept, {name: value.shape for name, value in kept.items()}, source)
        file = f"{stem.replace('pytorch_model', 'model')}.safetensors"
        copies = {
            name: value.to(precision or value.dtype, copy=True).contiguous() for name, value in kept.items()
        }
        save_file(copies, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(kept, file)
    if len(set(index.values())) > 1:
        written = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(written, indent=1))
    if config is not None:
        _check_language_model(shapes, config, source)
        settings = json.loads((folder / "config.json").read_text())
        if config.model_type == "t5":
            settings["dense_act_fn"] = config.dense_act_fn  # LAVIS runs Flan-T5 with the exact GELU
        if precision is not None:
            settings.pop("torch_dtype", None)  # its name before transformers 5
            settings["dtype"] = str(precision).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _check_language_model(shapes: dict[str, torch.Size], config: Any, source: Path) -> None:
    """Every parameter of the language model has come; tied ones once, and older files leave prefixes out."""
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(config)
    expected = {name: value.shape for name, value in model.named_parameters()}
    # transformers 5 builds T5 tied in any case; that it does not scale its outputs tells that it is not
    if not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        expected["lm_head.weight"] = model.get_output_embeddings().weight.shape
    found = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    lacking = [name for name, shape in expected.items() if found.get(name.removeprefix("model.")) != shape]
    if lacking:
        raise CheckpointError(
            f"{source}: {len(lacking)} tensors missing or of another shape: {', '.join(sorted(lacking)[:5])}"
        )


def check(state: dict[str, Tensor], expected: dict[str, Any], source: Path) -> None:
    """Hold tensors to the names and shapes expected, and to finite values.

    Raises:
        CheckpointError: they differ; the message names the first.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    infinite = [name for name, value in state.items() if not torch.isfinite(value).all()]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": wrong, "not finite": infinite}
    for kind, names in faults.items():
        if names:
            raise CheckpointError(f"{source}: {len(names)} tensors {kind}: {', '.join(names[:5])}")
