"""What was said about a picture so far. Without torch, as `blip2.settings` is."""

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .vision import ImageFeatures


@dataclass
class Turn:
    """One question and its answer.

    Attributes:
        question: as asked.
        answer: as given; what was said until then if it was stopped.
        prompt: the exact text the language model was sent.
        num_tokens: length of the answer, tokens.
        dropped: how many of the oldest turns no longer fit and were left out of the prompt.
    """

    question: str
    answer: str = ""
    prompt: str = ""
    num_tokens: int = 0
    dropped: int = 0

    @property
    def notice(self) -> str:
        """What the visitor should know about how the answer came about."""
        if not self.dropped:
            return ""
        turns = "turn was" if self.dropped == 1 else f"{self.dropped} turns were"
        return f"The conversation outgrew the model's context: the oldest {turns} left out."


@dataclass(eq=False)
class Conversation:
    """What a chat goes on from: plain tensors and text, so that it can be pickled; caches stay behind.

    Attributes:
        image: the picture as the model sees it; None before there is one.
        turns: questions and answers so far.
        description: what the model said of the picture, and read before the questions.
        described: in how many captions.
        key: names its key-value cache in the pool.
        id: names it to whoever keeps conversations; not to be trusted, as it may come back from there.
    """

    image: "ImageFeatures | None" = None
    turns: list[Turn] = field(default_factory=list)
    description: str = ""
    described: int = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
