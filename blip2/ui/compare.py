"""The Compare tab: the same question to two models, about the same picture, at the same time."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import gradio as gr

from blip2.conversation import Turn
from blip2.presets import EMBEDDED, PRESETS
from blip2.settings import Generation
from blip2.ui.answers import Progress
from blip2.ui.cards import adapter_of, split, title
from blip2.ui.errors import friendly, question
from blip2.ui.models import Models
from blip2.ui.parameters import Parameters
from blip2.ui.session import Session
from blip2.ui.tab import QUIET, Tab, Updates
from blip2.ui.votes import Votes
from blip2.ui.words import SILENCE, counted, note, receipt, settings_text
from blip2.ui.work import Work

SIDES = ("A", "B")
VOTES = ("A is better", "B is better", "Tie", "Neither")


class CompareTab(Tab):
    """Controls and events; see `Tab`.

    Args:
        votes: where votes go, with the texts they are about.
    """

    def __init__(self, work: Work, state: gr.State, picture: gr.Image, votes: Votes):
        super().__init__(work, state, picture)
        self.kept = votes
        self.box = gr.Textbox(
            label="Question for both", placeholder="what color is the circle?", max_lines=8, elem_id="both"
        )
        with gr.Row():
            self.picks = [
                gr.Dropdown(
                    self.models.choices(look=False),
                    value=name,
                    label=f"Model {side}",
                    allow_custom_value=self.models.local,
                    min_width=220,
                )
                for side, name in zip(SIDES, pair(self.models), strict=True)
            ]
        same = gr.Checkbox(
            False,
            label="Send both the same text",
            info="as typed; otherwise each gets the question in the frame it was evaluated with",
        )
        self.parameters = Parameters(Generation(), questions=True)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Ask both", variant="primary", min_width=160)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("compare-note")
        self.answers, self.receipts = [], []
        with gr.Row(elem_classes="sides"):
            for side in SIDES:
                with gr.Column(min_width=260):
                    self.answers.append(
                        gr.Textbox(
                            label=f"Answer {side}",
                            interactive=False,
                            lines=2,
                            max_lines=12,
                            buttons=["copy"],
                            elem_id=f"answer-{side.lower()}",
                        )
                    )
                    self.receipts.append(gr.HTML(elem_id=f"receipt-{side.lower()}"))
        with gr.Row(elem_classes="actions small"):
            self.votes = [gr.Button(text, size="sm", interactive=False, min_width=110) for text in VOTES]
        self.tally = gr.HTML(elem_id="tally")
        where = (
            "kept by the app's operator, with the question and the answers" if votes else "counted here alone"
        )
        gr.Markdown(f"Votes are {where}; pictures are never kept.", elem_classes="fine-print")
        inputs = [self.box, *self.picks, same, *self.parameters.inputs]
        outputs = [*self.answers, *self.receipts, *self.votes]
        self.wire([self.go.click, self.box.submit], self.run, inputs, outputs)
        self.wire_anyway(self.run, inputs, outputs)
        self.wire_stop()
        for text, button in zip(VOTES, self.votes, strict=True):
            button.click(partial(self.vote, text), state, [self.tally, *self.votes], **QUIET)

    def cleared(self) -> Updates:
        """The tab as for a new picture or model; the question stays."""
        empty = dict.fromkeys((*self.answers, *self.receipts), "")
        return super().cleared() | empty | self._votable(False)

    def _votable(self, possible: bool) -> Updates:
        return {button: gr.update(interactive=possible) for button in self.votes}

    def run(
        self,
        session: Session,
        picture: tuple[str | None, str],
        text: str,
        first: str | None,
        second: str | None,
        same: bool,
        *values: Any,
    ) -> Iterator[Updates]:
        """Ask both; yields what to change on the page."""
        generation, describe = self.parameters.generation(values), self.parameters.describe(values)
        text = question(text)
        session.look(*picture)
        session.compared = None
        names = [name.strip() for name in (first, second) if name and name.strip()]
        if len(names) < 2:
            raise ValueError("There are two models to choose: A or B is empty.")
        subject, style = session.subject, "raw" if same else None
        turns: dict[int, Turn] = {}
        finished: Updates = {}
        start = time.monotonic()
        with session.answering() as stop:
            empty = dict.fromkeys((*self.answers, *self.receipts), "")
            missing = [name for name in names if not self.models.is_loaded(name)]
            yield self.busy(*missing[:1] or names[:1]) | empty | self._votable(False)
            task = ("compare", names, subject, text, generation, describe, style)
            for item in self.work.run(*task, stop=stop):
                if isinstance(item, Progress):
                    yield {self.note: note(item.doing)}
                    continue
                side, said = item
                if isinstance(said, BaseException):
                    self.work.relieve(said, [names[side]])
                    finished |= {self.receipts[side]: note(friendly(said), "error")}
                    yield finished
                elif isinstance(said, Turn):
                    turns[side] = said
                    seconds = time.monotonic() - start
                    finished |= self._finished(side, names[side], said, generation, seconds)
                    yield finished
                else:
                    yield {self.answers[side]: said.text, self.note: note(said.doing)}
            stopped = stop.is_set()
        last = self.idle(session)
        if session.subject is not subject:
            yield last
            return  # the visitor has moved on to another picture
        unknown = dict.fromkeys(self.work.unknown_words(name, text) for name in names)
        last |= finished | {self.note: note("Stopped." if stopped else " ".join(unknown).strip())}
        if len(turns) == 2 and not stopped:
            sides = {
                side: {"model": names[which], "prompt": turns[which].prompt, "answer": turns[which].answer}
                for which, side in enumerate(SIDES)
            }
            session.compared = {"question": text, "settings": asdict(generation), **sides}
            last |= self._votable(True)
        yield last

    def _finished(self, side: int, name: str, turn: Turn, generation: Generation, seconds: float) -> Updates:
        facts = [settings_text(generation), counted(turn.num_tokens, "token"), f"{seconds:.1f} s"]
        return {
            self.answers[side]: turn.answer or SILENCE,
            self.receipts[side]: receipt(name, turn.prompt, facts),
        }

    def vote(self, text: str, session: Session) -> Updates:
        """Count a vote, once for each pair of answers."""
        compared, session.compared = session.compared, None
        if compared is None:
            return self._votable(False)
        try:
            self.kept.append({"time": round(time.time()), "vote": text, **compared})
        except OSError as error:
            return {self.tally: note(friendly(error), "error")} | self._votable(False)
        models = [compared[side]["model"] for side in SIDES]
        for model in models:
            session.votes.setdefault(model, 0)
        if text in VOTES[:2]:
            session.votes[models[VOTES.index(text)]] += 1
        else:
            session.votes[text] = session.votes.get(text, 0) + 1
        counts = ", ".join(f"{title(name)} {count}" for name, count in session.votes.items())
        return self._votable(False) | {self.tally: note(f"Your votes: {counts}.")}


def pair(models: Models) -> tuple[str, str]:
    """An adapter beside its model; else an OPT beside a Flan-T5: embedded, or the operator's and another."""
    if models.only is not None:  # nothing else is served
        first, *others = sorted(models.names, key=lambda name: "t5" in name)
        return first, others[-1] if others else first
    if worn := adapter_of(split(models.default)[0]):
        return worn.base, models.default
    embedded = tuple(name for name in EMBEDDED if PRESETS[name].kind == "generate")
    if models.default in embedded:
        return embedded[0], embedded[1]
    other = "blip2-opt-2.7b" if "t5" in models.default else "blip2-flan-t5-xl"
    return (other, models.default) if "t5" in models.default else (models.default, other)
