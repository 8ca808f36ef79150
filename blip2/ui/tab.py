"""What the tabs have in common: a button that asks, one that stops, a line for what the app has to say."""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import gradio as gr

from blip2.errors import UnknownPictureError
from blip2.ui.errors import EXPECTED, friendly
from blip2.ui.session import Session
from blip2.ui.words import note
from blip2.ui.work import Work

Updates = dict[Any, Any]  # component -> what to change
AT_ONCE = 64  # visitors asking; most of them wait in `Work`'s line, which says their place
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Tab:
    """Base of the tabs.

    Args:
        work: does what the models are asked to do.
        state: the visitor's `Session`.
        picture: the picture component.
    """

    go: gr.Button
    halt: gr.Button
    note: gr.HTML
    choice: gr.Row
    anyway: gr.Button
    real: gr.Button  # for the picker

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        self.work, self.models, self.state, self.picture = work, work.models, state, picture

    def add_note(self, elem_id: str, anyway: str = "Answer anyway") -> None:
        """Place the line for what the app has to say, and what to do about an unknown picture."""
        self.note = gr.HTML(elem_id=elem_id)
        with gr.Row(visible=False, elem_classes="actions small") as self.choice:
            self.anyway = gr.Button(anyway, size="sm", min_width=140)
            self.real = gr.Button("Get a real model", size="sm", visible=self.models.local, min_width=160)

    def wire(
        self,
        triggers: Any,
        run: Callable[..., Iterator[Updates]],
        inputs: list[Any],
        outputs: list[Any],
        js: str | None = None,
        picture: bool = True,
    ) -> None:
        """Let triggers, a list of them or the end of another event, start `run`, which yields; Stop ends it.

        The stop is an event of its own, not gradio's cancelling: the run sees it within a token, ends by
        itself, and leaves the page in order. `picture` says whether the run is handed the page's.
        """
        listen = partial(gr.on, triggers) if isinstance(triggers, list) else triggers
        event = listen(
            self.guarded(run),
            [self.state, *([self.picture] if picture else []), *inputs],
            [self.go, self.halt, self.note, self.choice, *outputs],
            show_progress="hidden",
            concurrency_id="model",
            concurrency_limit=AT_ONCE,
            api_visibility="private",
            js=js,
        )
        # what is left are bugs: without this the page would stay locked
        event.failure(self.failed, self.state, [self.go, self.halt, self.note, *outputs], **QUIET)

    def wire_anyway(
        self, run: Callable[..., Iterator[Updates]], inputs: list[Any], outputs: list[Any]
    ) -> None:
        """Let the button "Answer anyway" start `run`."""
        self.wire([self.anyway.click], self.insisting(run), inputs, outputs)

    def guarded(self, run: Callable[..., Iterator[Updates]]) -> Callable[..., Iterator[Updates]]:
        """`run`, and what the page shows when there is no answer."""

        @wraps(run)  # gradio looks at the signature, for what is told of an event
        def attempt(session: Session, *values: Any) -> Iterator[Updates]:
            try:
                yield from run(session, *values)
                return
            except UnknownPictureError as error:
                said = {
                    self.note: note(f"{error}. {self.instead()}"),
                    self.choice: gr.update(visible=True),
                }
            except EXPECTED as error:
                said = {self.note: note(friendly(error), "error")}
            yield self.idle(session) | self.after_error(session) | said

        return attempt

    def instead(self) -> str:
        """A sentence on where to turn with a picture that the model does not know."""
        return self.models.instead()

    def insisting(self, run: Callable[..., Iterator[Updates]]) -> Callable[..., Iterator[Updates]]:
        """`run` for a visitor who wants answers though the model does not know the picture's kind."""

        @wraps(run)
        def insist(session: Session, *values: Any) -> Iterator[Updates]:
            session.subject.anyway = True  # until there is another picture
            yield from run(session, *values)

        return insist

    def wire_stop(self) -> None:
        """Let the stop button end the visitor's answer, whichever tab began it."""
        self.halt.click(lambda session: session.stop(), self.state, None, **QUIET)

    def busy(self, model: str) -> Updates:
        """The page while an answer of that model is under way."""
        return {
            self.go: gr.update(interactive=False),
            self.halt: gr.update(visible=True),
            self.note: note("" if self.models.is_loaded(model) else f"Loading {model} ..."),
            self.choice: gr.update(visible=False),
        }

    def idle(self, session: Session) -> Updates:
        """The page when it can be asked again."""
        return {self.go: gr.update(interactive=True), self.halt: gr.update(visible=False)}

    def after_error(self, session: Session) -> Updates:
        """What else to put right when an answer could not be had."""
        return {}

    def failed(self, session: Session) -> Updates:
        """The page after a bug."""
        return (
            self.idle(session)
            | self.after_error(session)
            | {self.note: note("Something went wrong in the app; its log says what. Try again.", "error")}
        )

    def cleared(self) -> Updates:
        """The tab as for a new picture or model."""
        return {self.note: "", self.choice: gr.update(visible=False)}
