"""The Folder tab: captions of many pictures at once, to look through, mend and take away."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from blip2.pictures import Failure
from blip2.settings import Generation
from blip2.sidecars import Entry, IfExists, Sidecars
from blip2.ui.answers import Progress
from blip2.ui.parameters import Parameters
from blip2.ui.pile import Pile, Row, Settings
from blip2.ui.session import Session
from blip2.ui.subject import Subject
from blip2.ui.tab import QUIET, Tab, Updates
from blip2.ui.wanted import Options, sources
from blip2.ui.words import counted, note
from blip2.ui.work import Work

PREVIEWED = 5
BATCHES = 4  # that are captioned before others have their turn
FORMATS = [
    ("A text beside each picture (.txt)", ".txt"),
    ("The same, .caption", ".caption"),
    ("One table (.csv)", ".csv"),
    ("One table (.jsonl)", ".jsonl"),
]
ORDERS = ["As taken", "Worst match first"]
WRITTEN, UNWRITTEN = ", the texts lie beside them", ", nothing is written yet"
SCRIPT = Path(__file__).with_name("pile.js").read_text(encoding="utf-8")
TEMPLATE = """<div class="pile" hidden>
<div role="table" aria-label="Pictures and their captions">
<div role="rowgroup" class="head"><div role="row"><span role="columnheader">Picture</span>
<span role="columnheader">Captions and match</span></div></div>
<div role="rowgroup" class="rows"></div>
</div>
<nav aria-label="Pages of the table"><button type="button">Previous</button><span role="status"></span>
<button type="button">Next</button></nav>
</div>"""
# what the visitor typed goes with the event, so that no click can overtake it
EDITS = "(pile, edits, ...rest) => [pile, document.querySelector('#folder-table .pile').edits(), ...rest]"
SAVE = """(file) => {
  if (file) Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name }).click();
}"""


class FolderTab(Tab):
    """Controls and events; see `Tab`. Pictures and captions lie in the visitor's `Pile`."""

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        super().__init__(work, state, picture)
        models = self.models
        pile = gr.State(Pile())
        files, folder, recursive = sources(
            models,
            "Pictures",
            "folder-files",
            "texts are written beside the pictures",
        )
        self.options = Options(models)
        self.parameters = Parameters(Generation.caption(), several=True)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Caption all", variant="primary", min_width=140)
            self.preview = gr.Button("Preview five", min_width=120)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("folder-note")
        with gr.Column(visible=False, min_width=280) as self.after:
            with gr.Row():
                order = gr.Dropdown(ORDERS, value=ORDERS[0], label="Order", filterable=False, min_width=170)
                form = gr.Dropdown(
                    FORMATS, value=".csv", label="Download as", filterable=False, min_width=230
                )
            with gr.Row(elem_classes="actions small"):
                save = gr.Button("Download", size="sm", min_width=110)
                clear = gr.Button("Start over", size="sm", min_width=110)
        self.table = gr.HTML(
            {}, html_template=TEMPLATE, js_on_load=SCRIPT, apply_default_css=False, elem_id="folder-table"
        )
        edits = gr.Textbox(visible="hidden")
        self.file = gr.DownloadButton(visible="hidden")

        values = [pile, files, folder, recursive, *self.options.inputs, *self.parameters.inputs]
        outputs = [self.preview, self.table, self.after]
        self.wire([self.go.click], partial(self.run, None, False), values, outputs, picture=False)
        self.wire([self.preview.click], partial(self.run, PREVIEWED, False), values, outputs, picture=False)
        self.wire([self.anyway.click], partial(self.run, None, True), values, outputs, picture=False)
        self.halt.click(lambda pile: pile.stop(), pile, None, **QUIET)
        said = [self.note, self.table, self.after]
        files.change(self._guarded(self.take), [pile, files], [*said, self.choice], **QUIET)
        order.input(self._guarded(self.sort), [pile, order], said, **QUIET)
        self.table.select(self.turn, pile, self.table, **QUIET)
        self.table.input(self._guarded(self.edit), [pile, edits], said, js=EDITS, **QUIET)
        save.click(self.download, [pile, edits, form], [self.note, self.file], js=EDITS, **QUIET).then(
            None, self.file, None, js=SAVE, **QUIET
        )
        clear.click(self.clear, pile, [files, *said, self.choice], **QUIET)

    def _guarded(self, handle: Callable[..., Updates]) -> Callable[..., Updates]:
        """`handle`, with a sentence of its own instead of what a visitor can bring about."""

        def attempt(*values: Any) -> Updates:
            try:
                return handle(*values)
            except ValueError as error:
                return {self.note: note(str(error), "error")}

        return attempt

    # --- the page ---

    def busy(self, model: str) -> Updates:
        """The page while captions are under way."""
        return super().busy(model) | {self.preview: gr.update(interactive=False)}

    def idle(self, session: Session) -> Updates:
        """The page when it can be asked again."""
        return super().idle(session) | {self.preview: gr.update(interactive=True)}

    def _table(self, pile: Pile) -> Updates:
        return {self.table: pile.view(), self.after: gr.update(visible=bool(pile.shown))}

    # --- events ---

    def take(self, pile: Pile, files: list[tuple[str, str]]) -> Updates:
        """The page after pictures were dropped, or taken away."""
        pile.drop(files or [], limited=not self.models.local)
        said = f"{counted(len(pile.rows), 'picture')}." if pile.rows else ""
        return self._table(pile) | {self.note: note(said), self.choice: gr.update(visible=False)}

    def sort(self, pile: Pile, order: str) -> Updates:
        """The table in another order."""
        pile.order(order == ORDERS[1])
        return self._table(pile)

    def turn(self, pile: Pile, event: gr.EventData) -> dict[str, Any]:
        """Another page of the table."""
        pile.turn(getattr(event, "by", 1))
        return pile.view()

    def edit(self, pile: Pile, edits: str) -> Updates:
        """Take over what the visitor typed; the table has it already."""
        pile.edit(edits)
        return {self.note: gr.skip()}

    def download(self, pile: Pile, edits: str, ending: str) -> Updates:
        """A file of all captions; it lies with the uploads, and is deleted like them."""
        try:
            pile.edit(edits)
            with tempfile.TemporaryDirectory() as folder:
                path = pile.save(ending, Path(folder))
                return {self.file: self.file.move_resource_to_block_cache(path)}
        except ValueError as error:
            return {self.note: note(str(error), "error"), self.file: None}  # not the file of before

    def clear(self, pile: Pile) -> list[Any]:
        """The tab as at first; the options stay."""
        pile.clear()
        return [None, "", pile.view(), gr.update(visible=False), gr.update(visible=False)]

    def run(
        self,
        first: int | None,
        anyway: bool,
        session: Session,
        pile: Pile,
        files: list[tuple[str, str]],
        folder: str | None,
        recursive: bool,
        *values: Any,
    ) -> Iterator[Updates]:
        """Caption what is left of the pile; yields what to change on the page.

        Args:
            first: only the first so many, and nothing is written beside them; None: all.
            anyway: as the last time, and those too that the model does not know.
            session: the visitor's.
            pile: the visitor's.
            files: dropped ones.
            folder: or a folder of this machine.
            recursive: and the folders in it.
            values: of the options and the parameters.
        """
        count = len(self.options.inputs)
        options, generation = self.options.chosen(values[:count]), self.parameters.generation(values[count:])
        name = session.model or self.models.default
        wanted = replace(self.options.captioning(values[:count], name, generation), force=anyway)
        settings = Settings(name, options["scorer"] or None, wanted)
        out = self._take(pile, files or [], (folder or "").strip(), recursive, options)
        first = pile.first = pile.first if anyway else first
        if first:
            out = None
        rows, skipped = pile.plan(settings, out, first=first, anyway=anyway)
        going = {row.image: row for row in rows}
        done: list[Row] = []
        start, shown = time.monotonic(), 0
        names = [name, *([settings.scorer] if settings.scorer else [])]
        with pile.answering() as stop:
            yield self.busy(name) | self._table(pile)
            for batch in _portions(rows, BATCHES * wanted.batch_size):  # others are served in between
                paths = {row.image: row.path for row in batch}
                task = ("caption_all", names, Subject(), paths, out, wanted)
                for said in self.work.run(*task, stop=stop, kinds=["generate", "match"][: len(names)]):
                    if not isinstance(said, Progress):
                        done.append(going[said.image])
                        pile.add(done[-1], said, settings, out)
                        continue
                    doing = f"{len(done)} of {counted(len(rows), 'picture')}, {said.doing} ..."
                    changed = self._table(pile) if len(done) > shown else {}
                    shown = len(done)
                    yield {self.note: note(doing)} | changed
                if stop.is_set():
                    break
            pile.order()
        remarks = self.work.unknown_words(name, " ".join([wanted.prompt, *wanted.questions]))
        where = "" if not folder else WRITTEN if out else UNWRITTEN
        facts = _facts(done, len(rows), skipped, where)
        if done:
            facts.append(f"{time.monotonic() - start:.1f} s.")
        if not pile.rows:
            facts, remarks = [], ""  # the visitor has started over
        unknown = sum(row.unknown and row.settings == settings for row in pile.rows.values())
        if unknown:
            kind = f"{'is' if unknown == 1 else 'are'} of a kind that {name} does not know"
            facts.append(f"{counted(unknown, 'picture')} {kind}. {self.models.instead()}")
        yield (
            self.idle(session)
            | self._table(pile)
            | {
                self.note: note(" ".join([*facts, remarks]).strip()),
                self.choice: gr.update(visible=unknown > 0),
            }
        )

    def _take(
        self, pile: Pile, files: list[tuple[str, str]], folder: str, recursive: bool, options: dict[str, Any]
    ) -> Sidecars | None:
        """Fill the pile; where texts go if it is of a folder."""
        if not folder:
            pile.drop(files, limited=not self.models.local)
            if not files:
                raise ValueError("There are no pictures yet: drop some, or choose files.")
            return None
        if not self.models.local:
            raise ValueError("Folders are read only by an app on a machine of your own: drop the pictures.")
        if files:
            raise ValueError("There are dropped pictures and a folder: take the ones or the other away.")
        pile.open(folder, bool(recursive))
        if_exists: IfExists = options["if_exists"]
        return pile.sidecars(options["ending"], if_exists)


def _facts(done: list[Row], planned: int, skipped: int, where: str) -> list[str]:
    """Sentences on how a run went."""
    failed = [row for row in done if isinstance(row.result, Failure) and not row.unknown]
    captioned = sum(isinstance(row.result, Entry) for row in done)
    facts = []
    if len(done) < planned:
        facts.append(
            f"Stopped: {len(done)} of {counted(planned, 'picture')}; the same button goes on from there."
        )
    elif not planned and not skipped:
        facts.append("All have captions with these settings; Start over has new ones made.")
    else:
        facts.append(f"{counted(captioned, 'picture')} captioned{where}.")
    if failed:
        facts.append(f"{counted(len(failed), 'picture')} could not be used, see the table.")
    if skipped:
        facts.append(
            f"{counted(skipped, 'picture')} had a text already: Options has overwrite and append for those."
        )
    return facts


def _portions(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """As itertools.batched, which Python 3.11 lacks."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
