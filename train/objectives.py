"""What each stage trains: a model, its frozen parts, and the losses of a batch, whole or in parts.

`fit` minimizes the mean over processes of the sum over a batch's parts of every value named `loss*`. A part's
losses are weighted so that this is the loss of the global batch: accumulating gradients over parts changes
what is held in memory at a time, and nothing that is learned.

Legend: B pairs of this process, split into parts; W processes, G = W * B pairs of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model import Blip2
from blip2.representation import Blip2Representation, own_pairs, sample_hard_negatives, select
from blip2.vision import ImageFeatures
from train import distributed
from train.loader import Batch

ITC, ITM, ITG = "itc", "itm", "itg"


class Objective(nn.Module):
    """A model and its losses.

    Args:
        model: what is trained, and what is saved in the end.
        micro_batch_size: pairs that go through the model at a time; None: all of this process's.
        train_vision: whether the image encoder learns too, as in fine-tuning; else it is frozen.
    """

    def __init__(
        self,
        model: Blip2Representation | Blip2,
        micro_batch_size: int | None = None,
        train_vision: bool = False,
    ):
        super().__init__()
        self.model, self.micro_batch_size = model, micro_batch_size
        if not train_vision:
            model.freeze_vision()

    def split(self, batch: Batch, step: int, seed: int = 0) -> list[Batch]:
        """The parts of a training batch, each to be handed to `forward`; collective over processes.

        Args:
            batch: of B rows, a multiple of `micro_batch_size`.
            step: of the optimizer; decides, with `seed`, what is drawn for the whole batch.
            seed: of the run.
        """
        raise NotImplementedError

    def _with_hidden(self, batch: Batch) -> Batch:
        """The batch with `image_hidden`, a frozen encoder's output, in place of pixels, and no gradient."""
        if "image_hidden" in batch or not self.model.vision_model.frozen:
            return batch
        rest = {name: value for name, value in batch.items() if name != "pixel_values"}
        with torch.no_grad():
            return {**rest, "image_hidden": self.model.vision_model.encode(batch["pixel_values"])}

    def _hidden(self, batch: Batch) -> Tensor:
        """The encoder's output; with gradients where it learns."""
        if "image_hidden" in batch:
            return batch["image_hidden"]
        return self.model.vision_model.encode(batch["pixel_values"])

    def _embeds(self, hidden: Tensor) -> Tensor:
        """image_embeds (B, P, V): `post_layernorm` is trained, so it is not a part of the frozen encoder."""
        norm = self.model.vision_model.post_layernorm
        return norm(hidden.to(norm.weight.dtype))

    def _parts(self, batch: Batch, **shared: Any) -> list[Batch]:
        """Slices of micro_batch_size rows; `shared` goes into each."""
        rows = len(batch["input_ids"])
        size = self.micro_batch_size or rows
        if rows % size:
            raise ValueError(f"micro_batch_size {size} does not divide the {rows} pairs of a process")
        return [
            {name: value[first : first + size] for name, value in batch.items()} | shared
            for first in range(0, rows, size)
        ]


class Stage1(Objective):
    """Vision-language representation learning: ITC + ITM + ITG on the global batch; the encoder is frozen.

    A loss that is not among `objectives` loses its prefix, and `fit` leaves it out of the sum.

    In parts, ITC's gradient is cached (GradCache, arXiv 2101.06983): a first pass without gradients takes the
    features of all parts, ITC is differentiated with respect to them, and each part then carries its share of
    that gradient on through its own features, which it computes again with the same dropout. Negatives of ITM
    come from the whole global batch in any case. The encoder's output is gathered without gradient and
    normalized where it is used: as the encoder is frozen, that gives `post_layernorm` the gradient that a
    differentiable gather would, and moves half-precision numbers.

    Where the encoder learns (fine-tuning), the gradient goes through ITM's negative pictures, too: those of
    other processes are gathered with gradient, as in LAVIS; in parts, negative pictures are encoded again.
    """

    model: Blip2Representation

    def __init__(
        self,
        model: Blip2Representation,
        objectives: Sequence[str] = (ITC, ITM, ITG),
        micro_batch_size: int | None = None,
        train_vision: bool = False,
    ):
        super().__init__(model, micro_batch_size, train_vision)
        self.objectives = tuple(objectives)

    def split(self, batch: Batch, step: int, seed: int = 0) -> list[Batch]:
        """See `Objective.split`."""
        batch = self._with_hidden(batch)
        mask = batch["attention_mask"]
        # Drawn for every row of the global batch, so that it does not matter which process a row is on.
        generator = torch.Generator(mask.device).manual_seed(seed * 1_000_003 + step)
        draws = torch.rand(2, len(mask) * distributed.world_size(), generator=generator, device=mask.device)
        first = distributed.rank() * len(mask)
        weights = _token_weights(mask[:, 1:].sum(1))
        parts = self._parts(batch | {"draws": draws[:, first : first + len(mask)].T, "tokens": weights})
        if len(parts) > 1:
            self._contrast(batch, parts)
        for part in parts:
            part["itg_weight"] = part.pop("tokens").sum()
        return parts

    def _contrast(self, batch: Batch, parts: list[Batch]) -> None:
        """The first pass: give every part its share of ITC's value and gradient, and its negatives."""
        image_feats, text_feats = [], []
        for part in parts:
            part["dropout_seed"] = int(torch.randint(2**62, ()))
            torch.manual_seed(part["dropout_seed"])
            with torch.no_grad():
                pairs = self.model.read_pairs(
                    self._embeds(self._hidden(part)), part["input_ids"], part["attention_mask"]
                )
            image_feats.append(pairs.image_feats)
            text_feats.append(pairs.text_feats)
        with torch.enable_grad():
            images, texts = (torch.cat(feats).requires_grad_() for feats in (image_feats, text_feats))
            loss, positive, similarities = self._itc(images, texts, batch.get("image_ids"))
            wanted = (images, texts, self.model.temperature)
            of_images, of_texts, of_temperature = torch.autograd.grad(loss, wanted)
        negatives = sample_hard_negatives(*similarities, positive, torch.cat([p["draws"] for p in parts]).T)
        accuracy = _itc_accuracy(similarities, positive)
        shares = [of_images, of_texts, *negatives]
        pool = self._pool(batch, "image_hidden" if "image_hidden" in batch else "pixel_values")
        size = len(parts[0]["input_ids"])
        for number, part in enumerate(parts):
            own = slice(number * size, (number + 1) * size)
            part["cached"] = (
                [share[own] for share in shares], of_temperature / len(parts), loss.detach(), accuracy, pool
            )  # fmt: skip
            part["has_negative"], part["share"] = ~positive[own].all(dim=1), 1 / len(parts)

    def _itc(
        self, image_feats: Tensor, text_feats: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The loss, which pairs are positive, and the logits, on all features of this process.

        Rows with the same one of `ids`, int (B,), show the same picture: all are positive.
        """
        local, world = len(image_feats), distributed.world_size()
        if ids is None:
            positive = own_pairs(local, local * world, distributed.rank(), image_feats.device)
        else:
            positive = ids[:, None] == distributed.gather(ids)[None, :]
        loss, *similarities = self.model.itc(
            image_feats, text_feats, positive, distributed.gather, soft=ids is not None
        )
        return loss, positive, (similarities[0], similarities[1])

    def _pool(self, batch: Batch, *pictures: str) -> dict[str, Tensor]:
        """What negatives are taken from: the global batch's texts, and what `pictures` names."""
        names = (*pictures, "input_ids", "attention_mask")
        return {name: distributed.gather(batch[name]) for name in names}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and accuracies of a batch, or of a part that `split` returned.

        Args:
            batch: pixel_values or image_hidden, and input_ids and attention_mask of `representation_tokens`.
        """
        batch = self._with_hidden(batch)
        if "dropout_seed" in batch:
            torch.manual_seed(batch["dropout_seed"])
        ids, mask, share = batch["input_ids"], batch["attention_mask"], batch.get("share", 1.0)
        embeds = self._embeds(self._hidden(batch))
        pairs = self.model.read_pairs(embeds, ids, mask)
        if "cached" in batch:
            (of_images, of_texts, text, image), of_temperature, value, accuracy, pool = batch["cached"]
            carried = (pairs.image_feats * of_images).sum() + (pairs.text_feats * of_texts).sum()
            carried = carried + self.model.temperature * of_temperature
            loss_itc = carried - carried.detach() + value * share
            has_negative = batch["has_negative"]
        else:
            loss_itc, positive, similarities = self._itc(
                pairs.image_feats, pairs.text_feats, batch.get("image_ids")
            )
            draws = batch["draws"].T if "draws" in batch else None
            with torch.no_grad():
                text, image = sample_hard_negatives(*similarities, positive, draws)
            accuracy, has_negative = _itc_accuracy(similarities, positive), ~positive.all(dim=1)
            pool = self._pool(batch, *(name for name in ("image_hidden",) if name in batch))
        if not distributed.is_distributed() and "cached" not in batch:
            negatives = select(pairs.image_key_values, image)  # all images are here, read already
        else:
            if "image_hidden" in pool:
                negative = self._embeds(pool["image_hidden"][image])
            elif "pixel_values" in pool:
                negative = self._embeds(self._hidden({"pixel_values": pool["pixel_values"][image]}))
            else:
                negative = distributed.gather_with_grad(embeds)[image]
            negatives = self.model.qformer.project_image(negative)
        loss_itm, logits = self.model.itm(
            (pairs.image_key_values, negatives),
            (ids, pool["input_ids"][text]),
            (mask, pool["attention_mask"][text]),
            has_negative=has_negative,
        )
        matches = torch.arange(len(logits), device=logits.device) < len(ids)
        itm_accuracy = ((logits[:, 1] > logits[:, 0]) == matches).float().mean()
        loss_itg = self.model.itg(pairs.cache, ids, mask)
        if "itg_weight" in batch:
            loss_itg = loss_itg * batch["itg_weight"]
        losses = {ITC: loss_itc, ITM: loss_itm * share, ITG: loss_itg}
        named = {f"loss_{n}" if n in self.objectives else n: value for n, value in losses.items()}
        return named | {
            "itc_accuracy": accuracy * share,
            "itm_accuracy": itm_accuracy * share,
            "temperature": self.model.temperature * share,
        }


def _itc_accuracy(similarities: tuple[Tensor, Tensor], positive: Tensor) -> Tensor:
    """How often a text or image of the own pair is the closest of the global batch."""
    found = [positive.gather(1, sim.argmax(1, keepdim=True)) for sim in similarities]
    return torch.cat(found).float().mean()


def _token_weights(tokens: Tensor) -> Tensor:
    """float (B,): each row's share of the tokens that a process sees on average.

    A mean over a part's tokens, times the sum of its rows' weights, is that part's share of the mean over the
    tokens of the global batch, once processes are averaged over.
    """
    total = distributed.all_reduce_(tokens.sum().float())
    return tokens * (distributed.world_size() / total)


class Retrieval(Stage1):
    """Retrieval fine-tuning (Sec. 4.4): stage 1's losses where several captions describe one picture.

    A batch names the picture of each row in `images`. In ITC all pairs of a picture share its target, and ITM
    never takes one of them for a mismatch [C].
    """

    def split(self, batch: Batch, step: int, seed: int = 0) -> list[Batch]:
        """See `Objective.split`."""
        return super().split(_with_ids(batch), step, seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See `Stage1.forward`."""
        return super().forward(_with_ids(batch))


def _with_ids(batch: Batch) -> Batch:
    """The batch with `image_ids`, int (B,), made of the pictures' names: the same on every process."""
    if "image_ids" in batch:
        return batch
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in batch["images"]]
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return {**batch, "image_ids": torch.tensor(numbers, device=batch["input_ids"].device)}


class Stage2(Objective):
    """Vision-to-language generative learning: the frozen LLM's loss on text after the queries.

    Captions in pre-training; captions or answers after a prompt in fine-tuning, where the labels of the
    prompt are -100. A Q-Former that reads the question gets it beside the queries.
    """

    model: Blip2

    def __init__(self, model: Blip2, micro_batch_size: int | None = None, train_vision: bool = False):
        super().__init__(model, micro_batch_size, train_vision)
        model.freeze_language()

    def split(self, batch: Batch, step: int, seed: int = 0) -> list[Batch]:
        """See `Objective.split`."""
        batch = self._with_hidden(batch)
        weights = _token_weights((batch["labels"] != -100).sum(1))
        parts = self._parts(batch | {"tokens": weights})
        for part in parts:
            part["weight"] = part.pop("tokens").sum()
        return parts

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch, or of a part that `split` returned.

        Args:
            batch: pixel_values or image_hidden, and the tokens of `decoder_tokens` or `prefix_tokens`.
        """
        batch = self._with_hidden(batch)
        embeds = self._embeds(self._hidden(batch))
        question = {name: batch[name] for name in batch if name.startswith("qformer_")}
        output = self.model(
            image=ImageFeatures(embeds) if question else self.model.read_image(embeds),
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            check_image_tokens=False,
            use_cache=False,  # a cache would be filled twice where activations are recomputed
            **question,
        )
        return {"loss_lm": output.loss * batch["weight"] if "weight" in batch else output.loss}
