"""The example gallery: drawn scenes first, then photographs."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"  # beside the package, in a clone


def examples(folder: Path = FOLDER) -> list[Path]:
    """Example pictures in the order shown; none where only the package is installed."""
    scenes = sorted([*folder.glob("scene*.png"), *folder.glob("scenes/*.png")])
    return scenes + sorted(folder.glob("photos/*.jpg"))
