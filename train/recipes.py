"""Runs as Python values: the paper's pre-training of both stages, and the drawn world's.

A recipe says what a run starts from, what it reads and how it is optimized. `python -m train.pretrain RECIPE`
starts it; every field can be overridden on the command line; the resolved recipe is written beside the run's
results.

Sources beside numbers: [P] the paper (arXiv 2301.12597v3); [A] its authors in the reference code's issue 243;
[C] that code; ours: nobody published it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from train.datasets import RecipeError, Scenes, Shards, Source
from train.engine import FitConfig


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are BERT-base's with 32 queries [P 3.1]."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    """Cross-attention on every n-th layer, from the first."""
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    """Width of the contrastive space [C]."""
    dropout: float = 0.1
    """Of hidden states and attention, in training [C]."""


@dataclass(frozen=True)
class Execution:
    """How a run uses its machines; none of it changes what is learned, but for rounding."""

    micro_batch_size: int | None = None
    """Pairs that one process takes through the model at a time; None takes its share of batch_size at once.
    Smaller ones save memory: gradients are accumulated, and ITC and ITM still see the global batch."""
    checkpointing: bool = False
    """Compute the trained layers' activations (and those of the frozen LLM) again in the backward pass."""
    compile: bool | None = None
    """Compile the image encoder; None does so on a GPU where it is frozen."""
    vision_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of a frozen image encoder's weights; one that is trained has float32."""
    language_precision: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "float32"
    """Of the frozen language model's weights; stage 2 only."""
    shard_language_model: bool = False
    """Split the frozen language model over the processes (FSDP2), where it does not fit on each."""
    workers: int = 0
    """Processes that read and augment images, beside each training process; 0 reads in that process."""
    threads: int | None = None
    """CPU threads of each training process; None leaves torch's choice."""


@dataclass(frozen=True)
class Recipe:
    """One run of one pre-training stage."""

    program: ClassVar[str] = "train.pretrain"

    stage: Literal[1, 2]
    start_from: str
    """Stage 1: a pretrained image encoder: folder, Hub id, or "module:function" (see `train.encoders`); or a
    stage-1 model, to train on. Stage 2: folder of a finished stage-1 model."""
    data: Scenes | Shards
    batch_size: int
    """Image-text pairs a step, over all processes."""
    fit: FitConfig
    output: str
    """Run folder: config.json, log.jsonl, samples/, states/, best/, and model/ in the end."""
    save: Literal["last", "best"] = "last"
    """Whether model/ gets the last weights, or those with the best probe (`fit.probe`)."""
    tokenizer: str | None = None
    """Stage 1: folder of the Q-Former's word pieces; None takes the drawn world's."""
    bert: str | None = None
    """Stage 1: folder of the BERT that the Q-Former starts from; None starts from random weights."""
    language_model: str | None = None
    """Stage 2: folder or Hub id of the frozen language model and its tokenizer."""
    frame: Literal["auto", "question", "chat"] = "auto"
    """Stage 2 with a decoder: whether it is asked in its tokenizer's chat template, and ends a caption as it
    ends a turn there; auto does so with chat models only. OPT ends captions with a line break in any case."""
    encoder: str | None = None
    """Stage 2: "module:function" of the image encoder, if stage 1 was trained with such a one."""
    max_text_length: int = 32
    """Tokens of a caption; longer ones are cut [C]."""
    whole_captions: float = 0.0
    """Stage 2 with an encoder-decoder: chance that the decoder gets all of a caption, its beginning included,
    which the paper's split never leaves to it."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """Stage 1 only: stage 2 takes over what stage 1 trained."""
    objectives: tuple[Literal["itc", "itm", "itg"], ...] = ("itc", "itm", "itg")
    """Stage 1 only: the losses that are summed; the others are computed and logged, but not learned from."""
    execution: Execution = field(default_factory=Execution)
    """How the machines are used."""

    def __post_init__(self) -> None:
        if self.stage == 2 and self.language_model is None:
            raise RecipeError("stage 2 needs a language_model; none is named")
        if not self.objectives:
            raise RecipeError("objectives is empty; stage 1 trains at least one of itc, itm, itg")
        if not 0 <= self.whole_captions <= 1:
            raise RecipeError(f"whole_captions is {self.whole_captions}; it is a chance, 0 to 1")
        if self.save == "best" and self.fit.probe is None:
            raise RecipeError('save is "best", but fit.probe names no metric to tell by: retrieval or cider')
        if self.batch_size < 2:
            raise RecipeError(f"batch_size is {self.batch_size}; ITC and ITM compare at least 2 pairs")

    def missing(self) -> list[str]:
        """What the run needs and does not find, one line each."""
        what = "a pretrained image encoder" if self.stage == 1 else "a finished stage-1 model"
        named = [
            (what, self.start_from),
            ("a tokenizer", self.tokenizer),
            ("BERT weights", self.bert),
            ("a language model", self.language_model),
        ]
        from train.encoders import advice

        lacking = [
            f"{what}: there is none in {path}{advice(path)}"
            for what, path in named
            if path and not _filled(path)
        ]
        return lacking + self.data.missing()


class Run(Protocol):
    """What plans and commands ask of a recipe: a `Recipe`, or a `train.tuning.recipes.Tuning`."""

    program: ClassVar[str]

    @property
    def stage(self) -> int: ...
    @property
    def start_from(self) -> str: ...
    @property
    def data(self) -> Any: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def fit(self) -> FitConfig: ...
    @property
    def output(self) -> str: ...
    @property
    def max_text_length(self) -> int: ...
    @property
    def execution(self) -> Execution: ...
    @property
    def save(self) -> Literal["last", "best"]: ...
    def missing(self) -> list[str]: ...


def _filled(source: str) -> bool:
    from train.encoders import find, is_function

    folder = find(source)
    if folder is None:
        return is_function(source)
    names = {path.suffix for path in folder.glob("*")}
    return ".json" in names and (".safetensors" in names or (folder / "tokenizer_config.json").exists())


# Images of COCO, Visual Genome, SBU, CC3M, CC12M and a part of LAION-400M, 129 M in all [P 3.4]. The mixing
# ratios were never published; these are the numbers of images.
WEB_IMAGES = Shards(
    {
        "data/coco": 0.113e6,
        "data/visual-genome": 0.1e6,
        "data/sbu": 0.86e6,
        "data/cc3m": 3e6,
        "data/cc12m": 10e6,
        "data/laion-115m": 115e6,
    }
)


# The paper freezes in float16, and Flan-T5 in bfloat16, "without degradation" from float32 [P 3.4]. Here all
# frozen parts are in bfloat16: the steps run under bf16 autocast, which rounds float16 weights to bfloat16
# anyway, and gradients that pass through the language model then need no loss scale. The paper's way is
# `--precision fp16 --vision-precision float16 --language-precision float16`, but never for Flan-T5.
_PAPER = Execution(vision_precision="bfloat16", language_precision="bfloat16", workers=8)


def _paper_stage1(encoder: str, batch_size: int) -> Recipe:
    return Recipe(
        stage=1,
        start_from=f"weights/{encoder}",
        tokenizer="weights/bert-base-uncased",
        bert="weights/bert-base-uncased",  # [P 3.1]
        data=WEB_IMAGES,
        batch_size=batch_size,
        fit=FitConfig(
            steps=250_000,  # [P 3.4]
            learning_rate=1e-4,  # [P 3.4]
            min_learning_rate=1e-5,  # [A]; the paper gives a floor for stage 2 only
            warmup_steps=2_000,  # [P 3.4]; the public configuration warms up for 5,000 [C]
            weight_decay=0.05,  # [P 3.4]
            betas=(0.9, 0.98),  # [P 3.4]; the public configuration leaves 0.999 [C]
            eval_every=5_000,
            probe="retrieval",
        ),
        output=f"runs/stage1-{encoder}",
        execution=_PAPER,
    )


def stage1_vitg() -> Recipe:
    """Stage 1 with EVA-CLIP ViT-g/14, as in the paper."""
    return _paper_stage1("vitg", batch_size=1680)  # [P 3.4]


def stage1_vitl() -> Recipe:
    """Stage 1 with CLIP ViT-L/14, as in the paper."""
    return _paper_stage1("vitl", batch_size=2320)  # [P 3.4]


def _paper_stage2(language_model: str, batch_size: int, encoder: str = "vitg") -> Recipe:
    return Recipe(
        stage=2,
        start_from=f"runs/stage1-{encoder}/model",
        language_model=f"weights/{language_model}",
        data=WEB_IMAGES,
        batch_size=batch_size,
        fit=FitConfig(
            steps=80_000,  # [P 3.4]
            learning_rate=1e-4,  # [P 3.4]
            min_learning_rate=5e-5,  # [P 3.4]; the public configuration ends at 1e-5 [C]
            warmup_steps=2_000,  # [P 3.4]
            weight_decay=0.05,  # [P 3.4]
            betas=(0.9, 0.98),  # [P 3.4]
            eval_every=2_000,
            probe="cider",
            collapse=2 / 3,  # LAVIS issue 407: CIDEr fell from 110 to 55 to 1 while the loss looked well
        ),
        output=f"runs/stage2-{language_model}" + ("" if encoder == "vitg" else f"-{encoder}"),
        execution=_PAPER,
    )


def stage2_opt_2_7b() -> Recipe:
    """Stage 2 with ViT-g and OPT-2.7B, as in the paper."""
    return _paper_stage2("opt-2.7b", batch_size=1920)  # [P 3.4]


def stage2_opt_6_7b() -> Recipe:
    """Stage 2 with ViT-g and OPT-6.7B, as in the paper."""
    return _paper_stage2("opt-6.7b", batch_size=1920)  # [P 3.4]


def stage2_flan_t5_xl() -> Recipe:
    """Stage 2 with ViT-g and Flan-T5-XL, as in the paper."""
    return _paper_stage2("flan-t5-xl", batch_size=1520)  # [P 3.4]


def stage2_flan_t5_xxl() -> Recipe:
    """Stage 2 with ViT-g and Flan-T5-XXL, as in the paper."""
    return _paper_stage2("flan-t5-xxl", batch_size=1520)  # [P 3.4]


def stage2_opt_2_7b_vitl() -> Recipe:
    """Stage 2 with ViT-L and OPT-2.7B, a row of the paper's Table 2."""
    return _paper_stage2("opt-2.7b", batch_size=1920, encoder="vitl")  # [P 3.4]


def stage2_flan_t5_xl_vitl() -> Recipe:
    """Stage 2 with ViT-L and Flan-T5-XL, a row of the paper's Table 2."""
    return _paper_stage2("flan-t5-xl", batch_size=1520, encoder="vitl")  # [P 3.4]


def scenes_stage1() -> Recipe:
    """Stage 1 of the drawn world, on one CPU core."""
    return Recipe(
        stage=1,
        start_from="runs/scenes/encoder",
        data=Scenes(telling=True),
        batch_size=96,
        max_text_length=21,  # the longest caption
        qformer=QFormerConfig(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=576,
            num_query_tokens=16,  # four things need no more, and half of the paper's take half of the time
            image_text_hidden_size=96,
            dropout=0.0,  # every caption is new, and drawing masks takes a quarter of the time
        ),
        fit=FitConfig(
            steps=2_000,
            learning_rate=8e-4,
            min_learning_rate=2e-5,
            warmup_steps=100,
            clip_norm=1.0,
            max_minutes=43,
            log_every=20,
            eval_every=200,
            save_every=200,
            probe="retrieval",
        ),
        output="runs/scenes/stage1",
        execution=Execution(threads=1),
    )


def _scenes_stage2(language_model: str, output: str, steps: int, max_minutes: float) -> Recipe:
    return Recipe(
        stage=2,
        start_from="runs/scenes/stage1/model",
        language_model=language_model,
        data=Scenes(),
        batch_size=64,
        max_text_length=26,
        whole_captions=0.5,  # these captions are short, and asked for from their beginning
        fit=FitConfig(
            steps=steps,
            learning_rate=8e-4,
            min_learning_rate=5e-5,
            warmup_steps=100,
            clip_norm=1.0,
            max_minutes=max_minutes,
            log_every=20,
            eval_every=400,
            save_every=400,
            probe="cider",
            collapse=2 / 3,
        ),
        output=output,
        execution=Execution(threads=1),
    )


def scenes_stage2_opt() -> Recipe:
    """Stage 2 of the drawn world with its OPT-like language model, on one CPU core."""
    return _scenes_stage2("runs/scenes/opt", "runs/scenes/stage2-opt", 4_000, 32)


def scenes_stage2_flan_t5() -> Recipe:
    """Stage 2 of the drawn world with its Flan-T5-like language model, on two CPU cores."""
    return _scenes_stage2("runs/scenes/t5", "runs/scenes/stage2-flan-t5", 9_000, 42)


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        stage1_vitg,
        stage1_vitl,
        stage2_opt_2_7b,
        stage2_opt_6_7b,
        stage2_flan_t5_xl,
        stage2_flan_t5_xxl,
        stage2_opt_2_7b_vitl,
        stage2_flan_t5_xl_vitl,
        scenes_stage1,
        scenes_stage2_opt,
        scenes_stage2_flan_t5,
    )
}


def domain(recipe: Recipe, folder: str | Path, source: Source | None = None) -> Recipe:
    """A recipe for your own pictures; see `train.domain`."""
    from train.domain import domain as fitted  # which knows recipes

    return fitted(recipe, folder, source)
