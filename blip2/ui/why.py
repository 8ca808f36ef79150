"""The panel under the picture that looks into the last answer: its words' probabilities, and a map."""

import html
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch

from blip2 import explain
from blip2.images import open_image
from blip2.model import Blip2
from blip2.ui.answers import Background
from blip2.ui.models import Models
from blip2.ui.session import Answered, Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.words import note

MAPS = [("Which parts mattered", "occlusion"), ("Where the queries looked", "attention")]
SAYS = {
    "occlusion": "Red: hiding this part makes the answer less likely. Measured by hiding each in turn.",
    "attention": "Red: where the Q-Former's queries read the picture. It does not explain the answer.",
}


class Why(Tab):
    """Controls and events; see `Tab`."""

    def __init__(self, models: Models, state: gr.State, picture: gr.Image):
        super().__init__(models, state, picture)
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
        session.look(*picture)
        answered, subject = session.answered, session.subject
        if answered is None:
            raise ValueError("There is no answer to look into yet: ask something first.")

        def work() -> tuple[list[explain.Token], torch.Tensor]:
            loaded = self.models.get(answered.model)
            assert isinstance(loaded.model, Blip2)
            image = session.features(loaded)
            texts = (answered.prompt, answered.answer, answered.question)
            tokens = explain.token_probabilities(loaded.model, loaded.processor, image, *texts)
            if kind == "occlusion":
                return tokens, explain.occlusion(loaded.model, loaded.processor, opened, *texts, stop=stop)
            asked = loaded.processor.question(answered.question)
            asked = {name: ids.to(loaded.device) for name, ids in asked.items()}
            attention = explain.query_attention(loaded.model, image, asked)
            where, which = (
                _chosen("Layer", layer, len(attention)),
                _chosen("Query", query, attention.shape[3]),
            )
            return tokens, explain.attention_map(attention, -1 if where is None else where, which)[0]

        with session.answering() as stop:
            yield self.busy(answered.model) | {self.caption: ""}
            opened = open_image(Path(session.path or "").read_bytes())
            looking = Background(work, stop)
            for seconds in looking.ticks():
                yield {self.note: note(f"Looking, {seconds:.0f} s ...")}
            tokens, weights = looking.result()
            stopped = stop.is_set()
        yield self.idle(session)
        if session.subject != subject:
            return  # the visitor has moved on to another picture or model
        yield {
            self.note: note("Stopped: the map is not whole." if stopped else ""),
            self.tokens: _tokens(tokens, answered),
            self.map: gr.update(value=explain.overlay(opened, weights), visible=True),
            self.caption: f'<p class="fine-print">{SAYS[kind]}</p>',
        }


def _chosen(label: str, value: float | None, count: int) -> int | None:
    """What the page counts from 1, from 0."""
    if value is not None and not 1 <= value <= count:
        raise ValueError(f"{label} is {value:g}; this model has 1 to {count}.")
    return None if value is None else int(value) - 1


def _tokens(tokens: list[explain.Token], answered: Answered) -> str:
    """HTML: each token with its probability as a bar, and what else might have been said."""
    rows = "".join(
        f"<tr><td>{html.escape(token.text.strip())}</td>"
        f'<td><meter min="0" max="1" value="{token.probability:.4f}"></meter> {token.probability:.0%}</td>'
        f"<td>{', '.join(f'{html.escape(text)} {chance:.0%}' for text, chance in token.others[:3])}</td></tr>"
        for token in tokens
    )
    return (
        f'<table class="tokens"><caption>{html.escape(answered.question)}</caption>'
        "<tr><th>said</th><th>probability</th><th>otherwise</th></tr>" + rows + "</table>"
    )
