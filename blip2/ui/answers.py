"""From a model to the page: text as it is said, or how long the search has been going."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from blip2.settings import Generation
from blip2.ui.stop import Stop

T = TypeVar("T")


class Outcome(Generic[T]):
    """What a function came to, in whatever thread it ran."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._outcome: list[T] = []
        self._error: BaseException | None = None

    def settle(self, function: Callable[[], T]) -> None:
        """Run the function, in this thread."""
        try:
            self._outcome.append(function())
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._done.set()

    def result(self) -> T:
        """What the function returned; what it raised is raised here."""
        if self._error is not None:
            raise self._error
        return self._outcome[0]


class Background(Outcome[T]):
    """A function run in a thread, so that the page can be told how long it has been going.

    Leaving the iteration early, as when a page is closed, sets `stop`.
    """

    def __init__(self, function: Callable[[], T], stop: Stop):
        super().__init__()
        self._stop = stop
        threading.Thread(target=self.settle, args=(function,), daemon=True).start()

    def ticks(self, seconds: float = 0.25) -> Iterator[float]:
        """Seconds since the start, until it is done."""
        start = time.monotonic()
        try:
            while not self._done.wait(seconds):
                yield time.monotonic() - start
        except GeneratorExit:
            self._stop.set()
            raise


@dataclass
class Progress:
    """How far an answer has come: the text so far, or while there is none what the model is doing."""

    text: str = ""
    doing: str = ""


def streamed(start: Callable[[], Iterator[str]], generation: Generation, stop: Stop) -> Iterator[Progress]:
    """Follow an answer that `start` begins, and that heeds `stop`."""
    if generation.method == "beam":
        search = Background(lambda: "".join(start()), stop)
        for seconds in search.ticks():
            yield Progress(doing=f"Searching with {generation.num_beams} beams, {seconds:.0f} s ...")
        yield Progress(search.result())
        return
    text = ""
    for piece in start():
        text += piece
        yield Progress(text)


def together(
    runs: Sequence[Callable[[], Iterator[T]]], stop: Stop
) -> Iterator[tuple[int, T | BaseException | None]]:
    """What several iterators give, each followed in a thread of its own, as it comes.

    Leaving early sets `stop`, which the iterators are to heed.

    Yields:
        Which of them, and what it gave; None once it has ended, or what it raised.
    """
    said: queue.SimpleQueue[tuple[int, T | BaseException | None]] = queue.SimpleQueue()

    def follow(which: int, run: Callable[[], Iterator[T]]) -> None:
        try:
            for item in run():
                said.put((which, item))
            said.put((which, None))
        except BaseException as error:
            said.put((which, error))

    for which, run in enumerate(runs):
        threading.Thread(target=follow, args=(which, run), daemon=True).start()
    under_way = len(runs)
    try:
        while under_way:
            which, item = said.get()
            under_way -= item is None or isinstance(item, BaseException)
            yield which, item
    finally:
        if under_way:
            stop.set()
