"""Fine-tuning runs as Python values: the paper's Tables 7 to 9, and the drawn world's.

`python -m train.finetune RECIPE` starts one; every field can be overridden on the command line, and the
resolved recipe is written beside the run's results.

Sources beside numbers: [P] the paper (arXiv 2301.12597v3); [C] the reference code; ours: nobody published it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from blip2 import checkpoint
from blip2.presets import PRESETS
from train.datasets import RecipeError, Scenes, Shards
from train.encoders import advice, find
from train.engine import FitConfig
from train.lora import LoRA
from train.recipes import Execution


@dataclass(frozen=True)
class Questions:
    """Questions, answers and pictures as VQAv2 lays them out, and, if wanted, Visual Genome's."""

    questions: tuple[str, ...]
    """Files such as v2_OpenEnded_mscoco_train2014_questions.json."""
    annotations: tuple[str, ...]
    """The files with their answers, in the same order, such as v2_mscoco_train2014_annotations.json."""
    images: str
    """Folder of their pictures: train2014/ and val2014/, or all pictures themselves."""
    visual_genome: str | None = None
    """Visual Genome's question_answers.json, one answer to each question."""
    visual_genome_images: str | None = None
    """Folder of its pictures: VG_100K/ and VG_100K_2/, or all pictures themselves."""
    visual_genome_share: float = 0.2
    """Of its questions that come up in an epoch, others in every one; BLIP's loaders weight them so [C]."""
    num_validation: int = 500
    """VQAv2's pictures whose questions are held out for the evaluation."""
    max_words: int = 50
    """A question ends after so many [C]."""
    flip: float = 0.5
    """Chance of a mirror image [C]; 0 where questions tell left from right."""
    crop: float = 0.5
    """Least share of a picture that a random crop keeps [C]; 1 keeps all of it."""

    def __post_init__(self) -> None:
        if not self.questions or len(self.questions) != len(self.annotations):
            raise RecipeError(
                f"{len(self.questions)} files of questions with {len(self.annotations)} of annotations; "
                "each file of questions takes the one with its answers"
            )
        if (self.visual_genome is None) != (self.visual_genome_images is None):
            raise RecipeError("visual_genome and visual_genome_images go together; give both, or neither")
        if not 0 < self.visual_genome_share <= 1:
            raise RecipeError(f"visual_genome_share is {self.visual_genome_share}; above 0, at most 1")
        if not 0 <= self.flip <= 1 or not 0 < self.crop <= 1:
            raise RecipeError(f"flip is {self.flip}, a chance from 0 to 1; crop {self.crop}, above 0 to 1")

    def missing(self) -> list[str]:
        files = [*self.questions, *self.annotations, self.images]
        files += [name for name in (self.visual_genome, self.visual_genome_images) if name]
        return [f"questions and pictures: there is no {name}" for name in files if not Path(name).exists()]


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning run. The language model stays frozen; the image encoder learns (Sec. 4.2 to 4.4)."""

    program: ClassVar[str] = "train.finetune"

    task: Literal["caption", "vqa", "retrieval"]
    start_from: str
    """A model to go on from: a checkpoint's name (`blip2 models`), a folder or a Hub id. Stage 2's for
    captions and questions, stage 1's for retrieval."""
    data: Scenes | Shards | Questions
    batch_size: int
    """Pairs, or questions, a step, over all processes."""
    fit: FitConfig
    output: str
    """Run folder: config.json, log.jsonl, samples/, states/, best/, and model/ or adapter/ in the end."""
    save: Literal["last", "best"] = "last"
    """Whether the last weights are saved, or those with the best probe (`fit.probe`)."""
    stage1: str | None = None
    """Questions: a stage-1 model. The text half of its Q-Former, which stage 2 drops, is taken over, so that
    the queries read the question too. None: only the language model reads it, unless `start_from`'s Q-Former
    does already."""
    prompt: str = ""
    """In front of a caption; around a question, at {}."""
    resolution: int | None = None
    """Pixels a side of the pictures; positions are interpolated once. None: those of `start_from`."""
    train_vision: bool = True
    """Whether the image encoder learns; with LoRA it never does."""
    drop_path: float = 0.0
    """Stochastic depth of the image encoder in training [P: 0 in all of its tables]."""
    max_text_length: int = 32
    """Tokens of a caption or an answer, its end included; longer ones are cut [C]."""
    lora: LoRA | None = None
    """Captions and questions: train small matrices beside the language model, and nothing else."""
    execution: Execution = field(default_factory=Execution)
    """How the machines are used."""

    def __post_init__(self) -> None:
        expected = {"caption": Scenes | Shards, "vqa": Scenes | Questions, "retrieval": Scenes | Shards}
        if not isinstance(self.data, expected[self.task]):
            what = "questions with answers" if self.task == "vqa" else "captions"
            raise RecipeError(f"{self.task} reads {what}; the data given are {type(self.data).__name__}")
        if self.task == "vqa" and self.prompt.count("{}") != 1:
            raise RecipeError(f"prompt is {self.prompt!r}; one {{}} in it says where the question goes")
        if self.save == "best" and self.fit.probe is None:
            raise RecipeError(f'save is "best", but fit.probe names no metric: {PROBES[self.task]}')
        if self.fit.probe not in (None, PROBES[self.task]):
            raise RecipeError(f"fit.probe is {self.fit.probe!r}; {self.task} has {PROBES[self.task]}")
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"drop_path is {self.drop_path}; it is a chance, 0 to below 1")
        if self.stage1 is not None and self.task != "vqa":
            raise RecipeError(f"stage1 gives questions a way into the Q-Former; {self.task} has none")
        if self.batch_size < (2 if self.task == "retrieval" else 1):
            raise RecipeError(f"batch_size is {self.batch_size}; ITC and ITM compare at least 2 pairs")
        if self.trains_vision and self.execution.vision_precision != "float32":
            raise RecipeError(
                f"vision_precision is {self.execution.vision_precision}; an image encoder that learns takes "
                "float32 (in float16 it gave NaN, LAVIS issue 409): set it so, or train_vision to False"
            )
        if self.lora is None and self.execution.language_precision in ("int8", "nf4"):
            raise RecipeError(
                f"language_precision {self.execution.language_precision} goes with LoRA alone: add --lora, "
                "or take bfloat16"
            )
        if self.lora is not None and (self.task == "retrieval" or self.stage1 or self.resolution):
            raise RecipeError(
                "LoRA goes beside the language model of a model that stays as it is: leave out stage1 and "
                "resolution, and take it for captions or questions"
            )

    @property
    def stage(self) -> int:
        """Of pre-training: the model's form, 1 for image-text matching, 2 with a language model."""
        return 1 if self.task == "retrieval" else 2

    @property
    def trains_vision(self) -> bool:
        """Whether the image encoder learns."""
        return self.train_vision and self.lora is None

    @property
    def sources(self) -> list[str]:
        """The models that it starts from."""
        return [self.start_from, *([] if self.stage1 is None else [self.stage1])]

    def missing(self) -> list[str]:
        """What the run needs and does not find, one line each."""
        lacking = []
        for name in self.sources:
            if not checkpoint.is_available(name):
                what = f"stage {1 if name == self.stage1 or self.stage == 1 else 2}"
                released = name in PRESETS or find(name) is not None
                lacking.append(f"a model of {what}: {name}{'' if released else advice(name)}")
        return lacking + self.data.missing()


def with_lora(recipe: Tuning) -> Tuning:
    """A recipe that trains adapters of `train.lora` instead of the model; at ten times its rate, ours."""
    rate = min(1e-3, 10 * recipe.fit.learning_rate)
    return replace(
        recipe, lora=LoRA(), stage1=None, resolution=None, output=f"{recipe.output}-lora",
        fit=replace(recipe.fit, learning_rate=rate, layer_decay=1.0),
    )  # fmt: skip


PROBES = {"caption": "cider", "vqa": "accuracy", "retrieval": "retrieval"}

# Karpathy's training split of COCO: 113,287 pictures, 566,747 captions; an epoch takes every caption once.
_COCO = Shards({"data/coco": 1.0})
_COCO_CAPTIONS = 566_747
# VQAv2's train and val, and Visual Genome [P 4.3]. An epoch is counted in VQAv2's questions: how much of
# Visual Genome goes in was not published.
_VQA = Questions(
    questions=tuple(f"data/vqav2/v2_OpenEnded_mscoco_{part}2014_questions.json" for part in ("train", "val")),
    annotations=tuple(f"data/vqav2/v2_mscoco_{part}2014_annotations.json" for part in ("train", "val")),
    images="data/coco/images",
    visual_genome="data/visual-genome/question_answers.json",
    visual_genome_images="data/visual-genome/images",
)
_VQA_QUESTIONS = 443_757 + 214_354
# Weights that learn are float32, the steps under autocast [P, Tables 7 to 9]; the image encoder's activations
# are computed again [C].
_PAPER = Execution(language_precision="bfloat16", checkpointing=True, workers=8)


def _fit(
    task: str,
    examples: int,
    batch_size: int,
    layer_decay: float,
    learning_rate: float = 1e-5,  # [P]
    betas: tuple[float, float] = (0.9, 0.999),  # [P]
) -> FitConfig:
    return FitConfig(
        steps=5 * examples // batch_size,  # 5 epochs [P]
        learning_rate=learning_rate,
        min_learning_rate=0.0,  # [C]
        warmup_steps=1_000,  # [P]; from 1e-8 [C], here from the first step's share
        weight_decay=0.05,  # [P]
        betas=betas,
        layer_decay=layer_decay,
        eval_every=1_000,
        probe=PROBES[task],
    )


def _caption(language_model: str, layer_decay: float) -> Tuning:
    return Tuning(
        task="caption",
        start_from=f"blip2-{language_model}",
        data=_COCO,
        batch_size=256,  # [P]
        fit=_fit("caption", _COCO_CAPTIONS, 256, layer_decay),
        output=f"runs/caption-{language_model}",
        prompt="a photo of",  # [P]
        resolution=364,  # [P]
        execution=_PAPER,
    )


def caption_flan_t5_xl() -> Tuning:
    """Captions of COCO with ViT-g and Flan-T5-XL, Table 7 of the paper."""
    return _caption("flan-t5-xl", layer_decay=1.0)  # [P]


def caption_opt_2_7b() -> Tuning:
    """Captions of COCO with ViT-g and OPT-2.7B, Table 7 of the paper."""
    return _caption("opt-2.7b", layer_decay=1.0)  # [P]


def caption_opt_6_7b() -> Tuning:
    """Captions of COCO with ViT-g and OPT-6.7B, Table 7 of the paper."""
    return _caption("opt-6.7b", layer_decay=0.95)  # [P]


def _vqa(language_model: str, layer_decay: float) -> Tuning:
    return Tuning(
        task="vqa",
        start_from=f"blip2-{language_model}",
        stage1="blip2-itm-vit-g",  # ours: stage 2's files have no text half, and nobody published this run
        data=_VQA,
        batch_size=128,  # [P]
        fit=_fit("vqa", _VQA_QUESTIONS, 128, layer_decay),
        output=f"runs/vqa-{language_model}",
        prompt="Question: {} Answer:",  # [P], for Flan-T5 too
        resolution=490,  # [P]
        execution=_PAPER,
    )


def vqa_flan_t5_xl() -> Tuning:
    """VQA with ViT-g and Flan-T5-XL, Table 8 of the paper."""
    return _vqa("flan-t5-xl", layer_decay=0.95)  # [P]


def vqa_opt_2_7b() -> Tuning:
    """VQA with ViT-g and OPT-2.7B, Table 8 of the paper."""
    return _vqa("opt-2.7b", layer_decay=0.95)  # [P]


def vqa_opt_6_7b() -> Tuning:
    """VQA with ViT-g and OPT-6.7B, Table 8 of the paper."""
    return _vqa("opt-6.7b", layer_decay=0.9)  # [P]


def _retrieval(encoder: str, start_from: str, fit: FitConfig) -> Tuning:
    return Tuning(
        task="retrieval",
        start_from=start_from,
        data=_COCO,
        batch_size=224,  # [P]
        fit=fit,
        output=f"runs/retrieval-{encoder}",
        resolution=364,  # [P]
        execution=_PAPER,
    )


def retrieval_vitl() -> Tuning:
    """Retrieval of COCO with CLIP ViT-L/14, Table 9 of the paper."""
    fit = _fit("retrieval", _COCO_CAPTIONS, 224, 1.0, learning_rate=5e-6, betas=(0.9, 0.98))  # [P]
    return _retrieval("vitl", "runs/stage1-vitl/model", fit)


def retrieval_vitg() -> Tuning:
    """Retrieval of COCO with EVA-CLIP ViT-g/14, Table 9 of the paper."""
    # The released matching models lack the temperature and the language model head that this goes on with.
    return _retrieval("vitg", "weights/stage1-vitg", _fit("retrieval", _COCO_CAPTIONS, 224, 0.95))  # [P]


# --- the drawn world, on one CPU core ---


def _scenes(
    task: Literal["caption", "vqa", "retrieval"],
    start_from: str,
    batch_size: int,
    prompt: str = "",
    stage1: str | None = None,
) -> Tuning:
    """Learning rates and lengths are ours, chosen on validation scenes."""
    return Tuning(
        task=task,
        start_from=start_from,
        data=Scenes(num_scenes=20_000, num_validation=192, telling=task == "retrieval"),
        batch_size=batch_size,
        fit=FitConfig(
            steps=800,
            learning_rate=3e-4,
            min_learning_rate=0.0,
            warmup_steps=20,
            betas=(0.9, 0.98),
            layer_decay=0.9,
            clip_norm=1.0,
            max_minutes=6,
            log_every=20,
            eval_every=200,
            save_every=200,
            probe=PROBES[task],
        ),
        output=f"runs/{task}-{start_from}",
        stage1=stage1,
        prompt=prompt,
        max_text_length=30 if task == "caption" else 21,  # the longest
        execution=Execution(threads=1),
    )


def scenes_caption_opt() -> Tuning:
    """Captions of the drawn world that tell everything, in one way; with its OPT."""
    return _scenes("caption", "scenes-opt", 48, "a photo of")


def scenes_vqa_opt() -> Tuning:
    """Questions about the drawn world with its OPT, read by the Q-Former, too."""
    return _scenes("vqa", "scenes-opt", 64, "Question: {} Answer:", "scenes-itm")


def scenes_vqa_flan_t5() -> Tuning:
    """Questions about the drawn world with its Flan-T5, read by the Q-Former, too."""
    return _scenes("vqa", "scenes-flan-t5", 64, "Question: {} Short answer:", "scenes-itm")


def scenes_retrieval() -> Tuning:
    """Retrieval of drawn scenes, several captions of each."""
    return _scenes("retrieval", "scenes-itm", 64)


RECIPES: dict[str, Callable[[], Tuning]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        caption_flan_t5_xl,
        caption_opt_2_7b,
        caption_opt_6_7b,
        vqa_flan_t5_xl,
        vqa_opt_2_7b,
        vqa_opt_6_7b,
        retrieval_vitl,
        retrieval_vitg,
        scenes_caption_opt,
        scenes_vqa_opt,
        scenes_vqa_flan_t5,
        scenes_retrieval,
    )
}
