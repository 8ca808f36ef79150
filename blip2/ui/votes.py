"""Where votes on compared answers go: nowhere, to a file, or to a dataset on the Hub. No gradio here."""

import json
import tempfile
import threading
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

EVERY = 5  # minutes between two uploads


class Votes:
    """A sink for votes; true where they are kept.

    Args:
        file: appended to, a JSON line a vote; None keeps none.
        lock: held while a line is written.
    """

    def __init__(self, file: Path | None = None, lock: AbstractContextManager[Any] | None = None):
        self.file = file
        self._lock = lock or threading.Lock()

    def __bool__(self) -> bool:
        return self.file is not None

    def append(self, record: dict[str, Any]) -> None:
        """Keep a vote, if votes are kept.

        Raises:
            OSError: the file cannot be written.
        """
        if self.file is None:
            return
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock, self.file.open("a", encoding="utf-8") as file:
            file.write(line)

    @classmethod
    def in_dataset(cls, repo_id: str) -> "Votes":
        """Votes that go to a dataset on the Hub every few minutes, and when the program ends.

        Each run of the program writes a file of its own, as several may share the dataset. The dataset is
        made, private, if there is none: votes hold what visitors asked.

        Args:
            repo_id: USER/DATASET. The token of the environment must be allowed to write to it.

        Raises:
            ValueError: it cannot be reached, or not be written to.
        """
        from huggingface_hub import CommitScheduler

        folder = Path(tempfile.mkdtemp(prefix="blip2-votes-"))
        try:
            scheduler = CommitScheduler(
                repo_id=repo_id, repo_type="dataset", folder_path=folder, every=EVERY, private=True
            )
        except Exception as error:
            # the hub's client passes its HTTP library's own errors on: httpx's or httpx2's, by version
            if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith("httpx"):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"votes cannot go to the dataset {repo_id}: {reason}. Give a secret HF_TOKEN that may write "
                "to it, or keep no votes"
            ) from error
        return cls(folder / f"votes-{uuid.uuid4().hex}.jsonl", scheduler.lock)
