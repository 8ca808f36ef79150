"""The Search tab: which of many pictures fit a text, or are like the page's picture."""

import html
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from blip2.presets import EMBEDDED, find_preset
from blip2.sidecars import FolderError
from blip2.ui.album import Album
from blip2.ui.answers import Progress
from blip2.ui.cards import full_precision, join
from blip2.ui.errors import question
from blip2.ui.files import held
from blip2.ui.pile import RECURSIVE, plain_name, thumbnail
from blip2.ui.session import Session
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject
from blip2.ui.tab import QUIET, Tab, Updates
from blip2.ui.wanted import matching, sources
from blip2.ui.words import counted, note
from blip2.ui.work import Work

if TYPE_CHECKING:
    from blip2.search.encode import Picture
    from blip2.search.query import Collection, Found

    Ready = Generator[Updates, None, tuple[Collection | None, Sequence[Picture]]]

PORTION = 32  # dropped pictures that are encoded before others have their turn
RERANKED = 16
SHOWN = 12
SIDE = 240  # pixels of a found picture's longer side
NAMED = 3  # bad pictures that are named
NO_PICTURES = "There are no pictures to search yet: drop some, or choose files."
NO_TEXT = "There is nothing to look for yet: write what is in the pictures, or search by the picture."
EMPTY = '<div class="captions empty">The pictures that fit best will stand here.</div>'
# a picture that is pressed becomes the page's; the list is made anew with every search
SCRIPT = """element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-place]");
  if (chosen) trigger("select", { place: Number(chosen.dataset.place) });
});"""


class SearchTab(Tab):
    """Controls and events; see `Tab`. Pictures and what was made of them lie in the visitor's `Album`."""

    def __init__(self, work: Work, state: gr.State, picture: gr.Image):
        super().__init__(work, state, picture)
        models = self.models
        album = gr.State(Album())
        files, folder, recursive = sources(
            models,
            "Pictures to search",
            "search-files",
            "its index is kept in it, in .blip2-index; only new pictures are read again",
        )
        self.text = gr.Textbox(
            label="What to look for",
            placeholder="a large red square and a small red circle",  # of all that is there, as captions are
            max_lines=3,
            elem_id="search-text",
        )
        choices = matching(models)
        real = [name for _, name in choices if name not in EMBEDDED]
        with gr.Accordion("Options", open=False, elem_classes="settings"):
            with gr.Row():
                model = gr.Dropdown(
                    choices,
                    value=real[0] if real and models.default not in EMBEDDED else choices[0][1],
                    label="Model",
                    info="compares texts and pictures; a folder's index keeps to its own",
                    filterable=False,
                    min_width=220,
                )
                top = gr.Slider(1, 48, value=SHOWN, step=1, label="Pictures shown", buttons=[], min_width=220)
            again = gr.Checkbox(
                False,
                label="Look at the best again",
                info=f"the {RERANKED} nearest (ITC), each together with the text (ITM): slower, and better",
            )
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Search", variant="primary", min_width=140)
            self.like = gr.Button("Search by the picture", min_width=170)
            self.halt = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
        self.add_note("search-note", "Search them anyway")
        self.real.visible = False  # it gets one that answers
        self.results = gr.HTML(EMPTY, js_on_load=SCRIPT, elem_id="found")

        inputs = [album, files, folder, recursive, self.text, model, top, again]
        outputs = [self.like, self.results]
        self.wire([self.go.click, self.text.submit], partial(self.run, False, False), inputs, outputs)
        self.wire([self.like.click], partial(self.run, True, False), inputs, outputs)
        self.wire([self.anyway.click], partial(self.run, None, True), inputs, outputs)
        self.halt.click(lambda album: album.stop(), album, None, **QUIET)
        files.change(self.take, [album, files], [self.note, self.choice], **QUIET)
        self.results.select(self.pick, album, [self.note, picture], **QUIET)

    # --- the page ---

    def busy(self, model: str) -> Updates:
        """The page while a search is under way."""
        return super().busy(model) | {self.like: gr.update(interactive=False)}

    def idle(self, session: Session) -> Updates:
        """The page when it can be asked again."""
        return super().idle(session) | {self.like: gr.update(interactive=True)}

    def instead(self) -> str:
        """A sentence on where to turn with pictures that the model does not know."""
        if self.models.local:
            return "Options has the released models, or have them searched all the same."
        return (
            "The released models, for photographs, are not served here. Or have them searched all the same."
        )

    # --- events ---

    def take(self, album: Album, files: list[tuple[str, str]]) -> Updates:
        """The page after pictures were dropped, or taken away."""
        try:
            album.drop(files or [], limited=not self.models.local)
        except ValueError as error:
            return {self.note: note(str(error), "error"), self.choice: gr.update(visible=False)}
        said = f"{counted(len(files), 'picture')}." if files else ""
        return {self.note: note(said), self.choice: gr.update(visible=False)}

    def pick(self, album: Album, event: gr.EventData) -> Updates:
        """Make a found picture the page's, to talk about it."""
        place = getattr(event, "place", None)
        if not isinstance(place, int) or not 0 <= place < len(album.found):
            return {self.note: gr.skip()}
        one = album.found[place]
        try:
            name = Path(plain_name(one.image)).name
            return {self.picture: held(self.picture, one.path.read_bytes(), name)}
        except OSError:
            return {self.note: note(f"{plain_name(one.image)} is no longer here: search again.", "error")}

    def run(
        self,
        by_picture: bool | None,
        force: bool,
        session: Session,
        picture: tuple[str | None, str],
        album: Album,
        files: list[tuple[str, str]],
        folder: str | None,
        recursive: bool,
        text: str | None,
        model: str,
        top: float,
        again: bool,
    ) -> Iterator[Updates]:
        """Make ready what is new, and search; yields what to change on the page.

        Args:
            by_picture: search by the page's picture, not for the text; None: as the last time.
            force: also of, and by, pictures of a kind that the model does not know.
            session: the visitor's.
            picture: the page's.
            album: the visitor's.
            files: dropped ones.
            folder: or a folder of this machine.
            recursive: and the folders in it.
            text: what to look for.
            model: that compares.
            top: how many are shown.
            again: rerank by ITM.
        """
        by_picture = album.by_picture = album.by_picture if by_picture is None else by_picture
        folder = (folder or "").strip()
        if not by_picture and not (text or "").strip():
            raise ValueError(NO_TEXT)
        query = None if by_picture else question(text)
        subject = Subject.of_file(*picture) if by_picture else Subject()
        self._check(files or [], folder)
        name = self._model_of(folder, model) if folder else model
        start = time.monotonic()
        with album.answering() as stop:
            yield self.busy(name)
            if folder:
                collection, bad = yield from self._indexed(folder, recursive, force, name, stop)
            else:
                album.drop(files, limited=not self.models.local)
                collection, bad = yield from self._embedded(album, force, name, stop)
            found = None
            if collection is not None and len(collection.images):
                rerank = RERANKED if again and query is not None else 0
                task = ("find", [name], subject, collection, query, int(top or SHOWN), rerank, force)
                for said in self.work.run(*task, stop=stop, kinds=["match"]):
                    if isinstance(said, list):
                        found = said
                    else:
                        yield {self.note: note(said.doing)}
            stopped = stop.is_set()
            seconds = time.monotonic() - start
        if stopped and found is None:
            yield self.idle(session) | {self.note: note("Stopped; what was read need not be read again.")}
            return
        album.found = found or []
        remarks = "" if query is None else self.work.unknown_words(name, query, "match")
        there = 0 if collection is None else sum(map(len, collection.images.values()))
        facts = [f"{counted(there, 'picture')} searched with {name}, {seconds:.1f} s."]
        if not there:
            facts = ["There is no picture here that can be searched."]
        yield (
            self.idle(session)
            | {
                self.results: _gallery(album.found) if album.found else EMPTY,
                self.note: note(" ".join([*facts, *self._failures(bad, name), remarks]).strip()),
                self.choice: gr.update(visible=any(one.unknown for one in bad)),
            }
        )

    def _check(self, files: list[tuple[str, str]], folder: str) -> None:
        """Refuse what cannot be searched.

        Raises:
            ValueError: it cannot.
        """
        if not folder and not files:
            raise ValueError(NO_PICTURES)
        if folder and files:
            raise ValueError("There are dropped pictures and a folder: take the ones or the other away.")
        if folder and not self.models.local:
            raise ValueError("Folders are read only by an app on a machine of your own: drop the pictures.")

    def _model_of(self, folder: str, model: str) -> str:
        """The model that a folder's index was made with; the chosen one where it has none yet."""
        from blip2.search.store import HEAD, HIDDEN, read_head

        place = Path(folder).expanduser() / HIDDEN
        if not (place / HEAD).is_file():
            return model
        head = read_head(place)
        preset = find_preset(head.model)
        if preset is not None:
            full = "float32" if preset.repo_id is None else full_precision(preset)
            return preset.name if head.precision == full else join(preset.name, head.precision)
        return join(head.model, head.precision)

    def _indexed(self, folder: str, recursive: bool, force: bool, name: str, stop: Stop) -> "Ready":
        """Bring a folder's index up to date; gives it, or None if stopped, and the bad pictures."""
        summary, count = None, ""
        task = ("index", [name], Subject(), Path(folder).expanduser().absolute(), bool(recursive), force)
        try:
            for said in self.work.run(*task, stop=stop, kinds=["match"]):
                if isinstance(said, Progress):
                    yield {self.note: note(f"{count}{said.doing} ...")}
                elif isinstance(said, tuple):
                    count = f"{said[0]} of {counted(said[1], 'new picture')}, "
                else:
                    summary = said
        except FolderError as error:  # in the words of the page
            raise FolderError(str(error).replace("--recursive", f'"{RECURSIVE}"')) from error
        if summary is None:
            return None, []
        from blip2.search.store import Index

        return Index(summary.place), summary.bad

    def _embedded(self, album: Album, force: bool, name: str, stop: Stop) -> "Ready":
        """Make the dropped pictures ready; gives them, or None if stopped, and the bad ones."""
        left = list(album.left(name, force).items())
        for first in range(0, len(left), PORTION):  # others are served in between
            task = ("embed", [name], Subject(), dict(left[first : first + PORTION]), force)
            done = first
            for said in self.work.run(*task, stop=stop, kinds=["match"]):
                if isinstance(said, Progress):
                    yield {self.note: note(f"{done} of {counted(len(left), 'picture')}, {said.doing} ...")}
                else:
                    album.add(*said)
                    done += len(said[0])
            if stop.is_set():
                return None, []
        return album.collection(), album.bad()

    def _failures(self, bad: "Sequence[Picture]", name: str) -> list[str]:
        """Sentences on pictures that cannot be found."""
        facts = []
        unknown = sum(one.unknown for one in bad)
        failed = [one for one in bad if not one.unknown]
        if failed:
            facts.append(f"{counted(len(failed), 'picture')} could not be used:")
            facts += [plain_name(one.reason) for one in failed[:NAMED]]
            facts += [f"And {len(failed) - NAMED} more."] * (len(failed) > NAMED)
        if unknown:
            kind = f"{'is' if unknown == 1 else 'are'} of a kind that {name} does not know"
            facts.append(f"{counted(unknown, 'picture')} {kind}. {self.instead()}")
        return facts


def _gallery(found: "Sequence[Found]") -> str:
    """HTML: the pictures found, the best first; each a button."""
    items = []
    for place, one in enumerate(found):
        name = html.escape(plain_name(one.image))
        small = thumbnail(one.image, one.path, SIDE)
        score = (
            f"{one.cosine:.2f}" if one.match is None else f"{100 * one.match:.0f}% match, {one.cosine:.2f}"
        )
        image = f'<img src="{small}" alt="">' if small else "<em>no longer here</em>"
        items.append(
            f'<li><button type="button" data-place="{place}" title="Make it the picture to talk about">'
            f'<span class="frame">{image}</span><span class="name">{name}</span>'
            f'<span class="score">{score}</span></button></li>'
        )
    return f'<ol class="found" aria-label="Pictures found, the best first">{"".join(items)}</ol>'
