"""Pre-training, both stages: the models they start from, and the command.

    python -m train.pretrain scenes-stage1 --max-minutes 40
    torchrun --nproc-per-node 8 -m train.pretrain stage1-vitg

The same command goes on where a stopped run left off. Stage 1 is Sec. 3.2 of the paper, stage 2 Sec. 3.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    Blip2VisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blip2 import checkpoint
from blip2.convert import qformer_from_bert
from blip2.model import Blip2
from blip2.processing import Family, Processor
from blip2.qformer import QFormer
from blip2.representation import Blip2Representation
from train import distributed
from train.captions import scenes_loader, tokenize_for
from train.engine import NonFiniteError, Result, fit, make_accelerator
from train.execution import prepare
from train.loader import Loader
from train.log import say
from train.objectives import Objective, Stage1, Stage2
from train.recipes import RECIPES, Recipe, RecipeError, Scenes
from train.state import SaveError, StateError
from train.stop import stop_signals

# --- models to start from ---


def new_representation(
    recipe: Recipe, vision: Path, tokenizer: PreTrainedTokenizerBase
) -> Blip2Representation:
    """A stage-1 model with random weights around a pretrained image encoder.

    Args:
        recipe: gives the Q-Former's sizes.
        vision: folder with the encoder's config.json and model.safetensors, named as `VisionTransformer`'s.
        tokenizer: BERT-like; its bos token is [DEC], the last row of the embedding table.
    """
    sizes = dataclasses.asdict(recipe.qformer)
    num_query_tokens, projection = sizes.pop("num_query_tokens"), sizes.pop("image_text_hidden_size")
    dropout = sizes.pop("dropout")
    vision_config = Blip2VisionConfig.from_json_file(vision / "config.json")
    start: Any = tokenizer.bos_token_id
    if start is None:
        raise RecipeError(f"{recipe.tokenizer}: the tokenizer has no bos token; stage 1 wants [DEC] as one")
    config = Blip2Config(
        vision_config=vision_config.to_dict(),
        qformer_config={
            **sizes,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "encoder_hidden_size": vision_config.hidden_size,
            "vocab_size": start + 1,
            "pad_token_id": tokenizer.pad_token_id,
            "use_qformer_text_input": True,
        },
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=projection,
        image_token_index=tokenizer.get_vocab().get("<image>"),
    )
    config.decoder_start_token_id = start
    model = Blip2Representation(config)
    weights = load_file(vision / "model.safetensors")
    model.vision_model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def attach_language_model(
    representation: Blip2Representation, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Blip2:
    """A stage-2 model: image encoder, queries and query path of stage 1, a fresh projection, and the given
    LLM.

    Stage 1's text half and heads are dropped. As in the released models, a decoder ends with the line break
    that its captions end with, and an encoder without a prompt reads </s>.
    """
    text: Any = language_model.config
    if text.is_encoder_decoder:
        text.bos_token_id = text.eos_token_id
    else:
        (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
        text.eos_token_id = newline
        if language_model.generation_config is not None:
            language_model.generation_config.eos_token_id = newline
    old: Any = representation.config
    config: Any = type(old)(
        vision_config=old.vision_config.to_dict(),
        qformer_config={**old.qformer_config.to_dict(), "use_qformer_text_input": False},
        text_config=text.to_dict(),
        num_query_tokens=old.num_query_tokens,
        image_token_index=tokenizer.get_vocab().get("<image>"),
    )
    with torch.device("meta"):  # the language model is large, and every part is replaced
        model = Blip2(config)
    model.vision_model, model.query_tokens = representation.vision_model, representation.query_tokens
    model.qformer = QFormer(config.qformer_config)
    trained = representation.qformer.state_dict()
    model.qformer.load_state_dict({name: trained[name] for name in model.qformer.state_dict()})
    model.language_projection = nn.Linear(config.qformer_config.hidden_size, text.hidden_size)
    model.language_model = language_model
    return model


def start(recipe: Recipe) -> tuple[Objective, Processor]:
    """The objective of a recipe over the model it starts from, and the processor saved with that model.

    Raises:
        RecipeError: what the recipe starts from does not fit it.
    """
    if recipe.stage == 1:
        if recipe.tokenizer is None:
            from train.scenes.text import build_tokenizer

            tokenizer: Any = build_tokenizer("bert")
        else:
            tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
            if tokenizer.bos_token is None:  # BERT's: LAVIS adds [DEC], the token that starts a caption
                tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        representation = new_representation(recipe, Path(recipe.start_from), tokenizer)
        if recipe.bert is not None:
            qformer_from_bert(recipe.bert, representation)
        return Stage1(representation, recipe.objectives, recipe.execution.micro_batch_size), _processor(
            representation, tokenizer, "bert"
        )

    loaded = checkpoint.load(recipe.start_from, precision="float32", device="cpu")
    if not isinstance(loaded.model, Blip2Representation):
        raise RecipeError(f"{recipe.start_from} is no stage-1 model; stage 2 starts from one")
    assert recipe.language_model is not None
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
    encodes = AutoConfig.from_pretrained(recipe.language_model).is_encoder_decoder
    family = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    language_model = family.from_pretrained(recipe.language_model, dtype=torch.float32)
    model = attach_language_model(loaded.model, language_model, tokenizer)
    return Stage2(model, recipe.execution.micro_batch_size), _processor(
        model, tokenizer, "t5" if encodes else "opt"
    )


def _processor(
    model: Blip2Representation | Blip2, tokenizer: PreTrainedTokenizerBase, family: Family
) -> Processor:
    config: Any = model.config
    size, queries = config.vision_config.image_size, config.num_query_tokens
    return Processor(tokenizer, family=family, image_size=size, num_query_tokens=queries)


# --- the command ---


def mean_losses(
    make_loader: Callable[[], Loader], batches: int, seed: int = 0
) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for `fit`: the objective's values, averaged over the same batches every time.

    Args:
        make_loader: gives the validation loader, from its start.
        batches: how many to take.
        seed: of what the losses draw themselves, such as hard negatives.
    """

    def evaluate(objective: nn.Module) -> dict[str, float]:
        distributed.seed_everything(seed)
        device = next(objective.parameters()).device
        rows = []
        for batch in itertools.islice(make_loader(), batches):
            outputs = objective({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            rows.append({name: value.item() for name, value in outputs.items()})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    return evaluate


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
    if lacking := recipe.missing():
        raise RecipeError(f"{name} cannot start; it lacks\n" + "\n".join(f"  - {line}" for line in lacking))
    assert isinstance(recipe.data, Scenes)
    if recipe.execution.threads is not None:
        torch.set_num_threads(recipe.execution.threads)
    output = Path(recipe.output)
    accelerator = make_accelerator(
        recipe.fit.precision,
        trackers=recipe.fit.trackers,
        folder=output,
        timeout_minutes=recipe.fit.timeout_minutes,
    )
    if recipe.batch_size % distributed.world_size():
        raise RecipeError(
            f"batch_size {recipe.batch_size} is no multiple of the {distributed.world_size()} processes"
        )
    distributed.seed_everything(recipe.fit.seed)  # of new weights; DDP sends rank 0's to all
    objective, processor = start(recipe)
    prepare(objective, recipe.execution, accelerator.device)
    scenes, size = recipe.data, recipe.batch_size
    tokenize = tokenize_for(
        processor.tokenizer, processor.family, recipe.max_text_length, recipe.whole_captions
    )
    evaluate = mean_losses(
        lambda: scenes_loader(scenes, tokenize, size, split="validation"), scenes.num_validation // size
    )
    losses = evaluate

    def losses_and_answers(objective: nn.Module) -> dict[str, float]:
        from train.scenes.evaluate import answers

        model: Any = objective.model
        loaded = checkpoint.Loaded(model, processor, name, "float32", model.device, output, [])
        return {**losses(objective), **answers(loaded, scenes.num_asked, "validation")}

    if recipe.stage == 2 and scenes.num_asked:
        evaluate = losses_and_answers
    # On a CPU plain attention is the faster for short sequences: 1.4 times in bf16 without dropout.
    plain = sdpa_kernel(SDPBackend.MATH) if accelerator.device.type == "cpu" else nullcontext()
    with plain:
        result = fit(
            objective,
            scenes_loader(scenes, tokenize, size, seed=recipe.fit.seed),
            recipe.fit,
            output,
            run={"recipe": name, **dataclasses.asdict(recipe)},
            evaluate=evaluate,
            accelerator=accelerator,
            stop_requested=stop_requested,
        )
    if result.finished and distributed.rank() == 0:
        model: Any = objective.model
        checkpoint.save(model.cpu().eval(), processor, output / "model")
        say(f"saved {output / 'model'}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: trained, or stopped by a signal; 1: training failed; 2: it could not start."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    choices = {name: (make.__doc__ or "", make()) for name, make in RECIPES.items()}
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    recipe = tyro.extras.overridable_config_cli(
        choices, prog="python -m train.pretrain", args=arguments, config=flat
    )
    try:
        with stop_signals() as stop_requested:
            result = run(recipe, arguments[0], stop_requested)
    except (RecipeError, StateError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, SaveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        print(
            f"error: rank {distributed.rank()} lost another process ({error}); the last saved state is "
            f"whole; to go on:\n{resume_command(arguments)}",
            file=sys.stderr,
        )
        return 1
    if not result.finished and distributed.rank() == 0:
        say(f"to go on:\n{resume_command(arguments)}")
    return 0


def resume_command(arguments: Sequence[str]) -> str:
    """What to type to go on with this run."""
    launch, processes = "python", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        launch = f"torchrun --nproc-per-node {processes}"
        if (nodes := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:
            launch += f" --nnodes {nodes}"
    return f"{launch} -m train.pretrain {shlex.join(arguments)}"


if __name__ == "__main__":
    sys.exit(main())
