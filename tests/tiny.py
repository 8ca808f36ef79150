"""Tiny random models, ours and transformers', and the tokenizers that go with them.

Families: "opt" and "t5" (stage 2), "retrieval" (stage 1), "instruct" (OPT, question in the Q-Former too).
Weights are large enough, and biases and norms unlike their neutral values, that a swapped or forgotten
tensor shows.
"""

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Blip2Config, PreTrainedTokenizerFast

FAMILIES = ("opt", "t5", "retrieval", "instruct")
SENTENCE = """question answer short a photo of the is what color how many there in red green blue circle
square star ring left right two one no yes cat dog on . , ? :"""
WORDS = [*SENTENCE.split(), "\n"]
NUM_QUERIES = 6
IMAGE_SIZE = 28


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens, and their places, of the family's released one."""
    special = {
        "opt": ["<s>", "<pad>", "</s>", "<unk>"],
        "t5": ["<pad>", "</s>", "<unk>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    }[family]
    unknown = "[UNK]" if family == "bert" else "<unk>"
    vocabulary = {word: index for index, word in enumerate(special + WORDS + ["[DEC]"] * (family == "bert"))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\w]|\w+"), behavior="removed", invert=True)
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    start, end = {"opt": ("</s>", ""), "t5": ("", "</s>"), "bert": ("[CLS]", "[SEP]")}[family]
    template = " ".join(part for part in (start, "$A", end) if part)
    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in (start, end) if token]
    )
    names = {
        "opt": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "bert": {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "bos_token": "[DEC]",
        },
    }[family]
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    fast.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return fast


def language_family(family: str) -> str:
    """Which language model a family has."""
    return {"retrieval": "bert", "instruct": "opt"}.get(family, family)


def config(family: str, **changes) -> Blip2Config:
    """A configuration of some ten thousand parameters."""
    words = tokenizer(language_family(family))
    text = {
        "model_type": "opt",
        "vocab_size": 56,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "eos_token_id": tokenizer("opt").convert_tokens_to_ids("\n"),
    }
    if family == "t5":
        text = {
            "model_type": "t5",
            "vocab_size": 56,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "decoder_start_token_id": 0,
        }
    qformer = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 48,
        "vocab_size": len(tokenizer("bert")) - 1,  # <image> lies outside the table, as in the release
        "use_qformer_text_input": family in ("retrieval", "instruct"),
        "encoder_hidden_size": 24,
    }
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 36,
        "image_size": IMAGE_SIZE,
        "patch_size": 7,
    }
    fields = {
        "num_query_tokens": NUM_QUERIES,
        "image_text_hidden_size": 16,
        "image_token_index": words.convert_tokens_to_ids("<image>"),
    }
    for part, values in (("vision_config", vision), ("qformer_config", qformer), ("text_config", text)):
        fields[part] = values | changes.pop(part, {})
    return Blip2Config(**(fields | changes))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter values of its own; in eval mode afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name.lower() and name.endswith("weight")
        scale = 1.0 if "embed_positions" in name else 0.25  # so that generation does not repeat one token
        parameter.copy_(1 + 0.2 * noise if norm else scale * noise)
        if name == "temperature":
            parameter.fill_(0.05)
    return model.eval()


def ours(family: str, seed: int = 0, **changes):
    """Our model of a family, with random weights."""
    from blip2.model import Blip2
    from blip2.representation import Blip2Representation

    made = (Blip2Representation if family == "retrieval" else Blip2)(config(family, **changes))
    return untie(randomize(made, seed))


def theirs(family: str, seed: int = 0, **changes):
    """Transformers' model of a family, with random weights."""
    settings = config(family, **changes)
    if family == "instruct":
        raw = settings.to_dict()
        raw.pop("model_type")
        for part in ("vision_config", "qformer_config"):
            raw[part].pop("model_type")
        raw["qformer_config"].pop("use_qformer_text_input")
        made = transformers.InstructBlipForConditionalGeneration(transformers.InstructBlipConfig(**raw))
    elif family == "retrieval":
        made = transformers.Blip2ForImageTextRetrieval(settings)
    else:
        made = transformers.Blip2ForConditionalGeneration(settings)
    return untie(randomize(made, seed))


def untie(model):
    """Give Flan-T5 the output matrix of its own that the release has; transformers 5 builds it tied."""
    language = getattr(model, "language_model", None)
    if language is not None and language.config.model_type == "t5":
        weight = language.lm_head.weight.detach().flip(0).clone()
        language.lm_head.weight = torch.nn.Parameter(weight)
    return model


def theirs_processor(family: str):
    """Transformers' processor for a family."""
    images = transformers.BlipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    words = tokenizer(language_family(family))
    if family == "instruct":
        return transformers.InstructBlipProcessor(
            images, words, tokenizer("bert"), num_query_tokens=NUM_QUERIES
        )
    return transformers.Blip2Processor(images, words, num_query_tokens=NUM_QUERIES)


def pixels(batch: int = 2, seed: int = 0) -> torch.Tensor:
    """float (batch, 3, S, S)."""
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
