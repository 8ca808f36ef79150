"""A recipe's model and batch without numbers: full-size, on torch's meta device, in an instant.

Sizes come from the folders that the recipe names, or, before those are here, from the code: `train.weights`
knows the released parts, and a stage-1 folder is looked for among the outputs of the other recipes.

Recipes of fine-tuning have their own `build`, `batch` and `parts`, in `train.tuning.shapes`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, Blip2VisionConfig

from blip2.config import config_class
from blip2.layout import parse_config
from blip2.model import Blip2
from blip2.representation import Blip2Representation
from blip2.shards import read_json
from train import execution
from train.encoders import ENCODERS, OURS, find, is_function, load_encoder
from train.encoders import _tower as tower
from train.objectives import Objective, Stage1, Stage2
from train.recipes import RECIPES, Execution, Recipe, RecipeError
from train.weights import WEIGHTS


def model_config(recipe: Recipe) -> Any:
    """The configuration of a recipe's model.

    Raises:
        RecipeError: the recipe names weights that are not here, and whose sizes are not known.
    """
    vision, qformer = (_stage1_parts if recipe.stage == 1 else _stage2_parts)(recipe)
    sizes = dict(qformer)
    queries, width = sizes.pop("num_query_tokens"), sizes.pop("image_text_hidden_size")
    sizes |= {"encoder_hidden_size": vision.hidden_size, "use_qformer_text_input": recipe.stage == 1}
    text = None if recipe.stage == 1 else _language_config(recipe)
    return config_class(vision, text)(
        vision_config=vision.to_dict(),
        qformer_config=sizes,
        num_query_tokens=queries,
        image_text_hidden_size=width,
        **({} if text is None else {"text_config": text}),
    )


def _unknown(source: str) -> RecipeError:
    return RecipeError(f"{source} is not here, and its sizes are not known: fetch it first")


def _vision_config(source: str) -> Any:
    folder, known = find(source), WEIGHTS.get(Path(ENCODERS.get(source, source)).name)
    if folder is not None and (folder / "config.json").is_file():
        if read_json(folder / "config.json").get("model_type", OURS) == OURS:
            return Blip2VisionConfig.from_json_file(folder / "config.json")
        return tower(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if is_function(source):
        return load_encoder(source).encoder.config
    if known is None or known.kind != "vision" or known.config is None:
        raise _unknown(source)
    return known.config()


def _stage1_parts(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    sizes = dataclasses.asdict(recipe.qformer)
    sizes["hidden_dropout_prob"] = sizes["attention_probs_dropout_prob"] = sizes.pop("dropout")
    words = 30523  # BERT's, and [DEC]
    if recipe.tokenizer is None:
        from train.scenes.text import build_tokenizer

        start: Any = build_tokenizer("bert").bos_token_id
        words = start + 1
    return _vision_config(recipe.start_from), sizes | {"vocab_size": words}


def _stage2_parts(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    folder = find(recipe.start_from) or Path(recipe.start_from)
    if (folder / "config.json").is_file():
        config: Any = parse_config(read_json(folder / "config.json"), folder)
        rest = {name: getattr(config, name) for name in ("num_query_tokens", "image_text_hidden_size")}
        return config.vision_config, config.qformer_config.to_dict() | rest
    stage1 = [made for made in (make() for make in RECIPES.values()) if Path(made.output) / "model" == folder]
    if folder.name == "stage1-vitg":  # LAVIS's
        stage1 = [RECIPES["stage1-vitg"]()]
    if not stage1:
        raise _unknown(recipe.start_from)
    return _stage1_parts(stage1[0])


def _language_config(recipe: Recipe) -> Any:
    source = recipe.language_model or ""
    folder, known = find(source), WEIGHTS.get(Path(source).name)
    if folder is not None and (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if known is None or known.config is None:
        raise _unknown(source)
    return known.config()


@functools.singledispatch
def build(recipe: Any, chosen: Execution) -> Objective:
    """A recipe's objective on the meta device, its parts frozen and in their precisions."""
    with torch.device("meta"):
        model: Any = (Blip2Representation if recipe.stage == 1 else Blip2)(model_config(recipe))
        model.vision_model.set_frozen_precision(_dtype(chosen.vision_precision))
        if recipe.stage == 2:
            language = model.language_model
            if not getattr(language.config, "scale_decoder_outputs", True):  # Flan-T5's head is its own
                language.lm_head.weight = nn.Parameter(torch.empty_like(language.lm_head.weight))
            language.to(_dtype(chosen.language_precision))
        kind: Any = Stage1 if recipe.stage == 1 else Stage2
        objective: Objective = kind(model, micro_batch_size=chosen.micro_batch_size)
    objective.train()
    if chosen.checkpointing:
        execution.recompute(execution.layers(model))
    return objective


def _dtype(precision: str) -> torch.dtype:
    return getattr(torch, precision) if precision in ("float32", "float16") else torch.bfloat16


@functools.singledispatch
def batch(recipe: Any, rows: int) -> dict[str, torch.Tensor]:
    """One process's batch on the meta device, its captions as long as they may be."""
    config, longest = model_config(recipe), recipe.max_text_length
    text, target = longest, longest
    if recipe.stage == 2 and not config.use_decoder_only_language_model:
        text = longest // 2 + 1  # the prefix: at most half of a caption, and </s>
    size = config.vision_config.image_size
    with torch.device("meta"):
        made = {
            "pixel_values": torch.empty(rows, 3, size, size),
            "input_ids": torch.empty(rows, text, dtype=torch.long),
            "attention_mask": torch.empty(rows, text, dtype=torch.long),
        }
        return made | ({"labels": torch.empty(rows, target, dtype=torch.long)} if recipe.stage == 2 else {})


_sizes: dict[tuple[Any, ...], dict[str, int]] = {}


@functools.singledispatch
def parts(recipe: Any) -> tuple[Any, ...]:
    """What a recipe's sizes depend on."""
    return recipe.stage, recipe.start_from, recipe.language_model, recipe.tokenizer, str(recipe.qformer)


def sizes(recipe: Any) -> dict[str, int]:
    """How many numbers are trained, and how many are frozen: in the image encoder ("vision"), in the language
    model ("language"), and in that one's largest layer and in its embeddings and head ("ends"), which are
    never split.
    """
    if parts(recipe) not in _sizes:
        model = build(recipe, Execution()).model
        found = {"trained": _count(model, True), "vision": _count(model.vision_model, False)}
        found |= {"language": 0, "layer": 0, "ends": 0}
        if recipe.stage == 2:
            language: Any = model.language_model
            outer = {language.get_input_embeddings().weight, language.get_output_embeddings().weight}
            found["language"] = _count(language, False)
            found["layer"] = max(_count(block, False) for block in execution.blocks(language))
            found["ends"] = sum(weight.numel() for weight in outer)
        _sizes[parts(recipe)] = found
    return _sizes[parts(recipe)]


def _count(module: nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
