"""The model that a fine-tuning run starts from, made ready for it, and what is saved in the end.

Sizes may change on the way: positions are interpolated for larger pictures, and for questions the Q-Former of
stage 2 gets back the text half that it had in stage 1.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from blip2 import checkpoint
from blip2.encoders import CallableEncoder
from blip2.layout import read_layout, readers
from blip2.model import Blip2
from blip2.packed import unpack
from blip2.processing import Processor
from blip2.qformer import QFormer
from blip2.quantize import LANGUAGE, QUANTIZED
from blip2.representation import Blip2Representation
from blip2.shards import open_tensors, weight_files
from blip2.vision import VisionTransformer
from train.datasets import RecipeError
from train.log import say
from train.lora import wear
from train.objectives import Objective, Retrieval, Stage2
from train.tuning.recipes import Tuning

Model = Blip2Representation | Blip2


def start(recipe: Tuning) -> tuple[Objective, Processor]:
    """The objective of a recipe over the model it starts from, on the CPU, and the processor saved with it.

    A language model in int8 or nf4, under LoRA, lies on the GPU where there is one.

    Raises:
        RecipeError: what the recipe starts from does not fit it.
    """
    model, processor = load(recipe)
    return objective(recipe, model), processor


def load(recipe: Tuning) -> tuple[Model, Processor]:
    """The model as it is trained: in float32, but for the language model in the recipe's precision.

    That is read straight into it: OPT-6.7B in float32 would be 27 GB of every process.

    Raises:
        RecipeError: see `start`.
    """
    language = recipe.execution.language_precision
    if language in QUANTIZED:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = checkpoint.load(recipe.start_from, precision=language, device=where)
    else:
        loaded = checkpoint.load(
            recipe.start_from, precision="float32", language_precision=language, device="cpu"
        )
    model, processor = loaded.model, loaded.processor
    unpack(model)
    wanted = Blip2Representation if recipe.stage == 1 else Blip2
    if not isinstance(model, wanted):
        raise RecipeError(
            f"{recipe.start_from} is a stage-{3 - recipe.stage} model; {recipe.task} starts from one of "
            f"stage {recipe.stage}"
        )
    for note in loaded.notes:
        say(note)
    if recipe.stage1 is not None and isinstance(model, Blip2) and not model.question_in_qformer:
        add_text_half(model, processor, recipe.stage1)
    if recipe.resolution not in (None, processor.image_size):
        resize(model, processor, recipe.resolution or 0)
    return model, processor


def add_text_half(model: Blip2, processor: Processor, stage1: str) -> None:
    """Let the Q-Former of a stage-2 model read text beside the queries, as VQA does (Sec. 4.3).

    Stage 2 trains the query path alone and drops the rest, so word embeddings, positions and the text
    feed-forwards are those of stage 1; self-attention is shared and stays as stage 2 left it. The paper does
    not say where its text half came from; this is the only place that has one.

    Args:
        model: of stage 2; changed.
        processor: its own; gets the tokenizer of stage 1.
        stage1: name or folder of a stage-1 model.

    Raises:
        RecipeError: that is none, or its Q-Former has other sizes.
    """
    loaded = checkpoint.load(stage1, precision="float32", device="cpu")
    if not isinstance(loaded.model, Blip2Representation):
        raise RecipeError(f"{stage1} is no stage-1 model; the text half of the Q-Former comes from one")
    unpack(loaded.model)
    config, other = copy.deepcopy(model.config.qformer_config), loaded.model.config.qformer_config
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        ours, theirs = getattr(config, name), getattr(other, name)
        if ours != theirs:
            raise RecipeError(
                f"the Q-Former of {stage1} has {name} {theirs}, the model's own {ours}: take the stage-1 "
                "model that it was trained from"
            )
    for name in ("vocab_size", "max_position_embeddings", "pad_token_id"):
        setattr(config, name, getattr(other, name))
    config.use_qformer_text_input = True
    qformer = QFormer(config)
    trained, text = model.qformer.state_dict(), loaded.model.qformer.state_dict()
    qformer.load_state_dict({name: trained.get(name, text.get(name)) for name in qformer.state_dict()})
    model.config.qformer_config = config
    model.qformer, model.embeddings = qformer, loaded.model.embeddings
    processor.qformer_tokenizer = loaded.processor.tokenizer


def resize(model: Model, processor: Processor, image_size: int) -> None:
    """Have a model take pictures of another size: positions are interpolated once, bicubic.

    Args:
        model: changed, its configuration too.
        processor: likewise.
        image_size: pixels a side.

    Raises:
        RecipeError: its image encoder takes one size only, or the size is no multiple of its patches.
    """
    encoder = model.vision_model
    if not isinstance(encoder, VisionTransformer):
        raise RecipeError(f"this image encoder stays at {processor.image_size} pixels: leave out resolution")
    try:
        encoder.resize(image_size)
    except ValueError as error:
        raise RecipeError(f"resolution: {error}") from error
    vision: Any = model.config.vision_config
    vision.image_size = processor.image_size = image_size


def objective(recipe: Tuning, model: Model) -> Objective:
    """What the recipe trains of a model, with the rest frozen.

    Raises:
        RecipeError: the image encoder cannot be trained, or has no layers to drop.
    """
    learns, micro = recipe.trains_vision, recipe.execution.micro_batch_size
    encoder = model.vision_model
    if learns and isinstance(encoder, CallableEncoder):
        raise RecipeError("an image encoder that is a function stays frozen: set train_vision to False")
    made: Objective
    if isinstance(model, Blip2):
        made = Stage2(model, micro, learns)
        if model.question_in_qformer:
            freeze_unread(model)
    else:
        made = Retrieval(model, micro_batch_size=micro, train_vision=learns)
    if recipe.lora is not None:
        assert isinstance(model, Blip2)
        wear(model, recipe.lora)
    if learns and recipe.drop_path:
        if not isinstance(encoder, VisionTransformer):
            raise RecipeError("drop_path is for EVA-CLIP and CLIP as BLIP-2 has them: set it to 0")
        encoder.set_drop_path(recipe.drop_path)
    elif not learns and recipe.execution.vision_precision != "float32":
        encoder.set_frozen_precision(checkpoint.DTYPES[recipe.execution.vision_precision])
    return made


def freeze_unread(model: Blip2) -> None:
    """Freeze what no output depends on: the last layer passes on the queries alone, so its text half is idle.

    It would get no gradient, which DistributedDataParallel takes for a fault.
    """
    last = model.qformer.encoder.layers[-1]
    last.intermediate.requires_grad_(False)
    last.output.requires_grad_(False)


def finished(recipe: Tuning, model: Model) -> tuple[Model, str]:
    """The model to save after training, with a sentence on who reads it, or "".

    A run may hold frozen parts in fewer bits, or in parts of them per process; what is saved has them as they
    were stored.
    """
    execution = recipe.execution
    exact = recipe.trains_vision or execution.vision_precision == "float32"
    exact = exact and (recipe.stage == 1 or execution.language_precision == "float32")
    if not exact or execution.shard_language_model:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        stored: Any = stored_precision(recipe.start_from)
        whole = dataclasses.replace(execution, vision_precision="float32", language_precision=stored)
        model, _ = load(dataclasses.replace(recipe, execution=whole))
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)
    return model.cpu().eval(), readers(model.config)


def stored_precision(source: str) -> str:
    """What the language model's numbers are stored in, in a checkpoint that is here."""
    _, folder = checkpoint.locate(source, local_files_only=True)
    files = weight_files(folder, read_layout(folder).variant)
    names = {dtype: name for name, dtype in checkpoint.DTYPES.items()}
    tensors = open_tensors(files) if files[0].suffix == ".safetensors" else {}
    found = (tensor.stored for name, tensor in tensors.items() if name.startswith(LANGUAGE))
    return next((names[dtype] for dtype in found if dtype in names), "float32")
