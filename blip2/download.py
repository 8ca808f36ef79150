"""Checkpoints from the Hub into its cache, with progress; what was broken off goes on where it ended.

`huggingface_hub` 2 deletes half a file when a download ends early, and a released checkpoint's files have
ten gigabytes. So the big ones are fetched here, to where the Hub's cache keeps them; it does the rest.
"""

import errno
import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from blip2.layout import CheckpointError
from blip2.presets import Preset, resolve, suggestions

Watch = Callable[[int, int], None]  # (so far, in all): bytes or tensors; what it raises ends the work
BIG = 10_000_000  # bytes; smaller files are left to the Hub's client


def command(repo_id: str, revision: str | None = None) -> str:
    """What to type to have a repository downloaded, with its size where that is known."""
    preset = released(repo_id)
    words = f"blip2 download {preset.name if preset else repo_id}"
    words += f" --revision {revision}" if revision else ""
    return words + (f" ({preset.download_bytes / 1e9:.1f} GB)" if preset else "")


def released(repo_id: str) -> Preset | None:
    """The preset that lies in a repository."""
    try:
        preset = resolve(repo_id)
    except ValueError:
        return None
    return preset if preset.repo_id == repo_id else None


def needed(names: list[str]) -> list[str]:
    """Those of a repository's files that make up its checkpoint; releases hold every weight twice."""
    safe = any(name.endswith(".safetensors") for name in names)
    suffixes = (".json", ".txt", ".model", ".safetensors" if safe else ".bin")
    return [name for name in names if name.endswith(suffixes)]


def download(repo_id: str, revision: str | None = None, watch: Watch | None = None, spare: int = 0) -> Path:
    """Bring a repository's weights, configuration and tokenizer into the Hub's cache.

    Args:
        repo_id: owner/name.
        revision: a branch, tag or commit.
        watch: told the bytes that are here and all there are; to cancel, it raises. A later call goes on.
        spare: bytes that the disk has to have left for what is made of it.

    Returns:
        The folder in the cache.

    Raises:
        CheckpointError: no connection, no such repository, no room on the disk, or damaged files.
    """
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{repo_id} is not in the cache, and downloading is off (HF_HUB_OFFLINE is set). Get it with: "
            f"{command(repo_id, revision)}; on a machine without a connection, copy {constants.HF_HUB_CACHE} "
            "from one that has it"
        )
    try:
        return _download(repo_id, revision, watch, spare)
    except Exception as error:
        # the hub's client passes its HTTP library's own errors on: httpx's or httpx2's, by version
        known = isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OSError)
        if not known and not type(error).__module__.startswith("httpx"):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; what is here stays. Make room"
        else:
            reason = " ".join(str(error).split())[:300].rstrip(".")
        near = "" if released(repo_id) else f"{suggestions(repo_id)} "
        raise CheckpointError(
            f"{repo_id} could not be downloaded: {reason}. {near}"
            f"Later, with a connection: {command(repo_id, revision)}"
        ) from error


def _download(repo_id: str, revision: str | None, watch: Watch | None, spare: int) -> Path:
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}
    sizes = {name: files[name].size or 0 for name in needed(list(files))}
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo_id, repo_type="model")
    blobs, locks = cache / folder / "blobs", cache / ".locks" / folder  # as the Hub's client has them
    for made in (blobs, locks):
        made.mkdir(parents=True, exist_ok=True)
    big = {name: files[name].lfs for name in sizes if sizes[name] > BIG and files[name].lfs}
    parts = {name: Part(blobs, str(lfs["sha256"]), sizes[name]) for name, lfs in big.items() if lfs}
    missing = sum(part.size - part.here for part in parts.values())
    free = shutil.disk_usage(blobs).free
    if free < missing + spare:
        more = f", and {spare / 1e9:.1f} GB for what is made of it" if spare else ""
        raise CheckpointError(
            f"{repo_id} needs {missing / 1e9:.1f} GB on the disk{more}, and {free / 1e9:.1f} GB are free in "
            f"{constants.HF_HUB_CACHE}: make room, or set HF_HOME to a folder on a larger disk"
        )
    total = sum(sizes.values())
    done = total - sum(part.size for part in parts.values())  # the small ones, told before they are here
    for name, part in parts.items():
        if not part.blob.exists():
            url = hf_hub_url(repo_id, name, revision=info.sha)
            try:
                with WeakFileLock(locks / f"{part.sha256}.lock", timeout=1):
                    part.fetch(url, partial(_tell, watch, done, total))
            except TimeoutError:
                raise CheckpointError(f"{repo_id} is being downloaded by another program already") from None
        done += part.size
    done_in = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(sizes)))
    if watch:
        watch(total, total)
    return done_in


def _tell(watch: Watch | None, before: int, total: int, here: int) -> None:
    if watch:
        watch(before + here, total)


class Part:
    """One big file on its way into the cache, and the file-like object that its bytes are written to."""

    def __init__(self, blobs: Path, sha256: str, size: int):
        self.blob, self.sha256, self.size = blobs / sha256, sha256, size
        self.path = blobs / f"{sha256}.part"
        self._watch: Callable[[int], None] = lambda here: None

    @property
    def here(self) -> int:
        """Bytes on the disk."""
        if self.blob.exists():
            return self.size
        return self.path.stat().st_size if self.path.exists() else 0

    def fetch(self, url: str, watch: Callable[[int], None]) -> None:
        """Get what is missing, and check the whole.

        Raises:
            CheckpointError: it is not what the Hub says it is.
        """
        self._watch, self._digest = watch, hashlib.sha256()
        if self.here > self.size:
            self.path.unlink()
        with self.path.open("a+b") as self._file:
            self._file.seek(0)
            while chunk := self._file.read(1 << 22):
                self._digest.update(chunk)
            watch(self.here)
            sink: Any = self
            http_get(
                url, sink, resume_size=self._file.tell(), headers=build_hf_headers(), expected_size=self.size
            )
        if self._digest.hexdigest() != self.sha256:
            self.path.unlink()
            raise CheckpointError(f"{url} arrived damaged and was removed: try again")
        self.path.replace(self.blob)

    # what http_get asks of a file

    def write(self, chunk: bytes) -> int:
        """Append, and tell how far it is."""
        self._digest.update(chunk)
        self._file.write(chunk)
        self._watch(self._file.tell())
        return len(chunk)

    def tell(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def seek(self, offset: int) -> int:
        """Only back to the beginning, where a server cannot go on in the middle."""
        return self._file.seek(offset)

    def truncate(self) -> int:
        """Forget what follows."""
        self._digest = hashlib.sha256()
        return self._file.truncate()

    _file: BinaryIO
