"""The page: the picture on the left, what can be done with it on the right."""

from typing import Any

import gradio as gr

from blip2.devices import device_advice
from blip2.errors import ImageError
from blip2.ui import history
from blip2.ui.api import Api
from blip2.ui.caption import CaptionTab
from blip2.ui.compare import CompareTab
from blip2.ui.files import held
from blip2.ui.folder import FolderTab
from blip2.ui.instruct import InstructTab
from blip2.ui.picker import Picker
from blip2.ui.picture import PictureBox, refused
from blip2.ui.search import SearchTab
from blip2.ui.session import Session
from blip2.ui.tab import Tab, Updates
from blip2.ui.talk import ChatTab
from blip2.ui.theme import HEADER
from blip2.ui.votes import Votes
from blip2.ui.why import Why
from blip2.ui.words import note
from blip2.ui.work import Work

# Uploads: looked at every five minutes, deleted when older than fifty, so gone within the hour.
DELETE_CACHE = (300, 3000)
QUEUE = 64  # those who wait for a place in the line


def page(work: Work, votes: Votes) -> gr.Blocks:
    """Build the page; it keeps the shelf of models as `blip2_models`.

    Args:
        work: the models, and where they work.
        votes: where votes on compared answers go.
    """
    models = work.models
    with gr.Blocks(title="BLIP-2", analytics_enabled=False, delete_cache=DELETE_CACHE) as demo:
        state = gr.State(Session())
        with gr.Row(elem_id="top", equal_height=True):
            gr.HTML(HEADER, elem_id="header")
            picker = Picker(models, state)
        picker.notes()
        device_note = gr.HTML(elem_id="device-note")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320, elem_id="look"):
                box = PictureBox()
                why = Why(work, state, box.picture)
                with gr.Accordion("About the model", open=False, elem_id="about", elem_classes="settings"):
                    picker.about()
                earlier = history.panel()
            with gr.Column(scale=7, min_width=320, elem_id="ask"), gr.Tabs():
                with gr.Tab("Chat", id="chat"):
                    chat = ChatTab(work, state, box.picture, earlier, box.picked)
                with gr.Tab("Caption", id="caption", render_children=True):
                    caption = CaptionTab(work, state, box.picture)
                with gr.Tab("Instruct", id="instruct", render_children=True):
                    instruct = InstructTab(work, state, box.picture)
                with gr.Tab("Compare", id="compare", render_children=True):
                    compare = CompareTab(work, state, box.picture, votes)
                with gr.Tab("Folder", id="folder", render_children=True):
                    folder = FolderTab(work, state, box.picture)
                with gr.Tab("Search", id="search", render_children=True):
                    SearchTab(work, state, box.picture)
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

        def changed(session: Session) -> Updates:
            """The page after another model was chosen."""
            name = session.model or models.default
            updates: Updates = {**chat.suggest(name)}
            for tab in tabs:
                updates |= tab.cleared()
            return updates | chat.begun_anew(session, f"New model: a new chat begins, with {name}.")

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

        def tell() -> Updates:
            """What takes torch, which is imported while the page is served."""
            choices = models.choices()
            advice = device_advice() if models.local else None
            picks = {pick: gr.update(choices=choices) for pick in compare.picks}
            return picker.told(choices) | picks | {device_note: note(advice or "")}

        late = [picker.list, picker.card, picker.best, device_note, *compare.picks]
        demo.load(tell, None, late, queue=False, **private)
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
        real = [tab.real for tab in (*tabs, folder)]
        picker.wire(changed, [*chat.suggestions, *cleared], real)
        Api(work).add()
    demo.queue(max_size=QUEUE, default_concurrency_limit=8)
    demo.blip2_models = models
    return demo
