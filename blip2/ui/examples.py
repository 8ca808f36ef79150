"""The example gallery: drawn scenes first, then photographs."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"  # beside the package in a clone


def examples(folder: Path | None = None) -> list[Path]:
    """Example pictures in the order shown; none where only the package is installed."""
    folder = folder or FOLDER
    scenes = sorted([*folder.glob("scene*.png"), *folder.glob("scenes/*.png")])
    return scenes + sorted(folder.glob("photos/*.jpg"))
