"""What went into an answer: how sure each word was, which parts mattered, where the queries looked.

Three measurements that mean what they say and no more. Probabilities are the model's own, not chances of
being right. Occlusion tells how much less likely the answer becomes when a part is hidden. Query attention
tells where the Q-Former's queries read; it does not explain an answer.

B images, Q queries, P image tokens (a class token, or several or none, then the patches row by row), H heads,
L cross-attention layers, T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import Blip2Base
from .generation import StopSignal
from .model import Blip2
from .processing import Processor
from .vision import ImageFeatures


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: as it reads, a space in front where there is one.
        probability: that the model gave it after the tokens before, in [0, 1].
        others: what it would rather or else have said, likeliest first, with probabilities.
    """

    text: str
    probability: float
    others: tuple[tuple[str, float], ...]


def _answer_ids(model: Blip2, processor: Processor, answer: str) -> Tensor:
    """The answer's tokens, int (1, T), as they follow a prompt: in a decoder, after a space or a frame."""
    spaced = model.is_decoder_only and not processor.has_chat_frame
    text = f" {answer}" if spaced else answer
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the answer is empty: there is nothing to explain")
    return ids.to(model.device)


def _answer_log_probs(
    model: Blip2, processor: Processor, image: ImageFeatures, prompt: str, question: str, ids: Tensor
) -> Tensor:
    """Log-probabilities of all tokens at each place of the answer, float (B, T, words)."""
    tokens = {**processor.text(prompt), **processor.question(question)}
    tokens = {name: value.to(model.device).expand(len(image), -1) for name, value in tokens.items()}
    ids = ids.expand(len(image), -1)
    if model.is_decoder_only:
        mask = torch.cat([tokens.pop("attention_mask"), torch.ones_like(ids)], 1)
        ids_all = torch.cat([tokens.pop("input_ids"), ids], 1)
        logits = model(image=image, input_ids=ids_all, attention_mask=mask, **tokens).logits
        logits = logits[:, -ids.shape[1] - 1 : -1]
    else:
        logits = model(image=image, labels=ids.contiguous(), **tokens).logits
    return logits.float().log_softmax(-1)


@torch.no_grad()
def token_probabilities(
    model: Blip2,
    processor: Processor,
    image: ImageFeatures,
    prompt: str,
    answer: str,
    question: str | None = None,
    num_others: int = 4,
) -> list[Token]:
    """How likely each token of an answer was, and what else might have been said.

    Args:
        model: stage 2.
        processor: its processor.
        image: features of one image.
        prompt: as it was sent, see `Processor.prompt`.
        answer: as it was said.
        question: for a Q-Former that reads questions; by default the prompt.
        num_others: alternatives a token.

    Raises:
        ValueError: an empty answer.
    """
    ids = _answer_ids(model, processor, answer)
    [log_probs] = _answer_log_probs(model, processor, image, prompt, question or prompt, ids)
    found, before = [], ""
    for place, token in enumerate(ids[0].tolist()):
        best = log_probs[place].topk(num_others + 1).indices.tolist()
        others = [other for other in best if other != token][:num_others]
        whole = processor.decode(ids[:, : place + 1])[0]
        text, before = whole[len(before) :], whole
        alternatives = tuple(
            (processor.tokenizer.decode([other]).strip(), log_probs[place, other].exp().item())
            for other in others
        )
        found.append(Token(text, log_probs[place, token].exp().item(), alternatives))
    return found


@torch.no_grad()
def occlusion(
    model: Blip2,
    processor: Processor,
    picture: Image.Image,
    prompt: str,
    answer: str,
    question: str | None = None,
    grid: int = 8,
    batch_size: int = 16,
    stop: StopSignal | None = None,
) -> Tensor:
    """How much each part of a picture matters to an answer.

    Each cell of a grid is painted in the picture's mean color, and the answer's log-probability taken again.
    The prompt stays: what a description in it says of the cell is still known.

    Args:
        model: stage 2.
        processor: its processor.
        picture: RGB.
        prompt: as it was sent.
        answer: as it was said.
        question: for a Q-Former that reads questions; by default the prompt.
        grid: cells a side.
        batch_size: pictures at once.
        stop: once set, the cells not looked at yet count as 0.

    Returns:
        float (grid, grid), the fall of the log-probability (nats): above 0 where hiding makes the answer less
        likely, below 0 where it makes it likelier.

    Raises:
        ValueError: an empty answer, or a grid finer than the pixels.
    """
    pixels = processor.images(picture)
    size = pixels.shape[-1]
    if not 1 <= grid <= size:
        raise ValueError(f"grid is {grid}; allowed: 1 to {size}, the picture's side")
    ids = _answer_ids(model, processor, answer)
    edges = [round(index * size / grid) for index in range(grid + 1)]
    hidden = pixels.repeat(grid * grid + 1, 1, 1, 1)
    mean = pixels.mean((2, 3), keepdim=True)[0]
    for cell in range(1, grid * grid + 1):  # the first stays whole
        row, column = divmod(cell - 1, grid)
        hidden[cell, :, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = mean
    likely = []
    for part in hidden.split(batch_size):
        image = model.encode_image(part.to(model.device))
        log_probs = _answer_log_probs(model, processor, image, prompt, question or prompt, ids)
        likely.append(log_probs.gather(2, ids.expand(len(part), -1)[..., None]).sum((1, 2)).cpu())
        if stop is not None and stop.is_set():
            break
    fall = torch.cat(likely)[0] - torch.cat(likely)[1:]
    return F.pad(fall, (0, grid * grid - len(fall))).reshape(grid, grid)


@torch.no_grad()
def query_attention(
    model: Blip2Base, image: ImageFeatures, question: dict[str, Tensor] | None = None
) -> Tensor:
    """Where the queries read the image: the probabilities of every cross-attention.

    Args:
        model: either stage.
        image: features of B images.
        question: qformer_input_ids and qformer_attention_mask, of `Processor.question`, for a Q-Former that
            reads them.

    Returns:
        float (L, B, H, Q, P); over P they sum to 1.
    """
    found: list[Tensor] = []

    def record(attention: Any, given: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        projections = attention.attention
        query = projections.split(projections.query(given[0]))
        scores = query @ given[1][0].transpose(2, 3) / math.sqrt(query.shape[-1])
        found.append(scores.float().softmax(-1))

    crossed = [layer.crossattention for layer in model.qformer.encoder.layers if layer.crossattention]
    handles = [attention.register_forward_pre_hook(record) for attention in crossed]
    try:
        model.read_image(image.image_embeds, **(question or {}))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def attention_map(
    attention: Tensor, layer: int = -1, query: int | None = None, heads: Sequence[int] = ()
) -> Tensor:
    """One picture of `query_attention`: float (B, side, side), the class token and its like left out.

    Args:
        attention: float (L, B, H, Q, P).
        layer: which of the L.
        query: which of the Q; None for their mean.
        heads: which of the H; all if empty.

    Raises:
        ValueError: a layer, query or head that is not there.
    """
    layers, _, num_heads, queries, tokens = attention.shape
    allowed = {"layer": (layer, -layers, layers), "query": (query or 0, 0, queries)}
    allowed |= {f"head {head}": (head, 0, num_heads) for head in heads}
    for name, (value, least, most) in allowed.items():
        if not least <= value < most:
            raise ValueError(f"{name} is {value}; allowed: {least} to {most - 1}")
    chosen = attention[layer][:, list(heads) or slice(None)].mean(1)
    chosen = chosen.mean(1) if query is None else chosen[:, query]
    side = math.isqrt(tokens)  # SigLIP has no token in front of its patches, DINO may have five
    return chosen[:, tokens - side**2 :].unflatten(1, (side, side))


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """A picture, RGB, under a map in red: opaque where the map, float (rows, columns), is largest.

    What is below 0 does not show. The picture is turned gray, so that red is the map's alone.
    """
    strength = (weights.float().clamp(min=0) / weights.max().clamp(min=1e-12) * 200).byte().cpu().numpy()
    mask = Image.fromarray(strength).resize(picture.size, Image.Resampling.BICUBIC)
    red = Image.new("RGB", picture.size, (230, 0, 38))
    return Image.composite(red, picture.convert("L").convert("RGB"), mask)
