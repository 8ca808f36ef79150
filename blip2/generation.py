"""Decoding: a loop that streams, stops and caches; the settings are `Generation`.

B rows, Q queries, T text tokens. Greedy and nucleus decoding run in the loop below, because a caller can stop
it after any token and hand its key-value cache to the next turn; beam search is transformers' own.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .model import Blip2
from .processing import Processor
from .settings import Generation
from .vision import ImageFeatures

DESCRIPTION = "a photo of"  # what a description goes on from
MAX_DESCRIPTIONS = 20  # captions in one: more are the same again, and fill the context


class StopSignal(Protocol):
    """What asks an answer to end: a `threading.Event`, or what else can tell."""

    def is_set(self) -> bool:
        """Whether to end."""


@dataclass
class TextCache:
    """Keys and values of one conversation: the queries, then `ids`, the text tokens read so far."""

    ids: list[int] = field(default_factory=list)
    key_values: DynamicCache = field(default_factory=DynamicCache)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        layers: Any = self.key_values.layers
        held = [layer for layer in layers if layer.is_initialized]
        return sum(part.nbytes for layer in held for part in (layer.keys, layer.values))

    def keep(self, ids: list[int], num_queries: int) -> int:
        """Forget all but the beginning shared with `ids`; returns how many positions it still holds."""
        if not self.ids or not ids:  # without text the last query is read for its logits, so all of them are
            self.ids, self.key_values = [], DynamicCache()
            return 0
        shared = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):  # the last is always read, for its logits
            if old != new:
                break
            shared += 1
        if len(self.ids) > shared:
            self.key_values.crop(shared - len(self.ids))
            self.ids = self.ids[:shared]
        return num_queries + shared


class Stop(StoppingCriteria):
    """Ends a beam search after the current token once the event is set."""

    def __init__(self, event: StopSignal):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """All rows stop together."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@torch.no_grad()
def decode(
    model: Blip2,
    image: ImageFeatures,
    text: dict[str, Tensor],
    generation: Generation,
    cache: TextCache | None = None,
    avoid: list[list[int]] | None = None,
) -> Iterator[Tensor]:
    """Greedy or nucleus decoding, a token a time, for one image or for as many as there are prompts.

    Args:
        model: stage 2.
        image: features of one image or of B.
        text: of `Processor.text` (and `Processor.question`), B rows.
        generation: settings; `num_captions` repeats every row that often.
        cache: of the turns before, for one row and a decoder-only model; what it shares with the prompt is
            not read again, and it holds the new turn afterwards, also when the iterator is closed early.
        avoid: tokens, or sequences of them, that are never said; see `Processor.spellings`.

    Yields:
        int (B * num_captions,), the next token of every row; rows that have ended give padding.
    """
    copies = generation.num_captions
    question = {name: value for name, value in text.items() if name.startswith("qformer_")}
    ids, mask = (text[name].repeat_interleave(copies, 0) for name in ("input_ids", "attention_mask"))
    soft = model.language_inputs(None, image, len(text["input_ids"]), question).repeat_interleave(copies, 0)
    language, config = model.language_model, model.language_model.generation_config
    ends = torch.tensor(config.eos_token_id, device=ids.device).flatten()
    pad = config.pad_token_id if config.pad_token_id is not None else int(ends[0])
    processors = _processors(generation, ends.tolist(), ids.device, avoid)
    generator = torch.Generator(ids.device)
    generator.seed() if generation.seed is None else generator.manual_seed(generation.seed)

    state: dict[str, Any]
    bridge = model.bridge  # once: what it knows of the language model holds for every token
    if model.is_decoder_only:
        cache = cache if cache is not None and len(ids) == 1 else TextCache()
        inputs = bridge.prompt(soft, ids, mask)
        kept = cache.keep(ids[0].tolist(), soft.shape[1])
        embeds = inputs["inputs_embeds"][:, kept:]
        state = {"inputs_embeds": embeds, "past_key_values": cache.key_values, "logits_to_keep": 1}
        state |= _from(kept, bridge.positions(inputs["attention_mask"]))
    else:
        inputs = bridge.join(soft, ids, mask)
        start = torch.full_like(ids[:, :1], config.decoder_start_token_id)
        state = {"encoder_outputs": language.get_encoder()(**inputs), "decoder_input_ids": start}
        state["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache = TextCache()
    mask = inputs["attention_mask"]

    said: Any = ids[:, :0]
    unread = ids[0, len(cache.ids) :].tolist()
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(generation.max_new_tokens):
        output = language(**state, attention_mask=mask, use_cache=True, return_dict=True)
        cache.ids += unread
        scores = processors(said, output.logits[:, -1].float())
        if generation.method == "nucleus":
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = scores.argmax(-1)
        token = torch.where(finished, pad, token)
        finished = finished | torch.isin(token, ends)
        said = torch.cat([said, token[:, None]], dim=1)
        yield token
        if finished.all():
            return
        if model.is_decoder_only:
            state = {"input_ids": token[:, None], "past_key_values": cache.key_values}
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            state |= _from(-1, bridge.positions(mask))
            unread = [int(token[0])]
        else:
            state["decoder_input_ids"] = token[:, None]


def _from(start: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor (B, T) from position `start` on."""
    return {name: part[:, start:] for name, part in parts.items()}


def _processors(
    generation: Generation, ends: list[int], device: Any, avoid: list[list[int]] | None = None
) -> LogitsProcessorList:
    """What changes the scores before a token is chosen, in the order transformers applies it."""
    processors = LogitsProcessorList()
    if generation.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
    if avoid:
        processors.append(NoBadWordsLogitsProcessor(avoid, ends))
    if generation.min_new_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(0, generation.min_new_tokens, ends, device=device)
        )
    if generation.method == "nucleus":
        processors.append(TemperatureLogitsWarper(float(generation.temperature)))
        processors.append(TopPLogitsWarper(generation.top_p))
    return processors


def generate(
    model: Blip2,
    processor: Processor,
    image: ImageFeatures,
    prompts: str | list[str],
    generation: Generation,
    stop: StopSignal | None = None,
    questions: list[str] | None = None,
) -> list[list[str]]:
    """Answer prompts about one image, or one prompt (or a prompt each) about many.

    Args:
        model: stage 2.
        processor: its processor.
        image: features of one image or of B.
        prompts: already framed, see `Processor.prompt`.
        generation: settings.
        stop: ends decoding within a token once set; what was said until then is returned.
        questions: what a Q-Former that reads questions gets; by default the prompts.

    Returns:
        For every row, `num_captions` texts.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) == 1:
        prompts = prompts * len(image)
    stop = stop or threading.Event()
    device = image.image_embeds.device
    tokens = {**processor.text(prompts), **processor.question(questions or prompts)}
    tokens = {name: value.to(device) for name, value in tokens.items()}
    avoid = processor.spellings(generation.avoid) or None
    if generation.method == "beam":
        criteria = StoppingCriteriaList([Stop(stop)])
        options = generation.options() | {"bad_words_ids": avoid}
        new = model.generate(image=image, **tokens, **options, stopping_criteria=criteria)
    else:
        steps = []
        for token in decode(model, image, tokens, generation, avoid=avoid):
            steps.append(token)
            if stop.is_set():
                break
        new = torch.stack(steps, dim=1)
    texts = processor.decode(new)
    return [
        texts[start : start + generation.num_captions]
        for start in range(0, len(texts), generation.num_captions)
    ]


def num_descriptions(model: Blip2, wanted: int | None = None) -> int:
    """Of how many captions `describe` is to make a description: as wanted, or else as the checkpoint says."""
    return int(getattr(model.config, "num_descriptions", 0)) if wanted is None else wanted


def describe(
    model: Blip2,
    processor: Processor,
    image: ImageFeatures,
    captions: int = 1,
    stop: StopSignal | None = None,
) -> list[str]:
    """What the model says of each image by itself, for "describe, then answer".

    One greedy caption, and then sampled ones, as in PNP-VQA (arXiv 2210.08773, Sec. 3.2), each text once, and
    only what fits half of the model's context.

    Args:
        model: stage 2.
        processor: its processor.
        image: features of B images.
        captions: how many; 0 for none, and empty descriptions.
        stop: cuts it short.

    Raises:
        ValueError: fewer than 0 captions, or more than MAX_DESCRIPTIONS.
    """
    if not 0 <= captions <= MAX_DESCRIPTIONS:
        raise ValueError(f"a description takes 0 to {MAX_DESCRIPTIONS} captions, not {captions}")
    if captions == 0:
        return [""] * len(image)
    greedy = Generation(max_new_tokens=30)
    said = generate(model, processor, image, processor.prompt(DESCRIPTION, "caption"), greedy, stop)
    if captions > 1 and not (stop and stop.is_set()):
        sampling = greedy.with_(method="nucleus", temperature=0.7, seed=0, num_captions=captions - 1)
        more = generate(model, processor, image, "", sampling, stop)
        said = [first + others for first, others in zip(said, more, strict=True)]
    return [_joined(texts, processor) for texts in said]


def _joined(texts: list[str], processor: Processor) -> str:
    """Different texts as sentences, as many as fit half of the context: the rest is the conversation's."""
    room = (processor.context or 1 << 30) // 2
    joined = ""
    for text in dict.fromkeys(text.strip().rstrip(".") for text in texts):
        longer = f"{joined}. {text}" if joined else text
        if len(processor.tokenizer(longer)["input_ids"]) <= room:
            joined = longer
    return joined
