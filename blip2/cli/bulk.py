"""`bulk`: caption, embed or score many pictures; torch and Ray are imported where they work."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Literal

from blip2.bulk.cluster import StoppedError
from blip2.bulk.preview import preview
from blip2.bulk.run import Progress
from blip2.bulk.run import run as run_bulk
from blip2.bulk.settings import BATCH, BulkError, Model, Settings, Source
from blip2.cli.bulk_arguments import FITTING
from blip2.cli.console import Console, UsageError
from blip2.cli.decoding import generation
from blip2.pictures import Captioning, counted
from blip2.presets import EMBEDDED, PRESETS, find_preset
from blip2.settings import Generation

EVERY = 30  # seconds between two lines of progress where there is no terminal
DEFAULT_SEED = 42


def run(args: argparse.Namespace, console: Console) -> int:
    """Do a run, or say what it would be; returns the exit code: bad pictures are listed, and no failure."""
    settings = read_settings(args, console)
    if args.plan:
        _show_plan(preview(settings), settings, console)
        return 0
    line = Line(console)
    try:
        summary = run_bulk(settings, console.note, line.show)
    except StoppedError as error:
        line.end()
        console.fail(str(error))
        return 1
    except KeyboardInterrupt:
        line.end()
        console.note("stopped; the same command goes on")
        raise
    line.end()
    if summary["failed"]:
        failed = counted(summary["failed"], "row")
        console.note(f"{failed} could not be used: {summary['errors']} says why")
    console.show({"out": settings.out, **summary}, cost(summary, settings.out))
    return 0


def read_settings(args: argparse.Namespace, console: Console) -> Settings:
    """What the flags ask for.

    Raises:
        UsageError: flags that do not go together.
    """
    for task, names in FITTING.items():
        for name in names:
            if task != args.task and getattr(args, name) not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} is of `bulk {task}`, not of `bulk {args.task}`")
    args.model = _model_name(args, console)
    model = Model(
        args.model,
        args.precision,
        args.quantize_vision,
        args.adapter,
        args.encoder,
        not args.no_memory_check,
    )
    try:
        return Settings(
            task=args.task,
            source=Source(
                args.source, args.image_column, args.text_column, args.key_column, args.split, args.subset
            ),
            out=args.out,
            to=args.to or _form(args.out, args.task),
            model=model,
            captioning=_captioning(args) if args.task == "caption" else Captioning(),
            prompted=bool(args.prompt or args.start_with),
            scorer=args.match_model,
            texts_only=args.texts,
            texts=tuple(args.text or ()),
            heads=tuple(args.head or ("itm", "itc")),
            dtype=args.dtype or "float16",
            force=args.force,
            batch_size=BATCH[args.task] if args.batch_size is None else args.batch_size,
            per_file=args.per_file,
            workers=args.workers,
            device=args.device,
            address=args.address,
        )
    except BulkError as error:
        raise UsageError(str(error)) from error


def _form(out: str, task: str) -> str:
    ending = Path(out).suffix.lower().removeprefix(".")
    return ending if ending in ("jsonl", "parquet") else "parquet" if task == "embed" else "jsonl"


def _model_name(args: argparse.Namespace, console: Console) -> str:
    """The model to use; what is on the Hub is brought here once, before the workers ask for it."""
    kind: Literal["generate", "match"] = "generate" if args.task == "caption" else "match"
    if args.model in EMBEDDED and PRESETS[args.model].kind == kind:
        return str(args.model)
    from blip2.checkpoint import locate
    from blip2.cli.models import check_model, model_name

    name = model_name(args, kind, console, 2)
    check_model(name, kind, console, args.precision)
    if not args.address:
        locate(name, precision="float32" if args.quantize_vision else args.precision)
    return name


def _captioning(args: argparse.Namespace) -> Captioning:
    preset = find_preset(args.model or "")
    if args.adapter:
        from blip2.cli.models import named_preset

        preset = named_preset(args)
    defaults = preset.captioning if preset else Generation.caption()
    if args.method == "nucleus" and args.seed is None:
        args.seed = DEFAULT_SEED  # a run that goes on must draw as it did
    if args.prompt and args.start_with:
        raise UsageError("--start-with is --prompt repeated in the output: give one of them")
    if args.ask and not all(question.strip() for question in args.ask):
        raise UsageError("--ask is empty: ask something about the pictures")
    prompts = tuple(" ".join(text.split()) for text in args.start_with or args.prompt or ())
    return Captioning(
        generation(args, defaults),
        prompts=prompts,
        keep_prompt=args.start_with is not None,
        prefix=args.prefix or "",
        suffix=args.suffix or "",
        questions=tuple(args.ask or ()),
    )


def _show_plan(facts: dict[str, Any], settings: Settings, console: Console) -> None:
    rows = ("" if facts["exact"] else "about ") + counted(facts["rows"], "row")
    lines = [
        f"{rows}: {facts['source']}, in {counted(facts['parts'], 'part')}",
        f"{settings.task} with {settings.model.name}, to {settings.out} as {settings.to}",
    ]
    for one in facts["first"]:
        name = one.get("image") or one.get("key")
        said = one.get("reason") or one.get("captions") or one.get("texts") or one.get("text") or "embedded"
        scores = [f"{head} {one[head]}" for head in ("match", "itm", "itc") if one.get(head)]
        lines.append("  ".join([f"  {name}: {said if isinstance(said, str) else ' | '.join(said)}", *scores]))
    if facts["rows_per_second"]:
        lines.append(
            f"about {facts['rows_per_second']:,.1f} rows/s with {counted(facts['workers'], 'worker')} of "
            f"{facts['threads']} threads here: {duration(facts['seconds'])}, "
            f"a million rows {duration(1e6 / facts['rows_per_second'])}"
        )
    elif facts["rows"]:
        lines.append("too few rows to say how long it takes")
    first = [{name: _plain(value) for name, value in one.items()} for one in facts["first"]]
    console.show(facts | {"first": first, "out": settings.out, "to": settings.to}, lines)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def cost(summary: dict[str, Any], out: str) -> list[str]:
    """What a run did and what it cost, in words.

    Args:
        summary: of `blip2.bulk.run.run`.
        out: where the results are.
    """
    now = summary["this_call"]
    lines = [f"{counted(summary['rows'], 'row')} in {out}"]
    if "start_seconds" in now:
        lines[0] += f"; {now['rows']:,} now, in {duration(now['seconds'])}"
        lines.append(f"{now['start_seconds']:.1f} s of it to start, until the last worker had its model")
    if "rows_per_second" in now:
        million = duration(now["seconds_for_a_million"])
        speed = f"{now['rows_per_second']:,.1f} rows/s once under way"
        lines.append(f"{speed}, with {counted(now['workers'], 'worker')}; a million rows take {million}")
    return lines


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


class Line:
    """Progress: one line that changes in a terminal, else a line now and then."""

    def __init__(self, console: Console):
        self.console, self.last, self.shown = console, time.monotonic(), False

    def show(self, progress: Progress) -> None:
        """Say how far it is."""
        of = "" if progress.of_rows is None else f" of {progress.of_rows:,}"
        text = (
            f"{progress.rows:,}{of} rows, {progress.units:,} of {progress.of_units:,} parts, "
            f"{progress.per_second:,.1f} rows/s, {duration(progress.left)} left"
        )
        if self.console.bars:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self.shown = True
        elif time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            self.console.note(text)

    def end(self) -> None:
        """Leave the line."""
        if self.shown:
            print(file=sys.stderr)
            self.shown = False
