"""Find pictures by a text or by a picture: the nearest by ITC, the best of them by ITM (Sec. 4.4).

A text is compared with the closest query of each picture (`Blip2Representation.score`, head "itc"). As in the
paper's retrieval, the nearest may then be looked at again, together with the text, and are put in the order
of match logit + cosine; the others come after them. A picture finds those whose queries point its way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from blip2.checkpoint import Loaded
from blip2.errors import ImageError, PromptError
from blip2.pictures import open_picture
from blip2.representation import Blip2Representation
from blip2.search.vectors import SearchError, Vectors, mean, nearest

OPENED = 8  # pictures at a time, where they are looked at again


class Collection(Protocol):
    """What is searched: a `blip2.search.store.Index`, or pictures in memory."""

    @property
    def vectors(self) -> Vectors:
        """Of N rows."""

    @property
    def alive(self) -> np.ndarray:
        """Bool (N,): the rows that count."""

    @property
    def images(self) -> Mapping[int, Sequence[str]]:
        """Names of the pictures that a row is of; more than one where files are the same."""

    def path(self, image: str) -> Path:
        """A picture's file."""


@dataclass(frozen=True)
class Found:
    """A picture that was found.

    Attributes:
        image: its name in the collection.
        path: its file.
        score: what it is ranked by: its cosine; or match logit + cosine where it was looked at again.
        cosine: by ITC, in [-1, 1].
        match: probability that the text fits it (ITM); None where it was not looked at again.
        reason: why it could not be, though it should; it comes after those that were.
    """

    image: str
    path: Path
    score: float
    cosine: float
    match: float | None = None
    reason: str = ""


def search(
    loaded: Loaded,
    collection: Collection,
    query: str | Image.Image,
    k: int = 10,
    *,
    rerank: int = 0,
    force: bool = False,
) -> list[Found]:
    """The k pictures that fit a query best, the best first.

    Args:
        loaded: the stage-1 checkpoint that made the collection's vectors.
        collection: what to search.
        query: a text, or a picture.
        k: how many.
        rerank: look at so many of the nearest again, with ITM; for texts alone.
        force: take a picture, too, of a kind that the model does not know.

    Raises:
        PromptError: the text is empty or too long.
        SearchError: the numbers make no sense, or the collection is another model's.
        UnknownPictureError: the model does not know the picture's kind.
    """
    if k < 1 or rerank < 0:
        raise SearchError(
            f"{k} pictures, {rerank} of them looked at again: 1 or more, and 0 or more, are allowed"
        )
    if rerank and not isinstance(query, str):
        raise SearchError("ITM compares pictures with texts: a picture as a query is not reranked")
    wanted, vectors = max(k, rerank), collection.vectors
    if isinstance(query, str):
        rows = nearest(vectors.features, text_query(loaded, query), wanted, collection.alive)
    else:
        asked = picture_query(loaded, query, force)
        rows = nearest(vectors.means[:, None], asked, wanted, collection.alive)
    found = [
        Found(image, collection.path(image), cosine, cosine)
        for row, cosine in rows
        for image in collection.images[row]
    ][:wanted]
    if rerank:
        assert isinstance(query, str)
        again = [_matched(loaded, query, part) for part in _parts(found[:rerank])]
        looked = sorted(
            (one for part in again for one in part), key=lambda one: (bool(one.reason), -one.score)
        )
        found = [*looked, *found[rerank:]]
    return found[:k]


@torch.no_grad()
def text_query(loaded: Loaded, text: str) -> np.ndarray:
    """What a text looks for: float32 (E,), unit length.

    Raises:
        PromptError: it is empty or too long.
    """
    assert isinstance(loaded.model, Blip2Representation)
    if not text.strip():
        raise PromptError("the query is empty: say what is in the pictures that you look for")
    return loaded.model.text_feats(**_tokens(loaded, text))[0].cpu().numpy()


@torch.no_grad()
def picture_query(loaded: Loaded, image: Image.Image, force: bool = False) -> np.ndarray:
    """What a picture looks for: float32 (E,), unit length.

    Raises:
        UnknownPictureError: the model does not know its kind.
    """
    assert isinstance(loaded.model, Blip2Representation)
    seen = loaded.model.encode_image(loaded.processor.images(image).to(loaded.device))
    if not force:
        loaded.check_known(seen)
    assert seen.query_output is not None
    return mean(loaded.model.image_feats(seen.query_output))[0].cpu().numpy()


def _tokens(loaded: Loaded, text: str) -> dict[str, torch.Tensor]:
    return {name: value.to(loaded.device) for name, value in loaded.processor.text([text]).items()}


def _parts(found: list[Found]) -> list[list[Found]]:
    return [found[start : start + OPENED] for start in range(0, len(found), OPENED)]


@torch.no_grad()
def _matched(loaded: Loaded, text: str, found: list[Found]) -> list[Found]:
    """The same pictures with their match; those that cannot be opened any more with the reason."""
    assert isinstance(loaded.model, Blip2Representation)
    pixel_values, opened, closed = [], [], []
    for one in found:
        try:
            pixel_values.append(loaded.processor.images(open_picture(one.image, one.path)))
            opened.append(one)
        except ImageError as error:
            closed.append(replace(one, reason=str(error)))
    if not opened:
        return closed
    seen = loaded.model.encode_image(torch.cat(pixel_values).to(loaded.device))
    logits = loaded.model.match_logits(seen, **_tokens(loaded, text))[:, 0].float()  # (B, 2)
    looked = [
        replace(one, score=logit + one.cosine, match=match)
        for one, logit, match in zip(
            opened, logits[:, 1].tolist(), logits.softmax(-1)[:, 1].tolist(), strict=True
        )
    ]
    return [*looked, *closed]
