"""Tiny parts to pre-train from, and the options that make a recipe of the drawn world small."""

import dataclasses
from pathlib import Path

import tiny
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from blip2.vision import VisionTransformer
from train.recipes import QFormerConfig
from train.scenes.text import build_tokenizer


def make_parts(folder: Path) -> None:
    """A tiny random image encoder and two language models, in folders as `train.scenes` writes them."""
    config = tiny.config("retrieval", vision_config={"image_size": 64, "patch_size": 16}).vision_config
    (folder / "encoder").mkdir()
    config.to_json_file(folder / "encoder" / "config.json")
    encoder = tiny.randomize(VisionTransformer(config))
    half = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
    save_file(half, folder / "encoder" / "model.safetensors")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    for family in ("opt", "t5"):
        words = build_tokenizer(family)
        if family == "opt":
            text = OPTConfig(
                vocab_size=len(words), hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, **sizes,
                max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2,
            )  # fmt: skip
            model = OPTForCausalLM(text)
        else:
            text = T5Config(
                vocab_size=len(words), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            )  # fmt: skip
            model = T5ForConditionalGeneration(text)
        model.save_pretrained(folder / family)
        words.save_pretrained(folder / family)


CHANGES = {
    "steps": 4, "batch-size": 4, "log-every": 2, "save-every": 2, "eval-every": 0, "warmup-steps": 1,
    "precision": "fp32", "max-minutes": None, "num-scenes": 40, "num-validation": 8,
}  # fmt: skip
OPTIONS = [f"--{name}={value}" for name, value in CHANGES.items()]
QFORMER = QFormerConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    num_query_tokens=6, image_text_hidden_size=16,
)  # fmt: skip
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(QFORMER).items()]
