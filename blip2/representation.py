"""Stage 1: vision-language representation learning (Sec. 3.2, Fig. 2): ITC, ITM and ITG.

B images with B texts on this process, G over all processes, Q queries, T text tokens, P image tokens, V image
width, D Q-Former width, E contrastive width (256).
Losses follow BLIP (2201.12086) and ALBEF (2107.07651) as LAVIS computes them, without momentum encoder and
queue. This model knows nothing of processes: what has to be gathered is gathered by two functions that the
caller passes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2Config
from transformers import initialization as init
from transformers.activations import ACT2FN

from .base import Blip2Base, expect_features
from .qformer import KeyValues, causal_mask, multimodal_mask, text_mask
from .vision import ImageFeatures

Gather = Callable[[Tensor], Tensor]
SampleNegatives = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LABEL_SMOOTHING = 0.1  # of ITC (ALBEF) and ITG (LAVIS; the paper does not mention it)
MATCH_BATCH = 64  # image-text pairs scored at a time


def sample_hard_negatives(
    sim_i2t: Tensor, sim_t2i: Tensor, positive: Tensor, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a negative text for every image and a negative image for every text, the likelier the closer.

    Args:
        sim_i2t: float (B, G), image-text logits of the local images.
        sim_t2i: float (B, G), text-image logits of the local texts.
        positive: bool (B, G), pairs that belong together and are never drawn while another candidate exists.
        draws: float (2, B) in [0, 1), a number for every image and for every text that decides what is drawn;
            random by default.

    Returns:
        Indices of texts for the images, int (B,), and of images for the texts, int (B,). Paper: ALBEF Sec.
        3.2.
    """
    if draws is None:
        draws = torch.rand(2, len(positive), device=positive.device)
    below_one = draws * (1 - 2**-20)  # so that rounding cannot reach the sum of all
    indices = []
    for sim, draw in zip((sim_i2t, sim_t2i), below_one, strict=True):
        cumulated = sim.float().masked_fill(positive, -10000.0).softmax(dim=1).cumsum(dim=1)
        indices.append(torch.searchsorted(cumulated, cumulated[:, -1:] * draw[:, None], right=True)[:, 0])
    return indices[0], indices[1]


@dataclass
class Pairs:
    """What the passes without an image-text mixture make of B pairs.

    image_key_values: `QFormer.project_image`, shared by all passes; cache: keys and values of the queries,
    which ITG's text attends to; image_feats: float (B, Q, E) and text_feats: float (B, E), unit length.
    """

    image_key_values: list[KeyValues | None]
    cache: list[KeyValues]
    image_feats: Tensor
    text_feats: Tensor


class LMHead(nn.Module):
    """BERT's language model head; its output matrix is the word embeddings'."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """hidden: float (..., D) -> logits: float (..., vocabulary)."""
        return F.linear(self.layer_norm(self.activation(self.dense(hidden))), word_embeddings, self.bias)


def own_pairs(local: int, total: int, rank: int, device: torch.device) -> Tensor:
    """Bool (B, G): which of the gathered pairs is the local one; row i of rank r is row r * B + i of all."""
    own = rank * local + torch.arange(local, device=device)
    return own[:, None] == torch.arange(total, device=device)


def select(key_values: list[KeyValues | None], rows: Tensor) -> list[KeyValues | None]:
    """The given rows, int (N,), of every layer's keys and values."""
    return [kv and (kv[0][rows], kv[1][rows]) for kv in key_values]


class Blip2Representation(Blip2Base):
    """The stage-1 model; as a trained model it scores images against texts.

    Texts are BERT word pieces that start with [CLS]. `config.decoder_start_token_id` is [DEC], which ITG puts
    in its place (default: the last row of the embedding table).
    """

    _heads = ("vision_projection", "text_projection", "itm_head")

    def __init__(self, config: Blip2Config):
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "stage 1 reads text in the Q-Former: set qformer_config.use_qformer_text_input=True"
            )
        super().__init__(config)
        qformer, size = config.qformer_config, config.image_text_hidden_size
        self.vision_projection = nn.Linear(qformer.hidden_size, size)
        self.text_projection = nn.Linear(qformer.hidden_size, size)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.lm_head = LMHead(qformer)
        self.temperature = nn.Parameter(torch.tensor(0.07))  # learned and never clamped, unlike BLIP's
        self.pad_token_id = qformer.pad_token_id or 0
        start = getattr(config, "decoder_start_token_id", None)
        self.decoder_start_token_id = qformer.vocab_size - 1 if start is None else start
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Blip2Representation):
            init.constant_(module.temperature, 0.07)
        elif isinstance(module, LMHead):
            init.zeros_(module.bias)

    # --- features ---

    def image_feats(self, query_output: Tensor) -> Tensor:
        """query_output: float (B, Q, D) -> float32 (B, Q, E), unit length."""
        return F.normalize(self.vision_projection(query_output.to(self.dtype)).float(), dim=-1)

    def text_feats(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts, int (B, T), [CLS] first -> float32 (B, E), unit length, from the [CLS] position."""
        text = self.qformer(text_embeds=self.embeddings(input_ids), mask=text_mask(attention_mask))
        return F.normalize(self.text_projection(text.text_output[:, 0].to(self.dtype)).float(), dim=-1)

    # --- losses ---

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        image_ids: Tensor | None = None,
        gather: Gather = Tensor.detach,
        gather_with_grad: Gather | None = None,
        rank: int = 0,
        sample_negatives: SampleNegatives = sample_hard_negatives,
    ) -> dict[str, Tensor]:
        """The three losses of Sec. 3.2 on B matching pairs.

        Args:
            pixel_values: float (B, 3, S, S).
            input_ids: int (B, T), [CLS] first; equal T on all processes.
            attention_mask: int (B, T), 1 for real tokens.
            image_embeds: float (B, P, V), after `post_layernorm`, in place of pixel_values.
            image_ids: int (B,), the pictures' identities where several texts describe one (retrieval
                fine-tuning).
            gather: concatenates a tensor over processes, without gradient even for the local part.
            gather_with_grad: the same with gradients, for ITM's image_embeds; None: this process is alone.
            rank: which part of a gathered tensor is local.
            sample_negatives: draws ITM's negatives; see `sample_hard_negatives`.

        Returns:
            loss_itc, loss_itm, loss_itg: float scalars; the paper's loss is their sum.
        """
        if input_ids is None or attention_mask is None:
            raise ValueError("stage 1 needs input_ids and attention_mask beside the images")
        if image_embeds is None:
            if pixel_values is None:
                raise ValueError("stage 1 needs pixel_values, or image_embeds")
            image_embeds = self.image_embeds(pixel_values)
        if not len(image_embeds) == len(input_ids) == len(attention_mask):
            raise ValueError(f"{len(image_embeds)} images with {len(input_ids)} texts: pairs are needed")

        pairs = self.read_pairs(image_embeds, input_ids, attention_mask)
        if image_ids is not None:
            positive = image_ids[:, None] == gather(image_ids)[None, :]
        else:
            positive = own_pairs(len(image_embeds), len(gather(pairs.text_feats)), rank, image_embeds.device)
        loss_itc, sim_i2t, sim_t2i = self.itc(
            pairs.image_feats, pairs.text_feats, positive, gather, soft=image_ids is not None
        )
        with torch.no_grad():
            negative_text, negative_image = sample_negatives(sim_i2t, sim_t2i, positive)
        if gather_with_grad is None:
            negatives = select(pairs.image_key_values, negative_image)
        else:
            negatives = self.qformer.project_image(gather_with_grad(image_embeds)[negative_image])
        loss_itm, _ = self.itm(
            (pairs.image_key_values, negatives),
            (input_ids, gather(input_ids)[negative_text]),
            (attention_mask, gather(attention_mask)[negative_text]),
            has_negative=~positive.all(dim=1),
        )
        loss_itg = self.itg(pairs.cache, input_ids, attention_mask)
        return {"loss_itc": loss_itc, "loss_itm": loss_itm, "loss_itg": loss_itg}

    def read_pairs(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Pairs:
        """Passes (a) and (b): the queries read the images, the texts are read alone.

        Args:
            image_embeds: float (B, P, V), after `post_layernorm`.
            input_ids: int (B, T), [CLS] first.
            attention_mask: int (B, T).
        """
        image_key_values = self.qformer.project_image(image_embeds)
        queries = self.qformer(self.query_tokens, image=image_key_values)
        return Pairs(
            image_key_values,
            queries.cache,
            self.image_feats(queries.query_output),
            self.text_feats(input_ids, attention_mask),
        )

    def itc(
        self,
        image_feats: Tensor,
        text_feats: Tensor,
        positive: Tensor,
        gather: Gather = Tensor.detach,
        soft: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image-text contrastive loss; an image is as close to a text as the closest of its queries.

        Args:
            image_feats: float (B, Q, E), unit length.
            text_feats: float (B, E), unit length.
            positive: bool (B, G), the pairs that belong together.
            gather: see `forward`; only the local anchors receive gradients.
            soft: spread a row's target over all its positives, as retrieval fine-tuning does.

        Returns:
            The loss, and the logits image to text and text to image, float (B, G) each.
        """
        with torch.autocast(image_feats.device.type, enabled=False):  # bf16 would cost logits two digits
            images, texts = image_feats.float(), text_feats.float()
            sim_i2t = torch.einsum("bqe,ge->bgq", images, gather(texts)).amax(-1) / self.temperature
            sim_t2i = torch.einsum("be,gqe->bgq", texts, gather(images)).amax(-1) / self.temperature
        target = positive / positive.sum(1, keepdim=True) if soft else positive.int().argmax(1)
        losses = [F.cross_entropy(sim, target, label_smoothing=LABEL_SMOOTHING) for sim in (sim_i2t, sim_t2i)]
        return (losses[0] + losses[1]) / 2, sim_i2t, sim_t2i

    def itm(
        self,
        images: tuple[list[KeyValues | None], list[KeyValues | None]],
        input_ids: tuple[Tensor, Tensor],
        attention_mask: tuple[Tensor, Tensor],
        has_negative: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Image-text matching loss over B matching pairs, B with another image, B with another text.

        Args:
            images: own images and the texts' negative images, of `QFormer.project_image`.
            input_ids: own texts and the images' negative texts, int (B, T) each.
            attention_mask: likewise.
            has_negative: bool (B,), False where the whole batch shows one picture: those rows count as
                matches only.

        Returns:
            The loss, and the logits, float (3 B, 2), in the order above.
        """
        own_text, negative_text = input_ids
        own_mask, negative_mask = attention_mask
        key_values = [
            None
            if own is None or negative is None
            else (torch.cat([own[0], negative[0], own[0]]), torch.cat([own[1], negative[1], own[1]]))
            for own, negative in zip(*images, strict=True)
        ]
        logits = self._match(
            key_values,
            torch.cat([own_text, own_text, negative_text]),
            torch.cat([own_mask, own_mask, negative_mask]),
        )
        mismatch = torch.where(has_negative, 0, -100)
        labels = torch.cat([torch.ones_like(mismatch), mismatch, mismatch])
        return F.cross_entropy(logits, labels), logits

    def _match(self, images: list[KeyValues | None], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (N, 2) of N pairs; the head sees every query, their logits are averaged."""
        mask = multimodal_mask(self.query_tokens.shape[1], attention_mask)
        output = self.qformer(self.query_tokens, self.embeddings(input_ids), images, mask, queries_only=True)
        return self.itm_head(output.query_output.to(self.dtype)).mean(dim=1)

    def itg(self, cache: list[KeyValues], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Image-grounded generation loss: the text is predicted from the queries' cached keys and values.

        Args:
            cache: of the query pass, so that the queries are computed once for ITC and ITG.
            input_ids: int (B, T), [CLS] first.
            attention_mask: int (B, T).
        """
        labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
        logits = self.itg_logits(cache, input_ids, attention_mask)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=LABEL_SMOOTHING)

    def itg_logits(self, cache: list[KeyValues], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Next-token logits, float (B, T, vocabulary); [DEC] replaces the first token."""
        start = torch.full_like(input_ids[:, :1], self.decoder_start_token_id)
        text_embeds = self.embeddings(torch.cat([start, input_ids[:, 1:]], dim=1))
        mask = causal_mask(cache[0][0].shape[2], attention_mask)
        text = self.qformer(text_embeds=text_embeds, mask=mask, past=cache).text_output
        return self.lm_head(text.to(self.dtype), self.embeddings.word_embeddings.weight)

    # --- scores ---

    @torch.no_grad()
    def match_logits(self, image: ImageFeatures, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ITM logits of each of I images with each of N texts, float (I, N, 2); class 1 is a match.

        Args:
            image: of `encode_image`; its keys and values are projected once, not once a text.
            input_ids: int (N, T), [CLS] first.
            attention_mask: int (N, T).
        """
        image = expect_features(image)
        rows = []
        for row in range(len(image)):
            key_values = self.qformer.project_image(image[row].image_embeds)
            logits = []
            for ids, mask in zip(
                input_ids.split(MATCH_BATCH), attention_mask.split(MATCH_BATCH), strict=True
            ):
                shape = (len(ids), -1, -1, -1)
                images = [kv and (kv[0].expand(shape), kv[1].expand(shape)) for kv in key_values]
                logits.append(self._match(images, ids, mask))
            rows.append(torch.cat(logits))
        return torch.stack(rows)

    @torch.no_grad()
    def match_pairs(
        self, image: ImageFeatures, rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """ITM logits of N texts, each with one image, float (N, 2); class 1 is a match.

        Args:
            image: of `encode_image`; the keys and values of each are projected once.
            rows: int (N,), which image each text goes with.
            input_ids: int (N, T), [CLS] first.
            attention_mask: int (N, T).
        """
        key_values = self.qformer.project_image(expect_features(image).image_embeds)
        parts = zip(*(part.split(MATCH_BATCH) for part in (rows, input_ids, attention_mask)), strict=True)
        return torch.cat([self._match(select(key_values, own), ids, mask) for own, ids, mask in parts])

    @torch.no_grad()
    def score(
        self, image: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, head: str = "itm"
    ) -> Tensor:
        """How well each of I images fits each of N texts, float (I, N).

        Args:
            image: of `encode_image`.
            input_ids: int (N, T), [CLS] first.
            attention_mask: int (N, T).
            head: "itm": probability of a match; "itc": cosine similarity, in [-1, 1].
        """
        if head == "itm":
            return self.match_logits(image, input_ids, attention_mask).softmax(-1)[..., 1]
        if head != "itc":
            raise ValueError(f"head must be 'itm' or 'itc', not {head!r}")
        image = expect_features(image)
        assert image.query_output is not None
        image_feats, text_feats = (
            self.image_feats(image.query_output),
            self.text_feats(input_ids, attention_mask),
        )
        return torch.einsum("iqe,ne->inq", image_feats, text_feats).amax(-1)
