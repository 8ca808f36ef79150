"""Folders that lie beside the package in a clone, and inside it where it was installed."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `examples` or `spaces`; it need not exist.

    Inside comes first: beside an installed package lie other people's, and one of them is called `spaces`.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
