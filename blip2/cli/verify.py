"""`verify`: what is right and what is wrong with a checkpoint, and with how it is computed."""

import argparse
import os
import platform
from dataclasses import asdict
from typing import Any

from huggingface_hub.utils import tqdm

from blip2 import __version__
from blip2.checks import Check
from blip2.cli.console import Console, UsageError
from blip2.cli.models import announce
from blip2.devices import choose_device, device_name
from blip2.devices import versions as installed
from blip2.presets import find_preset
from blip2.verify import verify

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "bitsandbytes")
WORDS = {True: "PASS", False: "FAIL", None: "-"}


def run(args: argparse.Namespace, console: Console) -> int:
    """Check one, and print a report; exit code 1 where anything is wrong."""
    try:
        choose_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    preset = find_preset(args.model)
    if args.revision is None:
        announce(args.model, preset, console)
    progress = Progress(console)
    options = {"revision": args.revision, "precision": args.precision, "device": args.device}
    checks = []
    for check in verify(args.model, **options, watch=progress):
        progress.close()
        checks.append(check)
    progress.close()
    wrong = [check for check in checks if check.passed is False]
    document: dict[str, Any] = {
        "model": preset.name if preset else args.model,
        "passed": not wrong,
        "checks": [asdict(check) for check in checks],
        "versions": versions(args.device),
    }
    lines = []
    for check, before in zip(checks, [None, *checks], strict=False):
        lines += describe(check, said=before is not None and before.expected == check.expected)
    lines += ["", ", ".join(f"{name} {number}" for name, number in document["versions"].items())]
    skipped = sum(check.passed is None for check in checks)
    done = f"{len(checks) - skipped} checks, {skipped} that do not apply"
    lines.append(f"FAIL: {', '.join(check.name for check in wrong)}" if wrong else f"PASS: {done}")
    console.show(document, lines)
    return int(bool(wrong))


def describe(check: Check, said: bool = False) -> list[str]:
    """A check for people: what was found, what was expected if that is not `said`, and where it is wrong."""
    lines = [f"{WORDS[check.passed]:4}  {check.name}: {check.found}"]
    if check.expected and check.passed is not None and not said:
        lines.append(f"      expected: {check.expected}")
    if check.where:
        lines.append(f"      where: {check.where}")
    return lines


def versions(device: str = "cpu") -> dict[str, str]:
    """What a report holds for: of this package, of those it stands on, and of the machine."""
    found = {"blip2": __version__, "python": platform.python_version()} | installed(PACKAGES)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {device_name(device)}"
    return found | {"machine": machine}


class Progress:
    """A bar of bytes for each thing that takes time."""

    def __init__(self, console: Console):
        self.console, self.doing = console, ""
        self.bar: tqdm | None = None

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Show how far it is; a new bar for a new thing."""
        if not self.console.bars:
            return
        if self.bar is None or self.doing != doing:
            self.close()
            self.doing = doing
            self.bar = tqdm(desc=doing, total=total or None, unit="B", unit_scale=True, leave=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
