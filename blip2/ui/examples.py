"""The example gallery: drawn scenes first, then photographs."""

from pathlib import Path

from blip2 import resources

FOLDER = resources.folder("examples")


def examples(folder: Path = FOLDER) -> list[Path]:
    """Example pictures in the order shown."""
    scenes = sorted([*folder.glob("scene*.png"), *folder.glob("scenes/*.png")])
    return scenes + sorted(folder.glob("photos/*.jpg"))
