"""The command line: `blip2 caption | ask | chat | match | compare | explain`, and what is around the models.

Results go to stdout, everything said about them to stderr. Exit codes: 0 done, 1 failed, 2 used wrongly. What
needs torch is imported when a command runs, so that `--help` and bad usage answer at once.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TextIO

from blip2.cli.arguments import build_parser
from blip2.cli.console import Console, UsageError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: words after `blip2`; by default the process's own.

    Raises:
        SystemExit: by argparse: 0 after --help and --version, 2 for words it does not understand.
    """
    for stream in (sys.stdout, sys.stderr):
        _never_fail_on_characters(stream)
    args = build_parser().parse_args(argv)
    console = Console(json=args.json, quiet=args.quiet)
    try:
        with _quiet_libraries(console, args.debug):
            if getattr(args, "encoder", None):
                import_module("blip2.encoders").import_encoder(args.encoder)
            code = import_module(f"blip2.cli.{args.module}").run(args, console)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as in `blip2 info | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (UsageError, ValueError, OSError, MemoryError, RuntimeError) as error:
        if args.debug or not _is_expected(error):
            raise
        console.fail(_explain(error), **getattr(error, "facts", {}))
        return 2 if isinstance(error, UsageError) else 1


def _is_expected(error: BaseException) -> bool:
    """Whether the message alone tells a user what to do; other runtime errors are ours to see in full."""
    from blip2.devices import is_out_of_memory

    return not isinstance(error, RuntimeError) or is_out_of_memory(error)


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError | RuntimeError):
        return (
            "the model does not fit into memory: try --precision bfloat16, int8 or nf4, or a smaller model; "
            "`blip2 info` lists what each needs"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename!r}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _never_fail_on_characters(stream: TextIO) -> None:
    """Escape what a terminal or pipe cannot show, instead of failing."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


@contextmanager
def _quiet_libraries(console: Console, debug: bool) -> Iterator[None]:
    """Keep the libraries' notices off the terminal, and their progress bars off anything but a terminal."""
    if debug:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
            from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
            from transformers.utils import logging as transformers_logging

            bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
            if not console.bars:
                transformers_logging.disable_progress_bar()
                disable_progress_bars()
            try:
                yield
            finally:
                if bars[0]:
                    transformers_logging.enable_progress_bar()
                if bars[1]:
                    enable_hub_bars()
    finally:
        logging.disable(disabled)
