"""Whether a checkpoint is whole, and computes what transformers computes from it: `blip2 verify`.

`blip2.checks` and `blip2.values` look at the files. Then both libraries compute the same from the same
weights, one after the other, so that one model is in memory at a time: what every layer says of two pictures,
logits or scores, and generated text. Where they part, the first part that differs is named. Damage in a file
that both read alike cannot be seen so; that is what the checks of the files are for.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from blip2 import resources
from blip2.checkpoint import Loaded, load, locate
from blip2.checks import Check, Watch, check_counts, check_layout, check_sums
from blip2.devices import free_unused
from blip2.errors import CheckpointError, DoesNotFitError
from blip2.generation import decode, generate
from blip2.images import open_image
from blip2.layout import read_layout
from blip2.model import Blip2
from blip2.presets import find_preset
from blip2.processing import Processor
from blip2.progress import quiet
from blip2.quantize import DTYPES, empty_model, stored_precision
from blip2.settings import Generation
from blip2.shards import read_json
from blip2.values import check_values

PICTURES = ("scene-1.png", "photos/cat.jpg")
QUESTION = "what is in the picture?"
TEXTS = ["a photo of a cat", "a red circle and a small blue star"]  # one for each picture
LENGTHS: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 8}  # so that there are words to compare
# Largest difference relative to the length of the vector (L2) that counts as equal.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 5e-2, "nf4": 5e-2}
TRACED = re.compile(
    r"vision_model\.(embeddings|encoder\.layers\.\d+|post_layernorm)|qformer\.encoder\.layer\.\d+|"
    r"language_projection|language_model\.(model\.(decoder\.)?layers|encoder\.block|decoder\.block)\.\d+"
)
GROUPS = {
    "image embeddings": "vision_model.",
    "Q-Former": "qformer.",
    "language projection": "language_projection",
    "language model": "language_model.",
}


def verify(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    precision: str = "float32",
    device: str = "cpu",
    watch: Watch | None = None,
) -> Iterator[Check]:
    """Check a checkpoint, from its files to what it generates; yields each result as it comes.

    Args:
        name_or_path: as for `load`; what is not here is downloaded.
        revision: of a Hub repository.
        precision: of the comparison with transformers: "float32", "bfloat16" or "float16"; a folder of 8-bit
            or 4-bit weights is compared as it is.
        device: of the comparison.
        watch: told how far the reading of files is.

    Raises:
        CheckpointError: it cannot be found; what is wrong with one that is here is a result.
        ValueError: an unknown name, precision or device.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} cannot be compared: choose {', '.join(DTYPES)}")
    tell = watch or (lambda doing, done, total: None)
    preset = find_preset(str(name_or_path))
    _, folder = locate(name_or_path, revision=revision)
    sums = check_sums(folder, tell)
    yield sums
    try:
        layout = read_layout(folder)
        model = empty_model(layout)
    except CheckpointError as error:
        yield Check("layout", False, "a config.json and weights that can be read", str(error))
        return
    names = check_layout(layout, model)
    yield names
    yield check_counts(layout, model, preset if preset and preset.repo_id else None)
    wrong = sums.passed is False or not names.passed
    try:
        for check in check_values(layout, bool(sums.passed), tell):
            wrong = wrong or check.passed is False
            yield check
    except (SafetensorError, OSError, CheckpointError) as error:
        yield Check("values", False, "every tensor can be read", " ".join(str(error).split()))
        return
    if wrong:
        yield Check("transformers", None, "", "not compared, as what both would read is wrong")
        return
    tell("comparing", 0, 0)
    yield from compare(folder, "auto" if stored_precision(layout) else precision, device)


# --- ours and theirs ---


@dataclass
class Run:
    """What a model said: of each traced part the first output, in float32; values; generated texts."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    said: dict[str, list[list[Any]]] = field(default_factory=dict)

    def trace(self, model: nn.Module) -> None:
        """Keep what the traced parts of a model give from now on."""

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                first = output if isinstance(output, Tensor) else output[0]
                if name not in self.parts:
                    self.parts[name] = first.detach().float().cpu()

            return hook

        for name, module in model.named_modules():
            if TRACED.fullmatch(name):
                module.register_forward_hook(keep(name))


def until(ids: Tensor, ends: Any) -> list[list[int]]:
    """Generated tokens (B, T), each row up to where it ends."""
    stop = {ends} if isinstance(ends, int) else set(ends or ())
    rows = ids.tolist()
    return [row[: next((at for at, token in enumerate(row) if token in stop), len(row))] for row in rows]


@dataclass
class Inputs:
    """What both are given: the pixels and tokens of our processor, and how to read the folder."""

    processor: Processor
    pixel_values: Tensor
    text: dict[str, Tensor]
    config: Any
    renames: dict[str, str]
    precision: str
    dtype: torch.dtype
    device: torch.device


@torch.no_grad()
def ours(folder: Path, precision: str, device: str) -> tuple[Run, Inputs]:
    """Load with this package, and compute."""
    loaded: Loaded = load(folder, precision=precision, device=device)
    model, processor, run = loaded.model, loaded.processor, Run()
    run.trace(model)
    pictures = [open_image(resources.folder("examples") / name) for name in PICTURES]
    pixel_values = processor.images(pictures).to(loaded.device)
    image = model.encode_image(pixel_values)
    if isinstance(model, Blip2):
        prompts = [processor.prompt(QUESTION, processor.question_style)] * len(pictures)
        text = {**processor.text(prompts), **processor.question(prompts)}
        text = {name: value.to(loaded.device) for name, value in text.items()}
        start = {} if model.is_decoder_only else {"decoder_input_ids": text["input_ids"]}
        run.values["logits"] = model(image=image, **text, **start).logits.float().cpu()
        ends = model.language_model.generation_config.eos_token_id
        greedy = torch.stack(list(decode(model, image, text, Generation(**LENGTHS))), dim=1)
        run.said["greedy tokens"] = until(greedy, ends)
        said = generate(model, processor, image, prompts, Generation.caption(**LENGTHS))
        run.said["beam words"] = [words.split() for [words] in said]
    else:
        text = {name: value.to(loaded.device) for name, value in processor.text(TEXTS).items()}
        run.values["ITM logits"] = model.match_logits(image, **text).diagonal().T.float().cpu()
        run.values["ITC scores"] = model.score(image, **text, head="itc").float().cpu()
    layout = read_layout(folder)  # anew: `load` writes into the configuration it uses
    layout.config.image_token_index = model.config.image_token_index
    reading = (layout.config, layout.renames, loaded.precision, model.dtype, loaded.device)
    return run, Inputs(processor, pixel_values, text, *reading)


@torch.no_grad()
def theirs(folder: Path, inputs: Inputs) -> Run:
    """Load with transformers, and compute.

    Raises:
        CheckpointError: it leaves tensors out.
    """
    raw, run = read_json(folder / "config.json"), Run()
    stage1 = inputs.config.architectures == ["Blip2ForImageTextRetrieval"]
    made: type[Any] = transformers.Blip2ForConditionalGeneration
    reading: dict[str, Any] = {"config": inputs.config, "key_mapping": inputs.renames}  # of old revisions too
    if raw["model_type"] == "instructblip":
        made, reading = transformers.InstructBlipForConditionalGeneration, {}
    elif stage1:
        made = transformers.Blip2ForImageTextRetrieval
    with quiet():
        model, info = made.from_pretrained(
            folder,
            **reading,
            dtype=inputs.dtype,
            device_map={"": inputs.device},
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise CheckpointError(f"transformers finds no {', '.join(sorted(info['missing_keys'])[:5])}")
    run.trace(model.eval())
    pixels, text = inputs.pixel_values.to(inputs.dtype), dict(inputs.text)
    token = model.config.image_token_index
    if token is not None:  # the queries' places
        ids, mask = text["input_ids"], text["attention_mask"]
        images = torch.full((len(ids), model.config.num_query_tokens), token, device=ids.device)
        text["input_ids"] = torch.cat([images, ids], 1)
        text["attention_mask"] = torch.cat([torch.ones_like(images), mask], 1)
    if stage1:
        scores = [model(pixels, **text, use_image_text_matching_head=head) for head in (False, True)]
        run.values["ITC scores"], run.values["ITM logits"] = (
            score.logits_per_image.float().cpu() for score in scores
        )
        return run
    decoder = model.config.use_decoder_only_language_model
    start = {} if decoder else {"decoder_input_ids": inputs.text["input_ids"]}
    run.values["logits"] = model(pixels, **text, **start).logits.float().cpu()
    ends = model.language_model.generation_config.eos_token_id
    beam = Generation.caption(**LENGTHS).options()
    for name, options in (("greedy tokens", beam | {"num_beams": 1}), ("beam words", beam)):
        ids, prompt = model.generate(pixels, **text, **options), text["input_ids"]
        if decoder and ids.shape[1] > prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
            ids = ids[:, prompt.shape[1] :]
        ids = ids if decoder else ids[:, 1:]
        words = [line.split() for line in inputs.processor.decode(ids)]
        run.said[name] = words if name == "beam words" else until(ids, ends)
    return run


def compare(folder: Path, precision: str = "float32", device: str = "cpu") -> Iterator[Check]:
    """What this package and transformers compute from one folder, loaded one after the other."""
    against = f"transformers {transformers.__version__}, the same files"
    if read_json(folder / "config.json")["model_type"] == "blip2-any":
        yield Check("transformers", None, against, "not compared: it refuses folders of model type blip2-any")
        return
    try:
        mine, inputs = ours(folder, precision, device)
    except DoesNotFitError as error:
        found = f"{str(error).partition(': ')[0]}; compare in bfloat16, or on a larger machine"
        yield Check("transformers", False, "memory for one model at a time", f"not compared: {found}")
        return
    except CheckpointError as error:
        yield Check("loading", False, "it loads here", str(error))
        return
    free_unused()
    try:
        other = theirs(folder, inputs)
    except (CheckpointError, OSError, ValueError) as error:
        yield Check("transformers", False, f"{against} load there", " ".join(str(error).split()))
        return
    free_unused()
    limit = TOLERANCE[inputs.precision]
    expected = f"{against}, {inputs.precision}, relative difference at most {limit:g}"
    for group, prefix in GROUPS.items():
        common = [name for name in mine.parts if name.startswith(prefix) and name in other.parts]
        if common:
            yield _close(group, expected, limit, {n: (mine.parts[n], other.parts[n]) for n in common})
    for name, value in mine.values.items():
        yield _close(name, expected, limit, {name: (value, other.values[name])})
    for name, rows in mine.said.items():
        unit = name.split()[1]
        words = f"{against}, {inputs.precision}, the same {unit}"
        if inputs.precision != "float32":
            yield Check(name, None, words, "not compared: rounding turns close choices")
            continue
        differ = [row for row, ids in enumerate(rows) if ids != other.said[name][row]]
        found = f"{sum(map(len, rows))} {unit} about {len(rows)} pictures, {len(differ)} rows differ"
        where = ""
        if differ:
            [place] = differ[:1]
            where = f"picture {place + 1}: {rows[place]} here, {other.said[name][place]} there"
        yield Check(name, not differ, words, found, where)


def _close(name: str, expected: str, limit: float, pairs: dict[str, tuple[Tensor, Tensor]]) -> Check:
    """One result of parts in the order they are computed in; the first that differs is named."""
    differences = {part: _difference(*pair) for part, pair in pairs.items()}
    far = [part for part, difference in differences.items() if not difference <= limit]
    last, several = list(pairs)[-1], f", {len(pairs)} parts" if len(pairs) > 1 else ""
    found = f"{differences[far[0] if far else last]:.1e}{several}"
    return Check(name, not far, expected, found, far[0] if far and len(pairs) > 1 else "")


def _difference(mine: Tensor, other: Tensor) -> float:
    if mine.ndim == other.ndim == 3 and mine.shape[1] < other.shape[1]:
        other = other[:, : mine.shape[1]]  # our last Q-Former layer leaves the text out, which no one reads
    if mine.shape != other.shape:
        return float("inf")
    return ((mine - other).norm() / other.norm().clamp_min(1e-12)).item()
