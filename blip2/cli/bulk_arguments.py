"""The words that `blip2 bulk` understands, but for those of models and decoding."""

import argparse

TASKS = ("caption", "embed", "score")
FORMATS = (".txt", ".caption", "jsonl", "parquet", "shards")
FITTING = {  # flags of one task: the others refuse them
    "caption": (
        "prompt", "start_with", "prefix", "suffix", "num_captions", "ask", "match_model", "method",
        "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty", "avoid",
        "temperature", "top_p", "seed", "adapter",
    ),
    "embed": ("texts", "dtype"),
    "score": ("text", "head"),
}  # fmt: skip


def add_bulk(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.add_argument(
        "task", choices=TASKS, metavar="TASK", help="caption, embed (ITC) or score (ITM, ITC)"
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of pictures, tar shards or parquet files, with the folders in it; a file; a glob in "
        "quotes; an address such as s3://bucket/folder or hf://datasets/USER/NAME; or dataset:NAME",
    )
    parser.add_argument(
        "--out", required=True, metavar="DEST", help="a .jsonl or .parquet file, or a folder of files"
    )
    parser.add_argument(
        "--to",
        choices=FORMATS,
        help="in a folder: .txt or .caption, a text for each picture; or jsonl, parquet or shards: a file "
        "for each part of the source (jsonl; embeddings: parquet)",
    )
    table = parser.add_argument_group(
        "columns of parquet files and data sets", "by default the first that fit"
    )
    table.add_argument("--image-column", metavar="NAME", help="pictures: bytes, paths or http(s) addresses")
    table.add_argument("--text-column", metavar="NAME", help="texts to score or to embed")
    table.add_argument("--key-column", metavar="NAME", help="what rows go by in the results")
    table.add_argument("--split", default="train", help="of dataset:NAME (train)")
    table.add_argument("--subset", metavar="NAME", help="of dataset:NAME, its configuration")

    caption = parser.add_argument_group("caption")
    caption.add_argument(
        "--prompt", action="append", metavar="TEXT", help="captions go on from it; may be repeated"
    )
    caption.add_argument(
        "--start-with", action="append", metavar="TEXT", help="the same, and repeated in the output"
    )
    caption.add_argument("--prefix", metavar="TEXT", help="put before each caption")
    caption.add_argument("--suffix", metavar="TEXT", help="put after each caption")
    caption.add_argument("--ask", action="append", metavar="QUESTION", help="ask this of each picture, too")
    caption.add_argument("--match-model", metavar="MODEL", help="score each caption with it (ITM)")

    other = parser.add_argument_group("embed, score")
    other.add_argument("--texts", action="store_true", help="embed texts, not pictures")
    other.add_argument("--dtype", choices=("float16", "float32"), help="of embeddings (float16)")
    other.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="score each picture against this; may be repeated; by default against its own text",
    )
    other.add_argument("--head", nargs="+", choices=("itm", "itc"), help="scores wanted (both)")

    run = parser.add_argument_group("the run", "the same command goes on after a stop")
    run.add_argument(
        "--plan", action="store_true", help="say what would be done, try a little of it, write nothing"
    )
    run.add_argument("--batch-size", type=int, metavar="N", help="rows at once (captions 32, else 64)")
    run.add_argument(
        "--per-file",
        type=int,
        metavar="N",
        help="rows of a part, done as a whole; by default by the source's size",
    )
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="copies of the model, which share the cores; one a GPU, or as cores and memory allow. 0: no Ray",
    )
    run.add_argument("--address", metavar="ADDRESS", help="of a running Ray cluster, or auto ($RAY_ADDRESS)")
