"""LAVIS checkpoints' names and sizes in terms of ours: every entry is mapped, or dropped for a reason."""

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config

from blip2.config import Blip2AnyConfig
from blip2.layout import CheckpointError

POST_LAYERNORM_EPS = 1e-5  # LAVIS's ln_vision; transformers uses the encoder's 1e-6 for the same layer
DEPTHS = {"eva": 39, "clip": 23}  # blocks used; both encoders stop one before their last
HEAD_SIZES = {1408: 88}  # of image encoders by width; 64 otherwise

_ENTRY = r"\.(weight|bias)"
_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
_EVA = r"visual_encoder\.blocks\.(\d+)\."
_CLIP = r"visual_encoder\.transformer\.resblocks\.(\d+)\."
_BLOCK = r"vision_model.encoder.layers.\1."
# LAVIS name (a regular expression for the whole of it) -> ours.
RULES = [
    (r"query_tokens", r"query_tokens"),
    (r"temp", r"temperature"),
    (rf"ln_vision{_ENTRY}", r"vision_model.post_layernorm.\1"),
    (rf"(?:opt|t5)_proj{_ENTRY}", r"language_projection.\1"),
    (r"(?:opt|t5)_model\.(.+)", r"language_model.\1"),
    (rf"(vision|text)_proj{_ENTRY}", r"\1_projection.\2"),
    (rf"itm_head{_ENTRY}", r"itm_head.\1"),
    (rf"Qformer\.bert\.embeddings\.LayerNorm{_ENTRY}", r"qformer.layernorm.\1"),
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
    (
        rf"{_LAYER}(attention|crossattention)\.self\.(query|key|value){_ENTRY}",
        r"qformer.encoder.layer.\1.\2.attention.\3.\4",
    ),
    (
        rf"{_LAYER}((?:cross)?attention\.output|output|output_query)\.(dense|LayerNorm){_ENTRY}",
        r"qformer.encoder.layer.\1.\2.\3.\4",
    ),
    (rf"{_LAYER}(intermediate|intermediate_query)\.dense{_ENTRY}", r"qformer.encoder.layer.\1.\2.dense.\3"),
    (r"Qformer\.cls\.predictions\.bias", r"lm_head.bias"),
    (rf"Qformer\.cls\.predictions\.transform\.dense{_ENTRY}", r"lm_head.dense.\1"),
    (rf"Qformer\.cls\.predictions\.transform\.LayerNorm{_ENTRY}", r"lm_head.layer_norm.\1"),
    (r"visual_encoder\.cls_token", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", r"vision_model.embeddings.position_embedding"),
    (rf"visual_encoder\.patch_embed\.proj{_ENTRY}", r"vision_model.embeddings.patch_embedding.\1"),
    (rf"{_EVA}norm([12]){_ENTRY}", _BLOCK + r"layer_norm\2.\3"),
    (rf"{_EVA}attn\.qkv\.weight", _BLOCK + r"self_attn.qkv.weight"),
    (rf"{_EVA}attn\.([qv])_bias", _BLOCK + r"self_attn.\2_bias"),
    (rf"{_EVA}attn\.proj{_ENTRY}", _BLOCK + r"self_attn.projection.\2"),
    (rf"{_EVA}mlp\.(fc[12]){_ENTRY}", _BLOCK + r"mlp.\2.\3"),
    (r"visual_encoder\.class_embedding", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.positional_embedding", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.conv1\.weight", r"vision_model.embeddings.patch_embedding.weight"),
    (rf"visual_encoder\.ln_pre{_ENTRY}", r"vision_model.pre_layernorm.\1"),
    (rf"{_CLIP}ln_([12]){_ENTRY}", _BLOCK + r"layer_norm\2.\3"),
    (rf"{_CLIP}attn\.in_proj_(weight|bias)", _BLOCK + r"self_attn.qkv.\2"),
    (rf"{_CLIP}attn\.out_proj{_ENTRY}", _BLOCK + r"self_attn.projection.\2"),
    (rf"{_CLIP}mlp\.c_fc{_ENTRY}", _BLOCK + r"mlp.fc1.\2"),
    (rf"{_CLIP}mlp\.c_proj{_ENTRY}", _BLOCK + r"mlp.fc2.\2"),
]
# Entries that are not taken over, and why.
DROPS = [
    (r"Qformer\.bert\.embeddings\.position_ids", "indices, not weights"),
    (r"Qformer\.cls\.predictions\.decoder\.weight", "tied to the word embeddings"),
    (r"Qformer\.cls\.predictions\.decoder\.bias", "tied to the head's bias"),
    (
        r"visual_encoder\.(head|norm|fc_norm|ln_post)\..+|visual_encoder\.proj",
        "behind the last block that is used",
    ),
]


def rename(
    raw: dict[str, Tensor], depth: int | None = None, source: str = "the file"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LAVIS names -> ours; and the names that were dropped, with the reason.

    Args:
        raw: a LAVIS state dict.
        depth: blocks of the image encoder to keep; by default the paper's 39 (EVA-CLIP) or 23 (CLIP).
        source: how to call the file in an error message.

    Raises:
        CheckpointError: entries that no rule knows, or that were assumed tied and differ.
    """
    clip = "visual_encoder.conv1.weight" in raw
    depth = depth or DEPTHS["clip" if clip else "eva"]
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for name, value in raw.items():
        reason = next((why for pattern, why in DROPS if re.fullmatch(pattern, name)), None)
        new = next((re.sub(p, r, name) for p, r in RULES if re.fullmatch(p, name)), None)
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", new or "")
        if block and int(block[1]) >= depth:
            reason = f"block {int(block[1]) + 1}: BLIP-2 uses the first {depth}"
        if reason:
            dropped[name] = reason
        elif new is None:
            unknown.append(name)
        else:
            state[new] = value
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(raw)} entries are not of a LAVIS BLIP-2 checkpoint: "
            f"{', '.join(sorted(unknown)[:5])}{more}"
        )
    _check_tied(raw, source)
    _join_biases(state, source)
    for name in ("class_embedding", "position_embedding"):
        key = f"vision_model.embeddings.{name}"
        if key in state:  # CLIP keeps them without the axes of batch and token
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    return state, dropped


def _check_tied(raw: dict[str, Tensor], source: str) -> None:
    """What is dropped as tied has to be equal."""
    for copy, original in (
        ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
    ):
        if copy in raw and original in raw and not torch.equal(raw[copy], raw[original]):
            raise CheckpointError(
                f"{source}: {copy} is not tied to {original} here, which this model cannot express"
            )


def _join_biases(state: dict[str, Tensor], source: str) -> None:
    """EVA-CLIP has biases for queries and values only; ours is one vector with zeros for the keys."""
    for name in [name for name in state if name.endswith(".q_bias")]:
        other = name.replace(".q_bias", ".v_bias")
        if other not in state:
            raise CheckpointError(f"{source}: {name} has no {other} beside it")
        query, value = state.pop(name), state.pop(other)
        state[name.replace(".q_bias", ".qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])


def infer_config(state: dict[str, Tensor], text_config: Any = None) -> Blip2Config:
    """The configuration that a renamed state dict shows; heads are of the released models' width.

    Args:
        state: of `rename`, with the image encoder.
        text_config: of the language model; None for stage 1.
    """

    def count(prefix: str) -> int:
        found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    patch = state["vision_model.embeddings.patch_embedding.weight"]
    width, size = patch.shape[0], patch.shape[-1]
    num_positions = state["vision_model.embeddings.position_embedding"].shape[1]
    clip = "vision_model.pre_layernorm.weight" in state
    vision: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count("vision_model.encoder.layers"),
        "num_attention_heads": max(1, width // HEAD_SIZES.get(width, 64)),
        "image_size": math.isqrt(num_positions - 1) * size,
        "patch_size": size,
        "post_layernorm_eps": POST_LAYERNORM_EPS,
    }
    if clip:
        vision |= {
            "pre_layernorm": True,
            "patch_bias": False,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
    hidden = state["query_tokens"].shape[-1]
    layers = count("qformer.encoder.layer")
    crossing = [
        i
        for i in range(layers)
        if f"qformer.encoder.layer.{i}.crossattention.attention.query.weight" in state
    ]
    qformer: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": state["qformer.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else layers,
        "encoder_hidden_size": width,
    }
    words = state.get("embeddings.word_embeddings.weight")
    if words is not None:
        positions = state["embeddings.position_embeddings.weight"]
        qformer |= {
            "use_qformer_text_input": True,
            "vocab_size": len(words),
            "max_position_embeddings": len(positions),
        }
    fields: dict[str, Any] = {
        "vision_config": {"model_type": "blip_2_vision_model", **vision},
        "qformer_config": qformer,
        "num_query_tokens": state["query_tokens"].shape[1],
    }
    if "vision_projection.weight" in state:
        fields["image_text_hidden_size"] = state["vision_projection.weight"].shape[0]
    if text_config is not None:
        fields["text_config"] = text_config
    return (Blip2AnyConfig if clip else Blip2Config)(**fields)
