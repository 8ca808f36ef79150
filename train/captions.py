"""Captions as the tensors each objective trains on, and loaders that draw them.

Legend: B captions, T tokens. Everything random comes from the generator passed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2.images import CLIP_MEAN, CLIP_STD
from train import distributed
from train.datasets import Scenes
from train.loader import Batch, IndexLoader

Tokenize = Callable[[Sequence[str], np.random.Generator], dict[str, Tensor]]


def representation_tokens(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int = 32
) -> dict[str, Tensor]:
    """Stage 1: [CLS] caption [SEP], padded to `max_length`, so that every process holds the same T.

    Returns:
        input_ids and attention_mask: int (B, max_length).
    """
    tokens = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def decoder_tokens(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int = 32, end: str = "\n"
) -> dict[str, Tensor]:
    """Stage 2 with a decoder: </s> caption `end`, padded on the right.

    `end`, a line break for OPT, is appended before the text is cut, as in LAVIS, so a cut caption does not
    teach the model to end there. The label of </s> counts: the last query learns to predict it. Where the
    tokenizer puts nothing before a text, it learns to predict the first word.

    Returns:
        input_ids and attention_mask: int (B, T); labels: int (B, T), -100 on padding.
    """
    tokens = tokenizer(
        [caption + end for caption in captions],
        padding=True,
        padding_side="right",  # left is for generating
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def prefix_tokens(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    generator: np.random.Generator,
    max_length: int = 32,
    whole: float = 0.0,
) -> dict[str, Tensor]:
    """Stage 2 with an encoder-decoder: the prefix of a caption for the encoder, the rest for the decoder.

    The split is drawn between position 1 and the middle of the caption, as the authors describe it (LAVIS
    issue 139; its unit is unstated, here tokens). A caption of a single token goes to the decoder whole, and
    with the chance `whole` any.

    Returns:
        input_ids and attention_mask: int (B, T), prefix </s>; labels: int (B, T'), suffix </s>, -100 on
        padding.
    """
    prefixes: list[Tensor] = []
    suffixes: list[Tensor] = []
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        split = int(generator.integers(1, len(ids) // 2, endpoint=True)) if len(ids) > 1 else 0
        if whole and generator.random() < whole:
            split = 0
        for part, into in ((ids[:split], prefixes), (ids[split:], suffixes)):
            into.append(torch.tensor([*part[: max_length - 1], tokenizer.eos_token_id]))

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": pad(prefixes, tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in prefixes], 0),
        "labels": pad(suffixes, -100),
    }


def tokenize_for(
    tokenizer: PreTrainedTokenizerBase, family: str, max_length: int, whole: float = 0.0, end: str = "\n"
) -> Tokenize:
    """The function above that a model's family ("bert", "opt" or "t5", as its `Processor` says) trains on.

    Args:
        tokenizer: the processor's.
        family: likewise.
        max_length: of a caption, tokens.
        whole: see `prefix_tokens`.
        end: what ends a decoder's caption, the processor's.
    """
    if family == "bert":
        return lambda captions, generator: representation_tokens(tokenizer, captions, max_length)
    if family == "opt":
        return lambda captions, generator: decoder_tokens(tokenizer, captions, max_length, end)
    return lambda captions, generator: prefix_tokens(tokenizer, captions, generator, max_length, whole)


def scenes_loader(
    scenes: Scenes,
    tokenize: Tokenize,
    batch_size: int,
    *,
    seed: int = 0,
    split: str = "train",
    shared: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> IndexLoader:
    """Drawn scenes, each with one caption drawn anew every time it comes up.

    Args:
        scenes: how many, how large.
        tokenize: of `tokenize_for`.
        batch_size: over all processes.
        seed: of order and captions.
        split: "train" or "validation".
        shared: give every process all rows, instead of its own.
        mean: of the image encoder's pixels, in [0, 1].
        std: likewise.
    """
    from train.scenes.encoder import normalize
    from train.scenes.text import caption, telling_caption
    from train.scenes.world import render, sample

    say = telling_caption if scenes.telling else caption
    number = scenes.num_scenes if split == "train" else scenes.num_validation
    hidden = None
    if scenes.features is not None and split == "train":
        hidden = np.load(scenes.features, mmap_mode="r")
        number = min(number, len(hidden))

    def fetch(indices: list[int], generator: np.random.Generator) -> Batch:
        drawn = [sample(index, split) for index in indices]
        words = random.Random(int(generator.integers(2**63)))
        said = [say(scene, words) for scene in drawn]
        if hidden is not None:
            image = {"image_hidden": torch.from_numpy(hidden[indices])}
        else:
            pixels = np.stack([render(scene, scenes.image_size) for scene in drawn])
            image = {"pixel_values": normalize(torch.from_numpy(pixels), mean, std)}
        return {
            **image,
            **tokenize(said, generator),
            "captions": said,
            "keys": [f"{split}/{index}" for index in indices],
        }

    world = 1 if shared else distributed.world_size()
    rank = 0 if shared else distributed.rank()
    return IndexLoader(number, batch_size // world, fetch, seed=seed, rank=rank, world_size=world)
