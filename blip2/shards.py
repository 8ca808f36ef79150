"""The files of a checkpoint folder: which there are, what is in them, and tensors when they are asked for."""

import json
import math
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blip2.errors import CheckpointError

STORED_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
OWN = 1 << 20  # bytes; a tensor of so many is not kept in the heap
VARIANT = (
    "any"  # weights of `blip2-any` are named apart, so that transformers finds none and refuses the folder
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}")
    try:
        contents = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(contents).__name__}")
    return contents


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a configuration and all weight files, as a finished download does."""
    try:
        return bool(weight_files(folder, variant_of(read_json(folder / "config.json"))))
    except CheckpointError:
        return False


def variant_of(raw: dict[str, Any]) -> str | None:
    """The middle part of the weight files' names that goes with a config.json; None for the usual names."""
    return VARIANT if raw.get("model_type") == "blip2-any" else None


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a folder, all shards of the first layout found: safetensors before .bin.

    Raises:
        CheckpointError: there are none, or a shard that the index names is missing.
    """
    middle = f".{variant}" if variant else ""
    for single, index in (
        (f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"),
        (f"pytorch_model{middle}.bin", f"pytorch_model.bin.index{middle}.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{folder / index} has no weight_map")
            files = [folder / Path(name).name for name in sorted(set(names.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder}: {len(missing)} of {len(files)} weight files are missing: "
                    f"{', '.join(missing[:5])}; download them again"
                )
            return files
    raise CheckpointError(
        f"{folder} holds no weights: expected model{middle}.safetensors or its shards and index"
    )


def read_shapes(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored tensors, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder, variant):
        with file.open("rb") as start:
            pointer = start.read(24)
        if pointer.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in {folder}"
            )
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a dict
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is damaged or cut off ({one_line(error)}): fetch it again"
                ) from error
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in read_pickle(file, meta=True).items()}
    return shapes


def read_pickle(file: Path, meta: bool = False) -> dict[str, Any]:
    """Read a .bin or .pth of tensors without running any code that it may hold.

    Args:
        file: what to read.
        meta: shapes only.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors and plain containers.
    """
    try:
        contents = torch.load(file, map_location="meta" if meta else "cpu", weights_only=True, mmap=None)
    except Exception as error:  # torch names no common class for what a damaged or hostile file raises
        words = str(error)
        if (
            "weights_only" in words.lower()
            or "Unsupported global" in words
            or "unsupported operand" in words.lower()
        ):
            raise CheckpointError(
                f"{file} holds Python objects beside tensors; they could run code, so it is not read. "
                "Get the weights as safetensors, or a file that torch.load(weights_only=True) reads"
            ) from error
        raise CheckpointError(f"{file} is damaged or no PyTorch file: {one_line(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file} must hold a dict of tensors, not {type(contents).__name__}")
    return contents


class StoredTensor:
    """A tensor in a safetensors file, read when it is asked for: `tensor[...]`.

    It goes into its final dtype a piece at a time. transformers by itself maps files into memory, all of them
    until the last tensor is in place: a model that changes its dtype on the way is then there twice.
    """

    PIECE = 1 << 22  # bytes
    threads = threading.local()  # one piece a thread: many would leave holes that nothing else fills

    def __init__(self, file: Path, start: int, facts: dict[str, Any], dtype: torch.dtype | None):
        self.file, self.facts = file, facts
        begin, end = facts["data_offsets"]
        self.start, self.nbytes = start + begin, end - begin
        self.stored = STORED_TYPES[facts["dtype"]]
        self.dtype = dtype if dtype is not None and self.stored.is_floating_point else self.stored

    def get_shape(self) -> list[int]:
        """Its shape."""
        return self.facts["shape"]

    def get_dtype(self) -> str:
        """Its type, as safetensors calls it."""
        return self.facts["dtype"]

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = _empty(self.get_shape(), self.dtype)
        same = self.dtype == self.stored
        flat = tensor.view(-1)
        if not same and not hasattr(self.threads, "piece"):
            self.threads.piece = torch.empty(self.PIECE, dtype=torch.uint8)
        piece = flat if same else self.threads.piece.view(self.stored)
        buffer = memoryview(piece.view(torch.uint8).numpy().data) if self.nbytes else memoryview(b"")
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:
                part = buffer[done:] if same else buffer[: self.nbytes - done]
                count = file.readinto(part[: self.PIECE])
                if not count or count % self.stored.itemsize:
                    raise CheckpointError(
                        f"{self.file} ended before {self.nbytes} bytes of a tensor: fetch it again"
                    )
                if not same:
                    first, number = done // self.stored.itemsize, count // self.stored.itemsize
                    flat[first : first + number] = piece[:number]
                done += count
        return tensor[index]


def _empty(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty`; a big one gets memory of its own, which is the system's again when it is freed.

    Otherwise the heap of the thread that read it keeps what is left when a matrix is laid out anew: a third
    of all memory after loading.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < OWN:
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
    except OSError as error:
        raise MemoryError(f"no memory for a tensor of {size:,} bytes") from error


def open_tensors(
    files: list[Path], dtype: Callable[[str], torch.dtype | None] = lambda name: None
) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files, by name, to be read when it is asked for.

    Args:
        files: that were checked, as `read_shapes` does.
        dtype: what a tensor of that name becomes if it holds floating-point numbers; None for what it is.
    """
    tensors = {}
    for file in files:
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
            header = json.loads(start.read(length))
        header.pop("__metadata__", None)
        for name, facts in header.items():
            if facts["dtype"] not in STORED_TYPES:
                raise CheckpointError(
                    f"{file}: {name} is of type {facts['dtype']}, which no BLIP-2 is made of"
                )
            tensors[name] = StoredTensor(file, 8 + length, facts, dtype(name))
    return tensors


def one_line(error: BaseException) -> str:
    """An exception's message as part of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__
