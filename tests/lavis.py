"""Reads tests/reference: tiny models of the reference implementation, their inputs, outputs and gradients."""

import json
from pathlib import Path

import tiny
from safetensors import safe_open
from transformers import Blip2Config

from blip2.lavis_names import rename
from blip2.model import Blip2
from blip2.representation import Blip2Representation

FOLDER = Path(__file__).parent / "reference"


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
    if "language_model" in sizes:
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
    made = (Blip2 if "language_model" in sizes else Blip2Representation)(config(sizes))
    if sizes.get("language_model") == "t5":
        tiny.untie(made)  # transformers 5 ties every T5 that is not read from a file
    loaded = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    made.load_state_dict(rename(loaded)[0])
    return made.eval(), tensors


def gradient_errors(gradients, tensors):
    """Relative error of every gradient that the file has, by its name there; `gradients` by our names."""
    errors = {}
    for key, expected in tensors.items():
        if not key.startswith("grads."):
            continue
        name = key.removeprefix("grads.")
        if name.endswith(".q_bias"):  # the first third of our bias
            [weight] = rename({name.replace("q_bias", "qkv.weight"): expected})[0]
            found = gradients[weight.replace("weight", "bias")][: len(expected)]
        else:
            [ours] = rename({name: expected})[0]
            found = gradients[ours]
        errors[key] = ((found - expected).norm() / expected.norm()).item()
    return errors
