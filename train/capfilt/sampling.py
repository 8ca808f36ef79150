"""Nucleus sampling whose chances are given from outside: an image's captions do not depend on its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn: nucleus sampling, as BLIP's CapFilt (arXiv 2201.12086, Sec. 4.2).

    Attributes:
        top_p: probability mass to draw from.
        max_new_tokens: length of a caption at most, tokens.
        prompt: what a caption goes on from; it is no part of the caption.
    """

    top_p: float
    max_new_tokens: int
    prompt: str


def chances(seed: int, keys: Sequence[str], captions: int, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (len(keys) * captions, steps), that depend on seed and key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        rows.append(generator.random((captions, steps), dtype=np.float32))
    return np.concatenate(rows)


class Sample(LogitsProcessor):
    """Nucleus sampling from given chances, so that an image's captions do not depend on its batch.

    At each step only the token drawn keeps a finite score; a sampling `generate` then has no other choice.

    Args:
        chances: float (rows, steps), uniform in [0, 1): one token of one row each.
        top_p: probability mass to draw from.
    """

    def __init__(self, chances: Tensor, top_p: float):
        self.chances = chances
        self.warp = TopPLogitsWarper(top_p)
        self.step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores: float (rows, vocabulary) -> the same, 0 at one token of each row and -inf elsewhere."""
        below = self.warp(input_ids, scores.float()).softmax(-1).cumsum(-1)
        drawn = self.chances[:, self.step, None].to(below) * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def options(drawn: np.ndarray, images: int, sampling: Sampling, device: torch.device) -> dict[str, Any]:
    """Settings for transformers' `generate` that leave every choice to `Sample`."""
    sample = Sample(torch.from_numpy(drawn).to(device), sampling.top_p)
    return {
        "do_sample": True,
        "num_beams": 1,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "num_return_sequences": len(drawn) // images,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": 1,
        "logits_processor": LogitsProcessorList([sample]),
    }
