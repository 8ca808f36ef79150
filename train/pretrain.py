"""Pre-training, both stages: the command.

    python -m train.pretrain scenes-stage1 --max-minutes 40
    torchrun --nproc-per-node 8 -m train.pretrain stage1-vitg

The same command goes on where a stopped run left off. Stage 1 is Sec. 3.2 of the paper, stage 2 Sec. 3.3.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip2 import checkpoint
from blip2.model import Blip2
from blip2.processing import Processor
from train import distributed, plan, weights
from train.best import CollapseError, load_best
from train.captions import scenes_loader, tokenize_for
from train.datasets import Scenes
from train.domain import domain
from train.engine import Evaluate, NonFiniteError, Result, fit, make_accelerator
from train.execution import prepare
from train.loader import DataError, Loader
from train.log import say
from train.objectives import Objective, Stage1, Stage2
from train.plan import work_per_pair
from train.probe import Probe
from train.recipes import RECIPES, Recipe, RecipeError, Run
from train.smoke import smoke
from train.start import finished
from train.start import start as start_model
from train.state import SaveError, StateError
from train.stop import stop_signals

EVALUATED, EVALUATED_BATCHES = 256, 16  # pairs in a batch of the evaluation, and batches at most


def start(recipe: Recipe) -> tuple[Objective, Processor]:
    """The objective of a recipe over the model it starts from, and the processor saved with that model.

    Raises:
        RecipeError: what the recipe starts from does not fit it.
    """
    model, processor = start_model(recipe)
    if isinstance(model, Blip2):
        return Stage2(model, recipe.execution.micro_batch_size), processor
    return Stage1(model, recipe.objectives, recipe.execution.micro_batch_size), processor


def mean_losses(make_loader: Callable[[], Loader], batches: int, seed: int = 0) -> Evaluate:
    """An evaluation for `fit`: the objective's values, averaged over the same batches every time.

    Args:
        make_loader: gives the validation loader, from its start.
        batches: how many to take.
        seed: of what the losses draw themselves, such as hard negatives.
    """

    def evaluate(objective: nn.Module, step: int) -> dict[str, float]:
        distributed.seed_everything(seed)
        device = next(objective.parameters()).device
        rows = []
        for batch in itertools.islice(make_loader(), batches):
            outputs = objective({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            rows.append({name: value.item() for name, value in outputs.items()})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    return evaluate


def _answers(recipe: Recipe, processor: Processor) -> Evaluate:
    """Exact match of answers about drawn scenes; no question was ever trained."""
    from train.scenes.evaluate import answers

    assert isinstance(recipe.data, Scenes)
    count, output = recipe.data.num_asked, Path(recipe.output)

    def evaluate(objective: nn.Module, step: int) -> dict[str, float]:
        model: Any = objective.model
        loaded = checkpoint.Loaded(model, processor, "custom", "float32", model.device, output, [])
        return answers(loaded, count, "validation")

    return evaluate


def _data(recipe: Recipe, processor: Processor) -> tuple[Callable[..., Loader], int]:
    """Makes loaders of a split, of this process's rows or of all (`shared`); and how many to evaluate."""
    data, size, execution = recipe.data, processor.image_size, recipe.execution
    tokenize = tokenize_for(
        processor.tokenizer, processor.family, recipe.max_text_length, recipe.whole_captions, processor.end
    )
    pixels: dict[str, Any] = {"mean": processor.mean, "std": processor.std}
    if isinstance(data, Scenes):
        if data.image_size != size:
            raise RecipeError(
                f"data.image_size is {data.image_size}, the image encoder takes {size}: make them equal"
            )
        seed = recipe.fit.seed

        def scenes(split: str = "train", shared: bool = False) -> Loader:
            start = seed if split == "train" else 0
            return scenes_loader(
                data, tokenize, recipe.batch_size, seed=start, split=split, shared=shared, **pixels
            )

        return scenes, data.num_validation // recipe.batch_size

    from train.data.loader import shards_loader  # energon takes seconds to import

    def shards(split: str = "train", shared: bool = False) -> Any:
        part: dict[str, Any] = {"rank": 0, "world_size": 1} if shared else {}
        batch_size = recipe.batch_size
        if split == "validation":
            part["workers"], batch_size = 0, min(batch_size, EVALUATED - EVALUATED % distributed.world_size())
        return shards_loader(
            data, tokenize, batch_size, image_size=size, seed=recipe.fit.seed, split=split,
            **{"workers": execution.workers} | part, **pixels,
        )  # fmt: skip

    return shards, min(len(shards("validation")), EVALUATED_BATCHES)


def begin(recipe: Run, name: str) -> Accelerator:
    """What any run begins with: nothing is missing, the processes share the batch, all draw alike.

    Raises:
        RecipeError: something is missing or does not fit.
    """
    if lacking := recipe.missing():
        lines = [f"{name} cannot start; it lacks", *(f"  - {line}" for line in lacking)]
        raise RecipeError("\n".join([*lines, weights.hint(recipe, name)]).rstrip())
    if recipe.execution.threads is not None:
        torch.set_num_threads(recipe.execution.threads)
    accelerator = make_accelerator(
        recipe.fit.precision,
        trackers=recipe.fit.trackers,
        folder=Path(recipe.output),
        timeout_minutes=recipe.fit.timeout_minutes,
    )
    if recipe.batch_size % distributed.world_size():
        raise RecipeError(
            f"batch_size {recipe.batch_size} is no multiple of the {distributed.world_size()} processes"
        )
    distributed.seed_everything(recipe.fit.seed)  # of new weights; DDP sends rank 0's to all
    return accelerator


def fit_recipe(
    recipe: Run,
    name: str,
    objective: nn.Module,
    batches: Loader,
    evaluations: Sequence[Evaluate],
    accelerator: Accelerator,
    stop_requested: Callable[[], bool] | None = None,
) -> Result:
    """`fit` a recipe's objective; it ends with the weights that the recipe keeps."""
    settings: Any = recipe  # a dataclass, which a protocol cannot say
    # On a CPU plain attention is the faster for short sequences: 1.4 times in bf16 without dropout.
    plain = sdpa_kernel(SDPBackend.MATH) if accelerator.device.type == "cpu" else nullcontext()
    with plain:
        result = fit(
            objective,
            batches,
            recipe.fit,
            Path(recipe.output),
            run={"recipe": name, **dataclasses.asdict(settings)},
            evaluate=lambda objective, step: {
                name: value for one in evaluations for name, value in one(objective, step).items()
            },
            accelerator=accelerator,
            stop_requested=stop_requested,
            work=work_per_pair(recipe, distributed.world_size(), accelerator.device),
        )
    if result.finished and distributed.rank() == 0 and recipe.save == "best":
        say(f"the best weights are those of step {load_best(Path(recipe.output), objective)}")
    return result


def run(recipe: Recipe, name: str = "custom", stop_requested: Callable[[], bool] | None = None) -> Result:
    """Train a recipe, or go on with it, and save the finished model in `recipe.output`/model.

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
    load, batches = _data(recipe, processor)
    held_out = partial(load, split="validation")
    evaluations: list[Evaluate] = [
        mean_losses(held_out, batches),
        Probe(
            processor,
            partial(held_out, shared=True),
            batches,
            output,
            say=lambda page, step: accelerator.log({"samples": page}, step=step),
        ),
    ]
    if recipe.stage == 2 and isinstance(recipe.data, Scenes) and recipe.data.num_asked:
        evaluations.append(_answers(recipe, processor))
    result = fit_recipe(recipe, name, objective, load(), evaluations, accelerator, stop_requested)
    if result.finished and distributed.rank() == 0:
        trained: Any = objective.model
        model, reader = finished(recipe, trained)
        checkpoint.save(model, processor, output / "model")
        say(f"saved {output / 'model'}" + (f"\n{reader}" if reader else ""))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: trained, or stopped by a signal; 1: training failed; 2: it could not start."""
    return launch("train.pretrain", RECIPES, run, {"smoke": smoke}, FLAGS, arguments)


def launch(
    program: str,
    recipes: Mapping[str, Callable[[], Any]],
    run: Callable[[Any, str, Callable[[], bool]], Result],
    changes: Mapping[str, Callable[[Any, str], Any]],
    about: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """A command that trains a recipe: `main` of pre-training, and of fine-tuning.

    Args:
        program: module that `python -m` runs.
        recipes: by name; their docstrings are the help.
        run: trains one: recipe, its name, whether to stop.
        changes: flag -> what it makes of a recipe, given its name.
        about: the flags, for the help.
        arguments: by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags, rest = _take_flags(arguments, changes)
    machines, rest = plan.take_options(rest) if flags.plan else ({}, rest)
    made = {name: (make.__doc__ or "", make()) for name, make in recipes.items()}
    name = next((word for word in rest if word in made), "")
    try:
        for flag, change in changes.items():
            if name and getattr(flags, flag):
                made[name] = (made[name][0], change(made[name][1], name))
        if name and flags.folder is not None:
            made[name] = (made[name][0], domain(made[name][1], flags.folder))
        recipe = tyro.extras.overridable_config_cli(
            made,
            prog=f"python -m {program}",
            description=about,
            args=rest,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
        )
        if flags.plan:
            given = [f"--{flag}" for flag in changes if getattr(flags, flag)]
            given += [] if flags.folder is None else ["--folder", flags.folder]
            rest.remove(name)
            print(plan.plan(recipe, name, [*given, *rest], **machines))
            return 0
        if flags.fetch:
            weights.fetch(recipe)
            return 0
        with stop_signals() as stop_requested:
            result = run(recipe, name, stop_requested)
    except (RecipeError, StateError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, CollapseError, SaveError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        print(
            f"error: rank {distributed.rank()} lost another process ({error}); the last saved state is "
            f"whole; to go on:\n{resume_command(arguments, program)}",
            file=sys.stderr,
        )
        return 1
    if not result.finished and distributed.rank() == 0:
        say(f"to go on:\n{resume_command(arguments, program)}")
    return 0


FLAGS = """Train a recipe; the same command goes on after a stop. Besides the recipe's own settings:
--plan prints memory, speed, days and the command for some GPUs (--gpus --nodes --gpu-memory --gpu --mfu);
--fetch downloads and checks the weights that the recipe starts from;
--folder FOLDER trains on your own pictures: shards, or a .csv or .jsonl of images and captions;
--smoke runs it end to end on drawn scenes, with small parts, in about five minutes."""


def _take_flags(arguments: list[str], changes: Iterable[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("plan", "fetch", *changes):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--folder")
    return parser.parse_known_args(arguments)


def resume_command(arguments: Sequence[str], program: str = "train.pretrain") -> str:
    """What to type to go on with this run."""
    launch, processes = "python", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if distributed.promised() > 1:
        launch = f"torchrun --nproc-per-node {processes}"
        if (nodes := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:
            launch += f" --nnodes {nodes}"
    return f"{launch} -m {program} {shlex.join(arguments)}"


if __name__ == "__main__":
    sys.exit(main())
