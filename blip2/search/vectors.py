"""Vectors of many pictures, and which of them are nearest to a query: ITC over a whole collection.

N rows, Q queries, E contrastive width. A picture is as close to a text as the closest of its queries (Sec.
3.2), whichever that is, so all Q vectors of a picture are kept, in float16. The search is exact: no picture
is missed, and scores are computed in float32 at last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPARE = 16  # rows looked at beyond those wanted: float16 may swap neighbors


class SearchError(ValueError):
    """An index that cannot be used, or a search that cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Vectors:
    """What is kept of N pictures.

    Attributes:
        features: float16 (N, Q, E), `Blip2Representation.image_feats`.
        means: float16 (N, E), the direction in which a picture's queries point together.
    """

    features: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, image_feats: Tensor) -> "Vectors":
        """Vectors of pictures, from image_feats: float (N, Q, E)."""
        return cls(_half(image_feats), _half(mean(image_feats)))

    @classmethod
    def join(cls, parts: Sequence["Vectors"]) -> "Vectors":
        """The rows of several, one after another."""
        return cls(
            np.concatenate([part.features for part in parts]), np.concatenate([part.means for part in parts])
        )

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> "Vectors":
        """Some rows, as of a numpy array's first axis."""
        return Vectors(self.features[rows], self.means[rows])


def mean(image_feats: Tensor) -> Tensor:
    """image_feats: float (..., Q, E) -> float32 (..., E), unit length: what stands for a picture as a query.

    The paper compares no pictures. Of four ways tried on drawn scenes, mirrored on another ground, this found
    the same things most often (`python tests/search_quality.py`).
    """
    return F.normalize(image_feats.float().mean(-2), dim=-1)


def _half(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy().astype(np.float16)


def nearest(
    rows: np.ndarray, query: np.ndarray, k: int, alive: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """The k rows nearest to a query, the nearest first, and the cosine of each.

    Exact: the count nearest vectors are of at least count / M rows, each with its best one, so that the rows
    they are of are the nearest rows.

    Args:
        rows: float16 (N, M, E), unit vectors; a row is as near as the nearest of its M.
        query: float32 (E,), unit length.
        k: how many.
        alive: bool (N,), the rows that count; None: all.

    Raises:
        SearchError: the library is not installed.
    """
    try:
        from usearch.index import MetricKind, search
    except ImportError as error:
        raise SearchError('searching takes a package more: pip install "usearch>=2.26"') from error
    many, vectors = rows.shape[1], rows.reshape(-1, rows.shape[2])
    k = min(k, len(rows) if alive is None else int(alive.sum()))
    if k < 1:
        return []
    half, threads, wanted = query.astype(np.float16), torch.get_num_threads(), k + SPARE
    count = min(len(vectors), many * wanted)
    while True:
        found = search(vectors, half, count, MetricKind.IP, exact=True, threads=threads)
        first = dict.fromkeys((np.asarray(found.keys) // many).tolist())  # in order, each row once
        near = [row for row in first if alive is None or alive[row]][:wanted]
        if len(near) == wanted or count == len(vectors):
            break
        count = min(len(vectors), 4 * count)  # many of the nearest are dead
    exact = (rows[near].astype(np.float32) @ query.astype(np.float32)).max(1).clip(-1, 1)
    best = sorted(zip(near, exact.tolist(), strict=True), key=lambda one: (-one[1], one[0]))
    return best[:k]
