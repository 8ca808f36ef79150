"""Whether a picture is of the kind that a checkpoint knows; only checkpoints of a narrow world say so.

A linear score of what the image encoder hands on anyway: mean and deviation of each channel over the patches.
Pictures above a threshold are unknown. A checkpoint's folder may hold both, in a file of its own at which
transformers does not look; without it every picture passes, as with the released checkpoints.

    novelty.safetensors   weight (2V,)   metadata: threshold, and knows, what it knows in words
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.errors import UnknownPictureError as UnknownPictureError
from blip2.layout import NOVELTY
from blip2.vision import ImageFeatures


def statistics(image: ImageFeatures) -> Tensor:
    """Mean and deviation of each channel over the patches, the class token left out: float32 (B, 2V)."""
    patches = image.image_embeds[:, 1:].float()
    return torch.cat([patches.mean(1), patches.std(1)], dim=1)


@dataclass(frozen=True)
class Novelty:
    """A score with a threshold; they belong to one checkpoint's weights.

    Attributes:
        weight: float32 (2V,), of `statistics`.
        threshold: a picture that scores above it is unknown.
        knows: what the checkpoint knows, in words that go on after "knows ... only".
    """

    weight: Tensor
    threshold: float
    knows: str

    def score(self, image: ImageFeatures) -> Tensor:
        """How unlike what the checkpoint knows B pictures are: float32 (B,), of no unit."""
        values = statistics(image)
        return values @ self.weight.to(values.device)

    def is_unknown(self, image: ImageFeatures) -> Tensor:
        """Whether the checkpoint does not know them: bool (B,)."""
        return self.score(image) > self.threshold

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        metadata = {"format": "pt", "threshold": repr(self.threshold), "knows": self.knows}
        save_file({"weight": self.weight.float().contiguous().cpu()}, folder / NOVELTY, metadata)
        (folder / NOVELTY).chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors hides files from others


def read(folder: Path, width: int) -> Novelty | None:
    """The file of a checkpoint's folder; None if there is none.

    Args:
        folder: the checkpoint's.
        width: V, of its image encoder.

    Raises:
        CheckpointError: it is damaged, or belongs to another encoder.
    """
    path = folder / NOVELTY
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            weight, metadata = file.get_tensor("weight").float(), file.metadata() or {}
        novelty = Novelty(weight, float(metadata["threshold"]), metadata["knows"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): fetch it again, or delete it") from error
    if novelty.weight.shape != (2 * width,):
        raise CheckpointError(
            f"{path} is of another checkpoint: it has {novelty.weight.numel()} weights, where an image "
            f"encoder of width {width} needs {2 * width}; delete it"
        )
    return novelty
