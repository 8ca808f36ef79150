"""What a bulk run is to do. Without torch, so that the command line answers at once."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from blip2.pictures import Captioning
from blip2.sidecars import SIDECARS

Task = Literal["caption", "embed", "score"]
TASKS = ("caption", "embed", "score")
FORMATS = (*SIDECARS, "jsonl", "parquet", "shards")
FITTING = {"caption": FORMATS, "embed": ("jsonl", "parquet"), "score": ("jsonl", "parquet", "shards")}
BATCH = {"caption": 32, "embed": 64, "score": 64}
HEADS = ("itm", "itc")
DTYPES = ("float16", "float32")


class BulkError(ValueError):
    """What a run cannot work with: a source, a destination, a setting. The message says what to change."""


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        address: a folder, a glob, a tar, parquet or text file, local or in a store; or "dataset:NAME" of
            Hugging Face.
        image_column: of tables; by default the first that looks like pictures.
        text_column: of tables; by default the first of `caption`, `captions`, `text`, `texts`.
        key_column: of tables, what rows go by; by default where they stand.
        split: of a Hugging Face dataset.
        subset: likewise, its configuration.
    """

    address: str
    image_column: str | None = None
    text_column: str | None = None
    key_column: str | None = None
    split: str = "train"
    subset: str | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint and how it is loaded; as `blip2.load` takes it."""

    name: str
    precision: str = "auto"
    quantize_vision: bool = False
    adapter: str | None = None
    encoder: str | None = None
    check_memory: bool = True

    def loading(self) -> dict[str, Any]:
        """Arguments of `blip2.load`."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "encoder")}


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        task: "caption", "embed" or "score".
        source: what is read.
        out: where results go: a file, or a folder of files.
        to: in which form, of `FORMATS`.
        model: a stage-2 checkpoint for captions, a stage-1 checkpoint else.
        captioning: of captions; its prompts are the model's own unless `prompted`.
        prompted: whether captioning says what captions go on from.
        scorer: a stage-1 checkpoint that scores the captions.
        texts_only: embed texts, not pictures.
        texts: score every picture against these, not against its own.
        heads: scores wanted, of `HEADS`.
        dtype: of embeddings, of `DTYPES`.
        force: pictures of a kind that the model does not know, too.
        batch_size: rows at once; halved where memory does not suffice.
        per_file: rows of a unit and so of a result file, where the source does not say; None: by its size.
        workers: actors that hold the model; None: one a GPU, or as the cores allow. 0: this process, no Ray.
        device: of `workers` 0; actors take their GPU, or the CPU.
        address: of a running Ray cluster.
    """

    task: Task
    source: Source
    out: str
    to: str
    model: Model
    captioning: Captioning = field(default_factory=Captioning)
    prompted: bool = False
    scorer: str | None = None
    texts_only: bool = False
    texts: tuple[str, ...] = ()
    heads: tuple[str, ...] = HEADS
    dtype: str = "float16"
    force: bool = False
    batch_size: int = 32
    per_file: int | None = None
    workers: int | None = None
    device: str = "auto"
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            BulkError: naming the value seen and the values allowed.
        """
        allowed = {
            "task": (self.task in TASKS, ", ".join(TASKS)),
            "to": (self.to in FITTING.get(self.task, ()), ", ".join(FITTING.get(self.task, ()))),
            "dtype": (self.dtype in DTYPES, ", ".join(DTYPES)),
            "heads": (bool(self.heads) and set(self.heads) <= set(HEADS), ", ".join(HEADS)),
            "texts": (all(text.strip() for text in self.texts), "texts that are not empty"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "per_file": (self.per_file is None or self.per_file >= 1, "1 or more"),
            "workers": (self.workers is None or self.workers >= 0, "0 or more"),
        }
        for name, (fine, values) in allowed.items():
            if not fine:
                raise BulkError(f"{name} is {getattr(self, name)!r}; allowed for {self.task}: {values}")
        if self.texts_only and self.task != "embed":
            raise BulkError(f"texts alone can be embedded, not put to {self.task}")

    def lasting(self) -> dict[str, Any]:
        """What a destination is made with, as JSON has it; a run goes on with the same alone."""
        made = asdict(self)
        for name in ("per_file", "workers", "device", "address", "out"):
            del made[name]
        del made["model"]["check_memory"]
        batch = made.pop("batch_size")
        for generation in ("generation", "answers"):
            if self.task == "caption" and made["captioning"][generation]["method"] == "nucleus":
                made["batch_size"] = batch  # chance is drawn for a batch at once
        if self.task != "caption":
            del made["captioning"]
        else:
            del made["captioning"]["batch_size"]
        return made
