"""The page: the picture on the left, what can be done with it on the right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from blip2.devices import device_advice
from blip2.errors import ImageError
from blip2.ui import history
from blip2.ui.api import Api
from blip2.ui.caption import CaptionTab
from blip2.ui.compare import CompareTab
from blip2.ui.errors import EXPECTED, friendly
from blip2.ui.files import held
from blip2.ui.instruct import InstructTab
from blip2.ui.models import Models
from blip2.ui.picture import PictureBox, refused
from blip2.ui.session import Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.talk import ChatTab
from blip2.ui.theme import HEADER
from blip2.ui.why import Why
from blip2.ui.words import note
from blip2.ui.work import Work

# Uploads: looked at every five minutes, deleted when older than fifty, so gone within the hour.
DELETE_CACHE = (300, 3000)
QUEUE = 64  # those who wait for a place in the line


def page(models: Models, votes: Path | None = None) -> gr.Blocks:
    """Build the page over a shelf of models, which it keeps as `blip2_models`.

    Args:
        models: the shelf.
        votes: a file for votes on compared answers; None keeps none.
    """
    with gr.Blocks(title="BLIP-2", analytics_enabled=False, delete_cache=DELETE_CACHE) as demo:
        state, work = gr.State(Session()), Work(models)
        with gr.Row(elem_id="top", equal_height=True):
            gr.HTML(HEADER, elem_id="header")
            picker = gr.Dropdown(
                models.choices(),
                value=models.default,
                label="Model",
                allow_custom_value=models.local,
                elem_id="model",
                min_width=300,
                scale=0,
            )
        model_note = gr.HTML(elem_id="model-note")
        device_note = gr.HTML(elem_id="device-note")
        notice = gr.HTML(models.notice(models.default), elem_id="notice")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320, elem_id="look"):
                box = PictureBox()
                why = Why(work, state, box.picture)
                with gr.Accordion("About the model", open=False, elem_id="about", elem_classes="settings"):
                    card = gr.HTML(models.card(models.default), elem_id="card")
                earlier = history.panel()
            with gr.Column(scale=7, min_width=320, elem_id="ask"), gr.Tabs():
                with gr.Tab("Chat", id="chat"):
                    chat = ChatTab(work, state, box.picture, earlier)
                with gr.Tab("Caption", id="caption", render_children=True):
                    caption = CaptionTab(work, state, box.picture)
                with gr.Tab("Instruct", id="instruct", render_children=True):
                    instruct = InstructTab(work, state, box.picture)
                with gr.Tab("Compare", id="compare", render_children=True):
                    compare = CompareTab(work, state, box.picture, votes)
        tabs: list[Tab] = [chat, caption, instruct, compare, why]
        cleared = [component for tab in tabs for component in tab.cleared()]

        def look(session: Session, picture: tuple[str | None, str]) -> Updates:
            """The page after the picture changed, by whatever way."""
            if picture[0] is None:
                return {box.note: gr.skip()}  # the empty box itself says what to do
            try:
                if not session.look(*picture):
                    return {box.note: gr.skip()}
            except ImageError as error:
                value, sentence = refused(error, session.subject.path)
                return {box.picture: value, box.note: sentence}
            updates: Updates = {box.note: ""}
            for tab in tabs:
                updates |= tab.cleared()
            return updates | chat.begun_anew(session, "New picture: a new chat begins.")

        def choose(session: Session, name: str | None) -> Iterator[Updates]:
            """The page after another model was chosen; it stays with the old one where that fails."""
            before = session.model or models.default
            name = (name or before).strip()
            try:
                if not models.is_loaded(name):
                    yield {model_note: note(f"Loading {name} ...")}
                models.get(name)
            except EXPECTED as error:
                sentence = f"{friendly(error).rstrip('.')}. {before} stays in use."
                about = {card: models.card(name)} if name in models.names else {}
                yield {model_note: note(sentence, "error"), picker: before, **about}
                return
            session.use(name)
            updates: Updates = {
                model_note: "",
                notice: models.notice(name),
                card: models.card(name),
                **chat.suggest(name),
            }
            for tab in tabs:
                updates |= tab.cleared()
            yield updates | chat.begun_anew(session, f"New model: a new chat begins, with {name}.")

        def reopen(session: Session, kept: Any) -> Updates:
            """The page with a conversation that the visitor's browser had kept."""
            try:
                key, data, name, turns = history.opened(kept)
                path = held(box.picture, data, name)
                session.look(path, name)
            except ValueError as error:
                return {chat.note: note(str(error), "error")}
            session.forget()
            session.subject.conversation.id = key
            session.turns[:] = turns
            updates: Updates = {box.picture: path, box.note: ""}
            for tab in tabs:
                updates |= tab.cleared()
            return updates | chat.shown(session)

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        if models.local:  # asked once a page opens: it takes torch, imported while the page is served
            demo.load(lambda: note(device_advice() or ""), None, device_note, queue=False, **private)
        # on opening too, so that a bad upload can give way to the picture that was open at first
        gr.on(
            [demo.load, box.picture.change],
            look,
            [state, box.picture],
            [box.picture, box.note, *cleared],
            trigger_mode="multiple",  # a change while one is under way must not get lost
            **private,
        )
        shown = [box.picture, box.note, chat.go, chat.halt, *cleared]
        earlier.select(reopen, [state, earlier], shown, **private)
        picker.input(
            choose,
            [state, picker],
            [picker, model_note, notice, card, *chat.suggestions, *cleared],
            **private,
        )
        Api(work).add()
    demo.queue(max_size=QUEUE, default_concurrency_limit=8)
    demo.blip2_models = models
    return demo
