"""Files that the page hands out, deleted as uploads are."""

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache


def held(component: gr.components.Component, data: bytes, name: str) -> str:
    """Write a file into the cache of the component that will show or offer it; returns its path."""
    path = save_bytes_to_cache(data, name, component.GRADIO_CACHE)
    component.temp_files.add(path)  # those are what gradio deletes when they are old
    return path
