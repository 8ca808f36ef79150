"""The app's command line: what may be served where, and the server's beginning and end."""

import argparse
import importlib.util
import inspect
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock
from urllib.request import ProxyHandler, build_opener

from blip2.ports import is_loopback

if TYPE_CHECKING:
    import gradio as gr

    from blip2.ui.models import Models

PORTS = range(7860, 7960)  # tried in this order where no port is asked for
MAX_UPLOAD = "50mb"
IMPORTED = 20  # seconds by which torch is imported


class UsageError(ValueError):
    """Command line options that contradict each other or the place the app runs in."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        SystemExit: 2 for wrong use, 1 if the app cannot start; Ctrl-C ends with 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    with until_stopped():
        try:
            options.host = options.host or ("0.0.0.0" if _on_spaces() else "127.0.0.1")
            options.local = may_be_local(options.host, options.local)
            _serve(options)
        except UsageError as error:
            parser.error(str(error))
        except (ValueError, OSError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            sys.exit(1)


@contextmanager
def until_stopped() -> Iterator[None]:
    """Let Ctrl-C or `kill` end in order what runs inside, and take the uploads along."""
    # as Ctrl-C, also where a script started us in the background; as `kill` and containers end programs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    temporary = None
    try:
        if "GRADIO_TEMP_DIR" not in os.environ:  # a folder of our own: nothing uploaded outlives the app
            temporary = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="blip2-app-")
        yield
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave uploads behind
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            del os.environ["GRADIO_TEMP_DIR"]
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("app.py", description="The BLIP-2 browser app.")
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, help=f"default: the first free one from {PORTS[0]} on")
    parser.add_argument(
        "--model", help="the model that is open at first: a name, a Hub id in the cache, or a folder"
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA adapter; the model it was trained on is open at first, with the adapter",
    )
    parser.add_argument(
        "--encoder",
        metavar="MODULE:FUNCTION",
        help="import the image encoder of a model that was trained with a function of one's own",
    )
    parser.add_argument(
        "--local",
        action=argparse.BooleanOptionalAction,
        help="let visitors load released checkpoints and model folders of this machine; default: yes if "
        "only this machine can reach the app",
    )
    parser.add_argument(
        "--max-models",
        type=int,
        default=2,
        metavar="N",
        help="how many models stay in memory, the embedded ones not counted; the one used longest ago leaves "
        "(default: 2)",
    )
    parser.add_argument(
        "--votes",
        type=Path,
        metavar="FILE",
        help="append votes on compared answers to this file, a JSON line each; by default they are not kept",
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="offer captions, answers, chats, comparisons and matches as MCP tools too, at /gradio_api/mcp/",
    )
    return parser


def _on_spaces() -> bool:
    return bool(os.environ.get("SPACE_ID"))


def may_be_local(host: str, wanted: bool | None) -> bool:
    """Whether visitors may name what lies on this machine.

    Args:
        host: address to listen on.
        wanted: as asked for; None: wherever it is harmless.

    Raises:
        UsageError: it was asked for where strangers can reach the app.
    """
    private = is_loopback(host) and not _on_spaces()
    if wanted and not private:
        where = "a Space" if _on_spaces() else f"--host {host}"
        raise UsageError(
            f"--local would let strangers read this machine's folders, so it is refused on {where}; "
            "leave --local away, or listen on 127.0.0.1"
        )
    return private if wanted is None else wanted


def build(
    *,
    local: bool = False,
    model: str | None = None,
    votes: Path | None = None,
    max_models: int = 2,
    only: Sequence[str] | None = None,
) -> "gr.Blocks":
    """The page, not yet served.

    Args:
        local: visitors may load released checkpoints and model folders.
        model: the one open at first; default: the first of `only`, else the embedded default.
        votes: a file for votes on compared answers; default: none are kept.
        max_models: how many models stay in memory, the embedded ones not counted.
        only: the models to offer, all kept in memory; None offers those there are.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    with _no_stubs():
        import gradio  # noqa: F401
    from blip2.presets import DEFAULT
    from blip2.ui.models import Models
    from blip2.ui.page import page
    from blip2.ui.votes import Votes
    from blip2.ui.work import Work

    default = model or (only[0] if only else DEFAULT)
    return page(Work(Models(default, local=local, at_most=max_models, only=only)), Votes(votes))


@contextmanager
def _no_stubs() -> Iterator[None]:
    """Spare a second of gradio's import.

    For each component class it parses the source, to write a stub (.pyi) beside it; a class that has no file
    gets none.
    """
    getfile = inspect.getfile

    def refuse_classes(thing: Any) -> str:
        if isinstance(thing, type):
            raise OSError("no stub is wanted")
        return getfile(thing)

    with mock.patch.object(inspect, "getfile", refuse_classes):
        yield


def launch(demo: "gr.Blocks", *, host: str = "127.0.0.1", port: int | None = None, mcp: bool = False) -> str:
    """Start to serve a page and return the address it answers at; the server runs in threads of its own.

    Raises:
        OSError: the port, or all that were tried, are taken; or the page does not answer.
    """
    from blip2.ui.examples import examples
    from blip2.ui.theme import CSS, THEME, favicon

    options: dict[str, Any] = {
        "theme": THEME,
        "css": CSS,
        "favicon_path": favicon(),
        "quiet": True,
        "max_threads": 100,  # those in line take one now and then
        "prevent_thread_lock": True,
        "share": False,
        "allowed_paths": [str(file) for file in examples()],
        "blocked_paths": [],
        "max_file_size": MAX_UPLOAD,
        "enable_monitoring": False,
        "run_history": False,
        "pwa": False,
        "mcp_server": mcp,
        "show_error": False,  # what visitors should read is worded by us; the rest may hold paths
        "footer_links": ["api", "gradio", "settings"],
    }
    try:
        _, address, _ = demo.launch(server_name=host, server_port=port, **options)
    except OSError as error:
        tried = f"port {port} is" if port else f"ports {PORTS[0]} to {PORTS[-1]} are"
        raise OSError(
            f"cannot listen on {host}: {tried} taken or not allowed; choose another --port"
        ) from error
    with build_opener(ProxyHandler({})).open(address, timeout=30) as answer:  # this machine: by no proxy
        answer.read()
    return address.rstrip("/")


def _serve(options: argparse.Namespace) -> None:
    if options.port is not None and not 0 < options.port < 65536:
        raise UsageError(f"--port is {options.port}; allowed: 1 to 65535")
    if options.mcp and importlib.util.find_spec("mcp") is None:
        raise UsageError(f'--mcp takes a package more: {sys.executable} -m pip install "gradio[mcp]"')
    if sys.stdout.isatty():
        print("Starting ...", end="\r", flush=True)
    if options.votes is not None:
        options.votes.open("a").close()  # what is wrong with it is said now
    if options.max_models < 1:
        raise UsageError(f"--max-models is {options.max_models}; allowed: 1 or more")
    if options.adapter and options.model:
        raise UsageError("--adapter brings the model it was trained on: leave --model out")
    if options.adapter:
        options.model = str(importlib.import_module("blip2.adapters").read_adapter(options.adapter).folder)
    if options.encoder:
        importlib.import_module("blip2.encoders").import_encoder(options.encoder)
    demo = build(local=options.local, model=options.model, votes=options.votes, max_models=options.max_models)
    models = demo.blip2_models
    if options.model:
        models.get(models.default)  # the operator named it: what is wrong with it is said now
    keep_serving(demo, host=options.host, port=options.port, mcp=options.mcp)


def keep_serving(demo: "gr.Blocks", *, host: str, port: int | None = None, mcp: bool = False) -> None:
    """Serve a page until the process is interrupted; where it is, is printed.

    Raises:
        OSError: the port, or all that were tried, are taken.
    """
    starting = threading.Thread(target=_get_going, args=(demo.blip2_models,), daemon=True)
    try:
        address = launch(demo, host=host, port=port, mcp=mcp)
        print(f"BLIP-2 is ready: {address}", flush=True)
        if not is_loopback(host):
            print("Others can reach it: they can upload pictures and use the models offered, no more.")
        print("Ctrl-C ends it.", flush=True)
        starting.start()  # while the visitor looks around
        threading.Event().wait()
    except SystemExit:  # gradio's own way to end where Node renders the page
        raise KeyboardInterrupt from None
    finally:
        demo.close(verbose=False)
        if starting.is_alive():
            starting.join(IMPORTED)  # Python crashes where it ends in the midst of importing torch


def _get_going(models: "Models") -> None:
    """Import torch and load the first model; not in the main thread, where imports may swallow a Ctrl-C."""
    from blip2.devices import device_advice

    if advice := device_advice():
        print(advice, file=sys.stderr)
    try:
        models.get(models.default)
    except ValueError as error:
        print(error, file=sys.stderr)
