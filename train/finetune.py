"""Fine-tuning for captions, questions and retrieval: the command.

    python -m train.finetune scenes-vqa-opt
    python -m train.finetune caption-opt-2-7b --folder my/pictures
    torchrun --nproc-per-node 8 -m train.finetune vqa-opt-2-7b

The same command goes on where a stopped run left off. Paper: Sec. 4.2 to 4.4, Tables 7 to 9. Its VQA models
were never released; what nobody published is marked as ours in `train.tuning.recipes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import train.tuning.shapes  # noqa: F401 - which teaches `train.plan` these recipes
from blip2 import checkpoint
from blip2.model import Blip2
from blip2.processing import Processor
from train import distributed
from train.engine import Evaluate, Result
from train.execution import prepare
from train.log import say
from train.lora import save_adapter, share
from train.pretrain import begin, fit_recipe, launch, mean_losses
from train.probe import Probe
from train.tuning.answers import Answers
from train.tuning.data import loaders
from train.tuning.recipes import RECIPES, Tuning, with_lora
from train.tuning.smoke import smoke
from train.tuning.start import finished, start


def run(recipe: Tuning, name: str = "custom", stop_requested: Callable[[], bool] | None = None) -> Result:
    """Fine-tune a recipe, or go on with it; saved is `recipe.output`/model, or with LoRA its /adapter.

    Args:
        recipe: what to train.
        name: of the recipe, for the records.
        stop_requested: see `fit`.

    Raises:
        RecipeError: something is missing or does not fit; nothing has been trained or written.
        StateError: the output folder belongs to another run.
        NonFiniteError: a loss was not finite.
        SaveError: a state could not be written.
    """
    accelerator, output = begin(recipe, name), Path(recipe.output)
    objective, processor = start(recipe)
    prepare(objective, recipe.execution, accelerator.device)
    if recipe.lora is not None and isinstance(objective.model, Blip2):
        say(f"LoRA: {share(objective.model)}")
    load, batches = loaders(recipe, processor)
    held_out = partial(load, split="validation")
    probe: Any = Answers if recipe.task == "vqa" else partial(Probe, prompt=recipe.prompt)
    evaluations: list[Evaluate] = [
        mean_losses(held_out, batches),
        probe(
            processor,
            partial(held_out, shared=True),
            batches,
            output,
            say=lambda page, step: accelerator.log({"samples": page}, step=step),
        ),
    ]
    result = fit_recipe(recipe, name, objective, load(), evaluations, accelerator, stop_requested)
    if result.finished and distributed.rank() == 0:
        trained: Any = objective.model
        if recipe.lora is not None:
            _say_how_to_ask(recipe, trained, processor)
            say(f"saved {save_adapter(trained, output / 'adapter')}")
            return result
        model, reader = finished(recipe, trained)
        _say_how_to_ask(recipe, model, processor)
        checkpoint.save(model, processor, output / "model")
        say(f"saved {output / 'model'}" + (f"\n{reader}" if reader else ""))
    return result


def _say_how_to_ask(recipe: Tuning, model: Any, processor: Processor) -> None:
    """Note in the configuration what captions went on from, or how questions were asked."""
    if recipe.task == "caption":
        model.config.caption_prompt = recipe.prompt
    elif recipe.task == "vqa":
        if hasattr(model.config, "num_descriptions"):
            model.config.num_descriptions = 0  # no caption of its own stood before a question
        if not processor.has_chat_frame:  # which `train.tuning.tokens.asked` keeps
            model.config.question_prompt = recipe.prompt


FLAGS = """Fine-tune a recipe; the same command goes on after a stop. Besides the recipe's own settings:
--lora trains adapters beside the language model and nothing else (--rank --alpha --targets --qformer);
--plan prints memory, speed, days and the command for some GPUs (--gpus --nodes --gpu-memory --gpu --mfu);
--fetch downloads and checks the weights that the recipe starts from;
--folder FOLDER trains on your own pictures: shards, a .csv or .jsonl, or a .txt beside each picture;
--smoke runs it end to end on drawn scenes, from the embedded checkpoints, in about three minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: trained, or stopped by a signal; 1: training failed; 2: it could not start."""
    changes: dict[str, Callable[[Any, str], Any]] = {
        "lora": lambda recipe, name: with_lora(recipe),
        "smoke": smoke,
    }
    return launch("train.finetune", RECIPES, run, changes, FLAGS, arguments)


if __name__ == "__main__":
    sys.exit(main())
