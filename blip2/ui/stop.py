"""A visitor's wish that an answer end, which also reaches another process."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Stop:
    """Set once, seen by whoever decodes; see `blip2.generation.StopSignal`.

    An event in this process. Once shared, a file says the same to processes that got a pickled copy.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._file: Path | None = None

    def set(self) -> None:
        """Ask the answer to end."""
        self._event.set()
        if self._file is not None:
            self._file.touch()

    def is_set(self) -> bool:
        """Whether the answer is to end."""
        return self._event.is_set() or (self._file is not None and self._file.exists())

    def share(self) -> None:
        """Let copies in other processes see it, until `unshare`."""
        folder = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
        self._file = Path(tempfile.mkdtemp(prefix="stop-", dir=folder)) / "now"
        if self._event.is_set():
            self._file.touch()

    def unshare(self) -> None:
        """Remove the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.unlink(missing_ok=True)
            file.parent.rmdir()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self._file, "set": self._event.is_set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._file = state["file"]
        if state["set"]:
            self._event.set()


class Answering:
    """One visitor's answers, or runs, of which at most one is under way."""

    def __init__(self) -> None:
        self._stop = Stop()

    def stop(self) -> None:
        """End the one under way within one token."""
        self._stop.set()

    @contextmanager
    def answering(self) -> Iterator[Stop]:
        """Begin one, ending one still under way; yields what asks it to stop.

        Whatever ends the block, a closed page included, decoding ends.
        """
        self.stop()
        stop = self._stop = Stop()
        try:
            yield stop
        finally:
            stop.set()
