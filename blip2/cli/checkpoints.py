"""`info` and `convert`: the checkpoints there are, and LAVIS files as folders."""

import argparse
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Blip2Config

from blip2.adapters import Adapter, is_adapter, merge, num_parameters, read_adapter
from blip2.base import Blip2Base
from blip2.checkpoint import is_available, load, locate, save
from blip2.checks import count_parts
from blip2.cli.console import Console, UsageError, table
from blip2.cli.models import DOES
from blip2.devices import device_advice
from blip2.layout import EXTERNAL, CheckpointError, read_layout, readers
from blip2.model import Blip2
from blip2.presets import PRECISIONS, PRESETS, SMALL_PRECISIONS, Preset, find_preset, memory
from blip2.quantize import KEPT, skipped, stored_precision
from blip2.representation import Blip2Representation
from blip2.settings import Generation
from blip2.shards import is_complete


def run(args: argparse.Namespace, console: Console) -> int:
    """Run one of these commands; returns the exit code."""
    if args.command == "convert":
        return convert(args, console)
    return describe(args, console) if args.model else list_presets(console)


# --- the list ---


def list_presets(console: Console) -> int:
    """Every model with a name: parameters, download, memory by precision, license, whether it is here."""
    if advice := device_advice():
        console.note(advice)
    models = [_preset_document(preset) for preset in PRESETS.values()]
    rows = [
        (
            model["name"],
            _count(model["parameters"]),
            _size(model["download_bytes"]),
            *(_size(model["memory"][precision]) for precision in PRECISIONS),
            model["status"],
        )
        for model in models
    ]
    lines = table(("model", "parameters", "download", *PRECISIONS, "status"), rows)
    lines += ["", "Memory is the weights' alone. scenes-itm and blip2-itm-* score texts, the others write."]
    lines.append("")
    licenses: dict[str, list[str]] = {}
    for model in models:
        licenses.setdefault(model["license"], []).append(model["name"])
    lines += [f"{', '.join(names)}: {text}" for text, names in licenses.items()]
    console.show({"models": models}, lines)
    return 0


def _preset_document(preset: Preset) -> dict[str, Any]:
    there = is_available(preset.name, precision="float32")
    small = {
        precision: str(folder)
        for precision in SMALL_PRECISIONS
        for folder in preset.small_folders(precision)
        if is_complete(folder)
    }
    if preset.repo_id is None:
        status = "embedded" if there else "missing"
    elif there or small:
        status = ", ".join([*(["in the cache"] if there else []), *(f"here in {kept}" for kept in small)])
    else:
        status = "to download"
    writes = preset.kind == "generate"
    return {
        "name": preset.name,
        "repo_id": preset.repo_id,
        "kind": preset.kind,
        "parameters": preset.parameters,
        "download_bytes": preset.download_bytes,
        "memory": {precision: preset.memory(precision) for precision in PRECISIONS},
        "image_size": preset.image_size,
        "caption_prompt": preset.prompt if writes else None,
        "question_prompt": preset.question if writes else None,
        "captions": asdict(preset.captioning) if writes else None,
        "answers": asdict(Generation.answer()) if writes else None,
        "license": preset.license,
        "status": status,
        "small_folders": small,
    }


# --- one model ---


def describe(args: argparse.Namespace, console: Console) -> int:
    """One model, from its configuration and the names in its files: no weights are read or needed."""
    preset = find_preset(args.model)
    stored: set[str] | None = None
    external = 0
    if preset is not None and preset.repo_id:
        name, config, stage1 = preset.name, preset.config(), preset.kind == "match"
    else:
        try:
            name, folder = locate(args.model, local_files_only=True)
        except CheckpointError:
            raise
        except ValueError as error:  # no such name
            raise UsageError(str(error)) from error
        layout = read_layout(folder)
        config, stage1, stored = layout.config, layout.stage1, set(layout.shapes)
        external = sum(math.prod(shape) for key, shape in layout.shapes.items() if key.startswith(EXTERNAL))
    with torch.device("meta"):
        model: Blip2Base = (Blip2Representation if stage1 else Blip2)(config)
    document: dict[str, Any] = {"name": name, "kind": "match" if stage1 else "generate"}
    if preset is not None:
        document |= _preset_document(preset)
    parts = count_parts(model, stored)
    parts["image encoder"] += external
    trainable = _trainable(model)
    trainable["fine-tuning"] += external
    parameters = sum(parts.values())
    shares = _memory_shares(model)
    if is_adapter(Path(args.model).expanduser()):
        document["adapter"] = _adapter_document(read_adapter(args.model), parts)
    document |= {
        "parameters": parameters,
        "parts": parts,
        "trainable": trainable,
        "sizes": _sizes(config, stage1),
        "readers": readers(config),
        "memory": {precision: memory(parameters, *shares, precision) for precision in PRECISIONS},
    }
    console.show(document, _description(document))
    return 0


def _adapter_document(adapter: Adapter, parts: dict[str, int]) -> dict[str, Any]:
    """An adapter's size, and which share of the language model's parameters it has beside them."""
    number, beside = num_parameters(adapter), parts["language model"]
    return {
        "folder": str(adapter.folder),
        "rank": adapter.rank,
        "parameters": sum(number.values()),
        "percent": 100 * number.get("language_model", 0) / beside,
    }


def _trainable(model: Blip2Base) -> dict[str, int]:
    """Parameters that each stage trains: the image encoder joins in for fine-tuning (Sec. 4.2 to 4.4)."""
    trainable = {}
    if isinstance(model, Blip2):
        model.freeze_language()
    trainable["fine-tuning"] = model.num_trainable()
    model.freeze_vision()
    trainable["stage 2" if isinstance(model, Blip2) else "stage 1"] = model.num_trainable()
    return dict(reversed(trainable.items()))


def _memory_shares(model: Blip2Base) -> tuple[int, int]:
    """Weights that int8 and nf4 shrink, and weights that float16 keeps in float32."""
    skip = {*skipped(), *KEPT}
    quantizable = sum(
        module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not skip & set(path.split("."))
    )
    kept = sum(
        parameter.numel() for path, parameter in model.named_parameters() if set(KEPT) & set(path.split("."))
    )
    return quantizable, kept


def _sizes(config: Blip2Config, stage1: bool) -> dict[str, Any]:
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    sizes = {
        "image encoder": _known(
            {
                "type": vision.model_type if config.model_type == "blip2-any" else None,
                "source": getattr(vision, "source", None),
                "image_size": getattr(vision, "image_size", None),
                "patch_size": getattr(vision, "patch_size", None),
                "width": vision.hidden_size,
                "layers": getattr(vision, "num_hidden_layers", None),
                "heads": getattr(vision, "num_attention_heads", None),
            }
        ),
        "Q-Former": {
            "queries": config.num_query_tokens,
            "width": qformer.hidden_size,
            "layers": qformer.num_hidden_layers,
            "heads": qformer.num_attention_heads,
            "vocabulary": qformer.vocab_size,
        },
    }
    if not stage1:
        sizes["language model"] = {
            "type": text.model_type,
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "vocabulary": text.vocab_size,
        }
    return sizes


def _known(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if value is not None}


def _description(document: dict[str, Any]) -> list[str]:
    head = [f"{document['name']}: {DOES[document['kind']]}"]
    if document.get("repo_id"):
        size = _size(document["download_bytes"])
        head.append(f"{document['repo_id']}, {size} download, {document['status']}")
    head += [f"in {precision}: {folder}" for precision, folder in document.get("small_folders", {}).items()]
    if worn := document.get("adapter"):
        head.append(
            f"with the LoRA adapter {worn['folder']} of rank {worn['rank']}: "
            f"{worn['parameters']:,} parameters; those beside the language model are "
            f"{worn['percent']:.2f} % of it"
        )
    head += [document[name] for name in ("license", "readers") if document.get(name)]
    parts = [*document["parts"].items(), ("all", document["parameters"])]
    lines = [*head, "", *table(("part", "parameters"), [(part, f"{count:,}") for part, count in parts])]
    trainable = [(stage, f"{count:,}") for stage, count in document["trainable"].items()]
    lines += ["", *table(("training", "trainable"), trainable), ""]
    for part, sizes in document["sizes"].items():
        lines.append(f"{part}: " + ", ".join(f"{word.replace('_', ' ')} {n}" for word, n in sizes.items()))
    if document.get("captions"):
        lines += _manners(document)
    lines += ["", *table(("precision", "memory"), [(p, _size(n)) for p, n in document["memory"].items()])]
    return lines


def _manners(document: dict[str, Any]) -> list[str]:
    """How a model with a name is asked, and how it decodes unless told otherwise."""
    start = document["caption_prompt"]
    lines = ["", f"captions go on from: {start or 'nothing'}", f"questions: {document['question_prompt']}"]
    for what in ("captions", "answers"):
        by: dict[str, Any] = document[what]
        tokens = f"{by['min_new_tokens']} to {by['max_new_tokens']} tokens"
        lines.append(f"{what}: {by['num_beams']} beams, {tokens}, length penalty {by['length_penalty']:g}")
    return lines


def _count(number: int) -> str:
    if not number:
        return "-"
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(num_bytes: int) -> str:
    if not num_bytes:
        return "-"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


# --- conversion ---


def convert(args: argparse.Namespace, console: Console) -> int:
    """Turn a LAVIS file into a folder, and account for every entry of it; or merge an adapter."""
    if args.adapter or is_adapter(Path(args.source).expanduser()):
        return _merge(args, console)
    from blip2.convert import convert as convert_file

    console.note(f"converting {args.source}; the released sizes take some minutes")
    parts = {"llm": args.llm, "vision": args.vision, "tokenizer": args.tokenizer}
    done = convert_file(args.source, args.folder, **parts, dtype=args.dtype or "float32")
    line = f"wrote {done.folder}: {done.mapped} entries taken over, {len(done.dropped)} left out"
    reasons = [f"  {count} left out: {reason}" for reason, count in Counter(done.dropped.values()).items()]
    document = {"folder": str(done.folder), "mapped": done.mapped, "dropped": done.dropped}
    console.show(document, [line, *reasons])
    return 0


def _merge(args: argparse.Namespace, console: Console) -> int:
    """Fold an adapter into a copy of its model: a folder that needs no peft."""
    for name in ("llm", "vision", "tokenizer"):
        if getattr(args, name):
            raise UsageError(f"--{name} is for a LAVIS checkpoint, not for a model with an adapter")
    if Path(args.folder).exists():
        raise UsageError(f"{args.folder} is there already: name a new folder")
    _, stored = locate(args.source, precision="float32")
    layout = read_layout(stored)
    if (few := stored_precision(layout)) is not None:
        raise CheckpointError(
            f"{args.source} is stored in {few}: an adapter merges into full precision; load the base in full "
            "precision, from the folder it was made from"
        )
    dtype = args.dtype or str(layout.config.dtype or "float32").removeprefix("torch.")
    loaded = load(args.source, adapter=args.adapter, precision=dtype, device="cpu")
    for note in loaded.notes:
        console.note(note)
    merge(loaded.model)
    folder = save(loaded.model, loaded.processor, args.folder, weights_dtype=dtype)
    if loaded.novelty is not None:  # of the image encoder, which is the same
        loaded.novelty.save(folder)
    document = {"folder": str(folder), "model": loaded.name, "adapter": str(loaded.adapter), "dtype": dtype}
    console.show(document, [f"wrote {folder}: {loaded.name} as one model, in {dtype}"])
    return 0
