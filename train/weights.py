"""The weights that the paper's recipes start from: where they come from, and how they get here.

    python -m train.pretrain stage1-vitg --fetch

A recipe names folders, `weights/vitg` and such. Each is written whole or not at all, in the form that
training reads: an image encoder as config.json and model.safetensors under `VisionTransformer`'s names, cut
to the blocks that BLIP-2 uses; a language model as transformers has it, in safetensors, in the precision that
it is frozen in. Downloads go on where they broke off. What arrives is checked: the Hub's files against their
SHA-256, LAVIS's against the length and MD5 that their server states, and all of them for names, shapes and
finite values against the configuration built from the code.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.file_download import http_get
from transformers import Blip2VisionConfig, OPTConfig, T5Config

from blip2.convert import convert
from blip2.download import download
from blip2.errors import CheckpointError
from blip2.presets import EVA, OPT_LICENSE, OPT_SIZES, OPT_TEXT, PRESETS, T5_SIZES, T5_TEXT
from train.encoders import ENCODERS, find
from train.recipes import Recipe, RecipeError, Run
from train.weight_files import write_text_model, write_vision

LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """One folder that recipes start from.

    Attributes:
        name: of the folder.
        what: it holds.
        kind: "vision", "bert", "language", or "stage1", a finished stage 1 to go on from.
        source: a Hub id, or the address of a LAVIS file.
        gigabytes: to download, about.
        license: what may be done with it.
        config: the sizes of an image encoder or a language model, which are known without any download.
        precision: that its weights are stored in, the paper's for language models; None leaves them as they
            come.
        parts: other weights that go into it, by name.
    """

    name: str
    what: str
    kind: Literal["vision", "bert", "language", "stage1"]
    source: str
    gigabytes: float
    license: str
    config: Callable[[], Any] | None = None
    precision: torch.dtype | None = None
    parts: tuple[str, ...] = ()


def vit_g() -> Blip2VisionConfig:
    """EVA-CLIP ViT-g/14 without its last block: the defaults of transformers' BLIP-2."""
    return Blip2VisionConfig()


def vit_l() -> Blip2VisionConfig:
    """CLIP ViT-L/14 without its last block. Paper: Sec. 3.4."""
    return Blip2VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        pre_layernorm=True,
        patch_bias=False,
    )


def _opt(*sizes: int) -> Callable[[], OPTConfig]:
    """vocab_size is Meta's own; the released BLIP-2 models have further rows."""
    fields = OPT_TEXT | dict(zip(OPT_SIZES, sizes, strict=True)) | {"vocab_size": 50272}
    return lambda: OPTConfig(**{**fields, "word_embed_proj_dim": sizes[0]})


def _t5(*sizes: int) -> Callable[[], T5Config]:
    fields = T5_TEXT | dict(zip(T5_SIZES, sizes, strict=True))
    return lambda: T5Config(**fields)


T5 = "Apache-2.0."
BERT = "google-bert/bert-base-uncased"
WEIGHTS = {
    made.name: made
    for made in (
        Weights("vitg", "EVA-CLIP ViT-g/14", "vision", f"{LAVIS}/eva_vit_g.pth", 2.0, EVA, vit_g),
        Weights("vitl", "CLIP ViT-L/14", "vision", "openai/clip-vit-large-patch14", 1.7, "MIT.", vit_l),
        Weights("bert-base-uncased", "BERT-base and its word pieces", "bert", BERT, 0.4, "Apache-2.0."),
        Weights(
            "opt-2.7b", "OPT-2.7B", "language", "facebook/opt-2.7b", 5.3, OPT_LICENSE.split(" The")[0],
            _opt(2560, 10240, 32, 32), torch.float16,
        ),
        Weights(
            "opt-6.7b", "OPT-6.7B", "language", "facebook/opt-6.7b", 13.3, OPT_LICENSE.split(" The")[0],
            _opt(4096, 16384, 32, 32), torch.float16,
        ),
        Weights(
            "flan-t5-xl", "Flan-T5-XL", "language", "google/flan-t5-xl", 11.4, T5,
            _t5(2048, 5120, 24, 32), torch.bfloat16,
        ),
        Weights(
            "flan-t5-xxl", "Flan-T5-XXL", "language", "google/flan-t5-xxl", 45.1, T5,
            _t5(4096, 10240, 24, 64), torch.bfloat16,
        ),
        Weights(
            "stage1-vitg", "LAVIS's stage 1 with ViT-g", "stage1", f"{LAVIS}/blip2_pretrained.pth", 0.8, EVA,
            parts=("vitg", "bert-base-uncased"),
        ),
    )
}  # fmt: skip


# --- what a recipe needs ---


def wanted(recipe: Run) -> dict[Path, Weights]:
    """The folders that a recipe names and this module can fill, in the order to fill them."""
    found: dict[Path, Weights] = {}

    def add(folder: Path) -> None:
        for part in WEIGHTS[folder.name].parts:
            add(folder.parent / part)
        found.setdefault(folder, WEIGHTS[folder.name])

    for named in _named(recipe):
        if Path(named).name in WEIGHTS and Path(named).parent.name == "weights":
            add(Path(named))
    return found


def on_the_hub(recipe: Run) -> list[str]:
    """What a recipe names by its Hub id, such as another encoder, and the cache does not have."""
    ids = [name for name in _named(recipe) if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    return [
        name for name in ids if not Path(Path(name).parts[0]).is_dir() and not _local(name) and not find(name)
    ]


def _local(name: str) -> bool:
    return Path(name).parts[0] in (".", "..", "~", "weights", "runs", "data")


def _named(recipe: Run) -> list[str]:
    """The sources of a recipe, each once; short names of encoders and released models are spelled out."""
    fields = ("start_from", "bert", "tokenizer", "language_model", "stage1")
    found = (getattr(recipe, field, None) for field in fields)
    named = dict.fromkeys(ENCODERS.get(name, name) for name in found if name)
    return [PRESETS[name].repo_id or name if name in PRESETS else name for name in named]


def is_there(folder: Path) -> bool:
    """Whether a folder has been fetched: it appears with everything in it, or not at all."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def fetch(recipe: Run, say: Say = print) -> list[Path]:
    """Bring in what a recipe starts from and this machine lacks.

    Args:
        recipe: see `wanted`; anything else that it names is only looked for.
        say: gets sizes and licenses before a download, then what was done.

    Returns:
        The folders, those that were there already included.

    Raises:
        RecipeError: no connection, no room, or something arrived that is not what it should be. What was
            downloaded stays, and the same call goes on.
    """
    folders = wanted(recipe)
    lacking = {folder: weights for folder, weights in folders.items() if not is_there(folder)}
    for folder in folders.keys() - lacking.keys():
        say(f"{folder} is here")
    for folder, weights in lacking.items():
        say(f"{folder}: {weights.what}, {weights.gigabytes} GB from {weights.source}. {weights.license}")
    if lacking:
        _check_room(lacking)
    place: str | Path = ""
    try:
        for place, weights in lacking.items():
            fill(place, weights, say)
        for place in on_the_hub(recipe):
            say(f"{place} is in the Hub's cache: {download(place)}")
    except CheckpointError as error:
        raise RecipeError(f"{place} cannot be had: {error}") from error
    if isinstance(recipe, Recipe) and recipe.stage == 2 and find(recipe.start_from) is None:
        say(
            f"{recipe.start_from} comes from stage 1, which has to run first; or start from LAVIS's: "
            "--start-from weights/stage1-vitg"
        )
    return list(folders)


def hint(recipe: Run, name: str) -> str:
    """What to type to have the weights that a recipe lacks; empty if that would bring none."""
    lacking = [folder for folder in wanted(recipe) if not is_there(folder)]
    return f"python -m {recipe.program} {name} --fetch" if lacking or on_the_hub(recipe) else ""


def _check_room(lacking: dict[Path, Weights]) -> None:
    """Downloads and the folders made of them are both on the disk for a while."""
    needed = sum(2 * weights.gigabytes for weights in lacking.values())
    here = next(p for p in next(iter(lacking)).absolute().parents if p.exists())
    free = shutil.disk_usage(here).free / 1e9
    if free < needed:
        raise RecipeError(
            f"the weights need up to {needed:.1f} GB on the disk of {here}; {free:.1f} GB are free"
        )


def fill(folder: Path, weights: Weights, say: Say = print) -> None:
    """Make one folder, atomically.

    Raises:
        CheckpointError: see `fetch`.
    """
    downloads = folder.parent / ".downloads"
    if weights.source.startswith("http"):
        came = fetch_file(weights.source, downloads)
    else:
        came = download(weights.source)
    if weights.kind == "stage1":
        tower = fetch_file(WEIGHTS["vitg"].source, downloads)
        made = convert(came, folder, vision=tower, tokenizer=folder.parent / "bert-base-uncased")
        say(f"{folder}: {made.mapped} tensors, {len(made.dropped)} left out")
        return
    with _whole(folder) as fresh:
        if weights.kind == "vision":
            assert weights.config is not None
            for line in write_vision(came, fresh, weights.config()):
                say(f"{folder}: {line}")
        else:
            config = weights.config() if weights.config else None
            write_text_model(came, fresh, config, weights.precision)
        (fresh / "SOURCE.txt").write_text(f"{weights.what}, from {weights.source}. {weights.license}\n")
    say(f"{folder} is ready")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is full."""
    fresh = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


# --- downloads that are not the Hub's ---


def fetch_file(url: str, folder: Path) -> Path:
    """A file from a web server, in full; a download that was broken off goes on.

    Raises:
        CheckpointError: no connection, or it is not what the server says it is.
    """
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        return target
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"downloading is off (HF_HUB_OFFLINE is set). Without a connection, copy {url} to {target}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{target.name}.part"
    try:
        head = get_session().head(url, follow_redirects=True, timeout=30)
        head.raise_for_status()
        size = int(head.headers["content-length"])
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            http_get(url, file, resume_size=file.tell(), expected_size=size)
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "huggingface")):
            raise
        words = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(
            f"{url} could not be downloaded: {words}. The same command goes on; or copy it to {target}"
        ) from error
    stated = re.search(r"md5=([\w+/=]+)", head.headers.get("x-goog-hash", ""))
    if stated is not None:
        with part.open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if found != stated[1]:
            part.unlink()
            raise CheckpointError(f"{url} arrived damaged and was removed: try again")
    part.replace(target)
    return target
