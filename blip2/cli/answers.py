"""`caption`, `ask` and `match`: pictures in, words out."""

import argparse
import os
from typing import Any

from blip2.checkpoint import Loaded
from blip2.cli import folder
from blip2.cli.console import Console, UsageError, table
from blip2.cli.models import (
    about,
    check_question,
    encode,
    framed,
    generation,
    load_model,
    model_name,
    named_preset,
    note_unknown_words,
)
from blip2.generation import Generation, generate
from blip2.images import ImageError, open_image
from blip2.model import Blip2
from blip2.novelty import UnknownPictureError
from blip2.processing import PromptError
from blip2.representation import Blip2Representation
from blip2.vision import ImageFeatures


def run(args: argparse.Namespace, console: Console) -> int:
    """Run one of these commands; returns the exit code."""
    commands = {"caption": caption, "ask": ask, "match": match}
    return commands[args.command](args, console)


def caption(args: argparse.Namespace, console: Console) -> int:
    """Captions for one or more pictures; one that cannot be read does not keep the others from theirs."""
    preset = named_preset(args)
    settings = generation(args, preset.captioning if preset else Generation.caption())
    if args.start_with is not None and args.prompt is not None:
        raise UsageError("--start-with is --prompt repeated in the output: give one of them")
    if any(os.path.isdir(source) for source in args.images):  # not Path: it takes "" for "."
        return folder.run(args, settings, console)
    folder.refuse_flags(args)
    several = len(args.images) > 1
    name = model_name(args, "generate", console, len(args.images))
    only = None if several else open_image(args.images[0], allow_url=True)  # fails before a model is loaded
    loaded = load_model(name, "generate", args, console)
    wanted = folder.captioning(args, settings, loaded)
    note_unknown_words(loaded.processor, wanted.prompt, loaded.name, console)

    results: list[dict[str, Any]] = []
    for source in console.progress(args.images, "image"):
        try:
            image = open_image(source, allow_url=True) if only is None else only
            features = encode(loaded, image, source, args)
        except (ImageError, UnknownPictureError) as error:
            console.error(str(error))
            results.append({"image": source, "error": str(error), **getattr(error, "facts", {})})
            continue
        captions = wanted.worded(_generate(loaded, features, wanted.prompt, settings))
        results.append({"image": source, "captions": captions})
        if not console.json:
            console.show({}, [f"{source}: {text}" if several else text for text in captions])
    if console.json:
        console.show(about(loaded, settings) | {"prompt": wanted.prompt, "results": results}, ())
    return int(any("error" in result for result in results))


def ask(args: argparse.Namespace, console: Console) -> int:
    """An answer about one picture."""
    settings = generation(args, Generation.answer())
    check_question(args)
    name = model_name(args, "generate", console)
    image = open_image(args.image, allow_url=True)
    loaded = load_model(name, "generate", args, console)
    assert isinstance(loaded.model, Blip2)
    features = encode(loaded, image, args.image, args)
    note_unknown_words(loaded.processor, args.question, loaded.name, console)
    prompt = framed(loaded, features, args)
    answers = _generate(loaded, features, prompt, settings)
    if not any(answers):
        console.note("the model answered with nothing")
    document = {"image": args.image, "question": args.question, "prompt": prompt, "answers": answers}
    console.show(about(loaded, settings) | document, answers)
    return 0


def match(args: argparse.Namespace, console: Console) -> int:
    """Probability that each text matches the picture (ITM), and their cosine similarity (ITC)."""
    if not all(text.strip() for text in args.texts):
        raise PromptError("a text is empty: say what may be in the picture")
    name = model_name(args, "match", console)
    image = open_image(args.image, allow_url=True)
    loaded = load_model(name, "match", args, console)
    assert isinstance(loaded.model, Blip2Representation)
    features = encode(loaded, image, args.image, args)
    note_unknown_words(loaded.processor, " ".join(args.texts), loaded.name, console)
    tokens = {part: ids.to(loaded.device) for part, ids in loaded.processor.text(args.texts).items()}
    scores = {head: loaded.model.score(features, **tokens, head=head)[0].tolist() for head in ("itm", "itc")}
    rows = [
        {"text": text, "match": itm, "cosine": itc}
        for text, itm, itc in zip(args.texts, scores["itm"], scores["itc"], strict=True)
    ]
    rows.sort(key=lambda row: row["match"], reverse=True)
    lines = [(f"{row['match']:.3f}", f"{row['cosine']:.3f}", row["text"]) for row in rows]
    document = {**about(loaded), "image": args.image, "texts": rows}
    console.show(document, table(("match", "cosine", "text"), lines))
    return 0


def _generate(loaded: Loaded, image: ImageFeatures, prompt: str, settings: Generation) -> list[str]:
    assert isinstance(loaded.model, Blip2)
    [texts] = generate(loaded.model, loaded.processor, image, prompt, settings)
    return texts
