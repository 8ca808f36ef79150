"""What the models are asked to do, each a function that yields as it goes.

`blip2.ui.work` runs them, in this process or in one that has a GPU: what they are given and what they yield
can be pickled, and what they change is the subject alone. No gradio in this file,
and no page waits for its import: it takes torch.
"""

import queue
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from blip2 import explain
from blip2.chat import Chat, Conversation, Turn
from blip2.checkpoint import Loaded
from blip2.folder import caption_pictures
from blip2.generation import Generation, generate
from blip2.model import Blip2
from blip2.pictures import Captioning, Failure
from blip2.processing import Style
from blip2.representation import Blip2Representation
from blip2.search.encode import Picture, encode_pictures
from blip2.search.index import Summary, indexing
from blip2.search.query import Collection, Found, search
from blip2.search.vectors import Vectors
from blip2.sidecars import Entry, Sidecars
from blip2.ui.answers import Background, Progress, streamed, together
from blip2.ui.errors import EXPECTED
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject

T = TypeVar("T")


def talk(
    models: list[Loaded],
    subject: Subject,
    question: str,
    generation: Generation,
    describe: int | None,
    index: int | None,
    stop: Stop,
) -> Iterator[Progress | Turn]:
    """Go on with the subject's conversation.

    Args:
        models: the one to talk with.
        subject: the picture and the conversation.
        question: what to ask.
        generation: settings.
        describe: see `Chat`.
        index: the turn that is asked anew, from 0, those after it forgotten; None: the next.
        stop: ends it within a token.

    Yields:
        How far the answer has come, and last the turn; nothing if stopped before it began.
    """
    yield from _answer(models[0], subject, subject.conversation, question, generation, describe, stop, index)


def instruct(
    models: list[Loaded],
    subject: Subject,
    question: str,
    generation: Generation,
    describe: int | None,
    style: Style | None,
    stop: Stop,
) -> Iterator[Progress | Turn]:
    """Answer one instruction by itself; `style` is its frame, None for the model's own. Yields as `talk`."""
    yield from _answer(models[0], subject, Conversation(), question, generation, describe, stop, style=style)


def compare(
    models: list[Loaded],
    subject: Subject,
    question: str,
    generation: Generation,
    describe: int | None,
    style: Style | None,
    stop: Stop,
) -> Iterator[tuple[int, Progress | Turn | BaseException]]:
    """Answer one instruction by several models at the same time.

    Yields:
        Which of them, and what `instruct` yields, or what went wrong.
    """
    for loaded in models:  # one after the other, since they share what the subject keeps
        subject.features(loaded)
    rest = (subject, question, generation, describe, style, stop)
    runs = [partial(instruct, [loaded], *rest) for loaded in models]
    for which, said in together(runs, stop):
        if isinstance(said, BaseException) and not isinstance(said, EXPECTED):
            raise said
        if said is not None:
            yield which, said


def caption(
    models: list[Loaded], subject: Subject, prompt: str, generation: Generation, stop: Stop
) -> Iterator[Progress | list[str]]:
    """Write captions that go on from a prompt; yields how long it has been, and last the captions."""
    [loaded] = models
    assert isinstance(loaded.model, Blip2)
    write = partial(
        generate, loaded.model, loaded.processor, subject.features(loaded),
        loaded.processor.prompt(prompt, "caption"), generation, stop,
    )  # fmt: skip
    doing = f"Searching with {generation.num_beams} beams" if generation.method == "beam" else "Writing"
    [captions] = yield from _in_background(write, doing, stop)
    yield captions


def caption_all(
    models: list[Loaded],
    subject: Subject,
    pictures: dict[str, Path],
    out: Sidecars | None,
    wanted: Captioning,
    stop: Stop,
) -> Iterator[Progress | Entry | Failure]:
    """Caption many pictures, with the second model to score the captions; the subject is of no matter.

    Arguments are those of `blip2.folder.caption_pictures`. Yields the outcomes, and how long it has been.
    """
    loaded, scorer = models[0], models[1] if len(models) > 1 else None
    yield from _followed(caption_pictures(loaded, pictures, out, wanted, scorer, stop), stop)


def embed(
    models: list[Loaded], subject: Subject, pictures: dict[str, Path], force: bool, stop: Stop
) -> Iterator[Progress | tuple[list[Picture], Vectors | None]]:
    """Make pictures ready to be searched; the subject is of no matter.

    Yields:
        What `blip2.search.encode.encode_pictures` does, and how long it has been.
    """
    yield from _followed(encode_pictures(models[0], pictures, {}, force=force, stop=stop), stop)


def index(
    models: list[Loaded], subject: Subject, folder: Path, recursive: bool, force: bool, stop: Stop
) -> Iterator[Progress | tuple[int, int] | Summary]:
    """Bring the index of a folder of this machine up to date.

    Yields:
        (pictures done, of how many), and how long it has been; last the summary, unless it was stopped.
    """

    def work() -> Iterator[tuple[int, int] | Summary]:
        with indexing(models[0], folder, recursive=recursive, force=force, stop=stop) as run:
            for done, _ in enumerate(run, 1):
                yield done, len(run.left)
            if not stop.is_set():
                yield run.summary

    yield from _followed(work(), stop)


def find(
    models: list[Loaded],
    subject: Subject,
    collection: Collection,
    text: str | None,
    k: int,
    rerank: int,
    force: bool,
    stop: Stop,
) -> Iterator[Progress | list[Found]]:
    """Search, by a text, or where it is None by the subject; yields how long it has been, last the found."""
    query = subject.image() if text is None else text
    look = partial(search, models[0], collection, query, k, rerank=rerank, force=force)
    yield (yield from _in_background(look, "Searching", stop))


def match(
    models: list[Loaded], subject: Subject, texts: list[str], stop: Stop
) -> Iterator[list[tuple[float, float]]]:
    """Score how well texts fit the picture; yields (probability that it fits, cosine) of each."""
    [loaded] = models
    assert isinstance(loaded.model, Blip2Representation)
    features = subject.features(loaded)
    tokens = {name: value.to(loaded.device) for name, value in loaded.processor.text(texts).items()}
    matching = loaded.model.score(features, **tokens, head="itm")[0].tolist()
    cosine = loaded.model.score(features, **tokens, head="itc")[0].tolist()
    yield list(zip(matching, cosine, strict=True))


def occlude(
    models: list[Loaded], subject: Subject, turn: Turn, stop: Stop
) -> Iterator[Progress | tuple[list[explain.Token], Tensor]]:
    """Look into an answer by hiding parts of the picture.

    Yields:
        How long it has been; last the answer's tokens, and a map, float (rows, columns).
    """
    yield from _look_into(models[0], subject, turn, partial(_occlusion, stop=stop), stop)


def attend(
    models: list[Loaded], subject: Subject, turn: Turn, layer: int | None, query: int | None, stop: Stop
) -> Iterator[Progress | tuple[list[explain.Token], Tensor]]:
    """Look at where the queries read the picture; `layer` and `query` count from 1. Yields as `occlude`."""
    yield from _look_into(models[0], subject, turn, partial(_attention, layer=layer, query=query), stop)


def _answer(
    loaded: Loaded,
    subject: Subject,
    conversation: Conversation,
    question: str,
    generation: Generation,
    describe: int | None,
    stop: Stop,
    index: int | None = None,
    style: Style | None = None,
) -> Iterator[Progress | Turn]:
    model: Any = loaded.model
    chat = Chat(model, loaded.processor, conversation, style=style, describe=describe, stop=stop)
    features = subject.features(loaded)
    if conversation.image is None:
        chat.set_image(features, keep_turns=True)
    else:
        conversation.image = conversation.image.to(loaded.device)
    before = list(conversation.turns)

    def start() -> Iterator[str]:
        if index is None:
            return chat.stream(question, generation)
        return chat.edit(index, question, generation)

    try:
        yield from streamed(start, generation, stop)
    except EXPECTED:
        conversation.turns[:] = before  # as if it had not been asked
        raise
    yield conversation.turns[-1]


def _followed(items: Iterator[T], stop: Stop) -> Iterator[Progress | T]:
    """Items as they come, and meanwhile how long it has been."""
    found: queue.SimpleQueue[T] = queue.SimpleQueue()

    def work() -> None:
        for item in items:
            found.put(item)

    background = Background(work, stop)
    for seconds in background.ticks():
        while not found.empty():
            yield found.get()
        yield Progress(doing=f"{seconds:.0f} s")
    while not found.empty():
        yield found.get()
    background.result()


def _in_background(function: Any, doing: str, stop: Stop) -> Any:
    """Run a function while telling how long it has been; gives what it returned."""
    background = Background(function, stop)
    for seconds in background.ticks():
        yield Progress(doing=f"{doing}, {seconds:.0f} s ...")
    return background.result()


def _look_into(loaded: Loaded, subject: Subject, turn: Turn, weigh: Any, stop: Stop) -> Iterator[Any]:
    features = subject.features(loaded)
    texts = (turn.prompt, turn.answer, turn.question)

    def work() -> tuple[list[explain.Token], Tensor]:
        tokens = explain.token_probabilities(loaded.model, loaded.processor, features, *texts)
        return tokens, weigh(loaded, subject, turn).cpu()

    yield (yield from _in_background(work, "Looking", stop))


def _occlusion(loaded: Loaded, subject: Subject, turn: Turn, stop: Stop) -> Tensor:
    texts = (turn.prompt, turn.answer, turn.question)
    return explain.occlusion(loaded.model, loaded.processor, subject.image(), *texts, stop=stop)


def _attention(loaded: Loaded, subject: Subject, turn: Turn, layer: int | None, query: int | None) -> Tensor:
    asked = {name: ids.to(loaded.device) for name, ids in loaded.processor.question(turn.question).items()}
    attention = explain.query_attention(loaded.model, subject.features(loaded), asked)
    where, which = _chosen("Layer", layer, len(attention)), _chosen("Query", query, attention.shape[3])
    return explain.attention_map(attention, -1 if where is None else where, which)[0]


def _chosen(label: str, value: float | None, count: int) -> int | None:
    """What the page counts from 1, from 0."""
    if value is not None and not 1 <= value <= count:
        raise ValueError(f"{label} is {value:g}; this model has 1 to {count}.")
    return None if value is None else int(value) - 1
