"""BLIP-2 (arXiv 2301.12597): caption images, answer questions about them, chat, score image against text.

The names below are the public interface. They are imported on first use, so that `import blip2` and
`blip2 --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.chat import Chat
    from blip2.checkpoint import load, save
    from blip2.encoders import ExternalEncoder, register_encoder
    from blip2.images import open_image
    from blip2.model import Blip2
    from blip2.presets import PRESETS
    from blip2.processing import Processor
    from blip2.representation import Blip2Representation
    from blip2.settings import Generation

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Blip2",
    "Blip2Representation",
    "Chat",
    "ExternalEncoder",
    "Generation",
    "Processor",
    "__version__",
    "load",
    "open_image",
    "register_encoder",
    "save",
]

_HOMES = {
    "PRESETS": "presets",
    "Blip2": "model",
    "Blip2Representation": "representation",
    "Chat": "chat",
    "Generation": "settings",
    "ExternalEncoder": "encoders",
    "Processor": "processing",
    "load": "checkpoint",
    "open_image": "images",
    "register_encoder": "encoders",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(import_module(f"blip2.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
