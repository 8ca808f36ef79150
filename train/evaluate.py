"""Evaluation by the paper's protocols: the command.

    python -m train.evaluate scenes-vqa --model scenes-opt
    torchrun --nproc-per-node 8 -m train.evaluate gqa --model blip2-flan-t5-xl
        --questions testdev_balanced_questions.json --images gqa/images
    python -m train.evaluate --table 2 runs/evaluate/*      or 3, 4, 5, or scenes

The same command goes on where a stopped or killed one left off. docs/evaluation.md says how to get each data
set, and `train.evaluation.protocols` holds the settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from blip2 import checkpoint
from blip2.checkpoint import Loaded
from blip2.errors import CheckpointError, PromptError
from train import distributed
from train.engine import make_accelerator
from train.evaluation import (
    Figures,
    MetricError,
    captioning,
    predictions,
    provenance,
    scene_table,
    scenes,
    vqa,
)
from train.evaluation.annotations import AnnotationError, DataSet
from train.evaluation.options import Options
from train.evaluation.predictions import Predictions, Record, ResultsError, Stop
from train.evaluation.protocols import TASKS, own_prompt, read_data, resolve, table_rows
from train.evaluation.report import write_report
from train.evaluation.retrieval import Retrieval, clean_up
from train.evaluation.tables import show
from train.log import say
from train.stop import stop_signals

WAIT = 240.0  # minutes that a process waits for the others: shares are equal, pictures are not


def evaluate(options: Options, stop: Stop = lambda: False) -> Path | None:
    """Evaluate, or go on with it; returns the results folder, or None where it was stopped before the end.

    Raises:
        AnnotationError: files, pictures or settings do not fit; nothing was computed.
        CheckpointError: nor does the model.
        ResultsError: the folder holds another evaluation, or it cannot go on.
        MetricError: what was predicted cannot be scored; it is kept.
    """
    options.check()
    task, split = TASKS[options.task], options.split or TASKS[options.task].splits[0]
    data = read_data(
        options.task, split, questions=options.questions, annotations_file=options.annotations,
        images=options.images, num_scenes=options.scenes, unseen=bool(options.unseen),
        tuned=bool(options.tuned), limit=options.limit, skip_missing=options.skip_missing,
    )  # fmt: skip
    loaded = _load(options)
    settings = resolve(options.task, options.changes, loaded)
    parts = [options.task, split, provenance.model_name(loaded).replace("/", "-")]
    parts += [options.adapter.name] if options.adapter else []
    folder = options.output or Path("runs/evaluate") / "-".join(parts)
    pictures = options.batch_size or task.pictures
    made_of = {
        "task": options.task,
        "split": split,
        **provenance.of_model(loaded, options.adapter),
        "limit": options.limit,
        "scenes": options.scenes if task.drawn else None,
        "missing": len(data.missing),
        "settings": settings,
        "own_prompt": own_prompt(options.task, settings, loaded),
        "files": provenance.of_files({"questions": options.questions, "annotations": options.annotations}),
    }
    if task.kind == "retrieval":  # what its files hold is of so many pictures
        made_of["batch_size"] = pictures
    images = str(options.images) if options.images else None
    predictions.claim(folder, made_of, provenance.made_with(loaded, batch_size=pictures, images=images))

    kept = Predictions(folder)
    figures: Figures = {}
    if (folder / "predictions.jsonl").exists() and (task.kind != "retrieval" or _has_scores(folder)):
        records = list(kept.done.values())
        figures = predictions.read(folder / predictions.SCORES)["figures"] if task.kind == "retrieval" else {}
    elif task.kind == "retrieval":
        search = Retrieval(data, loaded, settings, folder, pictures, options.keep_gb, stop)
        found = search.run()
        if found is None:
            return None
        records, figures = found
    else:
        if task.kind == "vqa":
            work = vqa.answering(loaded, settings, pictures)
        else:
            work = captioning.captioning(loaded, settings)
        predictions.predict(
            data, loaded, work, kept, batch_size=pictures, skip_unusable=options.skip_missing, stop=stop,
            title=options.task,
        )  # fmt: skip
        if predictions.stopped(stop):
            return None
        records = predictions.complete(data, kept) if distributed.rank() == 0 else []
    if distributed.rank() == 0:
        _finish(options, folder, data, loaded, records, figures)
    distributed.barrier()
    return folder


def _load(options: Options) -> Loaded:
    device = options.device
    if distributed.promised() > 1:
        cpu = True if device == "cpu" else None
        device = str(make_accelerator(cpu=cpu, timeout_minutes=WAIT).device)
    try:
        return checkpoint.load(
            options.model, precision=options.precision, device=device, adapter=options.adapter
        )
    except ValueError as error:  # an unknown name, precision or device
        raise CheckpointError(str(error)) from error


# ---------------------------------------------------------------- scores


def _has_scores(folder: Path) -> bool:
    return (folder / predictions.SCORES).exists()


def _finish(
    options: Options,
    folder: Path,
    data: DataSet,
    loaded: Loaded,
    records: list[Record],
    figures: Figures,
) -> None:
    """Score, and write predictions, scores and report."""
    task, kept = TASKS[options.task], Predictions(folder)
    usable = [record for record in records if "unusable" not in record]
    if not usable:
        raise ResultsError(f"none of the {len(records)} pictures can be opened")
    notes = [*data.notes]
    if left_out := len(records) - len(usable):
        notes.append(f"{left_out} examples are left out, as their pictures cannot be opened")
    if data.missing:
        notes.append(f"{len(data.missing)} pictures are missing and left out, such as {data.missing[0]}")
    kept.finish(records)  # whole, whatever becomes of the scores
    if task.kind != "retrieval" and not usable[0]["references"]:
        submitted = (vqa if task.kind == "vqa" else captioning).submission(usable)
        predictions.write(folder / "submission.json", submitted)
        notes.append(f"scored by the challenge's server alone: {folder / 'submission.json'} is for it")
    elif task.kind != "retrieval":
        figures, more = _scored(options, usable)
        notes += more
        kept.finish(records)
    scores = {
        "task": options.task,
        "model": provenance.model_name(loaded),
        "examples": len(data.examples) - left_out,
        "figures": figures,
        "notes": notes,
    }
    predictions.write(folder / predictions.SCORES, scores)
    if task.kind == "retrieval":
        clean_up(folder)
    size, made = loaded.processor.image_size, predictions.read(folder / predictions.SETTINGS)
    write_report(
        folder, f"{options.task}, {loaded.name}", figures, usable,
        lambda record: data.picture(record["image"], size), settings=made,
    )  # fmt: skip
    say(f"{options.task}, {loaded.name}, {scores['examples']:,} examples\n{listed(figures)}")
    for note in notes:
        say(f"note: {note}")
    say(f"predictions, scores and report.html are in {folder}")


def _scored(options: Options, records: list[Record]) -> tuple[Figures, list[str]]:
    if TASKS[options.task].kind == "vqa":
        return vqa.score(records, lemmatize=options.task == "okvqa")
    if options.task != "scenes-caption":
        return captioning.score(records, spice=options.spice)
    objects = scenes.object_figures(records)
    try:
        figures, notes = captioning.score(records, spice=options.spice)
    except MetricError as error:  # the figures of objects need no Java
        return objects, [f"BLEU to CIDEr are left out: {error}"]
    return {**objects, **figures}, notes


def listed(figures: Figures) -> str:
    """Figures a line each, without those by question type, of which there are many."""
    shown = {name: value for name, value in figures.items() if not name.startswith(("question: ", "raw q"))}
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {name.ljust(width)}  {value:6.2f}" for name, value in shown.items())


def show_table(arguments: Sequence[str]) -> str:
    """One of the paper's tables beside what results folders hold; or theirs of drawn scenes, as Markdown.

    Args:
        arguments: "--table", its number or "scenes", and folders.

    Raises:
        ResultsError: one of the folders holds no results.
        MetricError: there is no such table, or the results do not go into one.
    """
    place = arguments.index("--table")
    number = arguments[place + 1] if place + 1 < len(arguments) else ""
    folders = [Path(word) for word in (*arguments[:place], *arguments[place + 2 :])]
    if number != "scenes" and not number.isdigit():
        raise MetricError(
            f"--table is {number!r}; it is 2, 3, 4, 5 or scenes, and results folders may follow it"
        )
    results = {}
    for folder in folders:
        if not _has_scores(folder):
            raise ResultsError(
                f"{folder} holds no {predictions.SCORES}: is it finished, and a results folder?"
            )
        results[folder] = tuple(
            predictions.read(folder / n) for n in (predictions.SETTINGS, predictions.SCORES)
        )
    if number == "scenes":
        return scene_table.markdown(results)
    return show(int(number), table_rows(int(number), results))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: done; 1: stopped, or it failed on the way; 2: it could not start."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "--table" in arguments:
            print(show_table(arguments), end="")
            return 0
        options = tyro.cli(Options, prog="python -m train.evaluate", description=__doc__, args=arguments)
        with stop_signals() as stop:
            folder = evaluate(options, stop)
    except (AnnotationError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MetricError, ResultsError, PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        print(
            f"error: rank {distributed.rank()} lost another process ({error}); what is done is kept, and the "
            "same command goes on",
            file=sys.stderr,
        )
        return 1
    if folder is None:
        if distributed.rank() == 0:
            say("stopped; what is done is kept, and the same command goes on")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
