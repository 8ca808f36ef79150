"""`python -m train.scenes COMMAND`: look at the drawn world, or train on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from blip2.presets import EMBEDDED
from train.scenes.world import SPLITS, render, sample


def show(args: argparse.Namespace) -> None:
    """Write a contact sheet: rows x columns pictures of consecutive seeds."""
    cell, gap = args.size, 4
    sheet = Image.new("RGB", (args.columns * (cell + gap) + gap, args.rows * (cell + gap) + gap), "white")
    for index in range(args.rows * args.columns):
        row, column = divmod(index, args.columns)
        picture = Image.fromarray(render(sample(args.seed + index, args.split), args.resolution))
        picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + column * (cell + gap), gap + row * (cell + gap)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out)
    print(f"wrote {args.out}: {args.rows * args.columns} scenes of split {args.split}")


def draw(args: argparse.Namespace) -> None:
    """Write one scene as a picture."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(sample(args.seed, args.split), args.size)).save(args.out)
    print(f"wrote {args.out}")


def encoder(args: argparse.Namespace) -> None:
    """Pretrain the image encoder, or go on with it."""
    from train.scenes.encoder import pretrain_encoder

    torch.set_num_threads(args.threads)
    pretrain_encoder(args.out, steps=args.steps, seed=args.seed, batch_size=args.batch_size)


def build(args: argparse.Namespace) -> None:
    """Train whatever is missing of the embedded checkpoints, and put them into the package."""
    from train.scenes.build import PhaseError, pack, run_phases

    try:
        run_phases(jobs=args.jobs)
    except PhaseError as error:
        raise SystemExit(f"error: {error}") from None
    pack(args.scenes)


def evaluate(args: argparse.Namespace) -> None:
    """Print the figures of checkpoints as JSON; with --write, put them into the model cards."""
    from blip2 import checkpoint
    from train.scenes.build import record
    from train.scenes.evaluate import figures

    found = {}
    for name in args.models:
        loaded = checkpoint.load(name, precision="float32", device="cpu")
        found[name] = figures(loaded, args.scenes, args.split)
        if args.write:
            record(loaded.folder, {args.split: found[name]})
    print(json.dumps(found, indent=2))


def shards(args: argparse.Namespace) -> None:
    """Write scenes and captions as tar shards."""
    from train.scenes.pack import write

    write(args.out, args.scenes, args.validation, args.captions)


def novelty(args: argparse.Namespace) -> None:
    """Print which pictures a checkpoint says it does not know; with --fit, have it learn that first."""
    from blip2 import checkpoint
    from blip2.values import write_digests
    from train.scenes.novelty import figures, fit

    torch.set_num_threads(1)
    loaded = checkpoint.load(args.model, precision="float32", device="cpu")
    if args.fit:
        fit(loaded, loaded.folder)
        write_digests(loaded.folder)
    print(json.dumps(figures(loaded, args.scenes, args.split), indent=2))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m train.scenes", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("show", help="write a contact sheet of drawn scenes")
    command.add_argument("--out", type=Path, required=True, help="picture file to write")
    command.add_argument("--split", choices=SPLITS, default="train")
    command.add_argument("--seed", type=int, default=0, help="seed of the first scene")
    command.add_argument("--rows", type=int, default=6)
    command.add_argument("--columns", type=int, default=10)
    command.add_argument("--resolution", type=int, default=64, help="pixels a scene is drawn at")
    command.add_argument("--size", type=int, default=128, help="pixels a scene takes on the sheet")
    command.set_defaults(run=show)

    command = commands.add_parser("draw", help="write one scene as a picture")
    command.add_argument("--out", type=Path, required=True, help="picture file to write")
    command.add_argument("--split", choices=SPLITS, default="test")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--size", type=int, default=256, help="pixels a side")
    command.set_defaults(run=draw)

    command = commands.add_parser(
        "encoder", help="pretrain the image encoder (three quarters of an hour on one core)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs/scenes/encoder"), help="run folder; resumable"
    )
    command.add_argument("--steps", type=int, default=4000)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--threads", type=int, default=1)
    command.set_defaults(run=encoder)

    command = commands.add_parser("shards", help="write scenes and captions as tar shards to train on")
    command.add_argument("--out", type=Path, default=Path("runs/scenes/shards"), help="folder; resumable")
    command.add_argument("--scenes", type=int, default=20_000, help="training scenes")
    command.add_argument("--validation", type=int, default=500, help="held-out scenes")
    command.add_argument("--captions", type=int, default=8, help="of each scene; training draws one")
    command.set_defaults(run=shards)

    command = commands.add_parser("build", help="train the embedded checkpoints from nothing; resumable")
    command.add_argument("--jobs", type=int, default=2, help="phases side by side, a thread each")
    command.add_argument("--scenes", type=int, default=500, help="validation scenes of the model cards")
    command.set_defaults(run=build)

    command = commands.add_parser("evaluate", help="print the figures of the embedded checkpoints")
    command.add_argument(
        "models", nargs="*", default=list(EMBEDDED), metavar="MODEL", help="an embedded name, or a folder"
    )
    command.add_argument("--split", choices=SPLITS, default="validation")
    command.add_argument("--scenes", type=int, default=500)
    command.add_argument("--write", action="store_true", help="into figures.json and the model card, too")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("novelty", help="print which pictures a checkpoint says it does not know")
    command.add_argument("--model", default="scenes-opt", help="embedded name or folder")
    command.add_argument("--split", choices=SPLITS, default="validation")
    command.add_argument("--scenes", type=int, default=1000)
    command.add_argument(
        "--fit", action="store_true", help="fit the score first, into the checkpoint's folder"
    )
    command.set_defaults(run=novelty)
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
