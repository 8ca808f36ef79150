"""What the Folder tab asks for: pictures, and what is wanted of each."""

from typing import Any

import gradio as gr
from gradio.data_classes import ListFiles

from blip2.pictures import ENDINGS, Captioning
from blip2.presets import EMBEDDED, PRESETS
from blip2.settings import Generation
from blip2.sidecars import SIDECARS
from blip2.ui.cards import caption_prompt
from blip2.ui.errors import question
from blip2.ui.files import UploadsOnly, no_stub
from blip2.ui.models import Models
from blip2.ui.pile import RECURSIVE

with no_stub():

    class Files(UploadsOnly, gr.File):
        """A file input that hands on [(path, name)] of the uploaded files, unopened."""

        def get_block_name(self) -> str:
            """The page's own file component draws it."""
            return "file"

        def preprocess(self, payload: Any) -> Any:
            """Where the uploads lie, and what the visitor calls them."""
            files = payload.root if isinstance(payload, ListFiles) else [payload] if payload else []
            return [(file.path, file.orig_name or file.path) for file in files]


def matching(models: Models) -> list[tuple[str, str]]:
    """(label, name) of the models offered that score texts."""
    return [
        (f"{preset.name}{' (embedded)' if preset.name in EMBEDDED else ''}", preset.name)
        for preset in PRESETS.values()
        if preset.kind == "match" and (models.local or preset.name in EMBEDDED)
    ]


def sources(models: Models, label: str, elem_id: str, info: str) -> tuple[Files, gr.Textbox, gr.Checkbox]:
    """Where pictures come from: dropped files; or a folder, and whether the folders in it count, too.

    Args:
        models: the shelf; a server of others has no such thing as "this machine".
        label: of the files.
        elem_id: of the files.
        info: what happens to a folder.
    """
    files = Files(label=label, file_count="multiple", file_types=list(ENDINGS), height=150, elem_id=elem_id)
    with gr.Column(visible=models.local, min_width=280):
        folder = gr.Textbox(
            label="Or a folder of this machine", placeholder="/home/me/pictures", info=info, max_lines=1
        )
        recursive = gr.Checkbox(False, label=RECURSIVE)
    return files, folder, recursive


class Options:
    """A folded panel of what is wanted of each picture, but for the settings of decoding.

    Args:
        models: the shelf.
    """

    def __init__(self, models: Models) -> None:
        self.controls: dict[str, Any] = {}
        with gr.Accordion("Options", open=False, elem_classes="settings"):
            with gr.Row(visible=models.local):
                self.controls["ending"] = gr.Radio(
                    list(SIDECARS), value=SIDECARS[0], label="Texts beside the pictures of a folder"
                )
                self.controls["if_exists"] = gr.Radio(
                    ["skip", "overwrite", "append"], value="skip", label="Pictures that have one already"
                )
            with gr.Row():
                self.controls["start"] = gr.Textbox(
                    label="Start with", info="the caption goes on from it", max_lines=1
                )
                self.controls["avoid"] = gr.Textbox(
                    label="Words to avoid", info="between commas", max_lines=1
                )
            with gr.Row():
                self.controls["prefix"] = gr.Textbox(
                    label="Prefix", info="put before each caption", max_lines=1
                )
                self.controls["suffix"] = gr.Textbox(label="Suffix", info="put after it", max_lines=1)
            self.controls["questions"] = gr.Textbox(
                label="Questions", info="asked of each picture, too; one a line", lines=2, max_lines=8
            )
            with gr.Row():
                self.controls["scorer"] = gr.Dropdown(
                    [("No match scores", ""), *matching(models)],
                    value="scenes-itm" if models.default in EMBEDDED else "",
                    label="Match scores",
                    info="how well a caption fits its picture, by another model",
                    filterable=False,
                    min_width=220,
                )
                self.controls["batch"] = gr.Slider(
                    1,
                    32,
                    value=Captioning.batch_size,
                    step=1,
                    label="Pictures at once",
                    info="halved where memory does not suffice",
                    buttons=[],
                    min_width=220,
                )

    @property
    def inputs(self) -> list[Any]:
        """The controls, as inputs of an event."""
        return list(self.controls.values())

    def captioning(self, values: tuple[Any, ...], name: str, generation: Generation) -> Captioning:
        """What the controls' values ask for.

        Args:
            values: of the controls.
            name: of the model.
            generation: settings of the captions.

        Raises:
            ValueError: something that cannot be.
        """
        chosen = self.chosen(values)
        start = (chosen["start"] or "").strip()
        avoid = (word.strip() for word in (chosen["avoid"] or "").split(","))
        asked = [question(line) for line in (chosen["questions"] or "").splitlines() if line.strip()]
        return Captioning(
            generation.with_(avoid=tuple(filter(None, avoid))),
            prompt=start or caption_prompt(name),
            keep_prompt=bool(start),
            prefix=chosen["prefix"] or "",
            suffix=chosen["suffix"] or "",
            questions=tuple(dict.fromkeys(asked)),
            batch_size=int(chosen["batch"] or Captioning.batch_size),
        )

    def chosen(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The controls' values by name: besides those of `captioning`, "scorer", "ending" and "if_exists"."""
        return dict(zip(self.controls, values, strict=True))
