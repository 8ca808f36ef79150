"""Figures of searching: what is found on the drawn world, and how long it takes.

    python tests/search_quality.py [--scenes 1000] [--pictures 100000]

Recalls are of test scenes of which no two are told alike, looked for by their captions, through an index on
the disk. Times are medians of 20 queries over random vectors, in a file that was read before.
"""

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blip2.checkpoint import Loaded, load
from blip2.search import Index, index_folder, search
from blip2.search.query import text_query
from blip2.search.vectors import mean, nearest
from train.scenes.evaluate import gallery
from train.scenes.text import clear_pairs, full_name, relation_caption
from train.scenes.world import Scene, render, sample

RERANKED = 16
TRIES = 20
ASKED = 300
SHAPES = {"scenes-itm": (16, 96), "blip2-itm-vit-g": (32, 256)}  # Q and E


def recall(ranks: list[int | None], k: int) -> float:
    """The share of queries whose own picture is among the first k."""
    return sum(rank is not None and rank < k for rank in ranks) / len(ranks)


def recalls(loaded: Loaded, index: Index, texts: list[str], rerank: int) -> dict[str, float]:
    """recall@1, @5 and @10 of texts, each of the picture that is named after its place."""
    ranks = []
    for place, text in enumerate(texts):
        names = [one.image for one in search(loaded, index, text, k=10, rerank=rerank)]
        own = f"{place:05}.png"
        ranks.append(names.index(own) if own in names else None)
    return {f"R@{k}": recall(ranks, k) for k in (1, 5, 10)}


def one_thing(scene: Scene) -> set[str]:
    """Texts that name one thing of a scene."""
    return {f"a {full_name(thing)}" for thing in scene.things}


def two_things(scene: Scene) -> set[str]:
    """Texts that say where one thing of a scene is, seen from another."""
    return {relation_caption(*pair) for pair in clear_pairs(scene.things)}


def parts(loaded: Loaded, index: Index, shows: list[set[str]], rerank: int) -> dict[str, float]:
    """Of texts that tell a part of a picture: how often it is true of the first, of the first five, of any.

    Args:
        shows: the texts that are true of each picture; at most `ASKED` of them are looked for.
    """
    texts = sorted(set.union(*shows))
    asked = random.Random(0).sample(texts, min(ASKED, len(texts)))
    first, five = [], []
    for text in asked:
        found = [text in shows[int(one.image[:5])] for one in search(loaded, index, text, k=5, rerank=rerank)]
        first.append(found[0])
        five += found
    by_chance = statistics.mean(text in seen for text in asked for seen in shows)
    return {"P@1": statistics.mean(first), "P@5": statistics.mean(five), "by chance": by_chance}


def write(folder: Path, scenes: list[Scene], size: int) -> None:
    """Draw scenes into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, scene in enumerate(scenes):
        Image.fromarray(render(scene, size)).save(folder / f"{place:05}.png")


def twin(scene: Scene) -> Scene:
    """The same things, mirrored, on another ground."""
    other = sample(scene.seed % 10**9 + 10**6, "test")
    things = sorted((dataclasses.replace(t, x=1 - t.x) for t in scene.things), key=lambda thing: thing.x)
    return dataclasses.replace(other, things=tuple(things))


@torch.no_grad()
def by_picture(loaded: Loaded, scenes: list[Scene]) -> dict[str, float]:
    """recall@1 of scenes, looked for by their twins, by four ways to compare two pictures."""

    def feats(drawn: list[Scene]) -> torch.Tensor:
        parts = []
        for start in range(0, len(drawn), 50):
            pictures = [
                Image.fromarray(render(s, loaded.processor.image_size)) for s in drawn[start : start + 50]
            ]
            seen = loaded.model.encode_image(loaded.processor.images(pictures))
            parts.append(loaded.model.image_feats(seen.query_output))
        return torch.cat(parts)

    there, asked = feats(scenes), feats([twin(scene) for scene in scenes])
    ways = {"mean of the queries": mean(asked) @ mean(there).T}
    pairs = [torch.einsum("qe,npe->nqp", one, there) for one in asked]
    ways["closest two queries"] = torch.stack([pair.amax((1, 2)) for pair in pairs])
    ways["each query's closest"] = torch.stack([pair.amax(2).mean(1) for pair in pairs])
    ways["query by query"] = torch.stack([pair.diagonal(dim1=1, dim2=2).mean(1) for pair in pairs])
    own = torch.arange(len(scenes))
    return {name: (sim.argmax(1) == own).float().mean().item() for name, sim in ways.items()}


def query_seconds(folder: Path, pictures: int, queries: int, width: int, k: int = 10) -> float:
    """Seconds of a search among so many pictures' vectors on the disk; to encode the text comes on top."""
    generator = np.random.default_rng(0)
    path = folder / "features.f16"
    block = generator.standard_normal((min(5000, pictures), queries, width), dtype=np.float32)
    block /= np.linalg.norm(block, axis=-1, keepdims=True)
    with path.open("wb") as file:  # the same block again and again: what is in it takes no other time
        for start in range(0, pictures, len(block)):
            file.write(block[: pictures - start].astype(np.float16).tobytes())
    rows = np.memmap(path, np.float16, "r", shape=(pictures, queries, width))
    times = []
    for _ in range(TRIES + 1):
        query = generator.standard_normal(width, dtype=np.float32)
        query /= np.linalg.norm(query)
        start = time.perf_counter()
        assert len(nearest(rows, query, k, np.ones(pictures, bool))) == k
        times.append(time.perf_counter() - start)
    path.unlink()
    return statistics.median(times[1:])


def text_seconds(loaded: Loaded, text: str) -> float:
    """Seconds until a text is a vector."""
    times = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        text_query(loaded, text)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--only", choices=("quality", "time"))
    options = parser.parse_args()
    loaded = load("scenes-itm")
    print(f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "time":
            scenes, texts = gallery(options.scenes, "test")
            write(folder / "scenes", scenes, loaded.processor.image_size)
            for run in ("first run", "again"):
                start = time.perf_counter()
                done = index_folder(loaded, folder / "scenes", force=True)
                print(
                    f"{run}: {done.encoded} of {done.pictures} encoded in {time.perf_counter() - start:.2f} s"
                )
            index = Index(folder / "scenes")
            for rerank in (0, RERANKED):
                start = time.perf_counter()
                found = recalls(loaded, index, texts, rerank)
                took = (time.perf_counter() - start) / len(texts)
                line = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(
                    f"{f'ITC, ITM on {rerank}' if rerank else 'ITC'}: {line}  ({1000 * took:.0f} ms a query)"
                )
            for told, texts_of in {"one thing named": one_thing, "two things, where": two_things}.items():
                shows = [texts_of(scene) for scene in scenes]
                for rerank in (0, RERANKED):
                    found = parts(loaded, index, shows, rerank)
                    line = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                    print(f"{told}, ITM on {rerank}: {line}")
            for way, value in by_picture(loaded, scenes[:500]).items():
                print(f"by a picture, {way}: R@1 {value:.3f} of {min(500, len(scenes))}")
        if options.only != "quality":
            print(f"a text to its vector, scenes-itm: {1000 * text_seconds(loaded, 'a red circle'):.1f} ms")
            for model, (queries, width) in SHAPES.items():
                seconds = query_seconds(folder, options.pictures, queries, width)
                vectors = f"{options.pictures:,} pictures, {options.pictures * queries:,} vectors of {width}"
                print(f"{vectors} ({model}): {1000 * seconds:.0f} ms a query")


if __name__ == "__main__":
    main()
