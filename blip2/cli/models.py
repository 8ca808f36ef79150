"""Which model a command uses, and how it decodes."""

import argparse
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from PIL import Image

from blip2.adapters import base_of, is_adapter, read_adapter
from blip2.checkpoint import CheckpointError, Loaded, is_available, load, locate
from blip2.cli.console import Console, UsageError
from blip2.cli.decoding import generation as generation
from blip2.devices import device_advice
from blip2.generation import Generation, describe, num_descriptions
from blip2.model import Blip2
from blip2.novelty import UnknownPictureError
from blip2.placement import main_device, read_budget
from blip2.presets import DEFAULT, PRESETS, Preset, find_preset
from blip2.processing import Processor, PromptError
from blip2.vision import ImageFeatures

Kind = Literal["generate", "match"]
DEFAULTS: dict[str, str] = {"generate": DEFAULT, "match": "scenes-itm"}
RELEASED: dict[str, str] = {"generate": "blip2-opt-2.7b", "match": "blip2-itm-vit-g"}  # the smallest
DOES = {"generate": "makes captions and answers", "match": "scores texts"}


def default_model(kind: Kind, console: Console, num_pictures: int = 1) -> str:
    """The model to use when none is named.

    The embedded ones serve for one picture at a time only: their captions must not end up beside someone's
    photographs. Several pictures get a released checkpoint if the cache has one.

    Raises:
        UsageError: several pictures and no released checkpoint at hand.
    """
    if num_pictures == 1:
        name = DEFAULTS[kind]
        console.note(f"using the embedded model {name}, which knows drawn scenes only; --model picks another")
        return name
    released = [preset.name for preset in PRESETS.values() if preset.repo_id and preset.kind == kind]
    for name in released:
        if is_available(name):
            console.note(f"using {name}, which is in the cache; --model picks another")
            return name
    raise UsageError(
        f"{num_pictures} pictures need --model: the embedded model knows drawn scenes only, and no released "
        f"one is in the cache. Choose one, such as --model {released[0]}; `blip2 info` lists them"
    )


def model_name(args: argparse.Namespace, kind: Kind, console: Console, num_pictures: int = 1) -> str:
    """The model to use: the one named, else the adapter's own, else `default_model`.

    Raises:
        CheckpointError: --adapter names no adapter, or the adapter no model.
        UsageError: of `default_model`.
    """
    if args.model:
        return str(args.model)
    if kind == "generate" and args.adapter:
        return base_of(read_adapter(args.adapter))
    return default_model(kind, console, num_pictures)


def named_preset(args: argparse.Namespace) -> Preset | None:
    """The embedded or released checkpoint that --model or --adapter stands for; None for others."""
    name = args.model or args.adapter or ""
    if name and is_adapter(Path(name).expanduser()):
        name = read_adapter(name).base
    return find_preset(name)


def check_model(name: str, kind: Kind, console: Console, precision: str = "auto") -> None:
    """Refuse a name that cannot work, before anything is downloaded, and announce a download.

    Raises:
        UsageError: an unknown name, or a model made for something else.
    """
    preset = find_preset(name)
    if preset is not None and preset.kind != kind:
        _refuse_kind(name, kind)
    announce(name, preset, console, precision)


def announce(name: str, preset: Preset | None, console: Console, precision: str = "auto") -> None:
    """Say how large a download is that loading a model begins with.

    Raises:
        UsageError: an unknown name.
    """
    try:
        locate(name, local_files_only=True, precision=precision)
    except CheckpointError:  # `load` will say what is wrong, unless it can download what is missing
        if preset is not None and preset.repo_id and not constants.HF_HUB_OFFLINE:
            size = preset.download_bytes / 1e9
            console.note(f"{preset.name} is not in the cache yet: downloading {size:.1f} GB")
    except ValueError as error:
        raise UsageError(str(error)) from error


def load_model(name: str, kind: Kind, args: argparse.Namespace, console: Console) -> Loaded:
    """Load a model for captions and answers, or for scores.

    Raises:
        UsageError: it is made for something else, or the device is not there.
    """
    try:
        budget = read_budget(args.max_memory) if args.max_memory else None
        main_device(budget, args.device)
        if args.offload_folder and not budget:
            raise UsageError("--offload-folder goes with --max-memory, which says what may stay in memory")
        if args.quantize_vision and args.precision not in ("int8", "nf4", "auto"):
            raise UsageError(f"--quantize-vision goes with --precision int8 or nf4, not {args.precision}")
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_model(name, kind, console, args.precision)
    preset = find_preset(name)
    advice = device_advice() if args.device == "auto" and (preset is None or preset.repo_id) else None
    if advice:
        console.note(advice)
    loaded = load(
        name,
        precision=args.precision,
        device=args.device,
        quantize_vision=args.quantize_vision,
        max_memory=args.max_memory,
        offload_folder=args.offload_folder,
        adapter=getattr(args, "adapter", None) if kind == "generate" else None,
        check_memory=not args.no_memory_check,
    )
    if isinstance(loaded.model, Blip2) != (kind == "generate"):
        _refuse_kind(name, kind)
    for note in loaded.notes:
        console.note(note)
    return loaded


def encode(loaded: Loaded, image: Image.Image, source: str, args: argparse.Namespace) -> ImageFeatures:
    """What the model sees of a picture, `source`.

    Raises:
        UnknownPictureError: it is of a kind that the model does not know, and --force was not given.
    """
    features = loaded.model.encode_image(loaded.processor.images(image).to(loaded.device))
    if args.force:
        return features
    try:
        loaded.check_known(features)
    except UnknownPictureError as error:
        preset = PRESETS[RELEASED["match" if args.command == "match" else "generate"]]
        here = is_available(preset.name)
        size = "in the cache" if here else f"{preset.download_bytes / 1e9:.1f} GB to download"
        option = "--models ..." if args.command == "compare" else "--model"
        raise UnknownPictureError(
            f"{source}: {error}. Run the same with {option} {preset.name} ({size}), or with --force to have "
            f"{loaded.name} answer all the same"
        ) from None
    return features


def framed(loaded: Loaded, features: ImageFeatures, args: argparse.Namespace) -> str:
    """The prompt that asks args.question, after the description that --describe or the model wants."""
    assert isinstance(loaded.model, Blip2)
    style = args.style or loaded.processor.question_style
    captions = 0 if style == "raw" else num_descriptions(loaded.model, args.describe)
    [description] = describe(loaded.model, loaded.processor, features, captions)
    return loaded.processor.prompt(args.question, style, description=description)


def _refuse_kind(name: str, kind: Kind) -> None:
    other: Kind = "match" if kind == "generate" else "generate"
    fitting = ", ".join(preset.name for preset in PRESETS.values() if preset.kind == kind)
    raise UsageError(f"{name} {DOES[other]}; a model that {DOES[kind]} is needed: {fitting}")


def check_question(args: argparse.Namespace) -> None:
    """Notice an empty question before a model is loaded for it.

    Raises:
        PromptError: it is.
    """
    if args.style != "raw" and not args.question.strip():
        raise PromptError("the question is empty: ask something about the picture")


def note_unknown_words(processor: Processor, text: str, name: str, console: Console) -> None:
    """Name the words that a small vocabulary lacks."""
    words = list(dict.fromkeys(processor.unknown_words(text)))
    if words:
        console.note(f"words that {name} does not know: {', '.join(words)}")


def about(loaded: Loaded, settings: Generation | None = None) -> dict[str, Any]:
    """What a JSON reader should know about how the result came about."""
    facts: dict[str, Any] = {
        "model": loaded.name,
        "precision": loaded.precision,
        "device": str(loaded.device),
    }
    if loaded.adapter is not None:
        facts["adapter"] = str(loaded.adapter)
    if settings is not None:
        facts["method"] = settings.method
        if settings.method == "nucleus":
            facts["seed"] = settings.seed
    return facts
