"""What CapFilt does to one shard: captions, ranking, the records that are written, and its report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from blip2.bulk.store import Store
from blip2.bulk.tars import ShardError, ShardWriter, index
from blip2.errors import CheckpointError
from blip2.presets import PRECISIONS
from train.capfilt.models import (
    CapFiltError,
    Captioner,
    Scorer,
    load_captioner,
    load_scorer,
    preset_prompt,
)
from train.capfilt.sampling import Sampling, chances
from train.capfilt.shards import Item, Samples, batches
from train.data.transforms import clean_caption

COUNTS = ("images", "texts_kept", "candidates", "with_original", "original_kept", "original_best")


@dataclass(frozen=True)
class Settings:
    """What to read, by which models, and how to spread the work; the defaults are BLIP-2's."""

    input: tyro.conf.Positional[str]
    """Folder of image-text tar shards (folders in it included), or an fsspec address such as s3://bucket/x."""
    output: tyro.conf.Positional[str]
    """Where the shards go, under the same names."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """A stage-2 checkpoint (name, folder, Hub id), or a BLIP, GIT or encoder-decoder of transformers."""
    scorer: str = "openai/clip-vit-large-patch14"
    """A stage-1 checkpoint, compared by ITC, or a CLIP or SigLIP of transformers."""
    captions: int = 10
    """Synthetic captions of each image."""
    keep: int = 2
    """How many texts are kept of these and the original."""
    top_p: float = 0.9
    """Probability mass that captions are sampled from."""
    max_new_tokens: int = 30
    """Length of a caption at most, tokens."""
    prompt: str | None = None
    """What captions go on from; by default what the checkpoint was tuned on, if anything."""
    precision: str = "auto"
    """Of both models, as `blip2.load` takes it; "auto" is float16 for the scorer on a GPU."""
    seed: int = 42
    """Of the sampling."""
    batch_size: int = 32
    """Images at a time; the captioner decodes so many times `captions` rows."""
    workers: int = 2
    """Decoding processes of each actor; 0: it decodes by itself."""
    actors: int | None = None
    """Copies of the models; by default as many as the GPUs (or, without any, CPU cores) allow. 0: no Ray."""
    num_gpus_per_actor: float | None = None
    """May be a fraction. By default 1 where there are GPUs, else 0."""
    address: str | None = None
    """Of a running Ray cluster, or "auto"; by default $RAY_ADDRESS, and without it Ray on this machine."""

    def __post_init__(self) -> None:
        allowed = {
            "captions": (1 <= self.captions <= 100, "1 to 100"),
            "keep": (1 <= self.keep <= self.captions + 1, f"1 to captions + 1 = {self.captions + 1}"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "precision": (self.precision in ("auto", *PRECISIONS), ", ".join(("auto", *PRECISIONS))),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "workers": (self.workers >= 0, "0 or more"),
            "actors": (self.actors is None or self.actors >= 0, "0 or more"),
            "num_gpus_per_actor": ((self.num_gpus_per_actor or 0) >= 0, "0 or more"),
        }
        for name, (fine, values) in allowed.items():
            if not fine:
                raise CapFiltError(f"{name} is {getattr(self, name)}; allowed: {values}")

    def sampling(self) -> Sampling:
        """How captions are drawn."""
        prompt = preset_prompt(self.captioner) if self.prompt is None else self.prompt
        return Sampling(self.top_p, self.max_new_tokens, prompt)


# ---------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Candidate:
    """A text that may be kept, and whether it came with the image."""

    text: str
    original: bool


def candidates(originals: Sequence[str], synthetic: Sequence[str]) -> list[Candidate]:
    """Texts to rank, each once; texts that training cleans to the same are the same, originals go before."""
    found: dict[str, Candidate] = {}
    for texts, original in ((originals, True), (synthetic, False)):
        for text in texts:
            if cleaned := clean_caption(text).strip():
                found.setdefault(cleaned, Candidate(text.strip(), original))
    return list(found.values())


def best(similarities: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` highest, best first; of equal ones the earlier."""
    if not np.isfinite(similarities).all():
        raise FloatingPointError("a similarity is not finite: choose another --precision, such as float32")
    return sorted(range(len(similarities)), key=lambda row: -similarities[row])[:keep]


# ---------------------------------------------------------------- one shard


class Filter:
    """Both models, and what takes a shard through them."""

    def __init__(self, settings: Settings, device: str = "auto"):
        self.settings = settings
        self.source, self.sink = Store(settings.input), Store(settings.output)
        self.captioner: Captioner = load_captioner(
            settings.captioner, device, settings.precision, settings.sampling()
        )
        self.scorer: Scorer = load_scorer(settings.scorer, device, settings.precision)

    def shard(self, name: str) -> dict[str, Any]:
        """Make one shard of the output, whatever is there; returns its report, see `summarize`."""
        start = time.perf_counter()
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        sums = dict.fromkeys(("original", "kept_beside_original", "kept"), 0.0)
        try:
            with self.source.reading(name) as path:
                entries = index(path)
                samples = Samples(path, entries, (self.captioner.preprocess, self.scorer.preprocess))
                with self.sink.writing(name) as part:
                    writer = ShardWriter(part)
                    for items in batches(samples, self.settings.batch_size, self.settings.workers):
                        dropped.update(item.dropped for item in items if item.dropped)
                        sound = [item for item in items if not item.dropped]
                        for item, record in self.records(name, sound):
                            if record is None:
                                dropped["no caption"] += 1
                                continue
                            text = json.dumps({**item.metadata, **record}, ensure_ascii=False)
                            writer.add(item.key, {item.extension: item.image, "json": text.encode()})
                            _count(record, counts, sums)
                    writer.close()
                    if not counts["images"]:
                        raise ShardError(f"holds no usable sample: {dict(dropped)}")
        except ShardError as error:
            return {"shard": name, "unreadable": str(error)}
        report = {
            "shard": name,
            "samples": len(entries),
            **{key: counts[key] for key in COUNTS},
            "dropped": dict(sorted(dropped.items())),
            "similarity_sums": {key: round(value, 6) for key, value in sums.items()},
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.sink.write_json(marker(name), report)
        return report

    def records(self, shard: str, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any] | None]]:
        """What the json of each sound sample of a batch gets; None where there is no text at all."""
        if not items:
            return
        s = self.settings
        pixels = [torch.from_numpy(np.stack(own)) for own in zip(*(i.pixels for i in items), strict=True)]
        drawn = chances(s.seed, [f"{shard} {item.key}" for item in items], s.captions, s.max_new_tokens)
        synthetic = self.captioner.captions(pixels[0], drawn)
        ranked = [candidates(i.originals, new) for i, new in zip(items, synthetic, strict=True)]
        some = [row for row, texts in enumerate(ranked) if texts]
        found = self.scorer.similarities(pixels[1][some], [[c.text for c in ranked[row]] for row in some])
        similarities = dict(zip(some, found, strict=True))
        for row, item in enumerate(items):
            yield item, self._record(ranked[row], similarities[row]) if row in similarities else None

    def _record(self, texts: Sequence[Candidate], similarities: Sequence[float]) -> dict[str, Any]:
        rounded = [round(value, 5) for value in similarities]
        kept = best(rounded, self.settings.keep)
        first = next((row for row, candidate in enumerate(texts) if candidate.original), None)
        return {
            "captions": [texts[row].text for row in kept],
            "capfilt": {
                "similarity": [rounded[row] for row in kept],
                "original": [texts[row].original for row in kept],
                "original_caption": None if first is None else texts[first].text,
                "original_similarity": None if first is None else rounded[first],
                "candidates": len(texts),
                "captioner": _label(self.settings.captioner),
                "scorer": _label(self.settings.scorer),
            },
        }


def _label(model: str) -> str:
    """A model's name in records that others read: of a folder its own name."""
    return Path(model).name if Path(model).is_absolute() else model


class Worker:
    """A filter as Ray Data wants an actor: called with names of shards, it loads the models at the first.

    What ends a run (a full disk, too little memory, a model that cannot be had) comes back as a report that
    says so, for the process that started the run to tell.
    """

    def __init__(self, settings: Settings, device: str = "auto"):
        self.settings, self.device = settings, device
        self.filter: Filter | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """unit: names of shards -> report: one JSON each."""
        return {"report": [json.dumps(self.report(str(name))) for name in batch["unit"]]}

    def report(self, name: str) -> dict[str, Any]:
        """As `Filter.shard`, or shard and failed: what ends the run."""
        try:
            self.filter = self.filter or Filter(self.settings, self.device)
            return self.filter.shard(name)
        except torch.OutOfMemoryError as error:
            return {"shard": name, "failed": f"{error}; lower --batch-size (now {self.settings.batch_size})"}
        except (OSError, FloatingPointError, CapFiltError, CheckpointError) as error:
            return {"shard": name, "failed": str(error)}


def _count(record: Mapping[str, Any], counts: Counter[str], sums: dict[str, float]) -> None:
    facts = record["capfilt"]
    mean = sum(facts["similarity"]) / len(facts["similarity"])
    has_original = facts["original_similarity"] is not None
    counts["images"] += 1
    counts["texts_kept"] += len(record["captions"])
    counts["candidates"] += facts["candidates"]
    counts["with_original"] += has_original
    counts["original_kept"] += any(facts["original"])
    counts["original_best"] += facts["original"][0]
    sums["kept"] += mean
    if has_original:
        sums["original"] += facts["original_similarity"]
        sums["kept_beside_original"] += mean


def marker(shard: str) -> str:
    """The file that says that a shard is done: its report."""
    return shard.removesuffix(".tar") + ".capfilt.json"


def summarize(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over all shards that are done.

    Returns:
        Counts; dropped, by kind; share of images whose original is among the kept texts, or the best;
        similarity_before: mean of the originals; similarity_after: mean of the kept texts of the same
        images; images_per_second_per_actor: the models' loading left out.
    """
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    seconds = 0.0
    shards = 0
    for report in reports:
        shards += 1
        counts.update({key: report[key] for key in ("samples", *COUNTS)})
        dropped.update(report["dropped"])
        sums.update(report["similarity_sums"])
        seconds += report["seconds"]

    def share(part: float, whole: float) -> float | None:
        return round(part / whole, 5) if whole else None

    return {
        "shards": shards,
        **{key: counts[key] for key in ("samples", *COUNTS)},
        "dropped": dict(sorted(dropped.items())),
        "share_original_kept": share(counts["original_kept"], counts["with_original"]),
        "share_original_best": share(counts["original_best"], counts["with_original"]),
        "similarity_before": share(sums["original"], counts["with_original"]),
        "similarity_after": share(sums["kept_beside_original"], counts["with_original"]),
        "similarity_kept": share(sums["kept"], counts["images"]),
        "images_per_second_per_actor": share(counts["samples"], seconds),
    }
