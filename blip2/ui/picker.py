"""The model picker: a list, a precision, how far a load or download is, and a way out of it."""

import html
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr

from blip2.presets import EMBEDDED, PRESETS, find_preset, gigabytes
from blip2.ui.cards import FULL, join, label, split, title
from blip2.ui.errors import EXPECTED, friendly
from blip2.ui.models import Models
from blip2.ui.session import Session
from blip2.ui.tab import QUIET, Updates
from blip2.ui.words import note

GET = "Get a real model"
NO_BEST = (
    "No released model fits this machine's memory and disk: the smallest takes 3 GB of memory and 15 GB of "
    "disk. Close other programs, or start the app on a larger machine."
)


class Wish(threading.Event):
    """A change of models under way; set once it is over, or given up.

    Attributes:
        shown: the model that the list shows meanwhile.
        granted: it has come about, and can no longer be given up.
    """

    def __init__(self, shown: str):
        super().__init__()
        self.shown, self.granted = shown, False


class Picker:
    """The components, placed by `__init__`, `notes`, and `about`, and their events, by `wire`.

    Args:
        models: the shelf.
        state: the visitor's `Session`.

    Attributes:
        list: the dropdown; its value is a name without precision.
        precision: full, 8-bit or 4-bit; seen for released checkpoints and folders, where there is a choice.
        note: the line that tells how far a load is, or what went wrong.
    """

    def __init__(self, models: Models, state: gr.State):
        self.models, self.state = models, state
        self._wishes: WeakKeyDictionary[Session, Wish] = WeakKeyDictionary()
        self._missing: WeakKeyDictionary[Session, str] = WeakKeyDictionary()
        with gr.Column(scale=0, min_width=300, elem_id="pick"):
            self.list = gr.Dropdown(
                models.choices(look=False),
                value=self._listed(models.default),
                label="Model",
                allow_custom_value=models.local,
                elem_id="model",
            )
            choices = self._precisions(models.default)
            self.precision = gr.Radio(
                choices or [("Full", FULL)],
                value=split(models.default)[1] if choices else FULL,
                label="Precision",
                visible=bool(choices),
                elem_id="precision",
            )

    def notes(self) -> None:
        """Place the lines under the page's head."""
        with gr.Row(elem_id="model-line", equal_height=True):
            self.note = gr.HTML(elem_id="model-note")
            self.cancel = gr.Button("Cancel", variant="stop", size="sm", visible=False, min_width=90, scale=0)
            self.fetch = gr.Button("Download it", size="sm", visible=False, min_width=120, scale=0)
        self.notice = gr.HTML(self.models.notice(self.models.default), elem_id="notice")

    def about(self) -> None:
        """Place what is said about the model, and the button that gets a real one."""
        self.card = gr.HTML(elem_id="card")
        self.best = gr.HTML(elem_classes="fine-print")
        self.real = gr.Button(GET, size="sm", visible=self.models.local, min_width=160)

    def told(self, choices: list[tuple[str, str]]) -> Updates:
        """What a page that has just opened is told: it was served before torch and the cache were there.

        Args:
            choices: `Models.choices`.
        """
        best = ""
        if self.models.local and (name := self.models.best()):
            license = PRESETS[split(name)[0]].license
            best = f"The best for photographs on this machine: {label(name)}. {license}"
        return {
            self.list: gr.update(choices=choices),
            self.card: self.models.card(self.models.default),
            self.best: html.escape(best),
        }

    def wire(
        self,
        changed: Callable[[Session], Updates],
        outputs: list[Any],
        buttons: list[gr.Button] | None = None,
    ) -> None:
        """Connect the events.

        Args:
            changed: given a session that has just changed models, what else to change on the page.
            outputs: the components that `changed` changes.
            buttons: others that get a real model, in other places of the page; seen where visitors may load
                models (`models.local`) alone.
        """
        self._changed = changed
        own = [self.list, self.precision, self.note, self.cancel, self.fetch, self.notice, self.card]
        waiting: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "trigger_mode": "multiple",  # another choice while one is under way takes its place
            "concurrency_limit": 16,  # it waits, and computes nothing
        }
        self.list.input(self.choose, [self.state, self.list], [*own, *outputs], **waiting)
        chosen = [self.state, self.list, self.precision]
        self.precision.input(self.choose_precision, chosen, [*own, *outputs], **waiting)
        clicks = [button.click for button in [self.real, *(buttons or [])]]
        gr.on(clicks, self.get_real, self.state, [*own, *outputs], **waiting)
        self.fetch.click(self.get_missing, self.state, [*own, *outputs], **waiting)
        self.cancel.click(self.close, self.state, [self.note, self.cancel, self.fetch], **QUIET)

    # --- events ---

    def choose(self, session: Session, name: str | None) -> Iterator[Updates]:
        """Change models; the page stays with the old one where that fails, or is cancelled.

        Without a precision in its name a model comes in the best that there is memory for.
        """
        wish, before = self._wishes.get(session), session.model or self.models.default
        name = (name or before).strip()
        shown = wish.shown if wish and not wish.is_set() else before
        if name in (shown, self._listed(shown)):
            yield {self.list: gr.skip()}  # the list tells of its value when it loses the focus, too
            return
        yield from self._guarded(session, name, self._choosing(session, name))

    def choose_precision(self, session: Session, name: str | None, precision: str) -> Iterator[Updates]:
        """Change the precision: another model, which is loaded."""
        name = (name or session.model or self.models.default).strip()
        yield from self._guarded(session, name, self._choosing(session, name, precision))

    def get_real(self, session: Session) -> Iterator[Updates]:
        """Download the best released checkpoint for this machine, if it is not here, and change to it."""
        name = self.models.best() if self.models.local else None
        if name is None:
            yield {self.note: note(NO_BEST, "error")} | self._at_rest(close=True)
            return
        yield from self._guarded(session, name, self._getting(session, name))

    def get_missing(self, session: Session) -> Iterator[Updates]:
        """Download what was chosen and is not here, and change to it."""
        if name := self._missing.pop(session, None):
            yield from self._guarded(session, name, self._getting(session, name))

    def give_up(self, session: Session) -> None:
        """Wait no longer for the load or download under way."""
        if wish := self._wishes.get(session):
            wish.set()

    def close(self, session: Session) -> Updates:
        """Cancel, or where nothing is under way, put away what was said."""
        if (wish := self._wishes.get(session)) and not wish.is_set():
            wish.set()
            return {self.note: gr.skip()}
        return {self.note: "", **self._at_rest()}

    # --- how they go ---

    def _guarded(self, session: Session, name: str, going: Iterator[Updates]) -> Iterator[Updates]:
        """Do that, and show the model before where it fails."""
        self.give_up(session)
        before = session.model or self.models.default
        wish = self._wishes[session] = Wish(before)
        try:
            yield from going
            if wish.granted or self._wishes.get(session) is not wish:
                return  # or the visitor has chosen anew, and the page is about that
            said = {self.note: note(f"Cancelled. {title(before)} stays in use.")}
        except EXPECTED as error:
            if self._wishes.get(session) is not wish:
                return
            sentence = f"{friendly(error).rstrip('.')}. {title(before)} stays in use."
            said = {self.note: note(sentence, "error"), **self._offer_download(session, name)}
        finally:
            wish.set()
        yield self._shown(before) | self._at_rest(close=True) | said

    def _choosing(self, session: Session, name: str, precision: str | None = None) -> Iterator[Updates]:
        wish = self._wishes[session]
        full = join(split(name)[0], precision) if precision else self.models.fitting(name)
        wish.shown = full
        shown = self._shown(full)
        if not self.models.is_loaded(full):
            # Once: a visitor may choose another precision meanwhile, which a second update would undo.
            yield shown | self._under_way(f"Loading {title(full)} ...")
            shown = {}
        for doing in self.models.load(full, wish):
            yield self._under_way(f"{doing} ...")
        if wish.is_set():
            return
        self.models.get(full)
        wish.granted = True
        session.use(full)
        about = {self.notice: self.models.notice(full), self.card: self.models.card(full), self.note: ""}
        yield shown | self._at_rest() | about | self._changed(session)

    def _getting(self, session: Session, name: str) -> Iterator[Updates]:
        wish, preset = self._wishes[session], find_preset(split(name)[0])
        license = f" {preset.license}" if preset else ""
        yield {self.card: self.models.card(name)} | self._at_rest()
        for doing in self.models.download(name, wish):
            yield self._under_way(f"{doing}.{license}")
        if not wish.is_set():
            yield {self.list: gr.update(choices=self.models.choices())}
            yield from self._choosing(session, name)

    def _under_way(self, doing: str) -> Updates:
        """The lines under the head while something can be cancelled."""
        cancel = gr.update(value="Cancel", visible=True)
        return {self.note: note(doing), self.cancel: cancel, self.fetch: gr.update(visible=False)}

    def _at_rest(self, close: bool = False) -> Updates:
        """The buttons there when nothing can be cancelled; with one that puts a sentence away, if `close`."""
        cancel = gr.update(value="Close" if close else "Cancel", visible=close)
        return {self.cancel: cancel, self.fetch: gr.update(visible=False)}

    def _listed(self, name: str) -> str:
        """The list's value for a model: with a precision where the list has it so."""
        return name if name in self.models.names else split(name)[0]

    def _shown(self, name: str) -> Updates:
        """The list and the precision as they stand for a model."""
        precision = gr.update(visible=False)
        if choices := self._precisions(name):
            precision = gr.update(choices=choices, value=split(name)[1], visible=True)
        return {self.list: self._listed(name), self.precision: precision}

    def _precisions(self, name: str) -> list[tuple[str, str]]:
        """What to choose from, and what was typed."""
        choices, own = self.models.precisions(name), split(name)[1]
        typed = choices and own not in {value for _, value in choices}
        return [*choices, (own, own)] if typed else choices

    def _offer_download(self, session: Session, name: str) -> Updates:
        """The card of what was asked for, and a button that downloads it."""
        try:
            base = split(name)[0]
        except ValueError:
            return {}
        preset = find_preset(base)
        if preset is None or base in EMBEDDED:
            return {}
        updates: Updates = {self.card: self.models.card(name)}
        if self.models.local and "download" in label(base):
            self._missing[session] = name
            text = f"Download it ({gigabytes(preset.download_bytes)})"
            updates[self.fetch] = gr.update(visible=True, value=text)
        return updates
