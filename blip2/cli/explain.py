"""`explain`: an answer, how sure each word of it is, and a map of the picture."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from blip2 import explain
from blip2.checkpoint import Loaded
from blip2.cli.console import Console, UsageError, table
from blip2.cli.models import (
    about,
    check_question,
    encode,
    framed,
    generation,
    load_model,
    model_name,
    note_unknown_words,
)
from blip2.generation import Generation, generate
from blip2.images import open_image
from blip2.model import Blip2
from blip2.vision import ImageFeatures


def run(args: argparse.Namespace, console: Console) -> int:
    """Answer a question, and explain the answer."""
    settings = generation(args, Generation())
    check_question(args)
    if args.out and Path(args.out).suffix.lower() != ".png":
        raise UsageError(f"--out is {args.out!r}; give a .png file")
    picture = open_image(args.image, allow_url=True)
    loaded = load_model(model_name(args, "generate", console), "generate", args, console)
    assert isinstance(loaded.model, Blip2)
    features = encode(loaded, picture, args.image, args)
    note_unknown_words(loaded.processor, args.question, loaded.name, console)
    prompt = framed(loaded, features, args)
    [[answer, *_]] = generate(
        loaded.model, loaded.processor, features, prompt, settings, questions=[args.question]
    )
    tokens = explain.token_probabilities(
        loaded.model, loaded.processor, features, prompt, answer, args.question
    )
    lines = [
        (f"{token.probability:.3f}", token.text.strip(), ", ".join(f"{t} {p:.3f}" for t, p in token.others))
        for token in tokens
    ]
    document = about(loaded, settings) | {
        "image": args.image,
        "question": args.question,
        "prompt": prompt,
        "answer": answer,
        "tokens": [vars(token) for token in tokens],
    }
    if args.out:
        weights = _map(loaded, picture, features, prompt, answer, args)
        explain.overlay(picture, weights).save(args.out)
        document |= {"map": weights.tolist(), "out": args.out}
    console.show(document, [answer, "", *table(("probability", "token", "otherwise"), lines)])
    return 0


def _map(
    loaded: Loaded,
    picture: Image.Image,
    features: ImageFeatures,
    prompt: str,
    answer: str,
    args: argparse.Namespace,
) -> torch.Tensor:
    """Float (rows, columns), as --map wants it.

    Raises:
        UsageError: a grid, layer or query that is not there.
    """
    assert isinstance(loaded.model, Blip2)
    try:
        if args.map == "occlusion":
            return explain.occlusion(
                loaded.model, loaded.processor, picture, prompt, answer, args.question, args.grid
            )
        question = loaded.processor.question(args.question)
        attention = explain.query_attention(
            loaded.model, features, {name: ids.to(loaded.device) for name, ids in question.items()}
        )
        return explain.attention_map(attention, -1 if args.layer is None else args.layer, args.query)[0]
    except ValueError as error:
        raise UsageError(str(error)) from error
