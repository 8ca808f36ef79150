"""What an evaluation was made of and with: settings.json. The first decides predictions, and is compared."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blip2.checkpoint import Loaded
from train import distributed

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "pycocoevalcap", "spacy", "pillow")
SAMPLED, SAMPLES = 1 << 16, 64  # bytes in a place, and places, of a weight file that tell it from others


def model_name(loaded: Loaded) -> str:
    """What a model is called: a folder named "model", as training saves it, after the run."""
    name, plus, adapter = loaded.name.partition("+")
    return f"{loaded.folder.resolve().parent.name if name == 'model' else name}{plus}{adapter}"


def of_model(loaded: Loaded, adapter: Path | None) -> dict[str, Any]:
    """Which weights, in which precision."""
    return {
        "model": model_name(loaded),
        "weights": fingerprint(loaded.folder),
        "precision": loaded.precision,
        "adapter": adapter and {"name": adapter.name, "weights": fingerprint(adapter)},
    }


def of_files(files: Mapping[str, Path | None]) -> dict[str, str]:
    """SHA-256 of each file that is given."""
    found = {}
    for name, path in files.items():
        if path is not None:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def versions() -> dict[str, str]:
    """Of Python and of what predictions may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def made_with(loaded: Loaded, **more: Any) -> dict[str, Any]:
    """What should not change predictions, and is good to know."""
    return {
        "versions": versions(),
        "device": str(loaded.device),
        "processes": distributed.world_size(),
        "notes": loaded.notes,
        **more,
    }


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint from another: sizes of its weight files, and what stands in 64 places of each.

    Released ones have up to 50 GB, so they are not read whole; training changes trained tensors all over.
    """
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*config.json")]):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(max(0, size - SAMPLED) * place // (SAMPLES - 1))
                found.update(file.read(SAMPLED))
    return found.hexdigest()
