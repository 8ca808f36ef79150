"""A JSON input whose schema says what it takes: gr.JSON's own is no schema, and MCP callers refuse it."""

from typing import Any

import gradio as gr

from blip2.ui.files import no_stub

with no_stub():

    class JsonInput(gr.JSON):
        """Hidden JSON of a given kind.

        Args:
            label: the parameter's name.
            schema: a JSON schema.
        """

        def __init__(self, label: str, schema: dict[str, Any]):
            self.schema = schema
            super().__init__(label=label, visible=False)

        def get_block_name(self) -> str:
            """The page's own component draws it."""
            return "json"

        def api_info(self) -> dict[str, Any]:
            """What callers read."""
            return self.schema


TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["user", "assistant"]},
            "content": {"type": "string"},
        },
        "required": ["role", "content"],
    },
    "minItems": 1,
}
