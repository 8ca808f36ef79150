"""One visitor: their picture, their conversation, and the answer under way.

A `Session` lives in a `gr.State`, one for each open page; nothing here is shared between visitors but the
models. No gradio in this file.
"""

from dataclasses import dataclass
from typing import Any

from blip2.conversation import Conversation, Turn
from blip2.ui.stop import Answering
from blip2.ui.subject import Subject


@dataclass(frozen=True)
class Answered:
    """An answer that can be looked into, and who gave it."""

    model: str
    turn: Turn


class Session(Answering):
    """What one visitor has open.

    Attributes:
        model: name of the model in use; None: the app's default.
        subject: the picture and the conversation about it; another one after each change of picture or model,
            so an answer that finds it changed comes too late.
        left: the conversation that the last change of picture or model ended; to go on with.
        answered: the last answer of the page's model; None before, and where it said nothing.
        compared: two answers to vote on; None before, and after the vote.
        votes: how many a model, or "Tie" and "Neither", got from this visitor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: str | None = None
        self.subject = Subject()
        self.left: list[Turn] = []
        self.answered: Answered | None = None
        self.compared: dict[str, Any] | None = None
        self.votes: dict[str, int] = {}

    def __deepcopy__(self, memo: Any) -> "Session":
        """Gradio copies the initial state for every visitor: each starts afresh."""
        return Session()

    @property
    def turns(self) -> list[Turn]:
        """The conversation so far."""
        return self.subject.conversation.turns

    def look(self, path: str | None, name: str = "") -> bool:
        """Turn to the picture the page shows, an uploaded file; True if it is another than before.

        Raises:
            ImageError: there is none, or it is no usable picture; the one before stays.
        """
        if path is not None and path == self.subject.path:
            return False
        subject = Subject.of_file(path, name)
        if subject.digest == self.subject.digest:
            self.subject.path = path
            return False
        self._turn_to(subject)
        return True

    def use(self, model: str) -> None:
        """Change models; the conversation starts anew."""
        self._turn_to(self.subject.anew())
        self.model = model

    def _turn_to(self, subject: Subject) -> None:
        self.stop()
        self.left = self.turns or self.left
        self.subject, self.answered, self.compared = subject, None, None

    def forget(self) -> None:
        """Start the conversation over."""
        self.stop()
        self.subject.conversation, self.left = Conversation(), []

    def resume(self) -> None:
        """Go on with the conversation that a change of picture or model ended, if none has begun since."""
        if not self.turns:
            self.turns[:], self.left = self.left, []

    def remember(self, model: str, turn: Turn) -> None:
        """Keep an answer, to be looked into."""
        self.left = []
        self.answered = Answered(model, turn) if turn.answer else None
