"""The words of `blip2 serve` that are not about its models. Imports nothing heavy."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the server listens to, and what it allows."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 8000 on")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="clients have to send it; may be repeated; better in the environment, as BLIP2_API_KEY",
    )
    parser.add_argument(
        "--allow-urls",
        action="store_true",
        help="read pictures from http(s) addresses, never from private ones",
    )
    parser.add_argument(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="pages from there may ask; may be repeated; * for all",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="requests answered together (32)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait; those beyond get 429 (64)"
    )
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds for a request (120)")
    parser.add_argument("--max-body", type=float, default=32, metavar="MB", help="size of a request (32)")
    parser.add_argument(
        "--grace", type=int, default=30, metavar="S", help="seconds for requests under way when it ends (30)"
    )
