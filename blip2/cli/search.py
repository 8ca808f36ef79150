"""`index` and `search`: a folder's pictures, found by a text or by a picture."""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2.checkpoint import Loaded, locate
from blip2.cli.console import Console, UsageError, table
from blip2.cli.models import about, load_model, model_name, note_unknown_words
from blip2.errors import CheckpointError, PromptError
from blip2.images import open_image
from blip2.pictures import counted, find_pictures
from blip2.search.index import Summary, changed, check_model, indexing, weights_of
from blip2.search.query import Found, search
from blip2.search.store import HEAD, HIDDEN, Head, Index, read_head

SHOWN = 20  # bad pictures that are named


def run(args: argparse.Namespace, console: Console) -> int:
    """Run one of these commands; returns the exit code."""
    return {"index": index, "search": find}[args.command](args, console)


# --- index ---


def index(args: argparse.Namespace, console: Console) -> int:
    """Bring the index of a folder up to date; a picture that cannot be used does not keep the others out."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}; it must be 1 or more")
    folder = Path(args.folder).expanduser()
    place = Path(args.out).expanduser() if args.out else folder / HIDDEN
    before = read_head(place) if (place / HEAD).is_file() else None
    if before is not None:
        if args.model in (None, before.model) and _is_current(place, before, folder, args):
            return 0 if _nothing_to_do(place, console) else 1
        _as_before(args, before)
    else:
        find_pictures(folder, args.recursive)  # before a model is loaded for it
    loaded = load_model(model_name(args, "match", console), "match", args, console)
    with indexing(
        loaded, folder, args.out, recursive=args.recursive, force=args.force, batch_size=args.batch_size
    ) as going:
        done = 0
        try:
            for _ in zip(console.progress(going.left, "image"), going, strict=True):
                done += 1
        finally:
            if done < len(going.left):
                left = len(going.left) - done
                console.note(f"{counted(done, 'picture')} done, {left} left: the same command goes on")
    return _report(going.summary, about(loaded), console)


def _as_before(args: argparse.Namespace, head: Head) -> None:
    """Take the model and the precision of an index, where no others were named."""
    args.model = args.model or head.model
    if args.precision == "auto":
        args.precision = head.precision


def _is_current(place: Path, head: Head, folder: Path, args: argparse.Namespace) -> bool:
    """Whether a finished index is of the folder as it is, so that no model need be loaded."""
    if head.lines < 0 or args.precision not in ("auto", head.precision):
        return False
    try:
        _, checkpoint = locate(head.model, local_files_only=True, precision=head.precision)
    except CheckpointError:  # to load it will say what is wrong
        return False
    known = Index(place)
    source = Path(os.path.normpath(folder.absolute()))
    if known.folder != source or weights_of(checkpoint, head)[0] != head.weights:
        return False
    found = find_pictures(folder, args.recursive or head.recursive)
    same = known.pictures.keys() == set(found) and (head.recursive or not args.recursive)
    return same and not changed(folder, found, known.pictures, args.force)


def _nothing_to_do(place: Path, console: Console) -> bool:
    known = Index(place)
    bad = [picture for picture in known.pictures.values() if picture.row is None]
    summary = Summary(place, len(known), 0, len(known), [], bad)
    return not _report(summary, {"model": known.head.model, "precision": known.head.precision}, console)


def _report(summary: Summary, facts: dict[str, Any], console: Console) -> int:
    """Say what a run came to; 1 if nothing can be found."""
    unknown = [picture for picture in summary.bad if picture.unknown]
    failed = [picture for picture in summary.bad if not picture.unknown]
    for picture in failed[:SHOWN]:
        console.error(picture.reason)
    if len(failed) > SHOWN:
        console.error(f"and {len(failed) - SHOWN} more, which --json lists")
    if unknown:
        kind = f"{counted(len(unknown), 'picture')} left out, of a kind that {facts['model']} does not know"
        console.error(f"{kind}: index with a released model, --model blip2-itm-vit-g, or with --force")
    document = facts | {
        "index": str(summary.place),
        "pictures": summary.pictures,
        "encoded": summary.encoded,
        "kept": summary.kept,
        "gone": summary.gone,
        "failed": [{"image": picture.image, "reason": picture.reason} for picture in failed],
        "unknown": [picture.image for picture in unknown],
    }
    line = (
        f"{summary.place}: {counted(summary.pictures, 'picture')}; {summary.encoded:,} encoded, "
        f"{summary.kept:,} kept, {len(summary.gone)} gone, {len(failed)} failed"
    )
    console.show(document, [line])
    return int(summary.pictures == 0)


# --- search ---


def find(args: argparse.Namespace, console: Console) -> int:
    """The pictures that fit a text, or are like a picture, the best first."""
    if (args.text is None) == (args.image is None):
        raise UsageError('give a text, as in `blip2 search INDEX "a red circle"`, or --image')
    if args.top < 1:
        raise UsageError(f"--top is {args.top}; it must be 1 or more")
    if args.rerank < 0:
        raise UsageError(f"--rerank is {args.rerank}; it must be 0 or more")
    if args.rerank and args.image is not None:
        raise UsageError("--rerank goes with a text: ITM compares pictures with texts")
    if args.text is not None and not args.text.strip():
        raise PromptError("the query is empty: say what is in the pictures that you look for")
    collection = Index(args.index)
    query = args.text if args.image is None else open_image(args.image, allow_url=True)
    _as_before(args, collection.head)
    loaded = load_model(args.model, "match", args, console)
    check_model(collection, loaded)
    if args.text is not None:
        note_unknown_words(loaded.processor, args.text, loaded.name, console)
    found = search(loaded, collection, query, args.top, rerank=args.rerank, force=args.force)
    for one in found:
        if one.reason:
            console.error(f"{one.reason} The index is older than the folder: run `blip2 index` again.")
    if not found:
        console.note("the index has no pictures")
    _show(args, collection, loaded, found, console)
    return 0


def _show(
    args: argparse.Namespace, collection: Index, loaded: Loaded, found: list[Found], console: Console
) -> None:
    document = about(loaded) | {
        "index": str(collection.place),
        "pictures": len(collection),
        "query": {"text": args.text} if args.image is None else {"image": args.image},
        "results": [asdict(one) | {"path": str(one.path)} for one in found],
    }
    lines = table(("cosine", "file"), [(f"{one.cosine:.3f}", str(one.path)) for one in found])
    if args.rerank:
        head = ("score", "match", "cosine", "file")
        lines = table(head, [(*_looked(one), f"{one.cosine:.3f}", str(one.path)) for one in found])
    console.show(document, lines)


def _looked(one: Found) -> tuple[str, str]:
    """Score and match of a picture that was looked at again; nothing for those after them."""
    return ("", "") if one.match is None else (f"{one.score:.3f}", f"{one.match:.3f}")
