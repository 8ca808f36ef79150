"""A fine-tuning recipe's model and batch without numbers, for `train.plan`: see `train.shapes`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2 import checkpoint
from blip2.layout import parse_config
from blip2.model import Blip2
from blip2.representation import Blip2Representation
from blip2.shards import read_json
from train import execution, shapes
from train.datasets import RecipeError
from train.objectives import Objective
from train.recipes import RECIPES, Execution
from train.tuning.recipes import Tuning
from train.tuning.start import objective


def _config(source: str) -> Any:
    """Of a model that is here; else of the pre-training recipe that made it, or makes its like."""
    if checkpoint.is_available(source):
        _, folder = checkpoint.locate(source, local_files_only=True)
        return parse_config(read_json(folder / "config.json"), folder)
    name = Path(source).name.removeprefix("blip2-").replace(".", "-")
    names = {"itm-vit-g": "stage1-vitg", "stage1-vitg": "stage1-vitg"}
    outputs = {str(Path(make().output) / "model"): known for known, make in RECIPES.items()}
    known = names.get(name) or outputs.get(source) or f"stage2-{name}"
    if known not in RECIPES:
        raise RecipeError(f"{source} is not here, and its sizes are not known: fetch it first")
    return shapes.model_config(RECIPES[known]())


def model_config(recipe: Tuning) -> Any:
    """The configuration of the model that a recipe trains."""
    config = _config(recipe.start_from)
    if recipe.resolution is not None:
        config.vision_config.image_size = recipe.resolution
    if recipe.stage1 is not None:
        config.qformer_config.use_qformer_text_input = True
        config.qformer_config.vocab_size = _config(recipe.stage1).qformer_config.vocab_size
    return config


@shapes.build.register(Tuning)
def _build(recipe: Tuning, chosen: Execution) -> Objective:
    bits = chosen.language_precision in ("int8", "nf4")
    plain = dataclasses.replace(chosen, language_precision="bfloat16" if bits else chosen.language_precision)
    with torch.device("meta"):
        model: Any = (Blip2Representation if recipe.stage == 1 else Blip2)(model_config(recipe))
        if recipe.stage == 2:
            language = model.language_model
            if not getattr(language.config, "scale_decoder_outputs", True):  # Flan-T5's head is its own
                language.lm_head.weight = nn.Parameter(torch.empty_like(language.lm_head.weight))
            language.to(checkpoint.DTYPES[plain.language_precision])
        made = objective(dataclasses.replace(recipe, execution=plain), model)
    made.train()
    if chosen.checkpointing:
        execution.recompute(execution.layers(model))
    return made


@shapes.batch.register(Tuning)
def _batch(recipe: Tuning, rows: int) -> dict[str, torch.Tensor]:
    config, longest = model_config(recipe), recipe.max_text_length
    size, asked = config.vision_config.image_size, 0
    if recipe.stage == 2:  # as many tokens for a question as for what is said
        asked = longest if recipe.task == "vqa" else len(recipe.prompt.split()) + 1
    decoder = recipe.stage == 2 and config.use_decoder_only_language_model
    text = asked + longest if decoder or recipe.stage == 1 else asked
    with torch.device("meta"):

        def ids(length: int) -> torch.Tensor:
            return torch.empty(rows, length, dtype=torch.long)

        made = {"pixel_values": torch.empty(rows, 3, size, size)}
        made |= {"input_ids": ids(text), "attention_mask": ids(text)}
        if recipe.stage == 1:
            return made | {"image_ids": torch.empty(rows, dtype=torch.long)}
        made["labels"] = ids(text if decoder else longest)
        if config.qformer_config.use_qformer_text_input:
            made |= {"qformer_input_ids": ids(longest), "qformer_attention_mask": ids(longest)}
        return made


@shapes.parts.register(Tuning)
def _parts(recipe: Tuning) -> tuple[Any, ...]:
    sizes = (recipe.task, recipe.start_from, recipe.stage1, recipe.resolution, recipe.prompt)
    return "tuning", *sizes, recipe.trains_vision, str(recipe.lora)
