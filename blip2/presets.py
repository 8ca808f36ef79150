"""The checkpoints one can name: the released ones with size, memory and licence, and the embedded ones.

Numbers are of the weights alone: activations, the key-value cache and the processor come on top.
"""

import difflib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blip2.settings import FRAMES, Generation

if TYPE_CHECKING:
    from transformers import Blip2Config

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "nf4")
SMALL_PRECISIONS = ("bfloat16", "int8", "nf4")  # that a released checkpoint is kept in, the most exact first
# Bytes a weight; nf4: 4 bits, and a doubly quantized scale a block.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 0.516}
ORGANIZATION = "Salesforce"

EVA = "The image encoder (EVA-CLIP ViT-g/14) and Salesforce's weights are MIT."
OPT_LICENSE = f"OPT weights: Meta's OPT license, non-commercial research only. {EVA}"
T5_LICENSE = f"Flan-T5 weights: Apache-2.0. {EVA}"
MATCH_LICENSE = f"BERT weights: Apache-2.0. {EVA}"
SCENES_LICENSE = "Apache-2.0, trained by this repository on drawn scenes."


@dataclass(frozen=True)
class Preset:
    """One checkpoint.

    Attributes:
        name: how it is asked for.
        repo_id: where it lies on the Hub; None for an embedded one.
        kind: "generate" (captions, answers, chat) or "match" (image-text scores).
        parameters: of the whole model.
        quantizable: weights that int8 and nf4 shrink, the language model's; the rest stays in 16 bits.
        kept: weights that float16 keeps in float32 (Q-Former, queries, T5's `wo`).
        image_size: pixels a side.
        language_model: "opt", "t5", or "bert" where the Q-Former itself reads the text.
        text_size: (width, feed-forward width, layers, heads) of the language model.
        license: what may be done with it.
        prompt: the frame it expects around a caption request (coco models were tuned on one).
        vision: weights of the image encoder that int8 and nf4 shrink too where that is asked for.
    """

    name: str
    repo_id: str | None
    kind: Literal["generate", "match"]
    parameters: int
    quantizable: int
    kept: int
    image_size: int
    language_model: Literal["opt", "t5", "bert"]
    text_size: tuple[int, int, int, int] | None
    license: str
    prompt: str = ""
    vision: int = 0

    @property
    def download_bytes(self) -> int:
        """What has to be downloaded: the releases are stored in float32. 0 for an embedded checkpoint."""
        return 4 * self.parameters if self.repo_id else 0

    def memory(self, precision: str, *, quantize_vision: bool = False, rest: str = "bfloat16") -> int:
        """Bytes the weights take in memory.

        Args:
            precision: one of `PRECISIONS`.
            quantize_vision: under int8 and nf4, the image encoder's too.
            rest: under int8 and nf4, the precision of what is not quantized.

        Raises:
            ValueError: an unknown precision.
        """
        quantizable = self.quantizable + quantize_vision * self.vision
        return memory(self.parameters, quantizable, self.kept, precision, rest)

    @property
    def folder(self) -> Path | None:
        """Where an embedded checkpoint lies; None for a released one."""
        return None if self.repo_id else Path(str(resources.files("blip2") / "assets" / self.name))

    @property
    def question(self) -> str:
        """The frame around a question (Sec. 4.1); "" for one that scores texts."""
        frames = {"opt": FRAMES["question"], "t5": FRAMES["short"]}
        return frames.get(self.language_model, "")

    @property
    def captioning(self) -> Generation:
        """How it makes captions: the paper's five beams; at least 8 tokens where it was tuned on COCO's."""
        return Generation.caption(min_new_tokens=8) if self.prompt else Generation.caption()

    def small_folders(self, precision: str = "auto") -> list[Path]:
        """Where `blip2 download --precision` keeps it, beside the Hub's cache; they need not be there.

        Args:
            precision: one of `SMALL_PRECISIONS`, or "auto" for any; none for others, which they cannot give.
        """
        from huggingface_hub import constants

        if self.repo_id is None:
            return []
        place = Path(constants.HF_HUB_CACHE).expanduser().parent / "blip2"
        wanted = [kept for kept in SMALL_PRECISIONS if precision in (kept, "auto")]
        return [place / f"{self.name}-{kept}" for kept in wanted]

    def config(self) -> "Blip2Config":
        """The full-size configuration of a released checkpoint, as its Hub repository states it."""
        from transformers import Blip2Config

        if self.repo_id is None:
            raise ValueError(f"{self.name} is embedded: read {self.folder}/config.json")
        qformer: dict = {"use_qformer_text_input": True, "vocab_size": 30523} if self.kind == "match" else {}
        text: dict = {"model_type": "opt"}  # unused where the Q-Former itself reads the text
        if self.text_size is not None:
            text = OPT_TEXT | dict(zip(OPT_SIZES, self.text_size, strict=True))
            text["word_embed_proj_dim"] = text["hidden_size"]
            if self.language_model == "t5":
                text = T5_TEXT | dict(zip(T5_SIZES, self.text_size, strict=True))
        return Blip2Config(
            vision_config={"image_size": self.image_size},
            qformer_config=qformer,
            text_config=text,
            image_token_index={"opt": 50265, "t5": 32100, "bert": 30523}[self.language_model],
        )


OPT_SIZES = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
T5_SIZES = ("d_model", "d_ff", "num_layers", "num_heads")
OPT_TEXT = {"model_type": "opt", "vocab_size": 50304, "eos_token_id": 50118}
T5_TEXT = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",  # LAVIS runs Flan-T5 with the exact GELU, and the releases were trained so
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "decoder_start_token_id": 0,
}


def memory(parameters: int, quantizable: int, kept: int, precision: str, rest: str = "bfloat16") -> int:
    """Bytes that the weights of a model take: see `Preset` and `Preset.memory` for the arguments.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision not in ("int8", "nf4"):
        quantizable, rest = 0, precision
    kept_more = (BYTES["float32"] - BYTES[rest]) * kept if rest == "float16" else 0
    return int(BYTES[rest] * (parameters - quantizable) + BYTES[precision] * quantizable + kept_more)


OVERHEAD, LIBRARIES = 1.1, 700_000_000  # activations and caches, a share of the weights; bytes


def gigabytes(number: int) -> str:
    """`15.0 GB`."""
    return f"{number / 1e9:.1f} GB"


def room(weights: int) -> int:
    """Bytes to have free for a model of that many bytes of weights: activations, caches, the libraries."""
    return int(OVERHEAD * weights) + LIBRARIES * (weights > 400_000_000)


# Zero-shot VQAv2 test-dev (Tab. 2): Flan-T5-XXL 65.0, XL 63.0, OPT-6.7B 52.6, OPT-2.7B 52.3; the Flan-T5
# ones may be used commercially, too. OPT-2.7B asks for the least memory and disk.
BEST = ("blip2-flan-t5-xxl", "blip2-flan-t5-xl", "blip2-opt-2.7b")
FAST_ONLY = BEST[:1]  # too slow to talk with on a CPU; in full precision alone


def best(
    memory: int,
    accelerator: int | None,
    disk: int,
    *,
    full: str | dict[str, str] = "bfloat16",
    quantized: bool = True,
    cached: Collection[str] = (),
) -> tuple[str, str] | None:
    """The released checkpoint that answers best on a machine.

    What is in the cache goes before what has to be downloaded; full precision of a model before its 8-bit
    and 4-bit weights, and those before a lesser model.

    Args:
        memory: free bytes of main memory.
        accelerator: free bytes of the accelerator's; None without one.
        disk: free bytes where the cache lies.
        full: the precision that "full" means here; or by language model, "opt" and "t5".
        quantized: whether 8-bit and 4-bit weights work here.
        cached: names that need no download.

    Returns:
        Name and precision, one of `PRECISIONS`; None if nothing fits.
    """
    space = memory if accelerator is None else accelerator
    for here in (True, False):
        for name in BEST:
            preset = PRESETS[name]
            if (name in cached) != here or not (here or preset.download_bytes <= disk):
                continue
            exact = full if isinstance(full, str) else full[preset.language_model]
            precisions: Sequence[str] = [exact, *(("int8", "nf4") if quantized else ())]
            if name in FAST_ONLY:
                precisions = precisions[: accelerator is not None]
            for precision in precisions:
                if room(preset.memory(precision, rest=exact)) <= space:
                    return name, precision
    return None


def _released() -> list[Preset]:
    tower = 39 * (4 * 1408**2 + 2 * 1408 * 6144)  # the linear layers of 39 blocks, without biases
    bigger_image = (26**2 - 16**2) * 1408  # position embeddings of 364 instead of 224 pixels
    qformer = 105_137_664 + 24_576  # with the query tokens
    opt27 = (2560, 10240, 32, 32)
    opt67 = (4096, 16384, 32, 32)
    xl, xxl = (2048, 5120, 24, 32), (4096, 10240, 24, 64)

    def opt(name: str, parameters: int, size: tuple[int, int, int, int], coco: bool) -> Preset:
        width, ffn, layers, _ = size
        quantizable = layers * (4 * width**2 + 2 * width * ffn)
        return Preset(
            name,
            f"{ORGANIZATION}/{name}",
            "generate",
            parameters + coco * bigger_image,
            quantizable,
            qformer,
            364 if coco else 224,
            "opt",
            size,
            OPT_LICENSE,
            "a photo of" if coco else "",
            tower,
        )

    def t5(name: str, parameters: int, size: tuple[int, int, int, int], coco: bool) -> Preset:
        width, ffn, layers, heads = size
        attention, wide = 4 * width * 64 * heads, 2 * width * ffn
        quantizable = layers * (3 * attention + 2 * wide)
        return Preset(
            name,
            f"{ORGANIZATION}/{name}",
            "generate",
            parameters + coco * bigger_image,
            quantizable,
            qformer + 2 * layers * width * ffn,
            364 if coco else 224,
            "t5",
            size,
            T5_LICENSE,
            "a photo of" if coco else "",
            tower,
        )

    def match(name: str, coco: bool) -> Preset:
        kept = 161_825_280 + 24_576
        parameters = 1_172_032_258 + coco * bigger_image
        size = 364 if coco else 224
        return Preset(
            name,
            f"{ORGANIZATION}/{name}",
            "match",
            parameters,
            0,
            kept,
            size,
            "bert",
            None,
            MATCH_LICENSE,
            vision=tower,
        )

    return [
        opt("blip2-opt-2.7b", 3_744_761_856, opt27, False),
        opt("blip2-opt-6.7b", 7_752_869_376, opt67, False),
        opt("blip2-opt-2.7b-coco", 3_744_761_856, opt27, True),
        opt("blip2-opt-6.7b-coco", 7_752_869_376, opt67, True),
        t5("blip2-flan-t5-xl", 3_942_446_592, xl, False),
        t5("blip2-flan-t5-xl-coco", 3_942_446_592, xl, True),
        t5("blip2-flan-t5-xxl", 12_229_596_672, xxl, False),
        match("blip2-itm-vit-g", False),
        match("blip2-itm-vit-g-coco", True),
    ]


def _embedded(name: str, kind: Literal["generate", "match"], family: Literal["opt", "t5", "bert"]) -> Preset:
    preset = Preset(name, None, kind, 0, 0, 0, 64, family, None, SCENES_LICENSE)
    weights = preset.folder / "model.safetensors" if preset.folder else None
    if weights is None or not weights.is_file():
        return preset
    with weights.open("rb") as file:  # the header alone: 8 bytes of length, then JSON
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return replace(preset, parameters=sum(math.prod(tensor["shape"]) for tensor in header.values()))


EMBEDDED = ("scenes-itm", "scenes-opt", "scenes-flan-t5")
DEFAULT = "scenes-opt"
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        _embedded("scenes-opt", "generate", "opt"),
        _embedded("scenes-flan-t5", "generate", "t5"),
        _embedded("scenes-itm", "match", "bert"),
        *_released(),
    ]
}


def resolve(name: str) -> Preset:
    """The preset of that name, with or without the organization in front; case does not matter.

    Raises:
        ValueError: no such preset; the message holds the nearest names.
    """
    wanted = name.strip().lower().removeprefix(f"{ORGANIZATION.lower()}/")
    for preset in PRESETS.values():
        if wanted == preset.name:
            return preset
    raise ValueError(f"unknown model {name!r}. {suggestions(name)}")


def find_preset(name: str) -> Preset | None:
    """The preset that `blip2.load` would take; a folder of that name goes before."""
    if Path(name).expanduser().is_dir():
        return None
    try:
        return resolve(name)
    except ValueError:
        return None


def suggestions(name: str) -> str:
    """One sentence with the names nearest to `name`, or all of them."""
    bare = name.strip().lower().rpartition("/")[2]
    close = difflib.get_close_matches(bare, PRESETS, n=3, cutoff=0.5)
    if not close:
        close = [preset for preset in PRESETS if bare and bare in preset]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known models: {', '.join(PRESETS)}; a folder or a Hub id (owner/name) will do as well."
