"""One model's worker: requests that wait at the same moment are answered together, in one batch.

A thread takes the request that has waited longest and those behind it with the same decoding settings.
Their pictures are encoded as one batch, described as one batch where the model reads descriptions, and
their answers decoded as one batch, a token of every row at a time; each request hears of its own tokens at
once, and leaves the batch when it is answered or nobody waits for it any more. Answers equal those of a
request alone. Pictures that were asked about lately are not encoded and described again.
"""

import logging
import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip2.chat import framed
from blip2.checkpoint import Loaded
from blip2.conversation import Turn
from blip2.devices import free_unused, is_out_of_memory
from blip2.errors import PromptError
from blip2.generation import decode, describe, ending, num_descriptions
from blip2.model import Blip2
from blip2.novelty import UnknownPictureError
from blip2.server.job import Asked, Job, Words
from blip2.vision import ImageFeatures

log = logging.getLogger("blip2.server")


class Closed(Exception):
    """The server is ending and takes no more requests."""


class _AllOver:
    """A `StopSignal`: nobody waits for any of these."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def is_set(self) -> bool:
        return all(job.over for job in self.jobs)


@dataclass
class _Seen:
    """A picture as the model sees it, why it does not know it, and its descriptions by number of captions."""

    features: ImageFeatures
    unknown: str
    descriptions: dict[int, str] = field(default_factory=lambda: {0: ""})


class Worker:
    """A model and the thread that answers with it.

    Args:
        loaded: a stage-2 checkpoint.
        batch_size: answers decoded together at most.
        remember: how many pictures are kept, encoded, for the next question about them.
        force: answer about pictures that the model does not know.
    """

    def __init__(self, loaded: Loaded, *, batch_size: int = 16, remember: int = 64, force: bool = False):
        assert isinstance(loaded.model, Blip2)
        self.loaded, self.batch_size, self.remember, self.force = loaded, batch_size, remember, force
        self.model, self.processor = loaded.model, loaded.processor
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._closed = False
        self._moved = threading.Condition()
        self._pictures: OrderedDict[bytes, _Seen] = OrderedDict()  # the one asked about longest ago first
        self._seconds = 1.0  # that a batch takes
        self._thread = threading.Thread(target=self._work, name=f"blip2 {loaded.name}", daemon=True)
        self._thread.start()

    # --- the side of those who ask; any thread ---

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn.

        Raises:
            Closed: it would wait in vain.
        """
        with self._moved:
            if self._closed:
                raise Closed
            self._waiting.append(job)
            self._moved.notify()

    def give_up(self, job: Job) -> None:
        """Nobody waits for a request any more: it leaves the line, or its batch with the next token."""
        job.over = True
        with self._moved:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self, seconds: float | None = None) -> None:
        """Take no more requests, and wait until those that are here are answered."""
        with self._moved:
            self._closed = True
            self._moved.notify()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests being answered that somebody waits for."""
        return sum(not job.over for job in self._running)

    @property
    def seconds_to_wait(self) -> float:
        """How long a request that came now might wait for its turn."""
        return self._seconds * (1 + len(self._waiting) / self.batch_size)

    # --- the thread ---

    def _work(self) -> None:
        while batch := self._next():
            start = time.monotonic()
            self._answer(batch)
            self._seconds = (self._seconds + time.monotonic() - start) / 2
            self._running = []

    def _next(self) -> list[Job]:
        """Wait for requests to answer together; none once all are answered and the worker is closed."""
        with self._moved:
            while not self._waiting and not self._closed:
                self._moved.wait()
            if not self._waiting:
                return []
            settings = self._waiting[0].asked.generation
            alike = [job for job in self._waiting if job.asked.generation == settings]
            self._running = alike[: max(1, self.batch_size // settings.num_captions)]
            self._waiting = [job for job in self._waiting if job not in self._running]
            return self._running

    def _answer(self, jobs: list[Job]) -> None:
        """Answer requests, in two halves where memory does not suffice."""
        try:
            self._answer_together([job for job in jobs if not job.over])
            return
        except Exception as error:  # a request that fails must not end the server
            short = is_out_of_memory(error)
            if not short:
                log.exception("a request failed")
            left = [job for job in jobs if not job.over]
            again = [job for job in left if not job.begun] if short and len(jobs) > 1 else []
            for job in left:
                if job not in again:
                    job.fail(error)
            traceback.clear_frames(error.__traceback__)  # which hold what was being computed
        free_unused()
        half = (len(again) + 1) // 2
        for part in (again[:half], again[half:]):
            if part:
                self._answer(part)

    @torch.no_grad()
    def _answer_together(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        seen = self._look(jobs)
        for job, picture in zip(jobs, seen, strict=True):
            if picture.unknown and not (self.force or job.asked.force):
                job.fail(UnknownPictureError(picture.unknown))
        self._describe(jobs, seen)
        rows: list[Words] = []
        pictures, prompts, questions = [], [], []
        for job, picture in zip(jobs, seen, strict=True):
            if job.over:
                continue
            try:
                turn = self._turn(job, picture)
            except PromptError as error:
                job.fail(error)
                continue
            rows += [Words(job, index) for index in range(job.asked.generation.num_captions)]
            pictures.append(picture.features)
            prompts.append(turn.prompt)
            questions.append(turn.question)
        if rows:
            self._decode(rows, ImageFeatures.join(pictures), prompts, questions)

    def _look(self, jobs: list[Job]) -> list[_Seen]:
        """The pictures that are asked about; those that are new are encoded together."""
        seen: dict[bytes, _Seen] = {}
        new: dict[bytes, Tensor] = {}
        for job in jobs:
            digest = job.asked.digest
            if digest in self._pictures:
                self._pictures.move_to_end(digest)
                seen[digest] = self._pictures[digest]
            else:
                new[digest] = job.asked.pixel_values
        if new:
            features = self.model.encode_image(torch.cat(list(new.values())).to(self.loaded.device))
            for row, digest in enumerate(new):
                own = features[row].to(self.loaded.device, copy=True)  # a view would keep the whole batch
                seen[digest] = self._pictures[digest] = _Seen(own, self._why_unknown(own))
        while len(self._pictures) > self.remember:
            self._pictures.popitem(last=False)
        return [seen[job.asked.digest] for job in jobs]

    def _why_unknown(self, picture: ImageFeatures) -> str:
        try:
            self.loaded.check_known(picture)
        except UnknownPictureError as error:
            return str(error)
        return ""

    def _num_descriptions(self, asked: Asked) -> int:
        """How many captions of its own the model reads before it answers."""
        wordless = not asked.question or asked.style == "raw"
        return 0 if wordless else num_descriptions(self.model, asked.describe)

    def _describe(self, jobs: list[Job], seen: list[_Seen]) -> None:
        """Have the pictures described that are not yet, those that take as many captions together."""
        stop = _AllOver(jobs)
        missing: dict[int, dict[bytes, _Seen]] = {}
        for job, picture in zip(jobs, seen, strict=True):
            count = self._num_descriptions(job.asked)
            if not job.over and count not in picture.descriptions:
                missing.setdefault(count, {})[job.asked.digest] = picture
        for count, pictures in missing.items():
            features = ImageFeatures.join([picture.features for picture in pictures.values()])
            said = describe(self.model, self.processor, features, count, stop, alone=True)
            if stop.is_set():  # in the midst of a sentence
                return
            for picture, text in zip(pictures.values(), said, strict=True):
                picture.descriptions[count] = text

    def _turn(self, job: Job, picture: _Seen) -> Turn:
        """The prompt of a request.

        Raises:
            PromptError: it is empty, or does not fit the model's context.
        """
        asked, longest = job.asked, job.asked.generation.max_new_tokens
        described = picture.descriptions[self._num_descriptions(asked)]
        before = " ".join(filter(None, (asked.before, described)))
        if asked.question:
            style = asked.style or self.processor.question_style
            turn, tokens = framed(self.processor, asked.question, style, longest, asked.history, before)
        else:
            prompt = f"{before} {self.loaded.caption_prompt}".strip()
            turn, tokens = framed(self.processor, prompt, "caption", longest)
        job.prompt_tokens = self.processor.num_query_tokens + tokens["input_ids"].shape[1]
        job.dropped = turn.dropped
        return turn

    def _decode(
        self, rows: list[Words], pictures: ImageFeatures, prompts: list[str], questions: list[str]
    ) -> None:
        """Decode a token of every row at a time, and tell each request what is said."""
        tokens = {**self.processor.text(prompts), **self.processor.question(questions)}
        tokens = {name: value.to(self.loaded.device) for name, value in tokens.items()}
        ends = set(ending(self.model, self.loaded.device)[0].tolist())
        given_up = torch.zeros(len(rows), dtype=torch.bool)
        generation = rows[0].job.asked.generation
        for step in decode(self.model, pictures, tokens, generation, given_up=given_up, alone=True):
            for row, token in zip(rows, step.tolist(), strict=True):
                row.read(token, ends)
            heard = [row for row in rows if row.has_news]
            texts = self.processor.decode([row.ids for row in heard]) if heard else []
            for row, text in zip(heard, texts, strict=True):
                row.say(text)
            over = [row.is_over for row in rows]
            if all(over):
                return
            given_up[:] = torch.tensor(over)
