"""Tiny random image encoders and language models of other families, in folders as transformers saves them.

Encoders take 64 pixels and give tokens of width 32; language models speak the drawn world's words.
"""

import json
from pathlib import Path

import tiny
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from blip2.encoders import ExternalEncoder
from train.scenes.text import TOKEN, WORDS, build_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {"image_size": 64, "patch_size": 16}
HALF = [0.5, 0.5, 0.5]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder(kind: str, folder: Path) -> Path:
    """A whole model as published, text half and heads included, and its image processor."""
    square = {"height": 64, "width": 64}
    if kind in ("siglip", "clip"):
        vision = {**SIZES, **PIXELS, "intermediate_size": 48}
        vision["patch_size"] = 15 if kind == "siglip" else 16  # as the released one's 14 in 384
        text = {**SIZES, "intermediate_size": 48, "vocab_size": 40, "projection_size": 32}
        names = {"siglip": ("SiglipConfig", "SiglipModel"), "clip": ("CLIPConfig", "CLIPModel")}[kind]
        config = getattr(transformers, names[0])(vision_config=vision, text_config=text)
        model = getattr(transformers, names[1])(config)
        images = transformers.SiglipImageProcessor(size=square, image_mean=HALF, image_std=HALF)
    elif kind == "dinov2":  # learned at 96 pixels, used at 64, as the released ones at 518 and 224
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=96, patch_size=16))
        images = transformers.BitImageProcessor(
            size={"shortest_edge": 73}, do_center_crop=True, crop_size=square,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        )  # fmt: skip
    else:
        names = {"vit": ("ViTConfig", "ViTModel"), "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel")}[kind]
        config = getattr(transformers, names[0])(**SIZES, **PIXELS, intermediate_size=48)
        model = getattr(transformers, names[1])(config)
        images = transformers.ViTImageProcessor(size=square, image_mean=HALF, image_std=HALF)
    tiny.randomize(model)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """ "qwen": nothing before a text, a chat template; "llama": <s> before it, no template, and no pad."""
    if kind == "qwen":  # transformers takes Qwen's own class, whatever the folder says
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
        raw.train_from_iterator([f" {word} {word}" for word in (*WORDS, "user", "assistant")] * 2, trainer)
        learned = json.loads(raw.to_str())["model"]
        made = transformers.Qwen2Tokenizer(
            vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
            eos_token="<|im_end|>", additional_special_tokens=special,
        )  # fmt: skip
        made.chat_template = CHAT
        return made
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "\n", *WORDS])
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    raw.decoder = decoders.WordPiece(prefix="##")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def language_model(kind: str, folder: Path, spare: int = 6) -> Path:
    """A language model and its tokenizer; `spare` rows of the embedding table belong to no word."""
    words = (
        build_tokenizer("t5") if kind == "t5" else tokenizer("qwen" if kind.startswith("qwen") else "llama")
    )
    sizes = {
        **SIZES,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(words) + spare, "tie_word_embeddings": True}
    if kind == "t5":
        text = transformers.T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(text)
    else:
        name = {"qwen": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[kind]
        own = {"qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 6}}.get(kind, {})
        ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
        config = getattr(transformers, f"{name}Config")(**sizes, **ends, **own)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        if kind.startswith("qwen"):
            model.generation_config.eos_token_id = [words.eos_token_id, 0]
    tiny.randomize(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


class Patches(torch.nn.Module):
    """An image encoder that is nobody's: patches through a linear layer; a buffer that is not saved."""

    def __init__(self, size: int = 64, width: int = 32):
        super().__init__()
        self.cells = torch.nn.Conv2d(3, width, 16, 16)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float (B, 3, S, S) -> float (B, P, V)."""
        return self.scale * self.cells(pixel_values).flatten(2).transpose(1, 2)


def patches() -> ExternalEncoder:
    """For start_from="others:patches"."""
    return ExternalEncoder(tiny.randomize(Patches()), width=32, image_size=64, mean=HALF, std=HALF)
