"""The app as a Hugging Face Space: the launcher of the bundle that `blip2 deploy` makes runs this."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.ui.serve import keep_serving
from blip2.ui.serve import until_stopped as running

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["build", "launch", "running", "settings"]

MODELS, VOTES = "BLIP2_MODELS", "BLIP2_VOTES"  # variables of the Space


def settings(file: Path) -> tuple[list[str], str | None]:
    """Models to offer and the dataset for votes: the Space's variables, else what it was deployed with.

    Raises:
        ValueError: no model is named.
    """
    told = json.loads(file.read_text("utf-8"))
    models, votes = told["models"], told["votes"]
    if MODELS in os.environ:
        models = [name.strip() for name in os.environ[MODELS].split(",") if name.strip()]
        if not models:
            raise ValueError(f"{MODELS} is empty: name models between commas, or delete the variable")
    if VOTES in os.environ:
        votes = os.environ[VOTES].strip() or None
    return models, votes


def build(file: Path) -> "gr.Blocks":
    """The page, with its models loaded: ZeroGPU takes to the GPU what is there when the page is launched.

    Args:
        file: what `blip2 deploy` wrote down; see `settings`.

    Raises:
        SystemExit: a model or the dataset for votes cannot be had; the message says why.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    if os.environ.get("SPACES_ZERO_GPU"):
        # ZeroGPU stands in for CUDA in this thread alone, while transformers would load in several
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    from blip2.ui.api import MATCHING
    from blip2.ui.models import Models
    from blip2.ui.page import page
    from blip2.ui.votes import Votes
    from blip2.ui.work import Work

    try:
        names, dataset = settings(file)
        votes = Votes.in_dataset(dataset) if dataset else Votes()
        models = Models(names[0], only=[*names, MATCHING])
        models.load_all()  # downloaded, if the Space's build has not done it
    except ValueError as error:
        sys.exit(f"The Space cannot start: {error}")
    gpu = None
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces

        gpu = spaces.GPU
    return page(Work(models, gpu), votes)


def launch(demo: "gr.Blocks") -> None:
    """Serve the page until the Space is stopped."""
    keep_serving(demo, host="0.0.0.0")
