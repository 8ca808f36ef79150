"""The browser app: one Gradio page with captions, free instructions and chat about a picture (Fig. 4).

Nothing else in `blip2` imports gradio, and this module imports it only when a page is built.
"""

from blip2.ui.serve import build, launch, main

__all__ = ["build", "launch", "main"]
