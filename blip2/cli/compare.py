"""`compare`: the same questions to several models, each in its own frame, one model loaded at a time."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.chat import Chat
from blip2.checkpoint import Loaded
from blip2.cli.console import Console, UsageError
from blip2.cli.models import (
    about,
    check_model,
    check_question,
    encode,
    generation,
    load_model,
    note_unknown_words,
)
from blip2.generation import Generation
from blip2.images import ImageError, open_image
from blip2.model import Blip2
from blip2.novelty import UnknownPictureError
from blip2.processing import PromptError
from blip2.report import Answer, Question, read_questions, summary, write_report


def run(args: argparse.Namespace, console: Console) -> int:
    """Ask one question, or those of a file."""
    if len(args.models) < 2:
        raise UsageError(f"compare needs two or more models after --models, not only {args.models[0]}")
    if bool(args.input) != bool(args.out):
        raise UsageError("--input and --out go together: a list of questions makes a report")
    if args.input and args.image is not None:
        raise UsageError("give IMAGE and QUESTION, or --input, not both")
    if not args.input and args.question is None:
        raise UsageError("compare needs IMAGE and QUESTION, or --input and --out")
    settings = generation(args, Generation.answer())
    if not args.input:
        check_question(args)
    for name in args.models:
        check_model(name, "generate", console, args.precision)
    return (_file if args.input else _one)(args, settings, console)


def _one(args: argparse.Namespace, settings: Generation, console: Console) -> int:
    image = open_image(args.image, allow_url=True)
    results: list[dict[str, Any]] = []
    for name in console.progress(args.models, "model"):
        try:
            loaded = load_model(name, "generate", args, console)
            note_unknown_words(loaded.processor, args.question, loaded.name, console)
            result = about(loaded, settings) | _ask(loaded, image, args.image, args.question, settings, args)
            del loaded  # the next model must not need room beside it
        except UnknownPictureError as error:
            console.error(str(error))
            result = {"model": name, "error": str(error), **error.facts}
        except ValueError as error:  # one that is missing or broken does not keep the others from answering
            console.error(f"{name}: {error}")
            result = {"model": name, "error": str(error)}
        results.append(result)
        if not console.json and "error" not in result:
            console.show({}, _paragraph(result))
    if console.json:
        console.show({"image": args.image, "question": args.question, "results": results}, ())
    return int(any("error" in result for result in results))


def _ask(
    loaded: Loaded,
    image: Image.Image,
    source: str,
    question: str,
    settings: Generation,
    args: argparse.Namespace,
) -> dict[str, Any]:
    assert isinstance(loaded.model, Blip2)
    start = time.perf_counter()
    chat = Chat(loaded.model, loaded.processor, style=args.style, describe=args.describe)
    chat.set_image(encode(loaded, image, source, args))
    answer = chat.ask(question, settings)
    seconds = time.perf_counter() - start
    turn = chat.turns[-1]
    return {"prompt": turn.prompt, "answer": answer, "tokens": turn.num_tokens, "seconds": round(seconds, 3)}


def _file(args: argparse.Namespace, settings: Generation, console: Console) -> int:
    """Every question to every model; answers are kept as they come, and the same command goes on."""
    questions = read_questions(Path(args.input))
    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out is {args.out!r}; give a .html file")
    if not out.parent.is_dir():
        raise UsageError(f"--out is {args.out!r}, but there is no folder {out.parent}")
    kept = out.with_suffix(".jsonl")
    how = {"settings": asdict(settings), "style": args.style, "describe": args.describe, "force": args.force}
    known = _kept(kept, json.loads(json.dumps(how | {"precision": args.precision})))
    answers: list[list[Answer]] = []
    for name in args.models:
        left = [q for q in questions if (name, q.image, q.question) not in known]
        with kept.open("a", encoding="utf-8") as file:
            for answer in _answers(name, left, settings, args, console):
                known[name, answer.image, answer.question] = answer
                line = asdict(answer) | {"how": how | {"precision": args.precision}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
        answers.append([known[name, q.image, q.question] for q in questions])
    title = f"{len(questions)} questions to {', '.join(args.models)}"
    write_report(out, questions, answers, title)
    figures = summary(questions, answers)
    lines = [
        f"{name}: " + ", ".join(f"{what} {value:.3g}" for what, value in found.items())
        for name, found in figures.items()
    ]
    document = {"input": args.input, "out": args.out, "figures": figures}
    console.show(document | {"answers": [asdict(one) for of_model in answers for one in of_model]}, lines)
    return int(any(answer.error for of_model in answers for answer in of_model))


def _kept(path: Path, how: dict[str, Any]) -> dict[tuple[str, str, str], Answer]:
    """Answers of an earlier call that were asked for in the same way; failures are tried again.

    Raises:
        UsageError: the file is none of ours.
    """
    found = {}
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        if not text.endswith("\n"):  # a stop cut the last line off
            text = text[: text.rfind("\n") + 1]
            if path.exists():
                path.write_text(text, "utf-8")
        for row in map(json.loads, text.splitlines()):
            if row.pop("how") == how and not row["error"]:
                found[row["model"], row["image"], row["question"]] = Answer(**row)
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{path} holds no answers of an earlier call ({error}): choose another --out"
        ) from error
    return found


def _answers(
    name: str, questions: list[Question], settings: Generation, args: argparse.Namespace, console: Console
) -> Iterator[Answer]:
    """One model's answers; what fails is an answer with an error."""
    if not questions:
        return
    try:
        loaded = load_model(name, "generate", args, console)
    except ValueError as error:
        console.error(f"{name}: {error}")
        yield from (Answer(name, q.image, q.question, error=str(error)) for q in questions)
        return
    for question in console.progress(questions, name):
        try:
            image = open_image(question.image, allow_url=True)
            said = _ask(loaded, image, question.image, question.question, settings, args)
            yield Answer(name, question.image, question.question, **said)
        except (ImageError, PromptError, UnknownPictureError) as error:
            console.error(f"{name}: {error}")
            yield Answer(name, question.image, question.question, error=str(error))


def _paragraph(result: dict[str, Any]) -> list[str]:
    tokens = "1 token" if result["tokens"] == 1 else f"{result['tokens']} tokens"
    return [
        f"{result['model']} ({result['precision']}, {result['device']}), {tokens}, {result['seconds']:.2f} s",
        f"  prompt: {result['prompt']}",
        f"  answer: {result['answer']}",
    ]
