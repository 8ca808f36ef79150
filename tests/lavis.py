"""Reads tests/reference: tiny models of the reference implementation, their inputs, outputs and gradients."""

import json
import re
from pathlib import Path

import tiny
import torch
from safetensors import safe_open
from transformers import Blip2Config

from blip2.model import Blip2
from blip2.representation import Blip2Representation

FOLDER = Path(__file__).parent / "reference"
RENAMES = [
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.(qkv|q_bias)", r".self_attn.\1"),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^Qformer\.cls\.predictions\.bias$", "lm_head.bias"),
    (r"^vision_proj\.", "vision_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^(opt|t5)_proj\.", "language_projection."),
    (r"^(opt|t5)_model\.", "language_model."),
    (r"^temp$", "temperature"),
]
COPIES = ("cls.predictions.decoder.weight", "decoder.bias", "position_ids")  # tied or constant


def renamed(name):
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read(name):
    """The sizes and the tensors of a reference file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config(sizes):
    """The same sizes as a configuration of ours."""
    qformer = dict(sizes.get("qformer", sizes))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    names += ("max_position_embeddings", "cross_attention_frequency", "encoder_hidden_size", "layer_norm_eps")
    qformer = {name: qformer[name] for name in names if name in qformer}
    vision = dict(sizes["vision"])
    vision["post_layernorm_eps"] = vision.pop("ln_vision_eps")
    fields = {"num_query_tokens": sizes["num_query_tokens"], "vision_config": vision}
    if sizes["stage"] == "2":
        # transformers 5 scales and ties unless told so; LAVIS's T5 does neither
        unscaled = {"scale_decoder_outputs": False} if sizes["language_model"] == "t5" else {}
        return Blip2Config(**fields, qformer_config=qformer, text_config=sizes["text"] | unscaled)
    qformer |= {"use_qformer_text_input": True, "pad_token_id": sizes["pad_token_id"]}
    made = Blip2Config(**fields, qformer_config=qformer, image_text_hidden_size=sizes["projection_dim"])
    made.decoder_start_token_id = sizes["decode_start_token_id"]
    return made


def model(name):
    """Our model with a file's weights, in eval mode, and the file's tensors."""
    sizes, tensors = read(name)
    made = (Blip2Representation if sizes["stage"] == "1" else Blip2)(config(sizes))
    if sizes.get("language_model") == "t5":
        tiny.untie(made)  # transformers 5 ties every T5 that is not read from a file
    loaded = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    ours = {renamed(n): t for n, t in loaded.items() if not n.endswith((*COPIES, "q_bias", "v_bias"))}
    for query, tensor in loaded.items():
        if query.endswith("q_bias"):
            bias = torch.cat([tensor, torch.zeros_like(tensor), loaded[query.replace("q_bias", "v_bias")]])
            ours[renamed(query.replace("q_bias", "qkv.bias"))] = bias
    made.load_state_dict(ours)
    return made.eval(), tensors


def gradient_errors(made, tensors):
    """Relative error of every gradient that the file has, by its name there."""
    parameters = dict(made.named_parameters())
    errors = {}
    for key, expected in tensors.items():
        if key.startswith("grads."):
            name = renamed(key.removeprefix("grads."))
            if name.endswith(".q_bias"):
                found = parameters[name.replace("q_bias", "qkv.bias")].grad[: len(expected)]
            else:
                found = parameters[name].grad
            errors[key] = ((found - expected).norm() / expected.norm()).item()
    return errors
