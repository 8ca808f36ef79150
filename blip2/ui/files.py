"""Files that visitors bring, and that the page hands out; the latter are deleted as uploads are."""

from pathlib import Path
from typing import Any
from unittest import mock

import gradio as gr
from gradio import component_meta
from gradio.exceptions import Error
from gradio.processing_utils import save_bytes_to_cache


def no_stub() -> Any:
    """While it lasts, gradio writes no stub (.pyi) beside the source of a component class; ours want none."""
    return mock.patch.object(component_meta, "create_or_modify_pyi")


class UploadsOnly:
    """Put before a component class: its files are uploads, and nothing that gradio would fetch."""

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuse URLs, which gradio would download."""
        if "://" in str(url_or_file_path or ""):
            raise Error("Only uploaded pictures are read here, no addresses.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]


def held(component: gr.components.Component, data: bytes, name: str) -> str:
    """Write a file into the cache of the component that will show or offer it; returns its path."""
    path = save_bytes_to_cache(data, name, component.GRADIO_CACHE)
    component.temp_files.add(path)  # those are what gradio deletes when they are old
    return path
