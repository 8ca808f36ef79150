"""The Instruct tab: one free instruction about the picture, answered zero-shot (Sec. 3.3, Fig. 4)."""

import time
from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr

from blip2.generation import Generation, num_descriptions
from blip2.processing import Style
from blip2.ui.answers import streamed
from blip2.ui.models import Models
from blip2.ui.parameters import Parameters
from blip2.ui.session import Session, question
from blip2.ui.tab import Tab, Updates, unknown_words
from blip2.ui.words import SILENCE, counted, note, receipt, settings_text

FRAMES = [
    ("The model's own question frame", "auto"),
    ("Question: … Answer:", "question"),
    ("Question: … Short answer:", "short"),
    ("None, as typed", "raw"),
]


class InstructTab(Tab):
    """Controls and events; see `Tab`."""

    def __init__(self, models: Models, state: gr.State, picture: gr.Image):
        super().__init__(models, state, picture)
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
        generation = self.parameters.generation(values)
        text = question(text)
        session.look(*picture)
        name, subject = session.model or self.models.default, session.subject
        start = time.monotonic()
        with session.answering() as stop:
            yield self.busy(name) | {self.answer: "", self.receipt: ""}
            loaded = self.models.get(name)
            style: Style | None = next((style for style in get_args(Style) if style == frame), None)
            chat = session.single(loaded, style)
            chat.describe = num_descriptions(chat.model, self.parameters.describe(values))
            if stop.is_set():  # while it was loading
                yield self.idle(session) | {self.note: note("Stopped.")}
                return
            for progress in streamed(chat, lambda: chat.stream(text, generation), generation, stop):
                yield {self.answer: progress.text, self.note: note(progress.doing)}
            stopped = stop.is_set()
        yield self.idle(session)
        if session.subject != subject:
            return  # the visitor has moved on to another picture or model
        turn = chat.turns[-1]
        session.remember(name, turn)
        facts = [
            settings_text(generation),
            counted(turn.num_tokens, "token"),
            f"{time.monotonic() - start:.1f} s",
        ]
        yield {
            self.note: note("Stopped." if stopped else unknown_words(loaded, text)),
            self.answer: turn.answer or SILENCE,
            self.receipt: receipt(name, turn.prompt, facts),
        }
