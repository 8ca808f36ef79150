"""Stage 2 and everything after it: an image, its queries, and a frozen language model (Sec. 3.3, Fig. 3).

B images, Q queries, T text tokens, P image tokens, V image width, D Q-Former width, L LLM width, S image
size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Blip2Config
from transformers.modeling_outputs import ModelOutput

from .base import Blip2Base, expect_features
from .language import Bridge, DecoderBridge, EncoderDecoderBridge
from .qformer import multimodal_mask
from .vision import ImageFeatures


class Blip2(Blip2Base):
    """BLIP-2 with a language model: forward gives the stage-2 loss, generate answers.

    With `qformer_config.use_qformer_text_input` the question enters the Q-Former too, beside the queries, as
    in the paper's VQA fine-tuning (Sec. 4.3); then an image's queries exist only together with a question.

    Args:
        config: sizes.
        language_dtype: of the language model's parameters, where that is another than of the rest.
    """

    _heads = ("language_projection",)

    def __init__(self, config: Blip2Config, language_dtype: torch.dtype | None = None):
        super().__init__(config)
        text = config.text_config
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, text.hidden_size)
        family = AutoModelForCausalLM if config.use_decoder_only_language_model else AutoModelForSeq2SeqLM
        self.language_model = family.from_config(text)
        if language_dtype is not None:  # without numbers yet, where a checkpoint is read straight into it
            for parameter in self.language_model.parameters():
                parameter.data = parameter.data.to(language_dtype)
        self.language_frozen = False
        self.post_init()

    # --- the language model ---

    @property
    def is_decoder_only(self) -> bool:
        """True for OPT-like, False for Flan-T5-like language models."""
        return self.config.use_decoder_only_language_model

    @property
    def bridge(self) -> Bridge:
        """How queries and text reach the language model."""
        return (DecoderBridge if self.is_decoder_only else EncoderDecoderBridge)(self.language_model)

    @property
    def question_in_qformer(self) -> bool:
        """Whether the Q-Former reads the question beside the image."""
        return self.config.qformer_config.use_qformer_text_input

    def get_input_embeddings(self) -> nn.Module:
        """The language model's word embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def freeze_language(self) -> None:
        """Freeze the language model: no gradients, eval mode for good (Sec. 3.3)."""
        self.language_frozen = True
        if self.wears_adapter:  # which is in there, and all else is frozen
            return
        self.language_model.requires_grad_(False)
        self.language_model.eval()

    def train(self, mode: bool = True) -> "Blip2":
        """As `nn.Module.train`, except that frozen parts stay in eval mode; under an adapter, all but it."""
        if self.wears_adapter:
            super().train(False)
            for path, module in self.named_modules():
                if path.endswith(".lora_dropout"):
                    module.train(mode)
            self.training = mode
            return self
        super().train(mode)
        if self.language_frozen:
            self.language_model.eval()
        return self

    # --- image to language inputs ---

    def read_image(
        self,
        image_embeds: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> ImageFeatures:
        """Let the queries read the image, and project them for the language model.

        Args:
            image_embeds: float (B, P, V).
            qformer_input_ids: int (B, T), the question in the Q-Former's own word pieces, where it takes one.
            qformer_attention_mask: int (B, T).
        """
        if not self.question_in_qformer:
            query_output = self.qformer(self.query_tokens, image=image_embeds).query_output
        elif qformer_input_ids is None:
            return ImageFeatures(image_embeds)
        else:
            if qformer_attention_mask is None:
                qformer_attention_mask = torch.ones_like(qformer_input_ids)
            query_output = self.qformer(
                self.query_tokens,
                self.embeddings(qformer_input_ids),
                image_embeds,
                multimodal_mask(self.query_tokens.shape[1], qformer_attention_mask),
                queries_only=True,
            ).query_output
        return ImageFeatures(
            image_embeds, query_output, self.language_projection(query_output.to(image_embeds.dtype))
        )

    def language_inputs(
        self,
        pixel_values: Tensor | None,
        image: ImageFeatures | None,
        rows: int | None,
        question: dict[str, Tensor],
    ) -> Tensor:
        """Soft tokens (rows, Q, L) from pixels or features; one image serves any number of rows."""
        if image is None:
            if pixel_values is None:
                raise ValueError("an image is needed: pass pixel_values, or image=encode_image(pixel_values)")
            embeds = self.image_embeds(pixel_values)
            image = ImageFeatures(embeds) if self.question_in_qformer else self.read_image(embeds)
        image = expect_features(image, rows)
        if self.question_in_qformer:
            if "qformer_input_ids" not in question:
                raise ValueError("this model's Q-Former reads the question too: pass qformer_input_ids")
            texts = len(question["qformer_input_ids"])
            image_embeds = image.image_embeds.expand(max(texts, len(image)), -1, -1)
            image = self.read_image(image_embeds, **question)
        assert image.language_inputs is not None
        return image.language_inputs.expand(rows or len(image), -1, -1)

    def _text(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, rows: int, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The text without image tokens and its mask; one prompt serves any number of rows."""
        if input_ids is None:
            text = self.config.text_config
            start = getattr(text, "bos_token_id", None)  # T5 has none of its own
            device = self.language_projection.weight.device
            if start is None and self.is_decoder_only:  # nothing stands before a text
                input_ids = torch.empty((rows, 0), dtype=torch.long, device=device)
            else:
                start = text.eos_token_id if start is None else start
                input_ids = torch.full((rows, 1), start, device=device)
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be whole numbers (rows, tokens), not {tuple(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if check:
            skip = self._count_image_tokens(input_ids)
            input_ids, attention_mask = input_ids[:, skip:], attention_mask[:, skip:]
        if len(input_ids) == 1:
            input_ids, attention_mask = input_ids.expand(rows, -1), attention_mask.expand(rows, -1)
        return input_ids, attention_mask

    def _count_image_tokens(self, input_ids: Tensor) -> int:
        """How many image tokens lead every row: 0 or Q.

        transformers accepts any other count and mixes up the images of a batch.
        """
        token, expected = self.config.image_token_index, self.query_tokens.shape[1]
        if token is None:
            return 0
        counts = (input_ids == token).sum(1)
        if not counts.any():
            return 0
        if (counts != expected).any() or (input_ids[:, :expected] != token).any():
            raise ValueError(
                f"rows with {counts.tolist()} image tokens (id {token}): give none, or {expected} in front"
            )
        return expected

    # --- loss and generation ---

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        image: ImageFeatures | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        check_image_tokens: bool = True,
        **options: Any,
    ) -> ModelOutput:
        """Logits of the language model, and the stage-2 loss where labels are given.

        Args:
            pixel_values: float (B, 3, S, S); or `image`, of `encode_image`.
            input_ids: int (B, T). Image tokens in front, as transformers wants them, are accepted and not
                needed.
            attention_mask: int (B, T).
            labels: int, -100 for no loss. Decoder-only: (B, T), aligned with input_ids. Encoder-decoder: what
                the decoder has to say, (B, any).
            image: features of B images or of one.
            qformer_input_ids: see `read_image`.
            qformer_attention_mask: see `read_image`.
            check_image_tokens: False saves a device synchronization where the caller knows there are none.
            options: for the language model, such as decoder_input_ids or use_cache.

        Returns:
            The language model's output: loss, logits. A decoder's logits cover queries and text, (B, Q + T,
            vocab).
        """
        if input_ids is None:
            raise ValueError("forward needs input_ids; to caption an image use generate")
        question = _question(qformer_input_ids, qformer_attention_mask)
        rows = max(
            len(input_ids),
            len(image) if image is not None else len(pixel_values if pixel_values is not None else ()),
        )
        text = self._text(input_ids, attention_mask, rows, check_image_tokens)
        language_inputs = self.language_inputs(pixel_values, image, rows, question)
        if labels is not None and self.is_decoder_only:
            labels = labels[:, labels.shape[1] - text[0].shape[1] :]
        return self.bridge.forward(language_inputs, *text, labels, **options)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image: ImageFeatures | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue a prompt about an image; without a prompt, caption it.

        Args:
            pixel_values: float (B, 3, S, S); or `image`, of `encode_image`, which saves encoding it again.
            input_ids: int (B or 1, T), the prompt as `Processor.text` makes it.
            attention_mask: int (B or 1, T).
            image: features of B images or of one.
            qformer_input_ids: see `read_image`.
            qformer_attention_mask: see `read_image`.
            options: of transformers' `generate`: max_new_tokens, num_beams, do_sample, ...

        Returns:
            New tokens only, int (B * num_return_sequences, new tokens), for both families.
        """
        question = _question(qformer_input_ids, qformer_attention_mask)
        images = len(image) if image is not None else len(pixel_values if pixel_values is not None else ())
        rows = max(images, 0 if input_ids is None else len(input_ids))
        text = self._text(input_ids, attention_mask, rows)
        return self.bridge.generate(
            self.language_inputs(pixel_values, image, rows, question), *text, **options
        )


def _question(input_ids: Tensor | None, attention_mask: Tensor | None) -> dict[str, Tensor]:
    given = {"qformer_input_ids": input_ids, "qformer_attention_mask": attention_mask}
    return {name: value for name, value in given.items() if value is not None}
