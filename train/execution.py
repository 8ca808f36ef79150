"""How a run uses its machines: recomputed activations, a compiled encoder, a language model split over GPUs.

Nothing here changes what is learned. The trained parts are small (0.1 to 0.2 billion parameters) and lie on
every process, under DistributedDataParallel; what is frozen needs no exchange at all, and a language model
that does not fit on a GPU is split with FSDP2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from blip2.encoders import AutoVisionEncoder
from blip2.model import Blip2
from blip2.representation import Blip2Representation
from blip2.vision import VisionTransformer
from train import distributed
from train.objectives import Objective
from train.recipes import Execution


def prepare(objective: Objective, execution: Execution, device: torch.device) -> None:
    """Apply `execution` to an objective that is not on its device yet.

    Raises:
        ValueError: the language model is to be split, but there is one process.
    """
    model = objective.model
    language_model = model.language_model if isinstance(model, Blip2) else None
    if execution.checkpointing:
        recompute(layers(model))
    if execution.shard_language_model and language_model is not None:
        split(language_model, device)
    frozen_on_gpu = device.type == "cuda" and model.vision_model.frozen
    compiled = frozen_on_gpu if execution.compile is None else execution.compile
    if compiled:
        encoder = model.vision_model
        encoder.tokens = torch.compile(encoder.tokens)  # type: ignore[method-assign]
    # Loaded from the same files by every process, or split: DistributedDataParallel need not send them.
    frozen = [name for name, p in objective.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in objective.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)


def layers(model: Blip2Representation | Blip2) -> list[nn.Module]:
    """The layers that gradients pass through: the Q-Former's, an LLM's, and those of a trained encoder."""
    found: list[nn.Module] = [*model.qformer.encoder.layers]
    encoder = model.vision_model
    if not encoder.frozen and isinstance(encoder, VisionTransformer):
        found += encoder.encoder.layers
    elif not encoder.frozen and isinstance(encoder, AutoVisionEncoder):
        found += blocks(encoder.model)
    return found + (blocks(model.language_model) if isinstance(model, Blip2) else [])


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model of transformers, of its encoder and decoder where it has both."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute(modules: Iterable[nn.Module]) -> None:
    """Keep only the inputs of these modules for the backward pass, and compute the rest again."""
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def split(language_model: PreTrainedModel, device: torch.device) -> None:
    """Keep a part of every layer's weights on each process (FSDP2), and collect a layer when it is its turn.

    Embeddings and head stay whole: they are used outside of the model's forward, too.
    """
    world = distributed.world_size()
    if world == 1:
        raise ValueError("shard_language_model splits over processes, but there is one: start with torchrun")
    mesh = init_device_mesh(device.type, (world,))
    for layer in blocks(language_model):
        fully_shard(layer, mesh=mesh)
    ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    whole = {p for end in ends if end is not None for p in end.parameters()}
    fully_shard(language_model, mesh=mesh, ignored_params=whole)
