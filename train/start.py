"""What a run starts from: the pretrained parts of a recipe, joined to the model that its stage trains.

Stage 1 puts a new Q-Former behind a pretrained image encoder; stage 2 puts the trained one between that
encoder and a pretrained language model (Sec. 3.2 and 3.3). Either may be any: `train.encoders` finds image
encoders, and `blip2.language.Manners` tells how a decoder ends what it says.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blip2 import checkpoint
from blip2.config import config_class
from blip2.convert import qformer_from_bert
from blip2.encoders import import_encoder, registered
from blip2.language import Manners
from blip2.layout import MODEL_TYPES, readers
from blip2.model import Blip2
from blip2.processing import Family, Processor
from blip2.qformer import QFormer
from blip2.quantize import quantization, skipped
from blip2.representation import Blip2Representation
from blip2.shards import read_json
from blip2.vision import ImageEncoder
from train.encoders import find, load_encoder
from train.recipes import Recipe, RecipeError

Model = Blip2Representation | Blip2


def new_representation(
    recipe: Recipe, encoder: ImageEncoder, tokenizer: PreTrainedTokenizerBase
) -> Blip2Representation:
    """A stage-1 model with random weights around a pretrained image encoder.

    Args:
        recipe: gives the Q-Former's sizes.
        encoder: of `train.encoders.load_encoder`; becomes part of the model.
        tokenizer: BERT-like; its bos token is [DEC], the last row of the embedding table.
    """
    sizes = dataclasses.asdict(recipe.qformer)
    num_query_tokens, projection = sizes.pop("num_query_tokens"), sizes.pop("image_text_hidden_size")
    dropout = sizes.pop("dropout")
    start: Any = tokenizer.bos_token_id
    if start is None:
        raise RecipeError(f"{recipe.tokenizer}: the tokenizer has no bos token; stage 1 wants [DEC] as one")
    vision: Any = encoder.config
    config = config_class(vision)(
        vision_config=vision.to_dict(),
        qformer_config={
            **sizes,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "encoder_hidden_size": vision.hidden_size,
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
    model.vision_model = encoder
    return model


def attach_language_model(
    representation: Blip2Representation,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: str = "auto",
) -> Blip2:
    """A stage-2 model: image encoder, queries and query path of stage 1, a fresh projection, and the given
    LLM.

    Stage 1's text half and heads are dropped. An encoder without a prompt reads </s>, as in the released
    models. How a decoder ends a caption and is asked (`Manners`) goes into its configuration and tokenizer,
    with which it is saved.

    Args:
        representation: of stage 1; its parts become the new model's.
        language_model: decoder-only, or T5-like.
        tokenizer: its own; gets <image> where the embedding table has a row to spare.
        frame: see `Manners.of`.

    Raises:
        RecipeError: the language model is of a kind that cannot read queries.
    """
    text: Any = language_model.config
    name = getattr(text, "_name_or_path", "") or text.model_type
    other_layers = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if other_layers or not isinstance(getattr(text, "hidden_size", None), int):
        what = (
            f"layers of type {', '.join(sorted(other_layers))}" if other_layers else "no single hidden_size"
        )
        raise RecipeError(f"{name}: this language model has {what}; decoders of plain attention and T5 work")
    if text.is_encoder_decoder:
        text.bos_token_id = text.eos_token_id
    else:
        _teach_manners(language_model, tokenizer, frame, name)
    rows = language_model.get_input_embeddings().weight.shape[0]
    if "<image>" not in tokenizer.get_vocab() and len(tokenizer) < rows:
        tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    image_token = tokenizer.get_vocab().get("<image>")
    old: Any = representation.config
    text_config = text.to_dict()
    text_config.pop("quantization_config", None)  # of the weights in memory, not of those that are saved
    config: Any = config_class(old.vision_config, text, image_token)(
        vision_config=old.vision_config.to_dict(),
        qformer_config={**old.qformer_config.to_dict(), "use_qformer_text_input": False},
        text_config=text_config,
        num_query_tokens=old.num_query_tokens,
        image_token_index=image_token,
    )
    if config.use_decoder_only_language_model == text.is_encoder_decoder:
        raise RecipeError(
            f"{name}: language models of type {text.model_type} work neither as decoder nor as T5"
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


def _teach_manners(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frame: str, name: str
) -> None:
    """Write into a decoder's configuration and tokenizer how it begins, ends and is asked."""
    try:
        manners = Manners.of(language_model, tokenizer, frame)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error
    if not manners.is_chat:
        tokenizer.chat_template = None  # its presence says that questions are framed by it
    if tokenizer.pad_token is None:  # the mask, not the token, tells what is padding
        tokenizer.pad_token = tokenizer.eos_token or manners.end
    text: Any = language_model.config
    ends = list(manners.ends) if len(manners.ends) > 1 else manners.ends[0]
    if text.model_type != "opt":
        text.bos_token_id = next(iter(tokenizer("")["input_ids"]), None)  # what stands before a text, if any
        text.pad_token_id = tokenizer.pad_token_id
    for settings in (text, language_model.generation_config):
        if settings is not None:
            settings.eos_token_id = ends


def _first(ids: Any) -> Any:
    return ids[0] if isinstance(ids, list) else ids


def start(recipe: Recipe, stored: bool = False) -> tuple[Model, Processor]:
    """The model that a recipe starts from, on the CPU, and the processor saved with it.

    Args:
        recipe: what to start.
        stored: frozen parts in the precision of their files, for saving; by default in that of
            `recipe.execution`, for training.

    Raises:
        RecipeError: what the recipe starts from does not fit it.
    """
    if recipe.stage == 1:
        model, processor = _start_stage1(recipe)
    else:
        model, processor = _start_stage2(recipe, stored)
    precision = recipe.execution.vision_precision
    if precision != "float32" and not stored:
        model.vision_model.set_frozen_precision(checkpoint.DTYPES[precision])
    return model, processor


def _start_stage1(recipe: Recipe) -> tuple[Blip2Representation, Processor]:
    folder = find(recipe.start_from)
    if folder is not None and read_json(folder / "config.json").get("model_type") in MODEL_TYPES:
        loaded = checkpoint.load(folder, precision="float32", device="cpu")
        if not isinstance(loaded.model, Blip2Representation):
            raise RecipeError(
                f"{folder} is a stage-2 model; stage 1 starts from an encoder, or a stage-1 model"
            )
        return loaded.model, loaded.processor
    if recipe.tokenizer is None:
        from train.scenes.text import build_tokenizer

        tokenizer: Any = build_tokenizer("bert")
    else:
        tokenizer = AutoTokenizer.from_pretrained(find(recipe.tokenizer) or recipe.tokenizer)
        if tokenizer.bos_token is None:  # BERT's: LAVIS adds [DEC], the token that starts a caption
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    found = load_encoder(recipe.start_from)
    model = new_representation(recipe, found.encoder, tokenizer)
    if recipe.bert is not None:
        qformer_from_bert(find(recipe.bert) or recipe.bert, model)
    processor = Processor(
        tokenizer, family="bert", image_size=found.image_size, mean=found.mean, std=found.std,
        num_query_tokens=model.config.num_query_tokens,
    )  # fmt: skip
    return model, processor


def _start_stage2(recipe: Recipe, stored: bool) -> tuple[Blip2, Processor]:
    if recipe.encoder is not None and recipe.encoder not in registered():
        try:
            import_encoder(recipe.encoder)
        except ValueError as error:
            raise RecipeError(str(error)) from error
    loaded = checkpoint.load(recipe.start_from, precision="float32", device="cpu")
    if not isinstance(loaded.model, Blip2Representation):
        raise RecipeError(f"{recipe.start_from} is no stage-1 model; stage 2 starts from one")
    assert recipe.language_model is not None
    source = find(recipe.language_model) or recipe.language_model
    precision = "stored" if stored else recipe.execution.language_precision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        language_model = load_language_model(source, precision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{recipe.language_model}: {' '.join(str(error).split())[:400]}") from error
    model = attach_language_model(loaded.model, language_model, tokenizer, recipe.frame)
    seen = loaded.processor
    family: Family = "opt" if model.is_decoder_only else "t5"
    processor = Processor(
        tokenizer, family=family, image_size=seen.image_size, mean=seen.mean, std=seen.std,
        num_query_tokens=model.config.num_query_tokens,
    )  # fmt: skip
    if model.is_decoder_only:
        processor.end = tokenizer.decode([_first(model.config.text_config.eos_token_id)])
    return model, processor


def load_language_model(source: Any, precision: str = "float32") -> PreTrainedModel:
    """A frozen language model, decoder-only or T5-like.

    Args:
        source: folder or Hub id.
        precision: "float32", "bfloat16", "float16", "int8" or "nf4", which a GPU loads where it trains; or
            "stored", that of the files.

    Raises:
        ValueError: transformers has no such decoder or T5; or int8 or nf4 without bitsandbytes.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if precision in ("stored", *checkpoint.DTYPES):
        return family.from_pretrained(source, dtype=checkpoint.DTYPES.get(precision, "auto"))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    dtype = checkpoint.DTYPES[checkpoint.half_precision(torch.device(device), config.model_type)]
    options = quantization(precision, dtype, skipped(), _awkward(family, config, device))
    return family.from_pretrained(source, dtype=dtype, quantization_config=options, device_map={"": device})


def _awkward(family: Any, config: Any, device: Any) -> list[str]:
    """Layers that bitsandbytes cannot compute in 4 bits on a CPU: it works in tiles of 32 x 64."""
    if device != "cpu":
        return []
    with torch.device("meta"):
        model = family.from_config(copy.deepcopy(config))
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return [name for name, layer in layers if layer.out_features % 32 or layer.in_features % 64]


def finished(recipe: Recipe, model: Model) -> tuple[Model, str]:
    """The model to save after training, with a sentence on who reads it, or "".

    A run may hold its frozen parts in few bits, or in parts of them per process; what is saved has them as
    they were stored.

    Args:
        recipe: as trained.
        model: trained.
    """
    execution = recipe.execution
    exact = (execution.vision_precision, execution.language_precision) == ("float32", "float32")
    if not exact or execution.shard_language_model:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        model, _ = start(recipe, stored=True)
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)
    return model.cpu().eval(), readers(model.config)
