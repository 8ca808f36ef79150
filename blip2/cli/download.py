"""`download`: a checkpoint into the Hub's cache, and by wish a small folder of it in fewer bits."""

import argparse
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir

from blip2.checkpoint import is_available, load, locate, save
from blip2.cli.console import Console, UsageError
from blip2.devices import choose_device, nearest_folder, why_not_quantized
from blip2.download import download
from blip2.errors import CheckpointError
from blip2.layout import read_layout
from blip2.presets import Preset, find_preset, gigabytes, suggestions
from blip2.quantize import QUANTIZED, compute_dtype, total_bytes
from blip2.shards import is_complete
from blip2.values import write_digests


def run(args: argparse.Namespace, console: Console) -> int:
    """Bring a checkpoint into the cache; what an earlier call left is taken up."""
    preset = find_preset(args.model)
    if preset is not None and preset.repo_id is None:
        console.show({"name": preset.name, "folder": str(preset.folder)}, [f"{preset.name} is embedded"])
        return 0
    if preset is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.model):
        raise UsageError(f"{args.model!r} is nothing to download. {suggestions(args.model)}")
    repo_id = str(preset.repo_id) if preset else args.model
    if args.precision:
        return _small(args, console, repo_id, preset)
    if args.out or args.delete_original:
        raise UsageError("--out and --delete-original go with --precision, which makes a small folder")
    if preset is not None:
        console.note(f"{repo_id}, {gigabytes(preset.download_bytes)}. {preset.license}")
    folder = download(repo_id, args.revision)
    console.show({"name": repo_id, "folder": str(folder)}, [f"{repo_id} is in {folder}"])
    return 0


def _small(args: argparse.Namespace, console: Console, repo_id: str, preset: Preset | None) -> int:
    """Download, load in fewer bits, write that to a folder that loads by itself, and offer to tidy up."""
    precision = {"bf16": "bfloat16"}.get(args.precision, args.precision)
    name = preset.name if preset else repo_id
    target = _target(args, preset, precision)
    document = {"name": name, "precision": precision, "folder": str(target)}
    original: Path | None = None
    if is_available(name, args.revision, "float32"):
        original = locate(name, revision=args.revision, local_files_only=True, precision="float32")[1]
    if is_complete(target):
        console.note(f"{name} is in {target} already")
    else:
        if original is None:
            spare = preset.memory(precision) if preset else 0
            if preset is not None:
                sizes = f"{gigabytes(preset.download_bytes)}, then {gigabytes(spare)} in {precision}"
                console.note(f"{repo_id}, {sizes}. {preset.license}")
            if _disk(target) != _disk(Path(constants.HF_HUB_CACHE)):
                _check_room(target, spare)
                spare = 0
            original = download(repo_id, args.revision, spare=spare)
        _write(original, target, precision)
    freed = 0
    if original is not None and _is_unwanted(args, console, original):
        strategy = scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(original.name)
        freed = strategy.expected_freed_size
        strategy.execute()
        console.note(f"deleted {original}: {gigabytes(freed)} are free again")
    elif original is not None:
        console.note(f"the original stays in {original}; --delete-original yes deletes it")
    how = f"--model {name} --precision {precision}" if args.out is None else f"--model {target}"
    line = f"{name} in {precision} is in {target}; use it with {how}"
    console.show(document | {"freed": freed}, [line])
    return 0


def _target(args: argparse.Namespace, preset: Preset | None, precision: str) -> Path:
    """The folder to write, found fit before anything is downloaded.

    Raises:
        UsageError: there is no such folder to be, or no such precision.
    """
    if precision in QUANTIZED:
        if reason := why_not_quantized():
            raise UsageError(reason)
        if preset is not None and preset.kind == "match":
            raise UsageError(
                f"{preset.name} has no language model, which is what {precision} shrinks: choose bf16"
            )
    if args.out is None and preset is None:
        raise UsageError(f"say with --out FOLDER where {args.model} in {precision} is to be written")
    if args.out is None and args.revision:
        raise UsageError("a revision of one's own needs a folder of its own: add --out FOLDER")
    if args.out is None:
        assert preset is not None
        return preset.small_folders(precision)[0]
    target = Path(args.out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already: choose a new folder")
    return target


def _write(original: Path, target: Path, precision: str) -> None:
    """Load in a precision and save; nothing is left of it after an error."""
    layout = read_layout(original)
    device = choose_device("auto" if precision in QUANTIZED else "cpu")
    dtype = compute_dtype(precision, device, layout.config.text_config.model_type)
    _check_room(target, total_bytes(layout, precision, dtype))
    loaded = load(original, precision=precision, device=device)
    save(loaded.model, loaded.processor, target)
    write_digests(target)


def _is_unwanted(args: argparse.Namespace, console: Console, original: Path) -> bool:
    """Whether the original goes: as was said, or as someone at the terminal says."""
    if args.delete_original or console.json or console.quiet or not sys.stdin.isatty():
        return args.delete_original == "yes"
    size = sum(file.stat().st_size for file in original.iterdir())
    print(
        f"Delete the original, {gigabytes(size)} in {original}? [y/N] ", end="", file=sys.stderr, flush=True
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _disk(path: Path) -> int:
    return nearest_folder(path).stat().st_dev


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(nearest_folder(target)).free
    if free < size:
        raise CheckpointError(
            f"{target} will take {gigabytes(size)}, and {gigabytes(free)} of its disk are free: make room, "
            "or choose a folder on another disk with --out"
        )
