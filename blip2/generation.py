"""Decoding: a loop that streams, stops and caches; the settings are `Generation`.

B rows, Q queries, T text tokens. A caller can stop greedy and nucleus decoding after any token and hand its
key-value cache to the next turn; beams are in `blip2.beams`.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutput

from .beams import beam_search
from .cache import KeyValues, LibraryKeyValues
from .decoders import Decoder, LibraryDecoder, OPTDecoder, T5Decoder, encode
from .model import Blip2
from .processing import Processor
from .settings import Generation
from .threads import one_thread, short
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
    key_values: KeyValues | LibraryKeyValues | None = None

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.key_values.num_bytes if self.key_values else 0

    def keep(self, ids: list[int], num_queries: int) -> int:
        """Forget all but the beginning shared with `ids`; returns how many positions it still holds."""
        if self.key_values is None or not self.ids or not ids:
            # without text the last query is read for its logits, so all of them are
            self.ids, self.key_values = [], None
            return 0
        shared = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):  # the last is always read, for its logits
            if old != new:
                break
            shared += 1
        self.ids = self.ids[:shared]
        self.key_values.crop(num_queries + shared)
        return num_queries + shared


@torch.no_grad()
def decode(
    model: Blip2,
    image: ImageFeatures,
    text: dict[str, Tensor],
    generation: Generation,
    cache: TextCache | None = None,
    avoid: list[list[int]] | None = None,
    given_up: Tensor | None = None,
    alone: bool = False,
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
        given_up: bool (B * num_captions,), which the caller may set between tokens: rows that end there.
        alone: with a seed, every image is told what it would be told alone, whatever the batch holds.

    Yields:
        int (B * num_captions,), the next token of every row; rows that have ended give padding.
    """
    copies = generation.num_captions
    cache = cache if cache is not None and len(text["input_ids"]) == copies == 1 else TextCache()
    decoder = read_prompt(model, image, text, generation, cache)
    if copies > 1:
        decoder.repeat(copies)
    ends, pad = ending(model, decoder.logits.device)
    processors = _processors(generation, ends, avoid)
    try:
        yield from _tokens(decoder, generation, ends, pad, processors, cache, given_up, alone)
    finally:
        decoder.close()


def _tokens(
    decoder: Decoder,
    generation: Generation,
    ends: Tensor,
    pad: int,
    processors: LogitsProcessorList,
    cache: TextCache,
    given_up: Tensor | None,
    alone: bool,
) -> Iterator[Tensor]:
    """What `decode` yields; rows that have ended leave the decoder."""
    copies, num_rows, device = generation.num_captions, len(decoder.logits), ends.device
    generator = torch.Generator(device)
    generator.seed() if generation.seed is None else generator.manual_seed(generation.seed)
    rows = torch.arange(num_rows, device=device)  # those that the decoder goes on with
    said = torch.empty((num_rows, 0), dtype=torch.long, device=device)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for length in range(1, generation.max_new_tokens + 1):
        with one_thread(short(decoder.logits.numel())):
            scores = processors(said, decoder.logits) if len(processors) else decoder.logits
            if generation.method == "nucleus":
                token = _sampled(scores, copies, generator, alone and generation.seed is not None)
            else:
                token = scores.argmax(-1)
        token = torch.where(finished, pad, token)
        finished = finished | torch.isin(token, ends)
        said = torch.cat([said, token[:, None]], dim=1)
        yield said.new_full((num_rows,), pad).index_copy(0, rows, token)
        if given_up is not None:
            finished = finished | given_up.to(device)[rows]
        if length == generation.max_new_tokens or finished.all():
            return
        over = finished.view(-1, copies).all(1)
        if num_rows > 1 and 4 * int(over.sum()) >= len(over):  # else copying the others costs more
            going = (~over).repeat_interleave(copies).nonzero()[:, 0]
            rows, said, finished, token = rows[going], said[going], finished[going], token[going]
            decoder.keep(going)
        decoder.read(token)
        cache.ids.append(int(token[0]))


def _sampled(scores: Tensor, copies: int, generator: torch.Generator, alone: bool) -> Tensor:
    """A token of every row by its probability, as `torch.multinomial` draws it: int (N,).

    Args:
        scores: float (N, vocabulary).
        copies: rows that each image has, one behind the other.
        generator: of the noise.
        alone: give every image the noise that it would get alone.
    """
    probabilities = scores.softmax(-1).unflatten(0, (-1, copies))  # (B, copies, vocabulary)
    noise = torch.empty_like(probabilities[:1] if alone else probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1).flatten()


def read_prompt(
    model: Blip2, image: ImageFeatures, text: dict[str, Tensor], generation: Generation, cache: TextCache
) -> Decoder:
    """Read queries and prompts, what the cache does not hold of them.

    Args:
        model: stage 2.
        image: features of one image or of B.
        text: of `Processor.text` (and `Processor.question`), B rows.
        generation: how long an answer may be.
        cache: empty, or of the turns before of one row; it holds queries and prompt afterwards.
    """
    question = {name: value for name, value in text.items() if name.startswith("qformer_")}
    ids, mask = text["input_ids"], text["attention_mask"]
    soft = model.language_inputs(None, image, len(ids), question)
    language: Any = model.language_model
    bridge = model.bridge
    inputs = bridge.prompt(soft, ids, mask)
    embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
    if not model.is_decoder_only:
        encoded = encode(language.get_encoder(), embeds, mask)
        start = language.generation_config.decoder_start_token_id
        if T5Decoder.fits(language):
            return T5Decoder(language, encoded, mask, start, generation.max_new_tokens)
        output = BaseModelOutput(last_hidden_state=encoded)
        state = {"encoder_outputs": output, "decoder_input_ids": torch.full_like(ids[:, :1], start)}
        return LibraryDecoder(bridge, state, mask, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    kept = cache.keep(ids[0].tolist(), soft.shape[1])
    decoder: Decoder
    if OPTDecoder.fits(language):
        past = cache.key_values if isinstance(cache.key_values, KeyValues) else KeyValues()
        decoder = OPTDecoder(language, embeds[:, kept:], mask, past, generation.max_new_tokens)
    else:
        library = cache.key_values if isinstance(cache.key_values, LibraryKeyValues) else LibraryKeyValues()
        decoder = LibraryDecoder(bridge, {"inputs_embeds": embeds[:, kept:]}, mask, library)
    cache.key_values = decoder.past
    cache.ids = ids[0].tolist()
    return decoder


def ending(model: Blip2, device: torch.device) -> tuple[Tensor, int]:
    """Tokens that end a text, int, and the one that fills the place behind the end."""
    config: Any = model.language_model.generation_config
    ends = torch.tensor(config.eos_token_id, device=device).flatten()
    return ends, config.pad_token_id if config.pad_token_id is not None else int(ends[0])


class MinNewTokens(LogitsProcessor):
    """No end before so many tokens; transformers' own goes over the vocabulary at every token after, too."""

    def __init__(self, count: int, ends: Tensor):
        self.count, self.ends = count, ends

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids: int (N, tokens so far); scores: float (N, vocabulary)."""
        return scores if input_ids.shape[1] >= self.count else scores.index_fill(1, self.ends, -math.inf)


def _processors(
    generation: Generation, ends: Tensor, avoid: list[list[int]] | None = None
) -> LogitsProcessorList:
    """What changes the scores before a token is chosen, in the order transformers applies it."""
    processors = LogitsProcessorList()
    if generation.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
    if avoid:
        processors.append(NoBadWordsLogitsProcessor(avoid, ends.tolist()))
    if generation.min_new_tokens:
        processors.append(MinNewTokens(generation.min_new_tokens, ends))
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
    alone: bool = False,
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
        alone: see `decode`.

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
    avoid = processor.spellings(generation.avoid)
    if generation.method == "beam":
        new = _search(model, image, tokens, generation, stop, avoid)
    else:
        steps = []
        for token in decode(model, image, tokens, generation, avoid=avoid, alone=alone):
            steps.append(token)
            if stop.is_set():
                break
        new = torch.stack(steps, dim=1)
    texts = processor.decode(new)
    return [
        texts[start : start + generation.num_captions]
        for start in range(0, len(texts), generation.num_captions)
    ]


@torch.no_grad()
def _search(
    model: Blip2,
    image: ImageFeatures,
    text: dict[str, Tensor],
    generation: Generation,
    stop: StopSignal,
    avoid: list[list[int]],
) -> Tensor:
    """Beam search; see `decode` for the arguments and `beam_search` for what it returns."""
    decoder = read_prompt(model, image, text, generation, TextCache())
    ends, pad = ending(model, decoder.logits.device)
    processors = _processors(generation, ends, avoid)
    return beam_search(decoder, generation, ends, pad, processors, stop.is_set)


def num_descriptions(model: Blip2, wanted: int | None = None) -> int:
    """Of how many captions `describe` is to make a description: as wanted, or else as the checkpoint says."""
    return int(getattr(model.config, "num_descriptions", 0)) if wanted is None else wanted


def describe(
    model: Blip2,
    processor: Processor,
    image: ImageFeatures,
    captions: int = 1,
    stop: StopSignal | None = None,
    alone: bool = False,
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
        alone: see `decode`.

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
        more = generate(model, processor, image, "", sampling, stop, alone=alone)
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
