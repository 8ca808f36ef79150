"""How a command decodes, from its flags. Without torch."""

import argparse
import secrets
from typing import Any

from blip2.cli.console import UsageError
from blip2.settings import Generation

FIELDS = (
    "method",
    "num_beams",
    "num_captions",
    "max_new_tokens",
    "min_new_tokens",
    "length_penalty",
    "repetition_penalty",
    "avoid",
    "temperature",
    "top_p",
    "seed",
)
ONLY = {"beam": ("num_beams", "length_penalty"), "nucleus": ("temperature", "top_p")}


def generation(args: argparse.Namespace, defaults: Generation) -> Generation:
    """Decoding settings: the defaults, changed by the flags that were given.

    Raises:
        UsageError: a value out of range, or a flag that the chosen method ignores.
    """
    given: dict[str, Any] = {name: getattr(args, name, None) for name in FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    method = given.get("method", defaults.method)
    for owner, names in ONLY.items():
        for name in names:
            if name in given and method != owner:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} has no effect with method {method}: add --method {owner}")
    if method == "nucleus" and "seed" not in given:
        given["seed"] = secrets.randbelow(1 << 31)  # reported, so that the answer can be had again
    if given.get("max_new_tokens", defaults.min_new_tokens) < defaults.min_new_tokens:
        given.setdefault("min_new_tokens", max(0, given["max_new_tokens"]))
    try:
        return defaults.with_(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
