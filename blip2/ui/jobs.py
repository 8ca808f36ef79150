"""Long work that visitors share: who asks for the same joins in, and it ends early when the last one left."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from blip2.ui.answers import Outcome

T = TypeVar("T")


class Abandoned(Exception):
    """Nobody waits for the work any more."""


class Job(Outcome[T]):
    """One piece of work.

    Args:
        work: is handed the job, and calls `report` often; that is where it can be ended.

    Attributes:
        doing: what it is at, for those who wait.
    """

    def __init__(self, work: Callable[["Job[T]"], T], doing: str):
        super().__init__()
        self._work = work
        self.doing = doing
        self._lock = threading.Lock()
        self._waiting, self._begun, self._abandoned = 0, False, False
        self._start = time.monotonic()

    # --- the work's side ---

    def report(self, doing: str) -> None:
        """Say how far it is.

        Raises:
            Abandoned: everyone has left.
        """
        self.doing = doing
        with self._lock:
            self._abandoned = self._abandoned or not self._waiting
            if self._abandoned:
                raise Abandoned

    def run(self) -> None:
        """Do it, in this thread."""
        self.settle(lambda: self._work(self))

    # --- the side of those who wait ---

    def join(self) -> bool:
        """Wait with the others; False if it is about to end, having been abandoned."""
        with self._lock:
            if self._abandoned:
                return False
            self._waiting += 1
            return True

    def leave(self) -> None:
        """Wait no longer."""
        with self._lock:
            self._waiting -= 1

    def begin(self) -> bool:
        """Whether it is for the caller to run it: True once."""
        with self._lock:
            begun, self._begun = self._begun, True
            return not begun

    def follow(self, stop: threading.Event | None = None, seconds: float = 0.25) -> Iterator[str]:
        """What it is doing, until it is done or `stop` is set; for one who has joined.

        Leaving the iteration early, as when a page is closed, leaves the work too.
        """
        if self.begin():
            threading.Thread(target=self.run, daemon=True).start()
        try:
            while not self._done.is_set() and not (stop and stop.is_set()):
                yield f"{self.doing}, {time.monotonic() - self._start:.0f} s"
                end = time.monotonic() + seconds
                while time.monotonic() < end and not self._done.wait(0.05):
                    if stop and stop.is_set():
                        break
        finally:
            self.leave()

    def wait(self) -> None:
        """Until it is done."""
        self._done.wait()

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._done.is_set()
