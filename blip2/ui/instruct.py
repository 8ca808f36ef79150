"""The Instruct tab: one free instruction about the picture, answered zero-shot (Sec. 3.3, Fig. 4)."""

import time
from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr

from blip2.conversation import Turn
from blip2.settings import Generation, Style
from blip2.ui.errors import question
from blip2.ui.parameters import Parameters
from blip2.ui.session import Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.words import SILENCE, counted, note, receipt, settings_text
from blip2.ui.work import Work

FRAMES = [
    ("The model's own question frame", "auto"),
    ("Question: … Answer:", "question"),
    ("Question: … Short answer:", "short"),
    ("None, as typed", "raw"),
]


class InstructTab(Tab):
    """Controls and events; see `Tab`."""

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        super().__init__(work, state, picture)
        self.box = gr.Textbox(
            label="Instruction",
            placeholder="what color is the circle?",
            max_lines=8,
            elem_id="instruction",
        )
        frame = gr.Dropdown(
            FRAMES,
            value="auto",
            label="Frame",
            info="what is put around the instruction; the prompt as sent is shown below the answer",
            filterable=False,
        )
        self.parameters = Parameters(Generation.answer(), questions=True)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Answer", variant="primary", min_width=160)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("instruct-note")
        self.answer = gr.Textbox(
            label="Answer",
            interactive=False,
            lines=2,
            max_lines=12,
            buttons=["copy"],
            placeholder="The answer will stand here.",
            elem_id="answer",
        )
        self.receipt = gr.HTML(elem_id="instruct-receipt")
        inputs = [self.box, frame, *self.parameters.inputs]
        outputs = [self.answer, self.receipt]
        self.wire([self.go.click, self.box.submit], self.run, inputs, outputs)
        self.wire_anyway(self.run, inputs, outputs)
        self.wire_stop()

    def cleared(self) -> Updates:
        """The tab as for a new picture or model; the instruction stays."""
        return super().cleared() | {self.answer: "", self.receipt: ""}

    def run(
        self, session: Session, picture: tuple[str | None, str], text: str, frame: str, *values: Any
    ) -> Iterator[Updates]:
        """Answer one instruction; yields what to change on the page."""
        generation, describe = self.parameters.generation(values), self.parameters.describe(values)
        text = question(text)
        session.look(*picture)
        name, subject = session.model or self.models.default, session.subject
        style: Style | None = next((style for style in get_args(Style) if style == frame), None)
        turn, start = None, time.monotonic()
        with session.answering() as stop:
            yield self.busy(name) | {self.answer: "", self.receipt: ""}
            task = ("instruct", [name], subject, text, generation, describe, style)
            for said in self.work.run(*task, stop=stop):
                if isinstance(said, Turn):
                    turn = said
                else:
                    yield {self.answer: said.text, self.note: note(said.doing)}
            stopped = stop.is_set()
        last = self.idle(session)
        if session.subject is not subject:
            yield last
            return  # the visitor has moved on to another picture or model
        last |= {self.note: note("Stopped." if stopped else self.work.unknown_words(name, text))}
        if turn is None:  # stopped while the model was loading
            yield last
            return
        session.remember(name, turn)
        facts = [
            settings_text(generation),
            counted(turn.num_tokens, "token"),
            f"{time.monotonic() - start:.1f} s",
        ]
        yield last | {self.answer: turn.answer or SILENCE, self.receipt: receipt(name, turn.prompt, facts)}
