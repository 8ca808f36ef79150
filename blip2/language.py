"""The bridges to frozen language models (Fig. 3, Sec. 3.3): projected queries stand in front of the text.

B batch, Q queries, T text tokens, L LLM width. Decoder-only models (OPT) learn by language modeling,
encoder-decoder models (Flan-T5) by prefix language modeling: queries and prefix into the encoder, the rest
out of the decoder.

What a decoder says ends with a token of its own, and a chat model's questions stand in its own frame: see
`Manners`.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

MARK = "BLIP"  # stands for an answer while a chat template is looked at


@dataclass(frozen=True)
class Manners:
    """How a decoder-only language model ends a text, and how it wants to be asked.

    Attributes:
        end: what ends a caption, as text: the line break for OPT, as in the released models; a chat model's
            end of a turn; any other's end of a text.
        ends: token ids that end an answer; `end`'s is the first.
        is_chat: whether questions are framed by the tokenizer's chat template.
    """

    end: str
    ends: tuple[int, ...]
    is_chat: bool = False

    @classmethod
    def of(
        cls, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frame: str = "auto"
    ) -> "Manners":
        """Find out from the configuration, the tokenizer and its chat template.

        Args:
            language_model: decoder-only.
            tokenizer: its own.
            frame: "chat" for a model that was tuned on its chat template, "question" for one that was not;
                "auto" decides by whether the end of a turn is among the tokens that end the model's texts,
                for base models come with the template of their siblings.

        Raises:
            ValueError: there is no such token, or "chat" without a chat template.
        """
        config: Any = language_model.config
        if config.model_type == "opt":
            newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
            if len(newline) != 1:
                raise ValueError(f"the line break that ends its captions is {len(newline)} tokens, not one")
            return cls("\n", tuple(newline))
        found = [getattr(language_model.generation_config, "eos_token_id", None), config.eos_token_id]
        known: dict[int, None] = {}
        for ids in (*found, tokenizer.eos_token_id):
            known |= dict.fromkeys(ids if isinstance(ids, list) else [] if ids is None else [ids])
        turn = None if frame == "question" else end_of_turn(tokenizer)
        if turn is None and frame == "chat":
            raise ValueError("its tokenizer has no chat template that ends an answer with a token of its own")
        is_chat = turn is not None and (frame == "chat" or turn in known)
        end = turn if is_chat else tokenizer.eos_token_id
        end = next(iter(known), None) if end is None else end
        if end is None:
            raise ValueError("neither its configuration nor its tokenizer names a token that ends a text")
        return cls(tokenizer.decode([end]), (end, *(other for other in known if other != end)), is_chat)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in a tokenizer's chat template; None without a template or token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    ids = tokenizer(text.rpartition(MARK)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None


class Bridge:
    """Joins soft visual tokens and text for one frozen language model."""

    padding_side: str

    def __init__(self, language_model: PreTrainedModel):
        self.language_model = language_model

    def join(self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Put the queries in front of the embedded text.

        Args:
            language_inputs: float (B, Q, L).
            input_ids: int (B, T).
            attention_mask: int (B, T), 1 for real tokens.

        Returns:
            inputs_embeds: float (B, Q + T, L), and attention_mask: int (B, Q + T).
        """
        text_embeds = self.language_model.get_input_embeddings()(input_ids)
        queries_mask = attention_mask.new_ones(language_inputs.shape[:2])
        return {
            "inputs_embeds": torch.cat([language_inputs.to(text_embeds), text_embeds], dim=1),
            "attention_mask": torch.cat([queries_mask, attention_mask], dim=1),
        }

    def forward(
        self,
        language_inputs: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        **options: Any,
    ) -> ModelOutput:
        """Logits, and the loss where labels (int, -100 for no loss) are given."""
        raise NotImplementedError

    def prompt(self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """As `join`, with the last position of every row the one that the answer follows."""
        return self.join(language_inputs, input_ids, attention_mask)

    def positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """position_ids: int (B, Q + T), for language models that need to be told; else nothing."""
        return {}

    def generate(
        self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens only, int (B * num_return_sequences, new), by the language model's own `generate`."""
        raise NotImplementedError


class DecoderBridge(Bridge):
    """Decoder-only language models: [queries][</s> prompt], text padded on the left when generating.

    Not every tokenizer puts a token in front of a text as OPT's does; a caption without a prompt then follows
    the last query.
    """

    padding_side = "left"

    @functools.cached_property
    def takes_positions(self) -> bool:
        """Whether the language model is to be told positions; asked once, not for every token."""
        model = self.language_model
        return (
            model.config.model_type != "opt" and "position_ids" in inspect.signature(model.forward).parameters
        )

    def positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """Padding has no place: without it a row has the positions, and the answer, it has alone.

        OPT and models with linear biases read this from the mask by themselves.
        """
        if not self.takes_positions:
            return {}
        return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}

    def prompt(self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Padding stands before the queries; with OPT between them and the text, as in transformers' BLIP-2.

        A window of attention counts places, padding too, and without a text the last query has to be last.
        """
        inputs = self.join(language_inputs, input_ids, attention_mask)
        if self.language_model.config.model_type != "opt" and not attention_mask.all():
            order = inputs["attention_mask"].argsort(dim=1, stable=True)  # padding, queries, text
            embeds = inputs["inputs_embeds"]
            inputs["inputs_embeds"] = embeds.gather(1, order[..., None].expand_as(embeds))
            inputs["attention_mask"] = inputs["attention_mask"].gather(1, order)
        return inputs

    def forward(
        self,
        language_inputs: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        **options: Any,
    ) -> ModelOutput:
        """labels: int (B, T), aligned with input_ids; as in LAVIS the last query predicts the first."""
        inputs = self.join(language_inputs, input_ids, attention_mask)
        output = self.language_model(**inputs, **self.positions(inputs["attention_mask"]), **options)
        if labels is not None:
            text_logits = output.logits[:, -labels.shape[1] - 1 : -1].float()
            output["loss"] = F.cross_entropy(text_logits.flatten(0, 1), labels.flatten())
        return output

    def generate(
        self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens only; with embeddings as input the library returns no prompt."""
        return self.language_model.generate(
            **self.prompt(language_inputs, input_ids, attention_mask), **options
        )


class EncoderDecoderBridge(Bridge):
    """Encoder-decoder language models: [queries][prompt </s>] into the encoder, padded on the right."""

    padding_side = "right"

    def forward(
        self,
        language_inputs: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        **options: Any,
    ) -> ModelOutput:
        """labels: int (B, suffix length), what the decoder has to say, </s> included."""
        return self.language_model(
            **self.join(language_inputs, input_ids, attention_mask), labels=labels, **options
        )

    def generate(
        self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens only, without the decoder's start token."""
        inputs = self.join(language_inputs, input_ids, attention_mask)
        return self.language_model.generate(**inputs, **options)[:, 1:]
