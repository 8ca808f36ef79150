"""Prompts and what is to be said after them, as tensors: only what is said counts in the loss.

Legend: B texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2.processing import Processor


def prompted(
    processor: Processor, prompts: Sequence[str], said: Sequence[str], max_length: int = 32
) -> dict[str, Tensor]:
    """Tokens of captions or answers after their prompts, for the language model's family.

    Decoder: [prompt, said, end], padded on the right; the labels of the prompt, its </s> included, are -100.
    Without a prompt the last query predicts </s>, as in stage 2.
    Encoder-decoder: the prompt into the encoder, what is said, and </s>, out of the decoder. No prompt is cut
    (LAVIS counts it among the 32 tokens of a caption, and would cut the answer to a long question).

    Args:
        processor: of a model with a language model.
        prompts: already framed.
        said: captions or answers, as many.
        max_length: tokens of what is said, its end included; longer ones are cut.

    Returns:
        input_ids and attention_mask: int (B, T); labels: int (B, T or any), -100 where no loss is taken.
    """
    tokenizer = processor.tokenizer
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if processor.family == "t5":
        answers = tokenizer(list(said), truncation=True, max_length=max_length)["input_ids"]
        return _padded(asked, answers, tokenizer.pad_token_id)
    rows, labels = [], []
    for prompt, start, text in zip(prompts, asked, said, strict=True):
        between = "" if not prompt or prompt[-1].isspace() else " "
        ids = tokenizer(f"{prompt}{between}{text}{processor.end}")["input_ids"]
        # Where a prompt's last token differs once something follows, it counts as said.
        pairs = zip(ids, start, strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) if prompt else 0
        rows.append(ids[: length + max_length])
        labels.append([-100] * length + rows[-1][length:])
    return _padded(rows, labels, tokenizer.pad_token_id)


def _padded(rows: list[list[int]], labels: list[list[int]], pad: int) -> dict[str, Tensor]:
    def stack(lists: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True, padding_value=value)

    return {
        "input_ids": stack(rows, pad),
        "attention_mask": stack([[1] * len(row) for row in rows], 0),
        "labels": stack(labels, -100),
    }


def asked(processor: Processor, questions: Sequence[str], prompt: str) -> tuple[list[str], dict[str, Tensor]]:
    """Questions as prompts, and as the Q-Former reads them where it does.

    Args:
        processor: of the model.
        questions: bare.
        prompt: with {} where the question goes. A model tuned to chat keeps its own frame.

    Returns:
        The prompts; qformer_input_ids and qformer_attention_mask, int (B, T), or nothing.
    """
    if processor.has_chat_frame:
        prompts = [processor.prompt(question) for question in questions]
    else:
        prompts = [prompt.format(question) for question in questions]
    return prompts, processor.question(list(questions))
