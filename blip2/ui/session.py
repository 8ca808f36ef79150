"""One visitor: their picture, their conversation, and the answer under way.

A `Session` lives in a `gr.State`, one for each open page; nothing here is shared between visitors but the
models. No gradio in this file.
"""

import hashlib
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.chat import Chat, Turn
from blip2.checkpoint import Loaded
from blip2.devices import is_out_of_memory
from blip2.images import ImageError, open_image
from blip2.processing import PromptError, Style
from blip2.vision import ImageFeatures

log = logging.getLogger("blip2.ui")

# What a visitor's input, a file or a model can bring about. Others are bugs and pass.
EXPECTED = (ValueError, RuntimeError, OSError, MemoryError)


def friendly(error: BaseException) -> str:
    """One sentence for the visitor; details of what is not their doing go to the log alone."""
    if is_out_of_memory(error):
        return (
            "The model ran out of memory: ask for fewer beams, captions or tokens, or choose a smaller model."
        )
    if isinstance(error, ValueError):
        return str(error)
    log.error("the app could not answer", exc_info=error)
    return "The model failed on this; the app's log says why. Try again, or with other settings."


@dataclass(frozen=True)
class Answered:
    """An answer that can be looked into: who gave it, to what, and the prompt as sent."""

    model: str
    question: str
    prompt: str
    answer: str


class Session:
    """What one visitor has open.

    Attributes:
        model: name of the model in use; None: the app's default.
        chat: the conversation, about the picture, with the model; None before the first question.
        path: the picture's file; None before the first look.
        subject: counts pictures and models; an answer that finds it changed comes too late.
        anyway: the visitor wants answers about this picture though the model does not know its kind.
        answered: the last answer of the page's model; None before, and where it said nothing.
        compared: two answers to vote on; None before, and after the vote.
        votes: how many a model, or "Tie" and "Neither", got from this visitor.
    """

    def __init__(self) -> None:
        self.model: str | None = None
        self.chat: Chat | None = None
        self.path: str | None = None
        self.subject = 0
        self.anyway = False
        self._digest = ""
        self._name = "the picture"
        self._features: dict[str, ImageFeatures] = {}
        self._stop = threading.Event()
        self._answering: list[Chat] = []
        self.answered: Answered | None = None
        self.compared: dict[str, Any] | None = None
        self.votes: dict[str, int] = {}

    def __deepcopy__(self, memo: Any) -> "Session":
        """Gradio copies the initial state for every visitor: each starts afresh."""
        return Session()

    # --- the picture ---

    def look(self, path: str | None, name: str = "") -> bool:
        """Turn to the picture the page shows, an uploaded file; True if it is another than before.

        Raises:
            ImageError: there is none, or it is no usable picture; the one before stays.
        """
        if path is None:
            raise ImageError("There is no picture: upload or paste one, take one, or pick an example.")
        if path == self.path:
            return False
        name = Path(name or path).name
        try:
            data = Path(path).read_bytes()
        except OSError:
            raise ImageError(
                f"{name} is no longer here, uploads are deleted within the hour: add it again."
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        if digest == self._digest:
            self.path = path
            return False
        _open(data, name)
        self.stop()
        self.path, self._name, self._digest = path, name, digest
        self._features.clear()
        self.chat, self.anyway, self.answered, self.compared = None, False, None, None
        self.subject += 1
        return True

    def features(self, loaded: Loaded) -> ImageFeatures:
        """The picture as the model sees it; encoded once for each picture and model.

        Raises:
            ImageError: it is no longer here.
            UnknownPictureError: the model does not know its kind, and the visitor did not insist.
        """
        if loaded.name not in self._features:
            if self.path is None or not Path(self.path).is_file():
                raise ImageError(
                    f"{self._name} is no longer here, uploads are deleted within the hour: add it again."
                )
            image = _open(Path(self.path).read_bytes(), self._name)
            pixels = loaded.processor.images(image).to(loaded.device)
            self._features[loaded.name] = loaded.model.encode_image(pixels)
        if not self.anyway:
            loaded.check_known(self._features[loaded.name])
        return self._features[loaded.name]

    # --- the model and the conversation ---

    def use(self, model: str) -> None:
        """Change models; the conversation starts anew."""
        self.stop()
        self.model, self.chat, self.answered = model, None, None
        self.subject += 1

    def conversation(self, loaded: Loaded) -> Chat:
        """The conversation under way, or a new one."""
        if self.chat is None:
            self.chat = self.single(loaded)
        self.chat.model = loaded.model
        self._answering.append(self.chat)
        return self.chat

    def single(self, loaded: Loaded, style: Style | None = None) -> Chat:
        """A conversation of its own about the picture, for one instruction."""
        chat = Chat(loaded.model, loaded.processor, style=style)
        chat.set_image(self.features(loaded))
        self._answering.append(chat)
        return chat

    # --- answering ---

    def remember(self, model: str, turn: Turn) -> None:
        """Keep an answer, to be looked into."""
        self.answered = Answered(model, turn.question, turn.prompt, turn.answer) if turn.answer else None

    def stop(self) -> None:
        """End the answer under way within one token."""
        self._stop.set()
        for chat in self._answering:
            chat.stop()  # a token need not be text that the page's loop would see

    @contextmanager
    def answering(self) -> Iterator[threading.Event]:
        """Begin an answer, ending one still under way; yields the event that asks to stop.

        Whatever ends the block, a closed page included, the event is set and decoding ends. From then on the
        conversations hold their models weakly: the shelf may let one go while the visitor reads.
        """
        self.stop()
        stop = self._stop = threading.Event()
        begun = self._answering = []
        try:
            yield stop
        finally:
            stop.set()
            for chat in begun:
                if not isinstance(chat.model, weakref.ProxyTypes):
                    weakly: Any = weakref.proxy(chat.model)
                    chat.model = weakly


def _open(data: bytes, name: str) -> Any:
    try:
        return open_image(data)
    except ImageError as error:  # the visitor's name for the file, not the server's
        raise ImageError(str(error).replace("the image data", name, 1)) from error


def question(text: str | None) -> str:
    """What a visitor typed, checked.

    Raises:
        PromptError: nothing, or characters that are no text.
    """
    text = (text or "").strip()
    if not text:
        raise PromptError("There is nothing to ask yet: write a question or an instruction first.")
    odd = sorted(
        {f"U+{ord(c):04X}" for c in text if (ord(c) < 32 and c not in "\t\n\r") or 127 <= ord(c) < 160}
    )
    if odd:
        raise PromptError(f"The text holds control characters ({', '.join(odd[:3])}): remove them.")
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise PromptError("The text holds half a character (a lone surrogate): type it again.")
    return text
