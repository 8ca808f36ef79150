"""A recipe's model and batch without numbers: full-size, on torch's meta device, in an instant.

Sizes come from the folders that the recipe names, or, before those are here, from the code: `train.weights`
knows the released parts, and a stage-1 folder is looked for among the outputs of the other recipes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Blip2Config, Blip2VisionConfig

from blip2.config import Blip2AnyConfig
from blip2.layout import parse_config, read_json
from blip2.model import Blip2
from blip2.representation import Blip2Representation
from train import execution
from train.objectives import Objective, Stage1, Stage2
from train.recipes import RECIPES, Execution, Recipe, RecipeError
from train.weights import WEIGHTS


def model_config(recipe: Recipe) -> Any:
    """The configuration of a recipe's model, from the folders it names or, before those exist, from the code.

    Raises:
        RecipeError: the recipe names weights whose sizes are not known here.
    """
    vision, qformer = (_stage1_parts if recipe.stage == 1 else _stage2_parts)(recipe)
    made = Blip2Config
    if getattr(vision, "pre_layernorm", False) or not isinstance(vision, Blip2VisionConfig):
        made = Blip2AnyConfig
    sizes = dict(qformer)
    queries, width = sizes.pop("num_query_tokens"), sizes.pop("image_text_hidden_size")
    text = {} if recipe.stage == 1 else {"text_config": _language_config(recipe)}
    sizes |= {"encoder_hidden_size": vision.hidden_size, "use_qformer_text_input": recipe.stage == 1}
    return made(
        vision_config=vision.to_dict(), qformer_config=sizes, num_query_tokens=queries,
        image_text_hidden_size=width, **text,
    )  # fmt: skip


def _stage1_parts(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    folder, known = Path(recipe.start_from), WEIGHTS.get(Path(recipe.start_from).name)
    if (folder / "config.json").is_file():
        raw = read_json(folder / "config.json")
        own = raw.get("model_type") in (None, "blip_2_vision_model")
        vision = Blip2VisionConfig.from_dict(raw) if own else AutoConfig.from_pretrained(folder)
    elif known is not None and known.kind == "vision" and known.config is not None:
        vision = known.config()
    else:
        raise RecipeError(f"{recipe.start_from} is not here, and its sizes are not known: fetch it first")
    sizes = dataclasses.asdict(recipe.qformer)
    sizes["hidden_dropout_prob"] = sizes["attention_probs_dropout_prob"] = sizes.pop("dropout")
    if recipe.tokenizer is None:
        from train.scenes.text import build_tokenizer

        return vision, sizes | {"vocab_size": build_tokenizer("bert").bos_token_id + 1}
    return vision, sizes | {"vocab_size": 30523}  # BERT's, and [DEC]


def _stage2_parts(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    folder = Path(recipe.start_from)
    if (folder / "config.json").is_file():
        config: Any = parse_config(read_json(folder / "config.json"), folder)
        rest = {name: getattr(config, name) for name in ("num_query_tokens", "image_text_hidden_size")}
        return config.vision_config, config.qformer_config.to_dict() | rest
    stage1 = [made for made in (make() for make in RECIPES.values()) if Path(made.output) / "model" == folder]
    if folder.name == "stage1-vitg":  # LAVIS's
        stage1 = [RECIPES["stage1-vitg"]()]
    if not stage1:
        raise RecipeError(f"{recipe.start_from} is not here, and no recipe makes it: its sizes are not known")
    return _stage1_parts(stage1[0])


def _language_config(recipe: Recipe) -> Any:
    assert recipe.language_model is not None
    folder, known = Path(recipe.language_model), WEIGHTS.get(Path(recipe.language_model).name)
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    if known is None or known.config is None:
        raise RecipeError(f"{recipe.language_model} is not here, and its sizes are not known: fetch it first")
    return known.config()


def build(recipe: Recipe, chosen: Execution) -> Objective:
    """A recipe's objective on the meta device, its parts frozen and in their precisions."""
    with torch.device("meta"):
        model: Any = (Blip2Representation if recipe.stage == 1 else Blip2)(model_config(recipe))
        norm = model.vision_model.post_layernorm
        model.vision_model.to(_dtype(chosen.vision_precision))
        norm.float()
        if recipe.stage == 2:
            model.language_model.to(_dtype(chosen.language_precision))
        kind: Any = Stage1 if recipe.stage == 1 else Stage2
        objective: Objective = kind(model, micro_batch_size=chosen.micro_batch_size)
    objective.train()
    if chosen.checkpointing:
        layers = [*model.qformer.encoder.layers]
        execution.recompute(layers + (execution.blocks(model.language_model) if recipe.stage == 2 else []))
    return objective


def _dtype(precision: str) -> torch.dtype:
    return getattr(torch, precision) if precision in ("float32", "float16") else torch.bfloat16


def batch(recipe: Recipe, rows: int) -> dict[str, torch.Tensor]:
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
