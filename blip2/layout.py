"""What lies in a checkpoint folder: reading and writing its config.json, and which names its weights go by.

Three model types are known: transformers' `blip-2` and `instructblip` (the latter for models whose Q-Former
reads the question too), and our own `blip2-any` for encoders that transformers' BLIP-2 cannot express. Old
and new revisions of the released repositories differ in names and defaults; the differences are listed here.
"""

import copy
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Blip2Config, PreTrainedConfig
from transformers.activations import ACT2FN

from blip2.config import Blip2AnyConfig
from blip2.errors import CheckpointError
from blip2.presets import PRESETS
from blip2.shards import one_line, read_json, read_shapes, variant_of

EXTERNAL = "vision_model.external."  # weights of an image encoder that is a callable
NOVELTY = "novelty.safetensors"  # see `blip2.novelty`
DIGESTS = "digests.json"  # see `blip2.values`
# Old names of parameters, as regular expressions, and the names they have here.
OLD_NAMES = {r"^vision_proj\.": "vision_projection.", r"^text_proj\.": "text_projection."}
INSTRUCT_NAMES = {
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.word_embeddings\.": "embeddings.word_embeddings.",
    r"^qformer\.embeddings\.position_embeddings\.": "embeddings.position_embeddings.",
}
# Entries of old files that no model reads any more: indices that used to be saved as if they were weights.
LEFTOVERS = re.compile(r"^(qformer\.)?(embeddings\.)?position_ids$")
# Parameters of stage 1 that the released image-text matching files lack: all or none of them.
STAGE1_EXTRAS = frozenset(
    {"temperature", "lm_head.bias"}
    | {f"lm_head.{module}.{kind}" for module in ("dense", "layer_norm") for kind in ("weight", "bias")}
)

STAGE1_CLASSES = (
    "Blip2ForImageTextRetrieval",
    "Blip2VisionModelWithProjection",
    "Blip2TextModelWithProjection",
    "Blip2Representation",
)
MODEL_TYPES = ("blip-2", "instructblip", "blip2-any")


@dataclass
class Layout:
    """A checkpoint folder, read but for its weights.

    Attributes:
        folder: where it lies.
        config: its configuration, normalized to the current names.
        stage1: whether it holds a `Blip2Representation`; otherwise it is a `Blip2`.
        shapes: name and shape of every stored tensor, under the stored names.
        renames: regular expressions that turn stored names into ours.
        variant: the middle part of the weight files' names, None for the usual names.
        notes: sentences about what was read in an unusual way.
    """

    folder: Path
    config: Blip2Config
    stage1: bool
    shapes: dict[str, tuple[int, ...]]
    renames: dict[str, str]
    variant: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Numbers stored, whatever their type; a quantized file stores two 4-bit weights in one."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_layout(folder: Path) -> Layout:
    """Read and check everything in a folder but the values of the weights.

    Raises:
        CheckpointError: files are missing or broken, or the configuration contradicts itself.
    """
    raw = read_json(folder / "config.json")
    variant = variant_of(raw)
    shapes = read_shapes(folder, variant)
    config = parse_config(raw, folder)
    text_raw = raw.get("text_config") or {}
    untied = text_raw.get("model_type") == "t5" and text_raw.get("tie_word_embeddings") is False
    if untied and "language_model.shared.weight" in shapes and "language_model.lm_head.weight" not in shapes:
        raise CheckpointError(
            f"{folder}: 1 missing key: language_model.lm_head.weight. text_config.tie_word_embeddings is "
            "false, so the output matrix has to be stored: save the model again, or set it to true"
        )
    _check_processor(folder, config)
    renames = OLD_NAMES | (INSTRUCT_NAMES if raw["model_type"] == "instructblip" else {})
    stage1 = _is_stage1(raw, shapes, folder)
    config.architectures = ["Blip2ForImageTextRetrieval" if stage1 else "Blip2ForConditionalGeneration"]
    return Layout(folder, config, stage1, shapes, renames, variant)


def parse_config(raw: dict[str, Any], source: Path | str) -> Blip2Config:
    """Turn the contents of a config.json, of an old or new revision, into a checked configuration.

    Raises:
        CheckpointError: an unknown model type, or values that contradict each other.
    """
    raw = copy.deepcopy(raw)
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not one of a BLIP-2 checkpoint: {', '.join(MODEL_TYPES)}"
        )
    for part in ("vision_config", "qformer_config", "text_config"):
        if not isinstance(raw.get(part) or {}, dict):
            raise CheckpointError(f"{source}: {part} must be an object, not {raw[part]!r}")
        raw[part] = raw.get(part) or {}
    qformer, vision, text = raw["qformer_config"], raw["vision_config"], raw["text_config"]
    for place in (qformer, raw):  # the name in revisions of 2024
        if "qformer_text_input" in place:
            qformer.setdefault("use_qformer_text_input", place.pop("qformer_text_input"))
    if model_type == "instructblip":
        qformer["use_qformer_text_input"] = True
    if model_type != "blip2-any":
        vision["model_type"], qformer["model_type"] = "blip_2_vision_model", "blip_2_qformer"
    text.setdefault("model_type", "opt")
    if "auto_map" in text or "auto_map" in vision or "auto_map" in raw:
        raise CheckpointError(
            f"{source}: the configuration asks for code of its own (auto_map), which is never run"
        )
    explicit = qformer.get("encoder_hidden_size")
    raw.pop("model_type")
    try:
        config = (Blip2AnyConfig if model_type == "blip2-any" else Blip2Config).from_dict(raw)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json cannot be used: {one_line(error)}") from error
    check_config(config, source)
    if explicit is not None and explicit != config.vision_config.hidden_size:
        raise CheckpointError(
            f"{source}: qformer_config.encoder_hidden_size is {explicit} but vision_config.hidden_size is "
            f"{config.vision_config.hidden_size}: the Q-Former reads what the encoder writes, make them equal"
        )
    decoder_only = raw.get("use_decoder_only_language_model")
    if decoder_only is not None and decoder_only != config.use_decoder_only_language_model:
        raise CheckpointError(
            f"{source}: use_decoder_only_language_model is {decoder_only} but text_config describes a "
            f"{text['model_type']} model: remove the setting or correct text_config"
        )
    return config


def readers(config: Blip2Config) -> str:
    """One sentence on who reads a folder, if it is not transformers too; else ""."""
    if config.model_type != "blip2-any":
        return ""
    vision: Any = config.vision_config
    kind = vision.model_type
    if kind == "blip_2_vision_model":
        kind = "CLIP as LAVIS has it" if getattr(vision, "pre_layernorm", False) else "EVA-CLIP"
    elif kind == "blip2_callable":
        kind = f"the function {vision.source}"
    parts = f"image encoder: {kind}"
    if not config.qformer_config.use_qformer_text_input:  # stage 1 has no language model
        parts += f"; language model: {config.text_config.model_type}"
    return (
        f"Model type blip2-any ({parts}): transformers' BLIP-2 cannot express this model and refuses its "
        "folder; the package blip2 reads it."
    )


def check_config(config: Blip2Config, source: Path | str = "config") -> None:
    """Hold a configuration to itself.

    Raises:
        CheckpointError: the first contradiction found, with the values seen and what to change.
    """
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config

    def get(part: PreTrainedConfig, name: str) -> Any:
        return getattr(part, name, None)

    def fail(message: str) -> None:
        raise CheckpointError(f"{source}: {message}")

    for label, part in (("vision_config", vision), ("qformer_config", qformer), ("text_config", text)):
        if get(part, "model_type") == "t5":
            continue  # its heads have a width of their own
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
            value = get(part, name)
            if isinstance(value, int) and value < 1:
                fail(f"{label}.{name} is {value}, it must be at least 1")
        size, heads = get(part, "hidden_size"), get(part, "num_attention_heads")
        if size and heads and size % heads:
            fail(f"{label}.hidden_size {size} is not divisible by num_attention_heads {heads}")
        act = get(part, "hidden_act")
        if isinstance(act, str) and act not in ACT2FN:
            fail(f"{label}.hidden_act {act!r} is unknown")
    image, patch = get(vision, "image_size"), get(vision, "patch_size")
    if vision.model_type != "blip_2_vision_model":
        patch = None  # others leave a rest of the image out
    if isinstance(image, int) and isinstance(patch, int) and (patch < 1 or image < patch or image % patch):
        fail(f"vision_config.image_size {image} is not a multiple of patch_size {patch}")
    if config.num_query_tokens < 1:
        fail(f"num_query_tokens is {config.num_query_tokens}, it must be at least 1")
    frequency = qformer.cross_attention_frequency
    if frequency < 1:
        fail(f"qformer_config.cross_attention_frequency is {frequency}, it must be at least 1")


def write_config(
    config: Blip2Config, stage1: bool, dtype: str, tied_t5: bool | None = None
) -> dict[str, Any]:
    """The contents of config.json for a model: transformers' class and type where it can express the model.

    Args:
        config: the model's configuration.
        stage1: whether the model is a `Blip2Representation`.
        dtype: what the model computes in, such as "bfloat16"; written under the old and the new name.
        tied_t5: for T5, whether the output matrix is the embeddings'; None for other language models.
    """
    raw = json.loads(config.to_json_string())
    for part in ("vision_config", "qformer_config", "text_config"):
        for name in ("dtype", "torch_dtype", "_name_or_path", "architectures"):
            raw[part].pop(name, None)
    name = "Blip2ForImageTextRetrieval" if stage1 else "Blip2ForConditionalGeneration"
    if config.model_type == "blip2-any":
        name = "Blip2Representation" if stage1 else "Blip2"
    elif config.qformer_config.use_qformer_text_input and not stage1:
        name = "InstructBlipForConditionalGeneration"
        raw["model_type"] = "instructblip"
        raw["vision_config"]["model_type"] = "instructblip_vision_model"
        raw["qformer_config"]["model_type"] = "instructblip_qformer"
        raw["qformer_config"].pop("use_qformer_text_input")
    if tied_t5 is not None:
        # transformers 4 ties exactly when tie_word_embeddings is true, and scales exactly when it ties;
        # transformers 5 reads the scaling from its own field and ties what is equal.
        scale = bool(getattr(config.text_config, "scale_decoder_outputs", True))
        raw["text_config"] |= {"tie_word_embeddings": scale and tied_t5, "scale_decoder_outputs": scale}
    raw |= {"architectures": [name], "dtype": dtype, "torch_dtype": dtype}
    raw.pop("_name_or_path", None)
    return raw


def stored_name(name: str, model_type: str) -> str:
    """Our parameter name -> the one it is stored under in a folder of that model type."""
    if model_type != "instructblip":
        return name
    for pattern, ours in INSTRUCT_NAMES.items():
        if name.startswith(ours):
            stored = pattern.removeprefix("^").replace("\\", "")
            return stored + name.removeprefix(ours)
    return name


def describe(shapes: dict[str, tuple[int, ...]]) -> str:
    """A sentence on what model a set of weights is of, for error messages; "" if they tell nothing."""
    facts: list[str] = []
    patch = shapes.get("vision_model.embeddings.patch_embedding.weight")
    position = shapes.get("vision_model.embeddings.position_embedding")
    image = None
    if patch and position:
        image = math.isqrt(position[1] - 1) * patch[-1]
        facts += [f"image size {image}", f"vision width {patch[0]}"]
    queries = shapes.get("query_tokens")
    if queries:
        facts += [f"{queries[1]} queries of width {queries[2]}"]
    projection = shapes.get("language_projection.weight")
    if projection:
        facts += [f"a language model of width {projection[0]}"]
    if "itm_head.weight" in shapes:
        facts += ["an image-text matching head"]
    wrong = ""  # the family that the language model, if there is one, is not of
    if any(name.startswith("language_model.") for name in shapes):
        wrong = "opt" if "language_model.shared.weight" in shapes else "t5"
    for preset in PRESETS.values():
        if preset.kind == "match":
            same = "itm_head.weight" in shapes
        else:
            width = preset.text_size[0] if preset.text_size else None
            same = projection is not None and width == projection[0] and preset.language_model != wrong
        if same and preset.repo_id and preset.image_size == image and patch and patch[0] == 1408:
            return f"The weights have {', '.join(facts)}: the config.json of {preset.repo_id} would fit"
    return f"The weights have {', '.join(facts)}: use the config.json saved with them" if facts else ""


def _is_stage1(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> bool:
    """Which class a folder is of; by its weights where config.json does not say."""
    if any(name in STAGE1_CLASSES for name in raw.get("architectures") or []):
        return True
    if any(name.startswith("language_model.") for name in shapes):
        return False
    if "itm_head.weight" in shapes:
        return True
    raise CheckpointError(
        f"{folder}: the weights hold neither a language model nor an image-text matching head, so this is no "
        "whole BLIP-2 model; `blip2 convert` joins a LAVIS file with the parts it needs"
    )


def _check_processor(folder: Path, config: Blip2Config) -> None:
    """Hold the number of queries that the processor writes into prompts to the model's."""
    path = folder / "processor_config.json"
    count = read_json(path).get("num_query_tokens") if path.is_file() else None
    if count is not None and count != config.num_query_tokens:
        raise CheckpointError(
            f"{folder}: processor_config.json says num_query_tokens {count}, config.json says "
            f"{config.num_query_tokens}: make them equal"
        )
