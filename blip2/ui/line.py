"""Visitors who wait for the models, first come, first served."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blip2.ui.stop import Stop

GLANCE = 1  # seconds after which one who waits is told again, and may be found to have left


class Line:
    """A line before a few places.

    Args:
        places: how many may work at the same time.
    """

    def __init__(self, places: int):
        self.places = places
        self._tickets: list[object] = []  # those who work, then those who wait
        self._moved = threading.Condition()

    @contextmanager
    def ticket(self) -> Iterator[object]:
        """Stand in line, and leave it in the end, from wherever."""
        ticket = object()
        with self._moved:
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()

    def wait(self, ticket: object, stop: Stop) -> Iterator[int]:
        """Wait for a place, or until `stop` is set; yields the place in line, 1 the next, as it changes."""
        while not stop.is_set():
            with self._moved:
                place = max(0, self._tickets.index(ticket) + 1 - self.places)
            if place == 0:
                return
            yield place
            with self._moved:
                self._moved.wait(GLANCE)
