"""LoRA adapters (arXiv 2106.09685) as peft saves them: read, checked, put on a model, folded into it.

An adapter is a folder: `adapter_config.json`, which names the model it was trained on, and
`adapter_model.safetensors`. Its names are those of transformers' BLIP-2, so plain peft reads it too.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from blip2.errors import CheckpointError
from blip2.packed import unpack
from blip2.presets import DEFAULT, PRESETS, find_preset
from blip2.shards import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANNERS = "blip2.json"  # beside them, no matter to peft: SETTINGS of the adapted model's configuration
SETTINGS: dict[str, type] = {"num_descriptions": int, "caption_prompt": str, "question_prompt": str}
PREFIX = "base_model.model."  # peft puts it before every name
NAME = "default"  # peft's name for a model's only adapter
CACHED = re.compile(r"models--(.+?)--(.+)")  # a repository's folder in the Hub's cache


@dataclass(frozen=True)
class Adapter:
    """What a folder says of its adapter.

    Attributes:
        base: the model it was trained on: a name, a Hub id or a folder; "" where it does not say.
        rank: of its matrices.
        settings: how the adapted model wants to be asked, where that is not as its base: how many captions it
            reads before a question (num_descriptions), what its captions go on from (caption_prompt), and
            what stands around a question (question_prompt).
    """

    folder: Path
    base: str
    rank: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name; of `run/adapter`, the run's."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "adapter" else folder.name


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter's folder says; its weights are not read.

    Raises:
        CheckpointError: there is no such folder, or it holds no LoRA adapter.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter {folder}: give the folder that training or peft wrote")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}: an adapter is a folder that peft saved")
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} holds an adapter of type {raw.get('peft_type')!r}; adapters of type 'LORA' are read"
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: save the adapter again, as safetensors")
    settings = read_json(folder / MANNERS) if (folder / MANNERS).is_file() else {}
    if wrong := [name for name, value in settings.items() if type(value) is not SETTINGS.get(name)]:
        raise CheckpointError(f"{folder / MANNERS} says {wrong[0]} {settings[wrong[0]]!r}, which is unknown")
    return Adapter(folder, str(raw.get("base_model_name_or_path") or ""), int(raw.get("r") or 0), settings)


def base_of(adapter: Adapter) -> str:
    """The name of the model that an adapter was trained on.

    Raises:
        CheckpointError: the adapter does not say, or it is a folder that is gone.
    """
    if not adapter.base:
        raise CheckpointError(f"{adapter.folder} does not name the model it was trained on: name it yourself")
    if Path(adapter.base).is_absolute() and not Path(adapter.base).is_dir():
        raise CheckpointError(
            f"{adapter.folder} was trained on {adapter.base}, which is gone: name the model's folder yourself"
        )
    return adapter.base


def asked_for(
    name_or_path: str | Path | None, adapter: str | Path | None
) -> tuple[str | Path, Adapter | None]:
    """Which model, with which adapter on, `load` is to load.

    Args:
        name_or_path: a model; an adapter's folder; or None, for the adapter's own model or the default.
        adapter: a folder.

    Raises:
        CheckpointError: no adapter, or its model is not known; see `read_adapter` and `base_of`.
        ValueError: two adapters; or peft is not installed.
    """
    if name_or_path is not None and is_adapter(Path(name_or_path).expanduser()):
        if adapter is not None:
            raise ValueError(f"{name_or_path} is an adapter, and a model wears one: leave out {adapter}")
        adapter, name_or_path = name_or_path, None
    if adapter is None:
        return name_or_path or DEFAULT, None
    found = read_adapter(adapter)
    import_peft()
    return name_or_path or base_of(found), found


def base_name(folder: str | Path) -> str:
    """What an adapter calls the model in a folder: a name that `load` finds wherever the adapter goes.

    Args:
        folder: a checkpoint's; of an embedded or released one the name is the preset's or the Hub's.
    """
    path = Path(folder).expanduser().resolve()
    for preset in PRESETS.values():
        places = [preset.folder] if preset.folder else preset.small_folders()
        if path in [place.resolve() for place in places]:
            return preset.repo_id or preset.name
    for part in path.parts:
        if found := CACHED.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    return str(path)


def num_parameters(adapter: Adapter) -> dict[str, int]:
    """How many parameters an adapter has beside each part of the model, such as "language_model"."""
    counts: Counter[str] = Counter()
    try:
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = key.removeprefix(PREFIX).partition(".")[0]
                counts[part] += math.prod(file.get_slice(key).get_shape())
    except SafetensorError as error:
        raise CheckpointError(f"{adapter.folder / WEIGHTS} is broken: {error}") from error
    return dict(counts)


def put_on(model: Any, adapter: Adapter, name: str) -> None:
    """Put an adapter on a `Blip2`, for inference; strict. Its numbers stay in float32, as they were trained.

    Args:
        model: in any precision, not packed yet.
        adapter: of `read_adapter`.
        name: of the model, for messages.

    Raises:
        CheckpointError: the adapter does not fit the model, or is broken.
        ValueError: peft is not installed.
    """
    peft = import_peft()
    trained_on = f", which was trained on {adapter.base}," if adapter.base else ""
    misfit = f"the adapter {adapter.folder}{trained_on} does not fit {name}"
    config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = True
    try:
        weights = load_file(adapter.folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{adapter.folder / WEIGHTS} is broken: {error}") from error
    weights = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    try:
        inject(model, config)
    except ValueError as error:  # none of the layers is there
        raise CheckpointError(f"{misfit}: {' '.join(str(error).split())[:300]}") from error
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if wrong := _differences(expected, weights):
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise CheckpointError(f"{misfit}; {len(wrong)} of its tensors differ: {shown}")
    left = peft.set_peft_model_state_dict(model, weights).unexpected_keys
    if left:
        raise CheckpointError(f"{misfit}: peft finds no place for {', '.join(left[:3])}")
    model.requires_grad_(False)
    for setting, value in adapter.settings.items():
        setattr(model.config, setting, value)


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with an adapter's tensors, in words."""
    wrong = [f"{key} is missing" for key in expected.keys() - found.keys()]
    wrong += [f"{key} has no place" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        there, wanted = list(found[key].shape), list(expected[key].shape)
        if there != wanted:
            wrong.append(f"{key} {there} instead of {wanted}")
    return sorted(wrong)


def inject(model: Any, config: Any) -> None:
    """Put peft's layers around those that a configuration names; what they add is computed in float32.

    Raises:
        ValueError: no layer has such a name.
    """
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):  # what peft asks the whole model for
        if getattr(model.language_model, flag, False):
            setattr(model, flag, True)
    import_peft().inject_adapter_in_model(config, model, NAME)
    for key, parameter in model.named_parameters():
        if ".lora_" in key and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    model._hf_peft_config_loaded = True  # as transformers marks a model that wears one


@torch.no_grad()
def merge(model: Any) -> None:
    """Fold the adapter that a model wears into its weights; the model is then as if it never wore one.

    Raises:
        CheckpointError: it wears none; or the weights it would go into are in 8 or 4 bits, or another
            layer's too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        raise CheckpointError("this model wears no adapter: there is nothing to merge")
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, layer in layers.items():
        weight: Any = layer.get_base_layer().weight
        if not weight.is_floating_point():
            raise CheckpointError(
                "an adapter cannot be merged into weights in 8 or 4 bits, which would round it away: load "
                "the base in full precision"
            )
        if uses[id(weight)] > 1:
            raise CheckpointError(f"{path} shares its weight with another layer: no adapter goes into it")
    unpack(model)
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        layer.merge(safe_merge=True)
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


def strangeness(adapter: Adapter, folder: Path) -> list[str]:
    """A sentence if the model in a folder is, by its name, another than an adapter was trained on."""
    ours, trained_on = base_name(folder), adapter.base
    if Path(trained_on).is_dir():
        trained_on = base_name(trained_on)
    preset, other = find_preset(trained_on), find_preset(ours)
    if not trained_on or (preset is other if preset or other else trained_on == ours):
        return []
    return [f"the adapter {adapter.name} was trained on {trained_on}, and changes another model here"]


def import_peft() -> Any:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("an adapter needs peft: pip install peft") from None
    return peft
