"""The Caption tab: several captions of the picture at once (Sec. 4.2)."""

import html
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from blip2.settings import Generation
from blip2.ui.cards import caption_prompt
from blip2.ui.parameters import Parameters
from blip2.ui.session import Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.words import note, receipt, settings_text
from blip2.ui.work import Work

EMPTY = '<div class="captions empty">The captions will stand here.</div>'


class CaptionTab(Tab):
    """Controls and events; see `Tab`."""

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        super().__init__(work, state, picture)
        self.parameters = Parameters(Generation.caption(num_captions=3), several=True)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Caption the picture", variant="primary", min_width=160)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("caption-note")
        self.captions = gr.HTML(EMPTY, elem_id="captions")
        self.receipt = gr.HTML(elem_id="caption-receipt")
        outputs = [self.captions, self.receipt]
        self.wire([self.go.click], self.run, self.parameters.inputs, outputs)
        self.wire_anyway(self.run, self.parameters.inputs, outputs)
        self.wire_stop()

    def cleared(self) -> Updates:
        """The tab as for a new picture or model."""
        return super().cleared() | {self.captions: EMPTY, self.receipt: ""}

    def run(self, session: Session, picture: tuple[str | None, str], *values: Any) -> Iterator[Updates]:
        """Write captions; yields what to change on the page."""
        generation = self.parameters.generation(values)
        session.look(*picture)
        name, subject = session.model or self.models.default, session.subject
        prompt = caption_prompt(name)
        captions, start = None, time.monotonic()
        with session.answering() as stop:
            yield self.busy(name) | {self.receipt: ""}
            for said in self.work.run("caption", [name], subject, prompt, generation, stop=stop):
                if isinstance(said, list):
                    captions = said
                else:
                    yield {self.note: note(said.doing)}
            stopped = stop.is_set()
        last = self.idle(session)
        if session.subject is subject:  # else the visitor has moved on to another picture or model
            last |= {self.note: note("Stopped." if stopped else "")}
            if captions is not None:
                facts = [settings_text(generation), f"{time.monotonic() - start:.1f} s"]
                last |= {self.captions: _list(captions), self.receipt: receipt(name, prompt, facts)}
        yield last


def _list(captions: list[str]) -> str:
    items = "".join(f"<li>{html.escape(text) or '<em>no words</em>'}</li>" for text in captions)
    return f'<ol class="captions" aria-live="polite">{items}</ol>'
