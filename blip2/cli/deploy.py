"""`deploy`: this app as a Hugging Face Space, uploaded or written to a folder."""

import argparse
import tempfile
from pathlib import Path

from blip2.cli.console import Console, UsageError
from blip2.deploy import NoConnectionError, Space, bundle, preload_list, upload
from blip2.presets import PRESETS


def run(args: argparse.Namespace, console: Console) -> int:
    """Build the bundle and upload it; returns the exit code."""
    try:
        space = Space(args.space, args.hardware, tuple(args.model or ()), args.title, args.votes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name in space.models:
        if name in PRESETS and PRESETS[name].repo_id:
            console.note(f"{name}: {PRESETS[name].license}")
    document = {"space": space.repo_id, "hardware": space.hardware, "models": list(space.models)}
    if args.dry_run is not None:
        try:
            preload = preload_list(space)
        except NoConnectionError as error:
            preload = []
            console.note(f"{error}; so the Space will download its models when it starts")
        written = bundle(space, Path(args.dry_run), preload)
        console.show(document | {"folder": str(written)}, [f"{space.repo_id} is in {written}"])
        return 0
    with tempfile.TemporaryDirectory(prefix="blip2-deploy-") as temporary:
        bundle(space, Path(temporary) / "space", preload_list(space))
        console.note(f"uploading to {space.repo_id}")
        url, existed = upload(space, Path(temporary) / "space", private=args.private)
    if existed:
        console.note("the Space was there before: its hardware and visibility stay as its Settings have them")
    if space.votes:
        console.note(f"votes need a secret HF_TOKEN in the Space's Settings that may write to {space.votes}")
    console.show(document | {"url": url, "existed": existed}, [url])
    return 0
