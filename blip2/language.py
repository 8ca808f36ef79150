"""The bridges to frozen language models (Fig. 3, Sec. 3.3): projected queries stand in front of the text.

B batch, Q queries, T text tokens, L LLM width. Decoder-only models (OPT) learn by language modeling,
encoder-decoder models (Flan-T5) by prefix language modeling: queries and prefix into the encoder, the rest
out of the decoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput


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

    def generate(
        self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens only, int (B * num_return_sequences, new), by the language model's own `generate`."""
        raise NotImplementedError


class DecoderBridge(Bridge):
    """Decoder-only language models: [queries][</s> prompt], text padded on the left when generating."""

    padding_side = "left"

    def forward(
        self,
        language_inputs: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        **options: Any,
    ) -> ModelOutput:
        """labels: int (B, T), aligned with input_ids; as in LAVIS the last query predicts the first."""
        output = self.language_model(**self.join(language_inputs, input_ids, attention_mask), **options)
        if labels is not None:
            text_logits = output.logits[:, -labels.shape[1] - 1 : -1].float()
            output["loss"] = F.cross_entropy(text_logits.flatten(0, 1), labels.flatten())
        return output

    def generate(
        self, language_inputs: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens only; with embeddings as input the library returns no prompt."""
        return self.language_model.generate(
            **self.join(language_inputs, input_ids, attention_mask), **options
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
