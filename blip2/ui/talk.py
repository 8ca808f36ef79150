"""The Chat tab: a conversation about the picture (Fig. 4)."""

import html
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from blip2.conversation import Turn
from blip2.errors import ImageError, UnknownPictureError
from blip2.settings import Generation
from blip2.ui.cards import embedded
from blip2.ui.errors import question
from blip2.ui.files import held
from blip2.ui.history import export, record
from blip2.ui.parameters import Parameters
from blip2.ui.session import Session
from blip2.ui.tab import QUIET, Tab, Updates
from blip2.ui.words import SILENCE, counted, note, plain, receipt, settings_text
from blip2.ui.work import Work

DRAWN = ("how many things are there?", "what color is the circle?", "is there a star?")
# the open tab in place of the third value
OPEN_TAB = """(state, picture, tab, ...rest) =>
  [state, picture, document.querySelector("#ask [role=tab][aria-selected=true]")?.innerText ?? "", ...rest]"""
PHOTO = ("what is in the picture?", "where was it taken?", "what could happen next?")


class ChatTab(Tab):
    """Controls and events; see `Tab`. The conversation itself lies in the visitor's `Session`.

    Args:
        history: of `blip2.ui.history.panel`; told of every answer.
        picked: the event that an example picture was picked; its question is asked.
    """

    def __init__(self, work: Work, state: gr.State, picture: gr.Image, history: gr.HTML, picked: Any = None):
        super().__init__(work, state, picture)
        self.history = history
        self.chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height=350,
            render_markdown=False,  # it still takes HTML, so what is written is escaped
            latex_delimiters=[],
            buttons=[],
            editable="user",
            group_consecutive_messages=False,
            feedback_options=None,
            placeholder="Ask anything about the picture",
            layout="bubble",
            elem_id="conversation",
        )
        with gr.Row(elem_classes="suggestions"):
            self.suggestions = [
                gr.Button(text, size="sm", min_width=150) for text in _suggestions(self.models.default)
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
        self.keep = gr.Button("Keep the conversation", size="sm", visible=False, min_width=180)
        with gr.Row(elem_classes="actions small"):
            self.again = gr.Button("Regenerate", size="sm", interactive=False, min_width=90)
            self.back = gr.Button("Undo", size="sm", interactive=False, min_width=90)
            self.clear = gr.Button("Clear", size="sm", interactive=False, min_width=90)
            self.export = gr.Button("Export", size="sm", interactive=False, min_width=90)
        self.file = gr.DownloadButton("Exported", visible="hidden", elem_id="exported")
        self.receipt = gr.HTML(elem_id="chat-receipt")
        self.parameters = Parameters(Generation(), questions=True)
        self.changes = [self.again, self.back, self.clear, self.export]
        outputs = [self.chatbot, self.receipt, self.keep, history, *self.changes]
        asked = [self.box, *self.parameters.inputs]
        self.wire([self.box.submit, self.go.click], self.ask, asked, [self.box, *outputs])
        self.wire_anyway(self.ask, asked, [self.box, *outputs])
        for button in self.suggestions:
            self.wire([button.click], self.ask, [button, *self.parameters.inputs], [self.box, *outputs])
        self.wire([self.again.click], self.regenerate, self.parameters.inputs, outputs)
        if picked is not None:
            tab = gr.Textbox(visible=False)  # which the page fills in
            asked = [tab, *self.parameters.inputs]
            self.wire(picked.success, self.ask_example, asked, [self.box, *outputs], js=OPEN_TAB)
        self.wire([self.chatbot.edit], self.edit, self.parameters.inputs, outputs)
        self.wire_stop()
        said = [self.note, self.choice, self.keep]
        self.keep.click(self.resume, state, [self.go, self.halt, *said, *outputs], **QUIET)
        self.back.click(self.undo, state, [self.go, self.halt, *said, self.box, *outputs], **QUIET)
        gr.on([self.clear.click, self.chatbot.clear], self.forget, state, [*said, *outputs], **QUIET)
        exported = self.export.click(self.pack, state, [self.note, self.file], **QUIET)
        click = "() => document.querySelector('#exported').click()"
        exported.success(None, None, None, js=click, **QUIET)

    # --- the page ---

    def idle(self, session: Session) -> Updates:
        """The page when it can be asked again."""
        talked = gr.update(interactive=bool(session.turns))
        buttons = dict.fromkeys(self.changes, talked)
        return super().idle(session) | {self.go: gr.update(visible=True, interactive=True)} | buttons

    def busy(self, model: str) -> Updates:
        """The page while an answer of that model is under way."""
        buttons = dict.fromkeys(self.changes, gr.update(interactive=False))
        hidden = {self.go: gr.update(visible=False), self.keep: gr.update(visible=False)}
        return super().busy(model) | hidden | buttons

    def cleared(self) -> Updates:
        """The tab as for a new picture or model; a question half written stays."""
        off = dict.fromkeys(self.changes, gr.update(interactive=False))
        empty = {self.chatbot: [], self.receipt: "", self.keep: gr.update(visible=False)}
        return super().cleared() | empty | off

    def begun_anew(self, session: Session, why: str) -> Updates:
        """The tab as for a new picture or model, with the choice to go on with the conversation before."""
        if not session.left:
            return self.cleared()
        return self.cleared() | {self.note: note(why), self.keep: gr.update(visible=True)}

    def after_error(self, session: Session) -> Updates:
        """Without the question that got no answer."""
        return {self.chatbot: _messages(session.turns)}

    def suggest(self, model: str) -> Updates:
        """Questions that the model can make something of."""
        return dict(zip(self.suggestions, map(gr.update, _suggestions(model)), strict=True))

    # --- events ---

    def ask(
        self, session: Session, picture: tuple[str | None, str], text: str, *values: Any
    ) -> Iterator[Updates]:
        """Ask the next question; yields what to change on the page."""
        text = question(text)
        session.look(*picture)
        try:
            yield from self._answer(session, text, values, {self.box: ""})
        except UnknownPictureError:
            yield {self.box: text}  # to be sent again, to another model or to this one all the same
            raise

    def ask_example(
        self, session: Session, picture: tuple[str | None, str], tab: str, *values: Any
    ) -> Iterator[Updates]:
        """Ask about an example that was picked, if the visitor has this tab open."""
        if tab == "Chat":
            drawn = Path(picture[1]).name.startswith("scene")
            yield from self.ask(session, picture, (DRAWN if drawn else PHOTO)[0], *values)

    def regenerate(
        self, session: Session, picture: tuple[str | None, str], *values: Any
    ) -> Iterator[Updates]:
        """Answer the last question again."""
        session.look(*picture)
        if not session.turns:
            raise ValueError("There is no answer yet to give again.")
        yield from self._answer(session, session.turns[-1].question, values, {}, len(session.turns) - 1)

    def edit(
        self, session: Session, picture: tuple[str | None, str], event: gr.EditData, *values: Any
    ) -> Iterator[Updates]:
        """Ask an earlier question differently; what came after it is forgotten."""
        session.look(*picture)
        index = int(event.index) // 2  # of messages: a question and its answer a turn
        if not 0 <= index < len(session.turns):
            raise ValueError("That question is no longer part of the conversation.")
        yield from self._answer(session, question(html.unescape(str(event.value))), values, {}, index)

    def resume(self, session: Session) -> Updates:
        """Go on with the conversation before, about the picture and with the model there are now."""
        session.resume()
        return self.shown(session)

    def shown(self, session: Session) -> Updates:
        """The tab with the conversation as it is."""
        return self.cleared() | self.idle(session) | {self.chatbot: _messages(session.turns)}

    def pack(self, session: Session) -> Updates:
        """Make a file of the conversation, for the hidden download button."""
        try:
            name, data = export(session, session.model or self.models.default)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        return {self.file: held(self.file, data, name)}

    def undo(self, session: Session) -> Updates:
        """Take the last question back into the box."""
        session.stop()
        text = {self.box: session.turns.pop().question} if session.turns else {}
        return self.shown(session) | {self.history: self._record(session), **text}

    def _record(self, session: Session) -> Any:
        try:
            return record(session, session.model or self.models.default)
        except ImageError:
            return gr.skip()  # the upload's hour is over: the browser keeps what it has

    def forget(self, session: Session) -> Updates:
        """Start over about the same picture."""
        session.forget()
        return self.cleared()

    def _answer(
        self,
        session: Session,
        text: str,
        values: tuple[Any, ...],
        begun: Updates,
        index: int | None = None,
    ) -> Iterator[Updates]:
        """Ask a question, or turn `index` anew; `begun` is what else changes on the page as it is sent."""
        generation, describe = self.parameters.generation(values), self.parameters.describe(values)
        name, subject = session.model or self.models.default, session.subject
        last = None if index is None else session.turns[index]
        asked = _messages(session.turns[:index], text)
        turn, began = None, time.monotonic()
        with session.answering() as stop:
            yield self.busy(name) | {self.chatbot: asked, self.receipt: "", **begun}
            task = ("talk", [name], subject, text, generation, describe, index)
            for said in self.work.run(*task, stop=stop):
                if isinstance(said, Turn):
                    turn = said
                    continue
                answer = [{"role": "assistant", "content": plain(said.text)}] if said.text else []
                yield {self.chatbot: [*asked, *answer], self.note: note(said.doing)}
            stopped = stop.is_set()
        done = self.idle(session)
        if session.subject is not subject:
            yield done
            return  # the visitor has moved on to another picture or model
        done |= {self.chatbot: _messages(session.turns), self.note: note("Stopped." if stopped else "")}
        if turn is None:  # stopped while the model was loading
            yield done
            return
        session.remember(name, turn)
        facts = [
            settings_text(generation),
            counted(turn.num_tokens, "token"),
            f"{time.monotonic() - began:.1f} s",
        ]
        remark = _remark(turn, last, generation, self.work.unknown_words(name, text))
        yield done | {  # all at once: of updates right after one another a page may lose one
            self.note: note("Stopped." if stopped else remark),
            self.history: self._record(session),
            self.receipt: receipt(name, turn.prompt, facts),
        }


def _remark(turn: Turn, last: Turn | None, generation: Generation, unknown: str) -> str:
    """What a visitor may want to know about an answer."""
    remarks = [turn.notice]
    if last is not None and turn.answer == last.answer and generation.method != "nucleus":
        remarks.append("The same again: this method always is. Nucleus sampling, under Parameters, varies.")
    return " ".join(filter(None, [*remarks, unknown]))


def _messages(turns: list[Turn], asked: str | None = None) -> list[dict[str, str]]:
    """Turns, and a question not yet answered, as the chat component takes them: HTML."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": plain(turn.question)})
        messages.append({"role": "assistant", "content": plain(turn.answer or SILENCE)})
    return messages + ([{"role": "user", "content": plain(asked)}] if asked else [])


def _suggestions(model: str) -> tuple[str, ...]:
    return DRAWN if embedded(model) else PHOTO
