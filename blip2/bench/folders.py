"""Checkpoint folders with random weights, in the released layout and at the released sizes: no download.

Speed and memory do not depend on what the weights are, as long as they are finite and the model says
different things of different pictures. Weights are drawn from one block of normal numbers, so a folder is
written as fast as the disk takes it, and never more than a shard is in memory.
"""

import json
import math
import shutil
import uuid
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import Blip2Config, PreTrainedTokenizerFast

from blip2.layout import STAGE1_EXTRAS, write_config
from blip2.model import Blip2
from blip2.presets import OPT_TEXT, PRESETS, T5_TEXT
from blip2.processing import Family, Processor
from blip2.representation import Blip2Representation

RELEASED = {
    "opt-2.7b": "blip2-opt-2.7b",
    "opt-6.7b": "blip2-opt-6.7b",
    "flan-t5-xl": "blip2-flan-t5-xl",
    "flan-t5-xxl": "blip2-flan-t5-xxl",
    "itm": "blip2-itm-vit-g",
}
SIZES = ("mid", "mid-t5", "mid-itm", *RELEASED)
MID_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
MID_OPT = {  # OPT-125m
    "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "word_embed_proj_dim": 768,
}  # fmt: skip
MID_T5 = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}  # Flan-T5-base

# The special tokens of the released tokenizers, at their places; all other places hold made-up words.
SPECIAL: dict[Family, dict[str, int]] = {
    "opt": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "\n": 50118, "<image>": 50265},
    "t5": {"<pad>": 0, "</s>": 1, "<unk>": 2, "<image>": 32100},
    "bert": {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[DEC]": 30522, "<image>": 30523},
}
SENTENCE = """question answer short a an the this that photo picture of is are was what which who where
when how many much color kind there here in on at under over near left right red green blue yellow black
white circle square star ring one two three four five no yes cat dog man woman child car tree house
street sky water table sitting standing running holding looking with and or to from . , ? ! : ; -"""
BLOCK = 16_777_213  # prime, so that rows of no matrix repeat each other


def config(size: str, depth: int | None = None) -> Blip2Config:
    """The configuration of a size, one of `SIZES`.

    Args:
        size: a name.
        depth: layers of the image encoder, the Q-Former (at least 2: one with cross-attention, one without)
            and the language model, at their full width; None: all.

    Raises:
        ValueError: an unknown name, or a depth below 1.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose {', '.join(SIZES)}")
    if depth is not None and depth < 1:
        raise ValueError(f"depth is {depth}, it must be at least 1")
    made = PRESETS[RELEASED[size]].config() if size in RELEASED else _mid(size)
    if depth is not None:
        made.vision_config.num_hidden_layers = depth
        made.qformer_config.num_hidden_layers = max(2, depth)
        made.text_config.num_hidden_layers = depth
        if made.text_config.model_type == "t5":
            made.text_config.num_decoder_layers = depth
    return made


def _mid(size: str) -> Blip2Config:
    qformer, text, image_token = {}, OPT_TEXT | MID_OPT, SPECIAL["opt"]["<image>"]
    if size == "mid-t5":
        text, image_token = T5_TEXT | MID_T5, SPECIAL["t5"]["<image>"]
    elif size == "mid-itm":
        qformer, text = {"use_qformer_text_input": True, "vocab_size": 30523}, {"model_type": "opt"}
        image_token = SPECIAL["bert"]["<image>"]
    return Blip2Config(
        vision_config=MID_VISION, qformer_config=qformer, text_config=text, image_token_index=image_token
    )


def tensor_shapes(made: Blip2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a released file: a tied output matrix is left out."""
    stage1 = bool(made.qformer_config.use_qformer_text_input)
    with torch.device("meta"):
        model = (Blip2Representation if stage1 else Blip2)(made)
    copies = {"language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"}
    if made.text_config.model_type == "opt":
        copies.add("language_model.lm_head.weight")
    left_out = copies | STAGE1_EXTRAS
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in left_out}


def num_bytes(size: str, dtype: str = "float16", depth: int | None = None) -> int:
    """Bytes that the weights of `make_folder` take on the disk."""
    shapes = tensor_shapes(config(size, depth)).values()
    return sum(math.prod(shape) for shape in shapes) * getattr(torch, dtype).itemsize


def make_folder(
    size: str,
    folder: str | Path,
    dtype: str = "float16",
    seed: int = 0,
    max_shard_size: str = "5GB",
    depth: int | None = None,
) -> Path:
    """Write a folder with random weights that `blip2.load` and transformers read; all of it, or nothing.

    config.json says float32, as those of the releases do.

    Args:
        size: one of `SIZES`.
        folder: a new name.
        dtype: of the stored weights, "float16", "bfloat16" or "float32".
        seed: the same seed gives the same weights.
        max_shard_size: of one file; so much is in memory at a time.
        depth: see `config`.

    Raises:
        ValueError: an unknown size or dtype, or a folder that is there already.
        OSError: the disk has no room for it.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"unknown dtype {dtype!r}: choose float16, bfloat16 or float32")
    made, target = config(size, depth), Path(folder)
    if target.exists():
        raise ValueError(f"{target} is there already: choose a new folder")
    kind: torch.dtype = getattr(torch, dtype)
    empty = {
        name: torch.empty(shape, dtype=kind, device="meta") for name, shape in tensor_shapes(made).items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.nbytes for tensor in empty.values()), shutil.disk_usage(target.parent).free
    if needed + 100_000_000 > free:
        raise OSError(
            f"{target} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: make room, or "
            "choose another folder or size"
        )
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        _write_files(fresh, made)
        shards = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
        draw = _Draw(made, kind, seed)
        for file, names in shards.filename_to_tensors.items():
            tensors = {name: draw(name, empty[name].shape) for name in names}
            save_file(tensors, fresh / file, {"format": "pt"})
            (fresh / file).chmod(
                (fresh / "config.json").stat().st_mode
            )  # safetensors hides files from others
            del tensors
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            _write_json(fresh / "model.safetensors.index.json", index)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


class _Draw:
    """Values for tensors by their names: finite, the same for a seed, and such that pictures matter."""

    def __init__(self, made: Blip2Config, dtype: torch.dtype, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(BLOCK, generator=self.generator).to(dtype)
        self.width = made.vision_config.hidden_size
        text = made.text_config
        self.t5_head = text.d_kv if text.model_type == "t5" else 1
        family: Family = "t5" if text.model_type == "t5" else "opt"
        # these are never said: no text has words for them, and an end would cut a measurement short
        unsaid = [*SPECIAL[family].values(), *range(max(SPECIAL[family].values()) + 1, text.vocab_size)]
        self.unsaid = torch.tensor(unsaid)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of that name."""
        values = self._normal(shape).mul_(self._scale(name, shape))
        if "norm" in name.lower() and name.endswith(".weight"):
            values += 1
        if name.endswith(
            "fc2.weight"
        ):  # what ReLU lets through has a mean, which would drown all differences
            values -= values.mean(-1, keepdim=True)
        if name.endswith("qkv.bias"):  # the releases' encoder has no bias for keys
            values[self.width : 2 * self.width] = 0
        if name.endswith(("decoder.embed_tokens.weight", "language_model.lm_head.weight")):
            values[self.unsaid] = 0
        return values

    def _normal(self, shape: torch.Size) -> Tensor:
        """Normal numbers, read from the block from a place of their own on."""
        count = shape.numel()
        values = torch.empty(count, dtype=self.block.dtype)
        place, filled = int(torch.randint(BLOCK, (), generator=self.generator)), 0
        while filled < count:
            part = self.block[place : place + count - filled]
            values[filled : filled + len(part)] = part
            place, filled = 0, filled + len(part)
        return values.view(shape)

    def _scale(self, name: str, shape: torch.Size) -> float:
        """Standard deviation of a tensor: what goes in with variance 1 comes out so, nearly."""
        if "norm" in name.lower():
            return 0.1
        if name.endswith("bias") and "relative_attention" not in name:
            return 0.02
        if name.endswith("word_embeddings.weight"):
            return 0.05
        # Words and places count for more than what all tokens see alike, or a decoder says one for ever.
        if name.endswith("decoder.embed_tokens.weight"):
            return 0.02
        if name.endswith("embed_positions.weight"):
            return 0.2
        if name.endswith(("query_tokens", "class_embedding", "position_embedding", "embeddings.weight")):
            return 0.5
        if name.endswith("shared.weight") or "relative_attention_bias" in name:
            return 1.0
        scale = math.prod(shape[1:]) ** -0.5
        if name.endswith("out_proj.weight"):
            return 0.3 * scale
        if name.endswith("Attention.q.weight"):
            return scale * self.t5_head**-0.5  # T5 does not divide by the root of the head's width
        return scale


def _write_files(folder: Path, made: Blip2Config) -> None:
    """Everything but the weights."""
    stage1 = bool(made.qformer_config.use_qformer_text_input)
    text = made.text_config
    family: Family = "bert" if stage1 else "t5" if text.model_type == "t5" else "opt"
    raw = write_config(made, stage1, "float32", tied_t5=False if family == "t5" else None)
    _write_json(folder / "config.json", raw)
    if not stage1:
        ids = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if family == "t5":
            ids["decoder_start_token_id"] = text.decoder_start_token_id
        _write_json(folder / "generation_config.json", ids)
    Processor(
        tokenizer(family), family=family, image_size=made.vision_config.image_size,
        num_query_tokens=made.num_query_tokens,
    ).save_pretrained(folder)  # fmt: skip


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that fills a released vocabulary: some English words, then `w0`, `w1`, ..."""
    special = SPECIAL[family]
    names = {index: token for token, index in special.items()}
    ordinary = iter([*SENTENCE.split(), *(f"w{number}" for number in range(max(names)))])
    vocabulary = {names.get(index) or next(ordinary): index for index in range(max(names))}
    unknown = "[UNK]" if family == "bert" else "<unk>"
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\w]|\w+"), behavior="removed", invert=True)
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    start, end = {"opt": ("</s>", ""), "t5": ("", "</s>"), "bert": ("[CLS]", "[SEP]")}[family]
    raw.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (start, "$A", end) if part),
        special_tokens=[(token, vocabulary[token]) for token in (start, end) if token],
    )
    if family == "bert":
        roles = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "bos": "[DEC]"}
    else:
        roles = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"} | ({"bos": "</s>"} if family == "opt" else {})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{f"{role}_token": token for role, token in roles.items()}
    )
    fast.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return fast


def _write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", "utf-8")
