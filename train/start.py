"""What a run starts from: the pretrained parts of a recipe, joined to the model that its stage trains.

Stage 1 puts a new Q-Former behind a pretrained image encoder; stage 2 puts the trained one between that
encoder and a pretrained language model (Sec. 3.2 and 3.3).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    Blip2VisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blip2 import checkpoint
from blip2.convert import qformer_from_bert
from blip2.model import Blip2
from blip2.processing import Family, Processor
from blip2.qformer import QFormer
from blip2.representation import Blip2Representation
from train.recipes import Recipe, RecipeError


def new_representation(
    recipe: Recipe, vision: Path, tokenizer: PreTrainedTokenizerBase
) -> Blip2Representation:
    """A stage-1 model with random weights around a pretrained image encoder.

    Args:
        recipe: gives the Q-Former's sizes.
        vision: folder with the encoder's config.json and model.safetensors, named as `VisionTransformer`'s.
        tokenizer: BERT-like; its bos token is [DEC], the last row of the embedding table.
    """
    sizes = dataclasses.asdict(recipe.qformer)
    num_query_tokens, projection = sizes.pop("num_query_tokens"), sizes.pop("image_text_hidden_size")
    dropout = sizes.pop("dropout")
    vision_config = Blip2VisionConfig.from_json_file(vision / "config.json")
    start: Any = tokenizer.bos_token_id
    if start is None:
        raise RecipeError(f"{recipe.tokenizer}: the tokenizer has no bos token; stage 1 wants [DEC] as one")
    config = Blip2Config(
        vision_config=vision_config.to_dict(),
        qformer_config={
            **sizes,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "encoder_hidden_size": vision_config.hidden_size,
            "vocab_size": start + 1,
            "pad_token_id": tokenizer.pad_token_id,
            "use_qformer_text_input": True,
        },
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=projection,
        image_token_index=tokenizer.get_vocab().get("<image>"),
    )
    config.decoder_start_token_id = start
    model = Blip2Representation(config)
    weights = load_file(vision / "model.safetensors")
    model.vision_model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def attach_language_model(
    representation: Blip2Representation, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Blip2:
    """A stage-2 model: image encoder, queries and query path of stage 1, a fresh projection, and the given
    LLM.

    Stage 1's text half and heads are dropped. As in the released models, a decoder ends with the line break
    that its captions end with, and an encoder without a prompt reads </s>.
    """
    text: Any = language_model.config
    if text.is_encoder_decoder:
        text.bos_token_id = text.eos_token_id
    else:
        (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
        text.eos_token_id = newline
        if language_model.generation_config is not None:
            language_model.generation_config.eos_token_id = newline
    old: Any = representation.config
    config: Any = type(old)(
        vision_config=old.vision_config.to_dict(),
        qformer_config={**old.qformer_config.to_dict(), "use_qformer_text_input": False},
        text_config=text.to_dict(),
        num_query_tokens=old.num_query_tokens,
        image_token_index=tokenizer.get_vocab().get("<image>"),
    )
    with torch.device("meta"):  # the language model is large, and every part is replaced
        model = Blip2(config)
    model.vision_model, model.query_tokens = representation.vision_model, representation.query_tokens
    model.qformer = QFormer(config.qformer_config)
    trained = representation.qformer.state_dict()
    model.qformer.load_state_dict({name: trained[name] for name in model.qformer.state_dict()})
    model.language_projection = nn.Linear(config.qformer_config.hidden_size, text.hidden_size)
    model.language_model = language_model
    return model


def start(recipe: Recipe) -> tuple[Blip2Representation | Blip2, Processor]:
    """The model that a recipe starts from, and the processor saved with it.

    Raises:
        RecipeError: what the recipe starts from does not fit it.
    """
    if recipe.stage == 1:
        if recipe.tokenizer is None:
            from train.scenes.text import build_tokenizer

            tokenizer: Any = build_tokenizer("bert")
        else:
            tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
            if tokenizer.bos_token is None:  # BERT's: LAVIS adds [DEC], the token that starts a caption
                tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        representation = new_representation(recipe, Path(recipe.start_from), tokenizer)
        if recipe.bert is not None:
            qformer_from_bert(recipe.bert, representation)
        return representation, _processor(representation, tokenizer, "bert")

    loaded = checkpoint.load(recipe.start_from, precision="float32", device="cpu")
    if not isinstance(loaded.model, Blip2Representation):
        raise RecipeError(f"{recipe.start_from} is no stage-1 model; stage 2 starts from one")
    assert recipe.language_model is not None
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
    encodes = AutoConfig.from_pretrained(recipe.language_model).is_encoder_decoder
    family = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    language_model = family.from_pretrained(recipe.language_model, dtype=torch.float32)
    model = attach_language_model(loaded.model, language_model, tokenizer)
    return model, _processor(model, tokenizer, "t5" if encodes else "opt")


def _processor(
    model: Blip2Representation | Blip2, tokenizer: PreTrainedTokenizerBase, family: Family
) -> Processor:
    config: Any = model.config
    size, queries = config.vision_config.image_size, config.num_query_tokens
    return Processor(tokenizer, family=family, image_size=size, num_query_tokens=queries)
