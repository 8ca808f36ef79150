"""Where the models work: in this process, or on ZeroGPU in the one that has the GPU.

ZeroGPU forks a process for each call of a decorated function, pickles what it is given and what it yields,
and loses what it changed (https://huggingface.co/docs/hub/spaces-zerogpu). So a task gets a copy of the
subject there, and the changed copy comes back as its last item. No gradio in this file.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from blip2.devices import is_out_of_memory
from blip2.settings import Generation
from blip2.ui.answers import Progress
from blip2.ui.errors import EXPECTED
from blip2.ui.line import Line
from blip2.ui.models import Models
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject

PLACES = 2  # calls at the same time: more would only make all of them slower
LONGEST = 120  # seconds of GPU that a call may ask for


@dataclass(frozen=True)
class Call:
    """A task and what it is given.

    Attributes:
        task: a function of `blip2.ui.tasks`, by name, as to import them takes torch.
        names: of the models it works with.
        subject: what it is about.
        arguments: what else it takes, in its order.
        stop: ends it.
        kinds: of the models, see `Models.get`; all are to generate by default.
    """

    task: str
    names: tuple[str, ...]
    subject: Subject
    arguments: tuple[Any, ...]
    stop: Stop
    kinds: tuple[str, ...] = ()


class Work:
    """Runs tasks on a shelf of models.

    Args:
        models: the shelf.
        gpu: `spaces.GPU`, which gives a function a GPU; None to work in this process.
    """

    def __init__(self, models: Models, gpu: Callable[..., Any] | None = None):
        self.models, self.line = models, Line(PLACES)
        self._remote = gpu(duration=seconds)(self._carried_out) if gpu else None

    def run(
        self,
        task: str,
        names: Sequence[str],
        subject: Subject,
        *arguments: Any,
        stop: Stop,
        kinds: Sequence[str] = (),
    ) -> Iterator[Any]:
        """Run a task, and yield what it yields; nothing more if it is stopped before it begins.

        While others are served first it yields `Progress` that says so. Arguments are those of `Call`; the
        subject holds the outcome afterwards.

        Raises:
            ValueError: the models or the task refuse; the message is for the visitor.
            RuntimeError, OSError, MemoryError: a model failed.
        """
        call = Call(task, tuple(names), subject, arguments, stop, tuple(kinds))
        if self._remote is None:
            try:
                with self.line.ticket() as ticket:
                    for place in self.line.wait(ticket, stop):
                        yield Progress(doing=f"You are number {place} in line ...")
                    yield from self._here(call)
            except EXPECTED as error:
                self.relieve(error, names)
                raise
            return
        stop.share()  # ZeroGPU has a line of its own
        try:
            for item in self._remote(call):
                if isinstance(item, Subject):
                    subject.adopt(item)
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            stop.unshare()

    def last(self, *arguments: Any, **options: Any) -> Any:
        """What a task yields last."""
        [item] = deque(self.run(*arguments, **options), maxlen=1)
        return item

    def unknown_words(self, name: str, text: str, kind: str = "generate") -> str:
        """A sentence on words of a prompt that a small vocabulary lacks, or nothing."""
        if not self.models.is_loaded(name):
            return ""
        unknown = self.models.get(name, kind).processor.unknown_words(text)
        words = [word[:30] for word in dict.fromkeys(unknown)][:5]
        return f"{name} has never seen: {', '.join(words)}." if words else ""

    def relieve(self, error: BaseException, names: Sequence[str]) -> None:
        """Let go of models that ran out of memory: the next visitor loads them into what is free by then."""
        if is_out_of_memory(error):
            for name in names:
                self.models.unload(name, error)

    def _here(self, call: Call) -> Iterator[Any]:
        if call.stop.is_set():
            return
        kinds = call.kinds or ["generate"] * len(call.names)
        models = [self.models.get(name, kind) for name, kind in zip(call.names, kinds, strict=True)]
        if not call.stop.is_set():  # while they were loading
            from blip2.ui import tasks

            yield from getattr(tasks, call.task)(models, call.subject, *call.arguments, call.stop)

    def _carried_out(self, call: Call) -> Iterator[Any]:
        """Runs in the process that has the GPU; errors are yielded: ZeroGPU keeps their names alone."""
        try:
            yield from self._here(call)
        except EXPECTED as error:
            yield error
        yield call.subject.to("cpu")


def seconds(call: Call) -> int:
    """How long a call may take on ZeroGPU: one that asks for less waits less."""
    if call.task == "occlude":
        return 60
    if call.task == "caption_all":
        return LONGEST
    tokens = 30
    for generation in call.arguments:
        if isinstance(generation, Generation):
            rows = generation.num_beams if generation.method == "beam" else generation.num_captions
            tokens = generation.max_new_tokens * (1 + rows // 4)
    return min(LONGEST, 15 + len(call.names) * tokens // 5)
