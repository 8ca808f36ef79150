"""The picture box: an upload's own bytes reach us, and nothing but an upload does."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from blip2.errors import ImageError
from blip2.ui.examples import examples
from blip2.ui.files import UploadsOnly, no_stub
from blip2.ui.pad import sketch_pad
from blip2.ui.words import note

with no_stub():

    class Picture(UploadsOnly, gr.Image):
        """An image input that hands on (path, name) of the uploaded file, unopened.

        gr.Image opens and converts files by itself, and fetches a path that is a URL; here `blip2.images`
        reads what was uploaded, and nothing else gets in.
        """

        def get_block_name(self) -> str:
            """The page's own image component draws it."""
            return "image"

        def preprocess(self, payload: ImageData | None) -> Any:
            """Where the upload lies, and what the visitor calls it."""
            if payload is None or payload.path is None:
                return None, ""
            return payload.path, Path(payload.orig_name or payload.path).name


class PictureBox:
    """The picture above the examples, or a sheet to draw one; and a line for what is wrong with an upload.

    Attributes:
        picture: the component; its value as a handler's input is (path, name).
        note: the line.
        picked: the event that an example was picked; None without examples.
    """

    picked: Any = None

    def __init__(self) -> None:
        files = examples()
        with gr.Tabs(elem_id="ways"):
            with gr.Tab("Picture") as ready:
                self.picture = Picture(
                    str(files[0]) if files else None,
                    label="Picture",
                    show_label=False,
                    sources=["upload", "clipboard", "webcam"],
                    webcam_options=gr.WebcamOptions(mirror=False),
                    buttons=["fullscreen"],
                    height=340,
                    placeholder="Drop a picture here, paste one, or click to upload",
                    alt_text="The picture that captions and answers are about",
                    elem_id="picture",
                )
                if files:
                    self._gallery(files)
            with gr.Tab("Draw", render_children=True) as drawn:
                sketch_pad(self.picture, ready, drawn)
        self.note = gr.HTML(elem_id="picture-note")

    def _gallery(self, files: list[Path]) -> None:
        gallery = gr.Gallery(
            [str(file) for file in files],
            label="Examples",
            show_label=False,
            columns=max(5, -(-len(files) // 2)),
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="examples",
        )

        def pick(event: gr.SelectData) -> str:
            return str(files[event.index])

        self.picked = gallery.select(
            pick, None, self.picture, queue=False, show_progress="hidden", api_visibility="private"
        )


def refused(error: ImageError, path: str | None) -> tuple[Any, str]:
    """What the picture box shows instead of a picture that cannot be used: the one before, and why."""
    return gr.update(value=path if path and Path(path).is_file() else None), note(str(error), "error")
