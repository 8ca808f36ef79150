"""Find a checkpoint by its name: an embedded one, a folder, or a repository in the Hub's cache."""

import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from blip2.adapters import base_of, is_adapter, read_adapter
from blip2.download import command, download
from blip2.errors import CheckpointError
from blip2.presets import resolve, suggestions
from blip2.shards import is_complete


def locate(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    precision: str = "auto",
) -> tuple[str, Path]:
    """Find a checkpoint: its name, and the folder with its files, downloaded if need be and allowed.

    A released one may have a small folder, which `blip2 download --precision` wrote: it serves for its own
    precision, and for "auto" where the original is not here.

    Raises:
        CheckpointError: a folder that is not there, or a repository that cannot be had.
        ValueError: a name that is not known; the message holds the nearest ones.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        if is_adapter(path):  # the files are those of the model it was trained on
            return locate(
                base_of(read_adapter(path)),
                revision=revision,
                local_files_only=local_files_only,
                precision=precision,
            )
        return path.resolve().name, path
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, a checkpoint is a folder: give its folder, or bring a LAVIS .pth in with "
            "`blip2 convert`"
        )
    try:
        preset = resolve(text)
    except ValueError:
        if (
            isinstance(name_or_path, Path)
            or text.startswith((".", "/", "~"))
            or (os.sep != "/" and os.sep in text)
        ):
            raise CheckpointError(f"there is no folder {text}. {suggestions(text)}") from None
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            raise
        return text, _cached_or_downloaded(text, revision, local_files_only)
    if preset.folder is not None:
        if not preset.folder.is_dir():
            raise CheckpointError(
                f"the embedded checkpoint {preset.name} is not in this installation ({preset.folder})"
            )
        return preset.name, preset.folder
    assert preset.repo_id is not None
    small = [] if revision else [kept for kept in preset.small_folders(precision) if is_complete(kept)]
    if small and precision != "auto":
        return preset.name, small[0]
    try:
        return preset.name, _cached_or_downloaded(preset.repo_id, revision, local_files_only or bool(small))
    except CheckpointError:
        if not small:
            raise
        return preset.name, small[0]


def is_available(name_or_path: str | Path, revision: str | None = None, precision: str = "auto") -> bool:
    """Whether a checkpoint can be loaded, in a precision, without a download."""
    try:
        locate(name_or_path, revision=revision, local_files_only=True, precision=precision)
    except ValueError:
        return False
    return True


def _cached_or_downloaded(repo_id: str, revision: str | None, local_files_only: bool) -> Path:
    """The local copy of a Hub repository."""
    found: str | None
    try:
        found = snapshot_download(repo_id, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        found = getattr(error, "snapshot_path", None)  # files are missing, maybe on purpose
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a Hub id: {error}") from error
    if found is not None and is_complete(Path(found)):  # and no download that was broken off
        return Path(found)
    if local_files_only or constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{repo_id} is not in the cache, and downloading is off. "
            f"Get it with: {command(repo_id, revision)}"
        )
    return download(repo_id, revision)
