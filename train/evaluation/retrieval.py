"""Image-text retrieval (Sec. 4.4): ITC over all pairs, ITM on the best k of each query, both ways.

A picture is as close to a text as the closest of its queries. The k texts closest to a picture, and the k
pictures closest to a text, are scored by ITM too, and ranked by match logit + cosine; the others come after
them, by cosine. Pairs are scored picture by picture, both directions at once, so that a picture's keys and
values are projected once for all its texts. Texts are cleaned and cut after 35 word pieces.

Memory, for N pictures and M texts, 5,000 and 25,000 in COCO: a process holds N x M cosines (0.5 GB) and the
pictures' features (Q x E float32 each, 0.16 GB); the one that ranks adds two such matrices and all pairs
(2.7 GB in all without the model, measured). Of the pictures' image tokens, which ITM reads, `keep_gb` are
kept; the rest is encoded again (at 364 pixels a picture has 1.9 MB of them in 16 bits, 5,000 have 9.5 GB).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from blip2.checkpoint import Loaded
from blip2.representation import Blip2Representation
from blip2.vision import ImageFeatures
from train import distributed
from train.data.shards import write_atomically
from train.data.transforms import clean_caption
from train.evaluation import Figures
from train.evaluation.annotations import DataSet, Example
from train.evaluation.metrics import recalls
from train.evaluation.predictions import (
    Predictions,
    Record,
    ResultsError,
    Stop,
    mine,
    opened_ahead,
    progress,
    stopped,
)

TEXT_BATCH = 256  # texts read at a time
SIM_BATCH = 32  # pictures compared with all texts at a time
FAR = 100.0  # what candidates that ITM did not see stay behind the others
FEATURES, PAIRS = "features", "pairs"


@dataclass
class Retrieval:
    """Retrieval among the pictures of a data set and all their captions.

    Args:
        data: a picture an example, its captions as references.
        loaded: stage 1.
        settings: the resolved ones of a task: clean, text_length, top_k.
        folder: of the results; holds features/ and pairs*.jsonl until it is done.
        batch_size: pictures at a time.
        keep_gb: of image tokens in memory, 10^9 bytes a process.
        stop: asked before every batch.
    """

    data: DataSet
    loaded: Loaded
    settings: Mapping[str, Any]
    folder: Path
    batch_size: int
    keep_gb: float
    stop: Stop
    kept: dict[int, ImageFeatures] = field(default_factory=dict)
    kept_bytes: float = 0

    def __post_init__(self) -> None:
        """Read the texts."""
        clean = clean_caption if self.settings["clean"] else str
        self.texts = [text for one in self.data.examples for text in one.references]
        self.own = [row for row, one in enumerate(self.data.examples) for _ in one.references]
        self.right: list[list[int]] = [[] for _ in self.data.examples]
        for text, row in enumerate(self.own):
            self.right[row].append(text)
        length, processor = self.settings["text_length"], self.loaded.processor
        tokens = processor.text([clean(text) for text in self.texts], max_length=length)
        self.tokens = {name: value.to(self.loaded.device) for name, value in tokens.items()}
        self.starts = range(0, len(self.data.examples), self.batch_size)

    @property
    def model(self) -> Blip2Representation:
        """The model."""
        assert isinstance(self.loaded.model, Blip2Representation)
        return self.loaded.model

    def run(self) -> tuple[list[Record], Figures] | None:
        """Records and figures, for process 0 to write; None where it was stopped.

        Raises:
            ResultsError: a picture cannot be opened.
        """
        images = self._image_feats()
        if stopped(self.stop) or images is None:
            return None
        # after all have written theirs; what is not there is computed
        image_feats = torch.cat([self._images(start) for start in self.starts])
        text_feats = torch.cat([self._texts(start) for start in range(0, len(self.texts), TEXT_BATCH)])
        cosines = self._compare(image_feats, text_feats)
        k = self.settings["top_k"]
        texts = cosines.topk(min(k, cosines.shape[1]), dim=1).indices  # (N, k)
        pictures = cosines.topk(min(k, len(cosines)), dim=0).indices  # (k, M)
        pairs = Predictions(self.folder, PAIRS)
        self._match(texts, pictures, pairs)
        if stopped(self.stop):
            return None
        return self._rank(cosines, texts, pictures, pairs) if distributed.rank() == 0 else ([], {})

    # --- features ---

    def _stored(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Features from a file in the results folder, or computed and put there; float32."""
        path = self.folder / FEATURES / f"{name}.safetensors"
        if path.exists():
            return load_file(path)["features"]
        features = compute().float().cpu().contiguous()
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, save({"features": features}))
        return features

    def _image_feats(self) -> bool | None:
        """This process's share of the features, pictures' and texts'; None where it was stopped."""
        for start in mine(range(0, len(self.texts), TEXT_BATCH)):
            self._texts(start)
        stored = self.folder / FEATURES
        left = [s for s in mine(self.starts) if not (stored / f"{self._name(s)}.safetensors").exists()]
        total = len(self.data.examples)
        going = distributed.world_size() * sum(len(self._batch(start)) for start in left)
        with progress("features", total, max(0, total - going), "picture") as bar:
            for start, pixels in self._opened(left):
                if self.stop():
                    return None
                self._stored(self._name(start), partial(self._encode, start, pixels))
                bar.update(min(len(pixels) * distributed.world_size(), max(0, bar.total - bar.n)))
        return True

    def _opened(self, starts: list[int]) -> Any:
        """Where batches start, and their pictures, float (B, 3, S, S)."""
        batches = [self._batch(start) for start in starts]
        for start, (_, opened) in zip(starts, opened_ahead(batches, self.data, self.loaded), strict=True):
            pixel_values = []
            for name, pixels in opened.items():
                if isinstance(pixels, str):
                    raise ResultsError(
                        f"{name}: {pixels} Retrieval takes a sound picture, or none: delete the file, and "
                        "--skip-missing does without"
                    )
                pixel_values.append(pixels)
            yield start, torch.cat(pixel_values)

    def _batch(self, start: int) -> list[Example]:
        return self.data.examples[start : start + self.batch_size]

    def _name(self, start: int) -> str:
        return f"images-{start}-{start + len(self._batch(start))}"

    def _images(self, start: int) -> Tensor:
        def compute() -> Tensor:
            [(_, pixels)] = self._opened([start])
            return self._encode(start, pixels)

        return self._stored(self._name(start), compute)

    @torch.no_grad()
    def _encode(self, start: int, pixels: Tensor) -> Tensor:
        """A batch's features, float (B, Q, E); its image tokens are kept while there is room."""
        image = self.model.encode_image(pixels.to(self.loaded.device))
        assert image.query_output is not None
        size = image.image_embeds.nbytes
        if self.kept_bytes + size <= self.keep_gb * 1e9:
            self.kept[start] = ImageFeatures(image.image_embeds.cpu())
            self.kept_bytes += size
        return self.model.image_feats(image.query_output)

    @torch.no_grad()
    def _texts(self, start: int) -> Tensor:
        rows = slice(start, start + TEXT_BATCH)
        ids, mask = self.tokens["input_ids"][rows], self.tokens["attention_mask"][rows]
        return self._stored(f"texts-{start}", lambda: self.model.text_feats(ids, mask))

    def _compare(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """Cosines of all pairs, float (N, M) on the host, in the same portions in every process."""
        texts = text_feats.to(self.loaded.device)
        rows = []
        for part in image_feats.split(SIM_BATCH):
            closeness = torch.einsum("iqe,ne->inq", part.to(self.loaded.device), texts)
            rows.append(closeness.amax(-1).cpu())
        return torch.cat(rows)

    # --- matching and ranking ---

    def _match(self, texts: Tensor, pictures: Tensor, pairs: Predictions) -> None:
        """ITM logits of this process's share of pairs, a record a picture: its texts, and their logits."""
        wanted = [set(row) for row in texts.tolist()]
        for text, rows in enumerate(pictures.T.tolist()):
            for row in rows:
                wanted[row].add(text)
        left = [
            start
            for start in mine(self.starts)
            if any(row not in pairs.done for row in range(start, start + len(self._batch(start))))
        ]
        again = self._opened([start for start in left if start not in self.kept])
        with progress("matching", len(self.data.examples), len(pairs.done), "picture") as bar:
            for start in left:
                if self.stop():
                    return
                if start in self.kept:
                    image = self.kept.pop(start).to(self.loaded.device)
                else:
                    _, pixels = next(again)
                    image = self._embeds(pixels)
                records = []
                for row in range(len(image)):
                    candidates = sorted(wanted[start + row])
                    picked = torch.tensor(candidates, device=self.loaded.device)
                    tokens = {name: value[picked] for name, value in self.tokens.items()}
                    logits = self.model.match_logits(image[row], **tokens)[0, :, 1]
                    records.append({"id": start + row, "texts": candidates, "match": logits.float().tolist()})
                pairs.add([record for record in records if record["id"] not in pairs.done])
                bar.update(min(len(records) * distributed.world_size(), max(0, bar.total - bar.n)))

    @torch.no_grad()
    def _embeds(self, pixels: Tensor) -> ImageFeatures:
        return ImageFeatures(self.model.image_embeds(pixels.to(self.loaded.device)))

    def _rank(
        self, cosines: Tensor, texts: Tensor, pictures: Tensor, pairs: Predictions
    ) -> tuple[list[Record], Figures]:
        """Recalls of both directions by ITC and by both scores, and a record of each query."""
        found = pairs.read()
        if lacking := len(self.data.examples) - len(found):
            raise ResultsError(f"{self.folder} lacks the pairs of {lacking} pictures: start again")
        both = cosines - FAR
        for record in found.values():
            row = record["id"]
            both[row, record["texts"]] = cosines[row, record["texts"]] + torch.tensor(record["match"])
        records: list[Record] = []
        figures: Figures = {}
        by_text: list[list[int]] = [[row] for row in self.own]
        for way, right in (("T", self.right), ("I", by_text)):
            itc = cosines if way == "T" else cosines.T
            scores = (cosines - FAR) if way == "T" else (cosines - FAR).T
            best = texts if way == "T" else pictures.T
            scores.scatter_(1, best, (both if way == "T" else both.T).gather(1, best))
            figures |= {f"{way}{name}": value for name, value in recalls(scores, right).items()}
            figures |= {f"ITC {way}{name}": value for name, value in recalls(itc, right).items()}
            for query, row in enumerate(scores):
                place = _rank_of(row, right[query])
                records.append(
                    self._record(way, query, int(row.argmax()))
                    | {
                        "rank": place,
                        "itc_rank": _rank_of(itc[query], right[query]),
                        "score": 1 / (1 + place),
                    }
                )
        order = [*(name for name in figures if not name.startswith("ITC")), *figures]
        return records, {name: figures[name] for name in dict.fromkeys(order)}

    def _record(self, way: str, query: int, found: int) -> Record:
        """What was found for a picture ("T"), or for a text ("I")."""
        examples = self.data.examples
        if way == "T":
            one = examples[query]
            return {
                "id": str(one.id),
                "image": one.image,
                "prediction": self.texts[found],
                "references": list(one.references),
            }
        row = self.own[query]
        return {
            "id": f"{examples[row].id}#{self.right[row].index(query)}",
            "image": examples[row].image,
            "question": self.texts[query],
            "prediction": examples[found].image,
            "references": [examples[row].image],
        }


def clean_up(folder: Path) -> None:
    """Remove what is of no use once the results are written."""
    Predictions(folder, PAIRS).remove_parts()
    shutil.rmtree(folder / FEATURES, ignore_errors=True)


def _rank_of(scores: Tensor, right: list[int]) -> int:
    """How many wrong candidates come before the best right one; equal ones count as before it."""
    best = scores[right].max()
    return int((scores >= best).sum() - (scores[right] >= best).sum())
