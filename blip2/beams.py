"""Beam search as the paper decodes (Sec. 4.1, 4.2), equal to transformers' with `early_stopping` off.

The prompt is read once an image, before there are beams, and an image that is done leaves the batch. B
images, K beams, N = B * K rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList

from .decoders import Decoder
from .settings import Generation

NEVER = -1e9  # log-probability of what must not be chosen


@dataclass
class Beams:
    """The beams of the images that are not done.

    Attributes:
        images: int (B,), which images.
        tokens: int (B, K, tokens so far).
        scores: float (B, K), summed log-probabilities, the best first.
        finished: int (B, K, length), texts that have ended, padded.
        finished_scores: float (B, K), their scores with the length penalty, the best first.
    """

    images: Tensor
    tokens: Tensor
    scores: Tensor
    finished: Tensor
    finished_scores: Tensor

    def keep(self, rows: Tensor) -> None:
        """Only these images, int."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def beam_search(
    decoder: Decoder,
    generation: Generation,
    ends: Tensor,
    pad: int,
    processors: LogitsProcessorList,
    stopped: Callable[[], bool],
) -> Tensor:
    """Search from a decoder that has read one prompt an image.

    Args:
        decoder: of B rows; used up.
        generation: settings; `num_captions` of the K texts are returned.
        ends: int, tokens that end a text.
        pad: token behind the end.
        processors: change log-probabilities before beams are chosen.
        stopped: asked before every token; once it says yes, texts end where they are.

    Returns:
        int (B * num_captions, tokens), the best of each image first.
    """
    beams, longest = generation.num_beams, generation.max_new_tokens
    images, device = len(decoder.logits), decoder.logits.device
    state = Beams(
        torch.arange(images, device=device),
        torch.empty((images, 1, 0), dtype=torch.long, device=device),
        torch.zeros((images, 1), device=device),
        torch.full((images, beams, longest), pad, device=device),
        torch.full((images, beams), NEVER, device=device),
    )
    done = state.finished[:, : generation.num_captions].clone()
    for length in range(1, longest + 1):
        last = length == longest or stopped()
        rows = _advance(state, decoder.logits, generation, ends, processors, last)
        worst = state.finished_scores.amin(1)
        hope = state.scores[:, 0] / length**generation.length_penalty
        over = (worst > NEVER) & (hope <= worst) | last
        done[state.images[over]] = state.finished[over, : generation.num_captions]
        going = (~over).nonzero()[:, 0]
        if not len(going):
            break
        decoder.repeat(beams) if length == 1 else decoder.reorder(rows)
        if len(going) < len(over):
            state.keep(going)
            decoder.keep((going[:, None] * beams + torch.arange(beams, device=device)).flatten())
        decoder.read(state.tokens[..., -1].flatten())
    return done.flatten(0, 1)[:, :length]


def _advance(
    state: Beams,
    logits: Tensor,
    generation: Generation,
    ends: Tensor,
    processors: LogitsProcessorList,
    last: bool,
) -> Tensor:
    """Make every beam a token longer; the first token's K best, from one row an image, become the beams.

    Returns:
        int (N,), which row of the decoder each beam goes on from.
    """
    images, rows, read = state.tokens.shape
    beams, vocabulary = generation.num_beams, logits.shape[-1]
    scores = logits.log_softmax(-1)
    if len(processors):
        scores = processors(state.tokens.flatten(0, 1), scores)
    scores = (scores.view(images, rows, -1) + state.scores[..., None]).flatten(1)
    candidates = max(2, 1 + len(ends)) * beams  # enough that K go on, however many end
    best, index = scores.topk(min(candidates, scores.shape[1]))
    row, token = index // vocabulary, index % vocabulary
    tokens = torch.cat([_of(state.tokens, row), token[..., None]], dim=2)
    ended = torch.isin(token, ends) | last

    # those of the K best that end compete with what has ended before
    new_scores = (best / (read + 1) ** generation.length_penalty).masked_fill(~ended, NEVER)[:, :beams]
    new = F.pad(state.finished[:, :1, read + 1 :].expand(-1, new_scores.shape[1], -1), (read + 1, 0))
    new[..., : read + 1] = tokens[:, :beams]
    state.finished_scores, chosen = torch.cat([state.finished_scores, new_scores], 1).topk(beams)
    state.finished = _of(torch.cat([state.finished, new], 1), chosen)

    state.scores, chosen = best.masked_fill(ended, NEVER).topk(beams)
    state.tokens = _of(tokens, chosen)
    start = torch.arange(images, device=row.device)[:, None] * rows
    return (start + row.gather(1, chosen)).flatten()


def _of(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Of int (B, any, T) those that int (B, K) names: (B, K, T)."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
