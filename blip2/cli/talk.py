"""`chat`: a conversation about a picture, one question a line, answers streamed as they are made."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from PIL import Image

from blip2.chat import Chat
from blip2.checkpoint import Loaded
from blip2.cli.console import Console
from blip2.cli.models import encode, generation, load_model, model_name, note_unknown_words
from blip2.generation import Generation
from blip2.images import open_image
from blip2.model import Blip2

HELP = """Ask about the picture, one question a line.
  /again       answer the last question again
  /edit TEXT   ask the last question differently
  /undo        take the last question and its answer back
  /new IMAGE   another picture: a file or an http(s) URL
  /help        this text
  /quit        leave; Ctrl-D does the same
Ctrl-C stops the answer under way."""


def run(args: argparse.Namespace, console: Console) -> int:
    """Talk until the lines end; in a pipe, a line that fails makes the exit code 1."""
    settings = generation(args, Generation())
    name = model_name(args, "generate", console)
    image = open_image(args.image, allow_url=True)
    loaded = load_model(name, "generate", args, console)
    assert isinstance(loaded.model, Blip2)
    chat = Chat(loaded.model, loaded.processor, style=args.style, describe=args.describe)
    conversation = Conversation(chat, loaded, settings, args, console)
    conversation.look(image, args.image)
    interactive = sys.stdin.isatty()
    if interactive:
        console.note(f"{loaded.name} sees {args.image}. /help lists commands, Ctrl-D leaves")
    failed = False
    for line in _lines(interactive, console):
        try:
            if not conversation.take(line):
                break
        except ValueError as error:
            console.error(str(error))
            failed = True
    if console.json:
        turns = [
            {"question": turn.question, "prompt": turn.prompt}
            | {"answer": turn.answer, "tokens": turn.num_tokens}
            for turn in chat.turns
        ]
        console.show({"model": loaded.name, "image": conversation.source, "turns": turns}, ())
    return int(failed and not interactive)


def _lines(interactive: bool, console: Console) -> Iterator[str]:
    """Lines of stdin without surrounding space, empty ones left out."""
    if not interactive:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        yield from filter(None, map(str.strip, sys.stdin))
        return
    if not console.json:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            if console.json:  # stdout is the document's alone
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("" if console.json else "> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            console.note("nothing to stop; Ctrl-D or /quit leaves")
            continue
        if line:
            yield line


class Conversation:
    """A chat and where its words go."""

    def __init__(
        self, chat: Chat, loaded: Loaded, settings: Generation, args: argparse.Namespace, console: Console
    ):
        self.chat, self.loaded, self.settings = chat, loaded, settings
        self.args, self.console = args, console
        self.source = ""

    def look(self, image: Image.Image, source: str) -> None:
        """Turn to a picture; the conversation starts anew.

        Raises:
            UnknownPictureError: the model does not know such pictures; the conversation is as it was.
        """
        self.chat.set_image(encode(self.loaded, image, source, self.args))
        self.source = source

    def take(self, line: str) -> bool:
        """Do what a line says; False to leave.

        Raises:
            ValueError: the line cannot be followed; the conversation is as it was.
        """
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            self._ask(line)
        elif word == "/quit":
            return False
        elif word == "/help":
            print(HELP, file=sys.stderr)
        elif word == "/new":
            self._new(rest)
        elif word in ("/undo", "/again", "/edit"):
            self._change(word, rest)
        else:
            raise ValueError(f"unknown command {word}: /help lists the commands")
        return True

    def _new(self, source: str) -> None:
        if len(source) > 1 and source[0] == source[-1] and source[0] in "'\"":  # as terminals paste paths
            source = source[1:-1]
        if not source:
            raise ValueError("/new needs a picture: a file or an http(s) URL")
        self.look(open_image(source, allow_url=True), source)
        self.console.note(f"looking at {source}; the conversation starts anew")

    def _change(self, word: str, text: str) -> None:
        if not self.chat.turns:
            raise ValueError(f"{word} needs a question before it: ask something first")
        last = len(self.chat.turns) - 1
        if word == "/undo":
            turn = self.chat.undo()
            self.console.note(f"took back: {turn.question if turn else ''}")
        elif word == "/again":
            self._show(self.chat.regenerate(self._fresh()))
        elif not text:
            raise ValueError("/edit needs the new question: /edit TEXT")
        else:
            note_unknown_words(self.chat.processor, text, self.loaded.name, self.console)
            self._show(self.chat.edit(last, text, self.settings))

    def _fresh(self) -> Generation:
        """The settings with another seed, so that a sampled answer to the same question differs."""
        if self.settings.seed is not None:
            self.settings = self.settings.with_(seed=self.settings.seed + 1)
        return self.settings

    def _ask(self, question: str) -> None:
        pieces = self.chat.stream(question, self.settings)
        note_unknown_words(self.chat.processor, question, self.loaded.name, self.console)
        self._show(pieces)

    def _show(self, pieces: Iterator[str]) -> None:
        """Print an answer as it comes; Ctrl-C ends it within a token and keeps what was said."""
        with _stop_on_interrupt(self.chat):
            for piece in pieces:
                if not self.console.json:
                    print(piece, end="", flush=True)
        if not self.console.json:
            print(flush=True)
        if not self.chat.turns[-1].answer:
            self.console.note("the model answered with nothing")
        if notice := self.chat.turns[-1].notice:
            self.console.note(notice)


@contextmanager
def _stop_on_interrupt(chat: Chat) -> Iterator[None]:
    """The first Ctrl-C stops the answer (raising in mid-token would spoil its cache), a second one leaves."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> Any:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
