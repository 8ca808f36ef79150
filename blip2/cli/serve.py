"""`blip2 serve`: models behind an OpenAI-compatible HTTP server."""

import argparse
import os
from importlib.util import find_spec

from blip2.cli.console import Console, UsageError
from blip2.cli.models import check_model, default_model, load_model
from blip2.ports import is_loopback, take_port

PORTS = range(8000, 8100)  # tried in this order where no port is asked for
KEYS = "BLIP2_API_KEY"


def run(args: argparse.Namespace, console: Console) -> int:
    """Load the models, and serve them until the process is interrupted."""
    _check(args)
    keys = tuple(args.api_key or filter(None, [os.environ.get(KEYS, "").strip()]))
    names = list(dict.fromkeys(args.model or [default_model("generate", console)]))
    for name in names:
        check_model(name, "generate", console, args.precision)
    with take_port(args.host, PORTS if args.port is None else [args.port]) as listening:
        from blip2.server.api import Settings
        from blip2.server.run import Server, serve
        from blip2.server.worker import Worker

        workers: dict[str, Worker] = {}
        for name in names:
            loaded = load_model(name, "generate", args, console)
            if loaded.name in workers:
                raise UsageError(f"two models are called {loaded.name}: rename a folder, or leave one out")
            workers[loaded.name] = Worker(loaded, batch_size=args.batch_size, force=args.force)
        settings = Settings(
            keys=keys,
            allow_urls=args.allow_urls,
            cors=tuple(args.cors or ()),
            places=args.batch_size + args.queue,
            timeout=args.timeout,
            max_body=round(args.max_body * 1e6),
        )
        host = args.host if ":" not in args.host else f"[{args.host.strip('[]')}]"
        url = f"http://{host}:{listening.getsockname()[1]}/v1"

        def ready() -> None:
            document = {"url": url, "models": list(workers)}
            console.show(document, [f"BLIP-2 serves {', '.join(workers)}: {url}"])
            if not is_loopback(args.host) and not keys:
                console.note(f"others can reach it, and no key is asked for: see --api-key and {KEYS}")
            console.note("Ctrl-C ends it")

        serve(
            Server(list(workers.values()), settings, ready=ready, grace=args.grace, log=args.debug), listening
        )
    console.note("ended")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags out of range before a model is loaded.

    Raises:
        UsageError: naming the flag.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageError("serve takes two packages more: pip install fastapi uvicorn")
    if args.port is not None and not 0 < args.port < 65536:
        raise UsageError(f"--port is {args.port}; allowed: 1 to 65535")
    for flag, least in {"batch_size": 1, "queue": 0, "grace": 0}.items():
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; allowed: {least} or more")
    for flag in ("timeout", "max_body"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag):g}; allowed: above 0")
    if not all(key.strip() for key in args.api_key or ()):
        raise UsageError("--api-key is empty: give a key that clients have to send")
