"""A conversation about one picture: set it once, ask many times (the paper's instructed generation, Fig. 4).

The picture is encoded once. A decoder-only language model keeps the keys and values of the turns before, in a
pool shared by all conversations; one that was evicted reads its turns again and gives the same answer.
"""

import threading
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .conversation import Conversation, Turn
from .generation import Generation, StopSignal, TextCache, decode, describe, generate, num_descriptions
from .images import ImageSource
from .model import Blip2
from .processing import Processor, PromptError, Style
from .vision import ImageFeatures

POOL_BYTES = 1 << 30


class _EitherStop(threading.Event):
    """An event of a chat's own that is also set once another signal is."""

    def __init__(self, other: StopSignal | None):
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())


class CachePool:
    """Key-value caches of many conversations under one limit; the least recently used leaves first."""

    def __init__(self, max_bytes: int = POOL_BYTES):
        self.max_bytes = max_bytes
        self._caches: OrderedDict[str, TextCache] = OrderedDict()
        self._lock = threading.RLock()  # a conversation's end may drop its cache in the midst of `give`

    def take(self, owner: str) -> TextCache:
        """The owner's cache, out of the pool while it is in use; an empty one if it was evicted."""
        with self._lock:
            return self._caches.pop(owner, None) or TextCache()

    def give(self, owner: str, cache: TextCache) -> None:
        """Put a cache back, and evict others, or this one if it alone is over the limit."""
        with self._lock:
            self._caches[owner] = cache
            while self._caches and self._bytes() > self.max_bytes:
                self._caches.popitem(last=False)

    def drop(self, owner: str) -> None:
        """Forget an owner's cache."""
        with self._lock:
            self._caches.pop(owner, None)

    def _bytes(self) -> int:
        return sum(cache.num_bytes for cache in self._caches.values())

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        with self._lock:
            return self._bytes()


_POOL = CachePool()


def framed(
    processor: Processor,
    text: str,
    style: Style,
    max_new_tokens: int,
    history: Sequence[tuple[str, str]] = (),
    description: str = "",
) -> tuple[Turn, dict[str, torch.Tensor]]:
    """The prompt of `Processor.prompt`, with as many of the latest turns as leave room for the answer.

    Args:
        processor: of the model.
        text: a question, or what `style` takes.
        style: the frame.
        max_new_tokens: of the answer.
        history: questions and answers before, the oldest first.
        description: of the picture.

    Returns:
        A turn without an answer, and its prompt's input_ids and attention_mask: int (1, T).

    Raises:
        PromptError: it does not fit even without the turns before.
    """
    room = (processor.context or 1 << 30) - processor.num_query_tokens - max_new_tokens

    def prompt(dropped: int) -> str:
        return processor.prompt(text, style, history[dropped:], description)

    def fits(dropped: int) -> bool:
        return len(processor.tokenizer(prompt(dropped))["input_ids"]) <= room

    dropped = 0  # mostly everything fits
    if history and not fits(0):
        dropped = bisect_left(range(len(history)), True, lo=1, key=fits)
    if dropped == len(history) and not fits(dropped):
        processor.text(prompt(dropped))  # which says so where the question alone is too long
        raise PromptError(
            f"the question and an answer of {max_new_tokens} tokens do not fit this model's "
            f"{processor.context}: shorten the question or lower max_new_tokens"
        )
    turn = Turn(text, prompt=prompt(dropped), dropped=dropped)
    return turn, processor.text(turn.prompt)


class Chat:
    """Multi-turn chat about one picture.

    Args:
        model: stage 2.
        processor: its processor.
        conversation: one to go on with; by default a new one.
        pool: where key-value caches live between turns; by default one pool serves the whole process.
        style: frame of the questions; by default the paper's for this language model.
        describe: how many captions of its own the model reads between picture and questions; 0 for none, by
            default as many as the checkpoint answers best with.
        stop: ends every answer within one token once set, as `stop()` ends the one under way; anything with
            `is_set()`.
    """

    def __init__(
        self,
        model: Blip2,
        processor: Processor,
        conversation: Conversation | None = None,
        *,
        pool: CachePool | None = None,
        style: Style | None = None,
        describe: int | None = None,
        stop: StopSignal | None = None,
    ):
        self.model, self.processor = model, processor
        self.conversation = conversation or Conversation()
        self.describe = num_descriptions(model, describe)
        self.style: Style = style or processor.question_style
        self._pool = pool or _POOL
        self._stop = _EitherStop(stop)
        self._busy = threading.Lock()
        weakref.finalize(self.conversation, self._pool.drop, self.conversation.key)

    @property
    def turns(self) -> list[Turn]:
        """Questions and answers so far; may be changed."""
        return self.conversation.turns

    @property
    def image(self) -> ImageFeatures | None:
        """The picture, encoded."""
        return self.conversation.image

    @property
    def description(self) -> str:
        """What the model said of the picture, and reads before the questions."""
        return self.conversation.description

    # --- the picture ---

    def set_image(self, image: ImageSource | ImageFeatures, *, keep_turns: bool = False) -> None:
        """Look at a picture: in any form `open_image` takes, or already encoded. Starts a new conversation.

        Args:
            image: the picture.
            keep_turns: go on with the conversation, about another picture.
        """
        if not isinstance(image, ImageFeatures):
            device = self.model.query_tokens.device
            image = self.model.encode_image(self.processor.images(image).to(device))
        if len(image) != 1:
            raise ValueError(f"a chat is about one picture, not {len(image)}")
        talk = self.conversation
        talk.image, talk.description, talk.described = image, "", 0
        self._pool.drop(talk.key)
        if not keep_turns:
            talk.turns.clear()

    # --- asking ---

    def ask(self, question: str, generation: Generation | None = None, **settings: Any) -> str:
        """Ask, and return the whole answer; by default decoded as in the paper (`Generation.answer`)."""
        return "".join(self.stream(question, (generation or Generation.answer()), **settings))

    def stream(self, question: str, generation: Generation | None = None, **settings: Any) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; beam search yields it whole.

        Close the iterator, or call `stop`, to end generation within one token; the turn keeps what was said.

        Args:
            question: free text.
            generation: settings, greedy by default.
            settings: fields of `Generation` to change.

        Raises:
            ValueError: no picture was set, more than one answer was asked for, or an answer is under way.
            PromptError: an empty question, or one that does not fit the model's context.
        """
        if self.image is None:
            raise ValueError("there is no picture yet: call set_image first")
        generation = (generation or Generation()).with_(**settings)
        if generation.num_captions != 1:
            raise ValueError(f"a chat turn has one answer; num_captions is {generation.num_captions}")
        wanted = 0 if self.style == "raw" else self.describe
        if wanted != self.conversation.described:
            self._stop.clear()
            [description] = describe(self.model, self.processor, self.image, wanted, self._stop)
            if self._stop.is_set():
                self.turns.append(Turn(question))
                return iter("")
            self.conversation.description, self.conversation.described = description, wanted
        turn, tokens = self._prompt(question, generation)
        return self._answer(turn, tokens, self.image, generation)

    def _prompt(self, question: str, generation: Generation) -> tuple[Turn, dict[str, torch.Tensor]]:
        """Frame the question with as many of the latest turns as fit the context."""
        history = [(turn.question, turn.answer) for turn in self.turns]
        turn, tokens = framed(
            self.processor, question, self.style, generation.max_new_tokens, history, self.description
        )
        return turn, tokens | self.processor.question(question)

    def _answer(
        self, turn: Turn, tokens: dict[str, torch.Tensor], image: ImageFeatures, generation: Generation
    ) -> Iterator[str]:
        if not self._busy.acquire(blocking=False):
            raise ValueError("this chat is still answering: wait, or call stop() first")
        try:
            self._stop.clear()
            if generation.method == "beam":
                [[turn.answer]] = generate(
                    self.model, self.processor, image, turn.prompt, generation, self._stop, [turn.question]
                )
                turn.num_tokens = len(
                    self.processor.tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
                )
                self.turns.append(turn)
                yield turn.answer
                return
            self.turns.append(turn)
            yield from self._stream(turn, tokens, image, generation)
        finally:
            self._busy.release()

    def _stream(
        self, turn: Turn, tokens: dict[str, torch.Tensor], image: ImageFeatures, generation: Generation
    ) -> Iterator[str]:
        device = image.image_embeds.device
        tokens = {name: value.to(device) for name, value in tokens.items()}
        cache, avoid = self._pool.take(self.conversation.key), self.processor.spellings(generation.avoid)
        ids: list[int] = []
        try:
            for token in decode(self.model, image, tokens, generation, cache, avoid):
                ids.append(int(token[0]))
                turn.num_tokens = len(ids)
                text = self.processor.decode([ids])[0]
                if not text.endswith("\ufffd"):  # half a character: wait for its other half
                    piece, turn.answer = text[len(turn.answer) :], text
                    if piece:
                        yield piece
                if self._stop.is_set():
                    return
        except Exception:
            cache = TextCache()  # some layers may have read a token that others have not
            self.turns.remove(turn)
            raise
        finally:
            if self.model.is_decoder_only and not self.model.question_in_qformer:
                self._pool.give(self.conversation.key, cache)

    def stop(self) -> None:
        """End the answer under way within one token; safe from any thread."""
        self._stop.set()

    # --- changing one's mind ---

    def undo(self) -> Turn | None:
        """Take the last turn back."""
        return self.turns.pop() if self.turns else None

    def regenerate(self, generation: Generation | None = None, **settings: Any) -> Iterator[str]:
        """Answer the last question again."""
        return self.edit(
            len(self.turns) - 1, self.turns[-1].question if self.turns else "", generation, **settings
        )

    def edit(
        self, index: int, question: str, generation: Generation | None = None, **settings: Any
    ) -> Iterator[str]:
        """Ask turn `index` (from 0) differently; the turns after it are forgotten."""
        if not 0 <= index < len(self.turns):
            raise ValueError(f"there is no turn {index}: this chat has {len(self.turns)}")
        before = list(self.turns)
        del self.turns[index:]
        try:
            return self.stream(question, generation, **settings)
        except ValueError:
            self.turns[:] = before
            raise

    def clear(self) -> None:
        """Forget all turns; the picture stays."""
        self.turns.clear()
        self._pool.drop(self.conversation.key)
