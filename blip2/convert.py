"""Bring weights in from elsewhere: LAVIS .pth files as whole folders, and BERT as the start of a Q-Former.

Every entry of a LAVIS file is either mapped to a parameter or dropped by a rule that has a name (see
`blip2.lavis_names`); anything else stops the conversion. Files are read without running code they may hold.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    PreTrainedModel,
)

from blip2.checkpoint import DTYPES, check_loading, quiet
from blip2.lavis_names import infer_config, rename
from blip2.layout import CheckpointError, Layout, check_config
from blip2.model import Blip2
from blip2.processing import Processor
from blip2.representation import Blip2Representation
from blip2.saving import save
from blip2.shards import read_pickle

BERT = "google-bert/bert-base-uncased"
LANGUAGE_MODELS = {
    ("opt", 2560): "facebook/opt-2.7b",
    ("opt", 4096): "facebook/opt-6.7b",
    ("t5", 2048): "google/flan-t5-xl",
    ("t5", 4096): "google/flan-t5-xxl",
}


@dataclass(frozen=True)
class Converted:
    """What became of a LAVIS file.

    Attributes:
        folder: the new checkpoint.
        mapped: how many entries of the files given were taken over.
        dropped: the entries that were not, and why.
    """

    folder: Path
    mapped: int
    dropped: dict[str, str]


def convert(
    pth: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    vision: str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: Blip2Config | None = None,
    dtype: str = "float32",
) -> Converted:
    """Turn a LAVIS checkpoint into a folder that `load` and transformers read.

    Args:
        pth: stage 1, stage 2 or fine-tuned; with or without its image encoder. The size of its position
            embeddings decides the image size.
        out: a new folder.
        llm: folder or Hub id of the frozen language model; for stage 2, whose files leave it out.
        vision: the frozen image encoder's file, eva_vit_g.pth or clip_vit_L.pth, where `pth` holds none.
        tokenizer: folder or Hub id; by default the language model's, or for stage 1 BERT's.
        config: sizes that the weights do not show (heads, epsilons), for models unlike the released ones.
        dtype: "float32", "bfloat16" or "float16", of the new folder.

    Raises:
        CheckpointError: a part is missing, does not fit, or an entry is not known.
    """
    target = Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already: choose a new folder")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    raw = _model_part(read_pickle(_existing(pth)))
    if vision is not None:
        tower = _model_part(read_pickle(_existing(vision)))
        if any(name.startswith("visual_encoder.") for name in raw):
            raise CheckpointError(f"{pth} holds its own, fine-tuned image encoder: leave `vision` out")
        raw |= {
            f"visual_encoder.{name.removeprefix('visual_encoder.')}": value for name, value in tower.items()
        }
    depth = config.vision_config.num_hidden_layers if config else None
    state, dropped = rename(raw, depth, source=str(pth))
    mapped = len(raw) - len(dropped)
    stage1 = "language_projection.weight" not in state
    _expect_parts(state, stage1, llm, config, pth)

    language_model = None if llm is None else _language_model(state, raw, llm, dtype)
    if language_model is not None and not any(name.startswith("language_model.") for name in state):
        state |= {f"language_model.{name}": value for name, value in language_model.state_dict().items()}
    words, question_words = _tokenizers(tokenizer or llm or BERT, state, stage1)
    settings = config or infer_config(state, language_model.config if language_model else None)
    settings.image_token_index = words.convert_tokens_to_ids("<image>")
    if not stage1 and settings.use_decoder_only_language_model:
        settings.text_config.eos_token_id = words("\n", add_special_tokens=False)["input_ids"][-1]
    check_config(settings, str(pth))

    model = _fill(state, settings, stage1, dtype, pth)
    text: Any = settings.text_config
    processor = Processor(
        words,
        family="bert" if stage1 else "opt" if settings.use_decoder_only_language_model else "t5",
        image_size=settings.vision_config.image_size,
        num_query_tokens=settings.num_query_tokens,
        context=None if stage1 else getattr(text, "max_position_embeddings", None),
        qformer_tokenizer=question_words,
    )
    return Converted(save(model, processor, target), mapped, dropped)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    return Path(path)


def _model_part(contents: dict[str, Any]) -> dict[str, Tensor]:
    """LAVIS puts the weights under `model`, beside optimizer and settings; encoders' files hold them bare."""
    part = contents.get("model", contents)
    return {name: value for name, value in part.items() if isinstance(value, Tensor)}


def _expect_parts(
    state: dict[str, Tensor], stage1: bool, llm: Any, config: Blip2Config | None, pth: str | Path
) -> None:
    """Say which part is missing before anything large is read."""
    if "query_tokens" not in state:
        raise CheckpointError(f"{pth} holds no query_tokens: it is no BLIP-2 checkpoint")
    if "vision_model.embeddings.patch_embedding.weight" not in state:
        key = "qformer.encoder.layer.0.crossattention.attention.key.weight"
        clip = key in state and state[key].shape[1] == 1024
        file = "clip_vit_L.pth" if clip else "eva_vit_g.pth"
        raise CheckpointError(
            f"{pth} holds no image encoder (it was frozen): pass LAVIS's {file} as `vision`"
        )
    if stage1 and llm is not None:
        raise CheckpointError(f"{pth} is a stage-1 checkpoint, it has no language model: leave `llm` out")
    whole = config is not None and any(name.startswith("language_model.") for name in state)
    if not stage1 and llm is None and not whole:
        raise CheckpointError(
            f"{pth} holds no language model (it was frozen): pass its folder or Hub id as `llm`"
        )


def _language_model(
    state: dict[str, Tensor], raw: dict[str, Tensor], llm: str | Path, dtype: str
) -> PreTrainedModel:
    """The frozen language model, with the settings that LAVIS gives it."""
    family = "t5" if "t5_proj.weight" in raw else "opt"
    loader = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(llm, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the language model {llm} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    width = state["language_projection.weight"].shape[0]
    if model.config.hidden_size != width:
        fitting = LANGUAGE_MODELS.get((family, width), f"a {family} model of that width")
        raise CheckpointError(
            f"{llm} has width {model.config.hidden_size}, the checkpoint was trained with {width}: "
            f"use {fitting}"
        )
    if family == "t5":
        model.config.dense_act_fn = "gelu"  # LAVIS runs Flan-T5 with the exact GELU
        model.config.bos_token_id = 1
    return model


def _tokenizers(source: str | Path, state: dict[str, Tensor], stage1: bool) -> tuple[Any, Any]:
    """The model's tokenizer with <image>; the Q-Former's own where it reads questions beside an LLM."""

    def read(name: str | Path) -> Any:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no tokenizer at {name}: {' '.join(str(error).split())[:200]}. Pass one as `tokenizer`"
            ) from error

    words = read(source)
    questions = read(BERT) if not stage1 and "embeddings.word_embeddings.weight" in state else None
    for bert in (words if stage1 else None, questions):
        if bert is not None and bert.bos_token is None:
            bert.add_special_tokens({"bos_token": "[DEC]"})
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return words, questions


def _fill(
    state: dict[str, Tensor], config: Blip2Config, stage1: bool, dtype: str, pth: str | Path
) -> Blip2 | Blip2Representation:
    model_class: type[Any] = Blip2Representation if stage1 else Blip2
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    with quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=DTYPES[dtype],
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loading(Layout(Path(pth), config, stage1, shapes, {}), info)
    return model.eval()


# --- the Q-Former's beginning ---


@torch.no_grad()
def qformer_from_bert(bert: PreTrainedModel | str | Path, model: Blip2Representation | Blip2) -> None:
    """Start a model's Q-Former from BERT, as stage 1 does. Paper: Sec. 3.1.

    BERT gives the self-attention, the text feed-forwards, copied into those of the queries, and the text
    embeddings, which get further rows (one, [DEC]) if the model has more; its head becomes that of ITG if
    there is one. Random stay the queries, the cross-attention and the new rows. BERT's token types are left
    out, as in LAVIS.

    Args:
        bert: a BERT model of transformers, with or without its masked-language head; or a folder or Hub id.
        model: what to change; a model without text feed-forwards takes what it has a place for.

    Raises:
        CheckpointError: the sizes differ.
    """
    if not isinstance(bert, PreTrainedModel):
        bert, info = AutoModelForMaskedLM.from_pretrained(bert, output_loading_info=True)
        if any(name.startswith("cls.") and "decoder" not in name for name in info["missing_keys"]):
            bert = bert.base_model
    source = {name.removeprefix("bert."): value for name, value in bert.state_dict().items()}
    target = dict(model.named_parameters())
    taken: dict[str, Tensor] = {}
    for name, value in source.items():
        for new in _bert_names(name):
            if new in target:
                taken[new] = value
    wrong = [name for name, value in taken.items() if not _fits(value, target[name])]
    wanted = [name for name in target if _from_bert(name)]
    missing = [name for name in wanted if name not in taken]
    if wrong or missing:
        raise CheckpointError(
            f"this BERT does not fit the Q-Former: {len(wrong)} tensors of another size, {len(missing)} "
            f"missing, such as {(wrong + missing)[0]}"
        )
    std = model.config.qformer_config.initializer_range
    for name, value in taken.items():
        rows = target[name][len(value) :]
        target[name][: len(value)] = value
        if name == "embeddings.word_embeddings.weight":
            nn.init.normal_(rows, std=std)
        else:
            rows.zero_()


def _bert_names(name: str) -> list[str]:
    """The parameters of ours that start from an entry of BERT."""
    name = name.replace("attention.self.", "attention.attention.")
    for old, new in (
        ("embeddings.LayerNorm.", "qformer.layernorm."),
        ("cls.predictions.transform.dense.", "lm_head.dense."),
        ("cls.predictions.transform.LayerNorm.", "lm_head.layer_norm."),
    ):
        if name.startswith(old):
            return [new + name.removeprefix(old)]
    if name == "cls.predictions.bias":
        return ["lm_head.bias"]
    if not name.startswith("encoder.layer."):
        return [name]
    feed_forward = re.fullmatch(r"(encoder\.layer\.\d+\.)(intermediate|output)(\..+)", name)
    queries = [f"qformer.{feed_forward[1]}{feed_forward[2]}_query{feed_forward[3]}"] if feed_forward else []
    return [f"qformer.{name}", *queries]


def _from_bert(name: str) -> bool:
    return name.startswith(("qformer.", "embeddings.")) and ".crossattention." not in name


def _fits(value: Tensor, place: Tensor) -> bool:
    """Equal sizes, but for rows that the place has more."""
    return value.shape[1:] == place.shape[1:] and len(value) <= len(place)
