"""The panel under the picture that looks into the last answer: its words' probabilities, and a map."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from blip2.ui.answers import Progress
from blip2.ui.session import Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.words import note
from blip2.ui.work import Work

if TYPE_CHECKING:
    from blip2.explain import Token

MAPS = [("Which parts mattered", "occlusion"), ("Where the queries looked", "attention")]
SAYS = {
    "occlusion": "Red: hiding this part makes the answer less likely. Measured by hiding each in turn; what "
    "the prompt says of the picture stays.",
    "attention": "Red: where the Q-Former's queries read the picture. It does not explain the answer.",
}


class Why(Tab):
    """Controls and events; see `Tab`."""

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        super().__init__(work, state, picture)
        with gr.Accordion("Why this answer?", open=False, elem_id="why", elem_classes="settings"):
            kind = gr.Radio(MAPS, value="occlusion", label="About the last answer")
            with gr.Row(visible=False) as reading:
                layer = gr.Number(None, label="Layer", info="1 is the first; empty: the last", precision=0)
                query = gr.Number(None, label="Query", info="1 is the first; empty: the mean", precision=0)
            with gr.Row(elem_classes="actions"):
                self.go = gr.Button("Look into it", min_width=140)
                self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
            self.add_note("why-note")
            self.tokens = gr.HTML(elem_id="tokens")
            self.map = gr.Image(
                show_label=False,
                label="Map",
                interactive=False,
                buttons=["fullscreen"],
                visible=False,
                alt_text="The picture under the map",
                elem_id="map",
            )
            self.caption = gr.HTML(elem_id="map-caption")
        kind.change(
            lambda chosen: gr.update(visible=chosen == "attention"),
            kind,
            reading,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        self.wire([self.go.click], self.run, [kind, layer, query], [self.tokens, self.map, self.caption])
        self.wire_stop()

    def cleared(self) -> Updates:
        """The panel as for a new picture or model."""
        return super().cleared() | {self.tokens: "", self.map: gr.update(visible=False), self.caption: ""}

    def run(
        self,
        session: Session,
        picture: tuple[str | None, str],
        kind: str,
        layer: float | None,
        query: float | None,
    ) -> Iterator[Updates]:
        """Look into the last answer; yields what to change on the page."""
        from blip2.explain import overlay

        session.look(*picture)
        answered, subject = session.answered, session.subject
        if answered is None:
            raise ValueError("There is no answer to look into yet: ask something first.")

        name, turn = answered.model, answered.turn
        task: tuple[Any, ...] = ("occlude", [name], subject, turn)
        if kind == "attention":
            task = ("attend", [name], subject, turn, layer, query)
        found = None
        with session.answering() as stop:
            yield self.busy(name) | {self.caption: ""}
            for said in self.work.run(*task, stop=stop):
                if isinstance(said, Progress):
                    yield {self.note: note(said.doing)}
                else:
                    found = said
            stopped = stop.is_set()
        last = self.idle(session)
        if session.subject is not subject:
            yield last
            return  # the visitor has moved on to another picture or model
        last |= {self.note: note("Stopped: the map is not whole." if stopped else "")}
        if found is not None:
            tokens, weights = found
            last |= {
                self.tokens: _tokens(tokens, turn.question),
                self.map: gr.update(value=overlay(subject.image(), weights), visible=True),
                self.caption: f'<p class="fine-print">{SAYS[kind]}</p>',
            }
        yield last


def _tokens(tokens: list[Token], question: str) -> str:
    """HTML: each token with its probability as a bar, and what else might have been said."""
    rows = ""
    for token in tokens:
        others = ", ".join(f"{html.escape(text)} {_percent(chance)}" for text, chance in token.others[:3])
        meter = (
            f'<meter min="0" max="1" value="{token.probability:.4f}"></meter> {_percent(token.probability)}'
        )
        rows += f"<tr><td>{html.escape(token.text.strip())}</td><td>{meter}</td><td>{others}</td></tr>"
    return (
        f'<table class="tokens"><caption>{html.escape(question)}</caption>'
        "<tr><th>said</th><th>probability</th><th>otherwise</th></tr>" + rows + "</table>"
    )


def _percent(chance: float) -> str:
    """HTML: a percentage."""
    return "&lt;1%" if 0 < chance < 0.01 else f"{chance:.0%}"
