"""`caption FOLDER`: every picture of a folder, into texts beside the pictures or into a table."""

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2.checkpoint import Loaded
from blip2.cli.console import Console, UsageError
from blip2.cli.models import about, load_model, model_name, note_unknown_words
from blip2.folder import caption_folder
from blip2.generation import Generation
from blip2.pictures import Captioning, Failure, find_pictures
from blip2.sidecars import SIDECARS, TABLES, Entry, IfExists, Sidecars, Table

FLAGS = ("recursive", "to", "if_exists", "ask", "match_model", "preview", "batch_size")
PREVIEWED = 5


def refuse_flags(args: argparse.Namespace) -> None:
    """Refuse the flags of folders where none was given.

    Raises:
        UsageError: naming the flag.
    """
    for name in FLAGS:
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is for a folder of pictures: give one")


def captioning(args: argparse.Namespace, settings: Generation, loaded: Loaded) -> Captioning:
    """What is wanted of each picture."""
    prompt = args.start_with if args.prompt is None else args.prompt
    if prompt is None:
        prompt = loaded.caption_prompt
    return Captioning(
        settings,
        prompt=loaded.processor.prompt(prompt, "caption"),
        keep_prompt=args.start_with is not None,
        prefix=args.prefix,
        suffix=args.suffix,
        questions=tuple(args.ask or ()),
        batch_size=args.batch_size or Captioning.batch_size,
        force=args.force,
    )


def run(args: argparse.Namespace, settings: Generation, console: Console) -> int:
    """Caption a folder; a picture that cannot be used does not keep the others from their captions."""
    out = _output(args)
    [folder] = args.images
    found = find_pictures(folder, args.recursive)
    pictures = out.missing(found)
    facts: dict[str, Any] = {
        "folder": folder,
        "to": args.to or SIDECARS[0],
        "skipped": len(found) - len(pictures),
    }
    if not pictures:
        console.note(f"all {len(found)} pictures have a caption there; see --if-exists")
        console.show(facts | {"results": []}, ())
        return 0
    if args.preview:
        pictures, facts["to"] = pictures[:PREVIEWED], None
    name = model_name(args, "generate", console, max(2, len(found)))
    loaded = load_model(name, "generate", args, console)
    scorer = load_model(args.match_model, "match", args, console) if args.match_model else None
    wanted = captioning(args, settings, loaded)
    note_unknown_words(loaded.processor, " ".join([wanted.prompt, *wanted.questions]), loaded.name, console)

    results: list[Entry | Failure] = []
    try:
        with nullcontext() if args.preview else out as kept:
            going = caption_folder(loaded, folder, pictures, kept, wanted, scorer)
            for _, result in zip(console.progress(pictures, "image"), going, strict=True):
                results.append(result)
                _say(result, console)
    finally:
        failed = sum(isinstance(result, Failure) for result in results)
        counts = f"{len(results) - failed} captioned, {facts['skipped']} had a caption, {failed} failed"
        left = len(pictures) - len(results)
        console.note(counts + (f", {left} left: the same command goes on" if left else ""))
    if console.json:
        shown = [asdict(result) for result in results]
        console.show(about(loaded, settings) | {"prompt": wanted.prompt} | facts | {"results": shown}, ())
    return int(failed > 0)


def _output(args: argparse.Namespace) -> Sidecars | Table:
    """Where captions go.

    Raises:
        UsageError: flags that do not go together.
    """
    if len(args.images) > 1:
        raise UsageError("a folder is captioned alone: give one folder, or pictures only")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}; it must be 1 or more")
    if args.ask and not all(question.strip() for question in args.ask):
        raise UsageError("--ask is empty: ask something about the pictures")
    to = args.to or SIDECARS[0]
    if_exists: IfExists = args.if_exists or "skip"
    if to in SIDECARS:
        return Sidecars(args.images[0], to, if_exists)
    if Path(to).suffix.lower() not in TABLES:
        allowed = ", ".join((*SIDECARS, *(f"a {ending} file" for ending in TABLES)))
        raise UsageError(f"--to is {to!r}; it must be one of {allowed}")
    return Table(to, if_exists, args.ask or ())


def _say(result: Entry | Failure, console: Console) -> None:
    if isinstance(result, Failure):
        console.error(f"{result.image}: {result.reason}")
    elif not console.json:
        scores = result.match or (None,) * len(result.captions)
        lines = [
            f"{result.image}: {text}" + ("" if score is None else f"  ({score:.2f})")
            for text, score in zip(result.captions, scores, strict=True)
        ]
        console.show({}, [*lines, *(f"  {asked} {reply}" for asked, reply in result.answers.items())])
