"""The Chat tab: a conversation about the picture (Fig. 4)."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from blip2.chat import Chat, Turn
from blip2.checkpoint import Loaded
from blip2.generation import Generation, num_descriptions
from blip2.novelty import UnknownPictureError
from blip2.presets import EMBEDDED
from blip2.ui.answers import streamed
from blip2.ui.models import Models
from blip2.ui.parameters import Parameters
from blip2.ui.session import EXPECTED, Session, question
from blip2.ui.tab import QUIET, Tab, Updates, unknown_words
from blip2.ui.words import SILENCE, counted, note, plain, receipt, settings_text

DRAWN = ("how many things are there?", "what color is the circle?", "is there a star?")
PHOTO = ("what is in the picture?", "where was it taken?", "what could happen next?")


class ChatTab(Tab):
    """Controls and events; see `Tab`. The conversation itself lies in the visitor's `Session`."""

    def __init__(self, models: Models, state: gr.State, picture: gr.Image):
        super().__init__(models, state, picture)
        self.chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height=350,
            render_markdown=False,  # it still takes HTML, so what is written is escaped
            buttons=[],
            feedback_options=None,
            placeholder="Ask anything about the picture",
            layout="bubble",
            elem_id="conversation",
        )
        with gr.Row(elem_classes="suggestions"):
            self.suggestions = [
                gr.Button(text, size="sm", min_width=150) for text in _suggestions(models.default)
            ]
        with gr.Row(elem_classes="ask", equal_height=True):
            self.box = gr.Textbox(
                show_label=False,
                label="Question",
                container=False,
                placeholder="Ask about the picture; Enter sends",
                max_lines=6,
                scale=1,
                min_width=180,
                elem_id="question",
            )
            self.go = gr.Button("Send", variant="primary", min_width=90, scale=0)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("chat-note")
        with gr.Row(elem_classes="actions small"):
            self.again = gr.Button("Regenerate", size="sm", interactive=False, min_width=90)
            self.back = gr.Button("Undo", size="sm", interactive=False, min_width=90)
            self.clear = gr.Button("Clear", size="sm", interactive=False, min_width=90)
        self.receipt = gr.HTML(elem_id="chat-receipt")
        self.parameters = Parameters(Generation(), questions=True)
        changes = [self.again, self.back, self.clear]
        outputs = [self.chatbot, self.receipt, *changes]
        asked = [self.box, *self.parameters.inputs]
        self.wire([self.box.submit, self.go.click], self.ask, asked, [self.box, *outputs])
        self.wire_anyway(self.ask, asked, [self.box, *outputs])
        for button in self.suggestions:
            self.wire([button.click], self.ask, [button, *self.parameters.inputs], [self.box, *outputs])
        self.wire([self.again.click], self.regenerate, self.parameters.inputs, outputs)
        self.wire_stop()
        said = [self.note, self.anyway]
        self.back.click(self.undo, state, [self.go, self.halt, *said, self.box, *outputs], **QUIET)
        gr.on([self.clear.click, self.chatbot.clear], self.forget, state, [*said, *outputs], **QUIET)

    # --- the page ---

    def idle(self, session: Session) -> Updates:
        """The page when it can be asked again."""
        turns = bool(session.chat and session.chat.turns)
        buttons = dict.fromkeys((self.again, self.back, self.clear), gr.update(interactive=turns))
        return super().idle(session) | {self.go: gr.update(visible=True, interactive=True)} | buttons

    def busy(self, model: str) -> Updates:
        """The page while an answer of that model is under way."""
        buttons = dict.fromkeys((self.again, self.back, self.clear), gr.update(interactive=False))
        return super().busy(model) | {self.go: gr.update(visible=False)} | buttons

    def cleared(self) -> Updates:
        """The tab as for a new picture or model; a question half written stays."""
        off = dict.fromkeys((self.again, self.back, self.clear), gr.update(interactive=False))
        return super().cleared() | {self.chatbot: [], self.receipt: "", **off}

    def after_error(self, session: Session) -> Updates:
        """Without the question that got no answer."""
        return {self.chatbot: _messages(session.chat)}

    def suggest(self, model: str) -> Updates:
        """Questions that the model can make something of."""
        return dict(zip(self.suggestions, map(gr.update, _suggestions(model)), strict=True))

    # --- events ---

    def ask(
        self, session: Session, picture: tuple[str | None, str], text: str, *values: Any
    ) -> Iterator[Updates]:
        """Ask the next question; yields what to change on the page."""
        generation = self.parameters.generation(values)
        text = question(text)
        session.look(*picture)

        def start(chat: Chat) -> Iterator[str]:
            chat.describe = num_descriptions(chat.model, self.parameters.describe(values))
            return chat.stream(text, generation)

        try:
            yield from self._answer(session, text, start, generation, {self.box: ""})
        except UnknownPictureError:
            yield {self.box: text}  # to be sent again, to another model or to this one all the same
            raise

    def regenerate(
        self, session: Session, picture: tuple[str | None, str], *values: Any
    ) -> Iterator[Updates]:
        """Answer the last question again."""
        generation = self.parameters.generation(values)
        session.look(*picture)
        if not (session.chat and session.chat.turns):
            raise ValueError("There is no answer yet to give again.")
        last = session.chat.turns[-1]

        def start(chat: Chat) -> Iterator[str]:
            chat.describe = num_descriptions(chat.model, self.parameters.describe(values))
            return chat.regenerate(generation)

        yield from self._answer(session, last.question, start, generation, {}, last)

    def undo(self, session: Session) -> Updates:
        """Take the last question back into the box."""
        session.stop()
        turn = session.chat.undo() if session.chat else None
        text = {self.box: turn.question} if turn else {}
        return self.cleared() | self.idle(session) | {self.chatbot: _messages(session.chat), **text}

    def forget(self, session: Session) -> Updates:
        """Start over about the same picture."""
        session.stop()
        session.chat = None
        return self.cleared()

    def _answer(
        self,
        session: Session,
        text: str,
        start: Callable[[Chat], Iterator[str]],
        generation: Generation,
        begun: Updates,
        last: Turn | None = None,
    ) -> Iterator[Updates]:
        name, subject = session.model or self.models.default, session.subject
        before = list(session.chat.turns) if session.chat else []
        before = [turn for turn in before if turn is not last]
        began = time.monotonic()
        with session.answering() as stop:
            asked = _messages(before, text)
            yield self.busy(name) | {self.chatbot: asked, self.receipt: "", **begun}
            loaded = self.models.get(name)
            chat = session.conversation(loaded)
            if stop.is_set():  # while it was loading
                yield self.idle(session) | self.after_error(session) | {self.note: note("Stopped.")}
                return
            try:
                for progress in streamed(chat, lambda: start(chat), generation, stop):
                    said = [{"role": "assistant", "content": plain(progress.text)}] if progress.text else []
                    yield {self.chatbot: [*asked, *said], self.note: note(progress.doing)}
            except EXPECTED:
                chat.turns[:] = [*before, last] if last else before  # as if it had not been asked
                raise
            stopped = stop.is_set()
        if session.subject != subject:
            yield self.idle(session)
            return  # the visitor has moved on to another picture or model
        turn = chat.turns[-1]
        session.remember(name, turn)
        facts = [
            settings_text(generation),
            counted(turn.num_tokens, "token"),
            f"{time.monotonic() - began:.1f} s",
        ]
        yield self.idle(session) | {
            self.chatbot: _messages(chat),
            self.note: note("Stopped." if stopped else _remark(chat, loaded, generation, text, last)),
            self.receipt: receipt(name, turn.prompt, facts),
        }


def _remark(chat: Chat, loaded: Loaded, generation: Generation, text: str, last: Turn | None) -> str:
    """What a visitor may want to know about an answer."""
    remarks = [*chat.notices]
    if last is not None and chat.turns[-1].answer == last.answer and generation.method != "nucleus":
        remarks.append("The same again: this method always is. Nucleus sampling, under Parameters, varies.")
    if unknown := unknown_words(loaded, text):
        remarks.append(unknown)
    return " ".join(remarks)


def _messages(chat: Chat | list[Turn] | None, asked: str | None = None) -> list[dict[str, str]]:
    """Turns, and a question not yet answered, as the chat component takes them: HTML."""
    turns = chat.turns if isinstance(chat, Chat) else chat or []
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": plain(turn.question)})
        messages.append({"role": "assistant", "content": plain(turn.answer or SILENCE)})
    return messages + ([{"role": "user", "content": plain(asked)}] if asked else [])


def _suggestions(model: str) -> tuple[str, ...]:
    return DRAWN if model in EMBEDDED else PHOTO
