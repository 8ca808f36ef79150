"""A request on its way through a worker: what it asks, and what it is told."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from blip2.settings import Generation, Style


@dataclass(frozen=True)
class Asked:
    """What a request wants to know.

    Attributes:
        digest: names the picture.
        pixel_values: float32 (1, 3, S, S), the picture.
        question: "" asks for a caption.
        history: questions and answers before, the oldest first.
        before: read before all questions: the system's messages.
        generation: settings.
        answers: how many; a greedy one is given several times.
        stops: an answer ends before the first of these.
        style: frame of the question, None for the model's own.
        describe: as for `Chat`.
        force: answer about a picture that the model does not know, too.
        streamed: tell pieces as they come, not each answer as a whole.
    """

    digest: bytes
    pixel_values: Tensor
    question: str = ""
    history: tuple[tuple[str, str], ...] = ()
    before: str = ""
    generation: Generation = field(default_factory=Generation)
    answers: int = 1
    stops: tuple[str, ...] = ()
    style: Style | None = None
    describe: int | None = None
    force: bool = False
    streamed: bool = False


@dataclass(frozen=True)
class Said:
    """A piece of an answer, or all of it.

    Attributes:
        answer: which, from 0.
        reason: why the answer ends here: "stop", or "length" for as many tokens as were allowed; None if it
            goes on.
        num_tokens: of the answer so far.
    """

    answer: int
    text: str
    reason: str | None
    num_tokens: int


class Job:
    """A request on its way through a worker.

    Args:
        asked: what it wants.
        tell: is called, in the worker's thread, with what is said, and with the error that ends it.

    Attributes:
        prompt_tokens: what the language model read, the picture's soft tokens included; known before anything
            is said, as is
        dropped: how many of the oldest turns did not fit.
        over: answered, failed, or given up by whoever waited.
    """

    def __init__(self, asked: Asked, tell: Callable[[Said | Exception], None]):
        self.asked, self.tell = asked, tell
        self.prompt_tokens = self.dropped = 0
        self.begun = self.over = False
        self._open = set(range(asked.answers))

    def say(self, said: Said) -> None:
        """Hand a piece on."""
        if self.over:
            return
        self.begun = True
        if said.reason is not None:
            self._open.discard(said.answer)
        self.over = not self._open
        self.tell(said)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.over:
            self.over = True
            self.tell(error)


class Words:
    """One answer of a request as its tokens come.

    Args:
        job: the request.
        answer: which of its answers, from 0; a greedy one stands for all of them.

    Attributes:
        ids: the tokens so far.
        has_news: whether `say` is to be called with their text.
    """

    def __init__(self, job: Job, answer: int):
        self.job, self.ids = job, list[int]()
        several = job.asked.generation.num_captions > 1
        self._answers = [answer] if several else list(range(job.asked.answers))
        self.has_news = False
        self._told = ""
        self._reason: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether no more tokens are wanted."""
        return self._reason is not None or self.job.over

    def read(self, token: int, ends: set[int]) -> None:
        """Take the next token; those after the end are not looked at."""
        self.has_news = False
        if self.is_over:
            return
        self.ids.append(token)
        if token in ends:
            self._reason = "stop"
        elif len(self.ids) == self.job.asked.generation.max_new_tokens:
            self._reason = "length"
        asked = self.job.asked
        self.has_news = bool(self._reason or asked.streamed or asked.stops)

    def say(self, text: str) -> None:
        """Tell what is new in the text of all tokens so far, as far as it can be told yet.

        What may be the beginning of a stop, or half a character, waits for what follows it.
        """
        stops = self.job.asked.stops
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        if ends:
            text, self._reason = text[: min(ends)], "stop"
        elif self._reason is None:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, stop) for stop in stops), default=0)]
        piece = text[len(self._told) :]
        if self._reason is None and (not piece or not self.job.asked.streamed):
            return
        self._told = text if piece else self._told
        for answer in self._answers:
            self.job.say(Said(answer, piece, self._reason, len(self.ids)))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return next(
        (length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0
    )
