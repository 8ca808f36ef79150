"""The words that each command understands. Imports nothing heavy: `blip2 --help` must not wait for torch."""

import argparse

from blip2 import __version__
from blip2.cli.bulk_arguments import add_bulk
from blip2.cli.serving import add_options

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8", "nf4")
STYLES = ("question", "short", "raw")
MAX_DESCRIPTIONS = 20
METHODS = ("greedy", "beam", "nucleus")

EPILOG = """The default model is embedded and knows drawn scenes only: circles, stars, colors. For photographs
choose a released one, such as --model blip2-opt-2.7b; `blip2 info` lists them with their sizes.
About other pictures the embedded models decline to answer; --force makes them.
Exit codes: 0 done, 1 failed, 2 used wrongly."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.module` names the file that runs the command."""
    parser = argparse.ArgumentParser(
        "blip2",
        description="BLIP-2: caption images, ask and chat about them, score them against texts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"blip2 {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    def command(name: str, module: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(module=module)
        sub.allow_abbrev = False
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        sub.add_argument("--quiet", "-q", action="store_true", help="no notes and no progress on stderr")
        sub.add_argument("--debug", action="store_true", help="show the libraries' notices and tracebacks")
        return sub

    caption = command("caption", "answers", "describe one or more pictures, or a folder of them")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="a file, an http(s) URL, or one folder")
    caption.add_argument(
        "--prompt",
        metavar="TEXT",
        help='words that the caption goes on from, such as "a photo of"; not repeated in the output',
    )
    caption.add_argument("--start-with", metavar="TEXT", help="the same, and repeated in the output")
    caption.add_argument("--prefix", default="", metavar="TEXT", help="put before each caption")
    caption.add_argument("--suffix", default="", metavar="TEXT", help="put after each caption")
    _add_decoding(caption, "beam, up to 30 tokens")
    caption.add_argument("--num-captions", type=int, metavar="N", help="captions a picture (default 1)")
    _add_folder(caption)
    _add_model(caption)

    bulk = command("bulk", "bulk", "caption, embed or score many pictures, on this machine or on many")
    add_bulk(bulk)
    _add_decoding(bulk, "captions: beam, up to 30 tokens; seed 42")
    bulk.add_argument("--num-captions", type=int, metavar="N", help="captions a prompt and picture (1)")
    _add_model(bulk, spread=False)

    ask = command("ask", "answers", "answer a question about a picture")
    ask.add_argument("image", metavar="IMAGE", help="a file or an http(s) URL")
    ask.add_argument("question", metavar="QUESTION")
    _add_style(ask)
    _add_decoding(ask, "beam, up to 10 tokens, length penalty -1")
    ask.add_argument("--num-captions", type=int, metavar="N", help="answers (default 1)")
    _add_model(ask)

    chat = command("chat", "talk", "talk about a picture, one question a line")
    chat.add_argument("image", metavar="IMAGE", help="a file or an http(s) URL")
    _add_style(chat)
    _add_decoding(chat, "greedy, up to 30 tokens; beam does not stream")
    _add_model(chat)

    match = command("match", "answers", "score texts against a picture, the best first")
    match.add_argument("image", metavar="IMAGE", help="a file or an http(s) URL")
    match.add_argument("texts", nargs="+", metavar="TEXT")
    _add_model(match, adapter=False)

    index = command("index", "search", "index the pictures of a folder, to find them by a text or a picture")
    index.add_argument("folder", metavar="FOLDER", help="of pictures")
    index.add_argument("--out", metavar="INDEX", help="the index's folder (FOLDER/.blip2-index)")
    index.add_argument("--recursive", "-r", action="store_true", help="the folders in it, too, from now on")
    index.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once (8)")
    _add_model(index, adapter=False)

    search = command("search", "search", "find pictures of an indexed folder")
    search.add_argument("index", metavar="INDEX", help="what `blip2 index` made, or the folder of pictures")
    search.add_argument("text", nargs="?", metavar="TEXT", help="what is in the pictures")
    search.add_argument("--image", metavar="IMAGE", help="instead of TEXT: a file or an http(s) URL")
    search.add_argument("--top", "-k", type=int, default=10, metavar="K", help="how many (10)")
    search.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="N",
        help="look at the N nearest again, together with the text (ITM): slower, and better (0)",
    )
    _add_model(search, adapter=False)

    compare = command("compare", "compare", "put questions about pictures to several models")
    compare.add_argument("image", nargs="?", metavar="IMAGE", help="a file or an http(s) URL")
    compare.add_argument("question", nargs="?", metavar="QUESTION")
    compare.add_argument(
        "--models", nargs="+", required=True, metavar="MODEL", help="two or more models, or adapters' folders"
    )
    compare.add_argument(
        "--input",
        metavar="CSV",
        help="instead of IMAGE and QUESTION: a file of columns image, question and, to score, reference",
    )
    compare.add_argument(
        "--out", metavar="HTML", help="with --input: the report; beside it, answers as .jsonl"
    )
    _add_style(compare)
    _add_decoding(compare, "beam, up to 10 tokens, length penalty -1")
    _add_machine(compare)

    explain = command("explain", "explain", "answer, and say how sure each word is and which parts matter")
    explain.add_argument("image", metavar="IMAGE", help="a file or an http(s) URL")
    explain.add_argument("question", metavar="QUESTION")
    explain.add_argument("--out", metavar="PNG", help="write the picture under a map")
    explain.add_argument(
        "--map",
        choices=("occlusion", "attention"),
        default="occlusion",
        help="occlusion: where hiding a part makes the answer less likely; attention: where queries read",
    )
    explain.add_argument("--grid", type=int, default=8, metavar="N", help="occlusion: parts a side (8)")
    explain.add_argument("--layer", type=int, metavar="N", help="attention: of the cross-attentions (last)")
    explain.add_argument("--query", type=int, metavar="N", help="attention: of one query (mean of all)")
    _add_style(explain)
    _add_decoding(explain, "greedy, up to 30 tokens")
    _add_model(explain)

    convert = command(
        "convert", "checkpoints", "turn a LAVIS .pth file, or a model and an adapter, into one folder"
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="a LAVIS checkpoint; or a model, or an adapter's folder, to merge"
    )
    convert.add_argument("folder", metavar="FOLDER", help="where to write: a new folder")
    convert.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter to fold into the model SOURCE")
    convert.add_argument("--llm", metavar="MODEL", help="folder or Hub id of the frozen language model")
    convert.add_argument("--vision", metavar="PTH", help="eva_vit_g.pth or clip_vit_L.pth, if PTH has none")
    convert.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id (the language model's)")
    convert.add_argument(
        "--dtype", choices=PRECISIONS[1:4], help="of the new folder (float32; with an adapter, as it was)"
    )

    download = command("download", "download", "download a released checkpoint, or go on with it")
    download.add_argument("model", metavar="MODEL", help="a name, such as blip2-opt-2.7b, or a Hub id")
    download.add_argument("--revision", help="a branch, tag or commit (main)")
    download.add_argument(
        "--precision",
        choices=("bf16", "bfloat16", "int8", "nf4"),
        help="then write a small folder in this precision, which --model NAME --precision finds",
    )
    download.add_argument("--out", metavar="FOLDER", help="of the small folder (beside the Hub's cache)")
    download.add_argument(
        "--delete-original",
        choices=("yes", "no"),
        help="what to do with the large one then; by default a terminal is asked, and else it stays",
    )

    verify = command("verify", "verify", "check a checkpoint's files, and what it computes, part by part")
    verify.add_argument("model", metavar="MODEL", help="a name, a folder, or a Hub id")
    verify.add_argument("--revision", help="a branch, tag or commit (main)")
    verify.add_argument(
        "--precision",
        choices=PRECISIONS[1:4],
        default="float32",
        help="to compare with transformers in; float32 (default) takes the most memory and is exact",
    )
    verify.add_argument("--device", default="cpu", help="to compare on: cpu (default), cuda, cuda:1 or mps")

    deploy = command("deploy", "deploy", "put this app on the Hugging Face Hub, as a Space")
    deploy.add_argument("space", metavar="USER/SPACE", help="a new Space, or one to bring up to date")
    deploy.add_argument("--hardware", choices=("cpu", "zerogpu"), default="cpu", help="default: cpu")
    deploy.add_argument(
        "--model",
        "-m",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="models offered, names or Hub ids; default: the embedded ones on cpu, "
        "blip2-opt-2.7b and blip2-flan-t5-xl on zerogpu",
    )
    deploy.add_argument("--title", default="BLIP-2", metavar="TEXT", help="default: BLIP-2")
    deploy.add_argument("--private", action="store_true", help="a new Space is for its owner alone")
    deploy.add_argument(
        "--votes",
        metavar="USER/DATASET",
        help="keep votes on compared answers in this dataset; by default they are not kept",
    )
    deploy.add_argument("--dry-run", metavar="FOLDER", help="write the Space to a new folder; upload nothing")

    bench = command("bench", "bench", "measure this package against transformers, on this machine")
    _add_bench(bench)

    serve = command("serve", "serve", "answer programs: an OpenAI-compatible HTTP server")
    add_options(serve)
    _add_models(serve)

    info = command("info", "checkpoints", "list the models, or describe one: parameters, sizes, memory")
    info.add_argument("model", nargs="?", metavar="MODEL", help="a name, a folder, or a Hub id in the cache")
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a folder of pictures", "each caption is on the disk at once; the same command goes on after a stop"
    )
    group.add_argument("--recursive", "-r", action="store_true", help="the folders in it, too")
    group.add_argument(
        "--to",
        metavar="WHERE",
        help=".txt (default) or .caption: a text beside each picture; or a table: a .csv or .jsonl file",
    )
    group.add_argument(
        "--if-exists",
        choices=("skip", "overwrite", "append"),
        help="what to do about pictures that have a caption there (skip)",
    )
    group.add_argument(
        "--ask", action="append", metavar="QUESTION", help="ask this of each picture, too; may be repeated"
    )
    group.add_argument(
        "--match-model", metavar="MODEL", help="score each caption with it (ITM); a table has the worst first"
    )
    group.add_argument("--preview", action="store_true", help="show the first five, and write nothing")
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (8)")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        nargs="+",
        default=["embedded"],
        metavar="SIZE",
        help="embedded (default), mid, mid-t5, itm, opt-2.7b, opt-6.7b, flan-t5-xl, flan-t5-xxl; one that is "
        "not in the cache is made up with random weights, nothing is downloaded",
    )
    parser.add_argument("--model", "-m", metavar="MODEL", help="instead: a name, a folder, or a Hub id")
    parser.add_argument(
        "--random", action="store_true", help="random weights, even if the cache has real ones"
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", help="keep folders with random weights there, and reuse them"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS[1:],
        help="a table each, with both sides in it; default: float32, and then --defaults",
    )
    parser.add_argument(
        "--defaults", action="store_true", help="a table of what each side does by itself: auto, and float32"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[0], metavar="N", help="a table each (all)")
    parser.add_argument("--repeats", type=int, metavar="N", help="pairs of runs (3 to 51, by their length)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="load, preprocess, encode, first-token, caption, beam, batch, decode, chat, match, contrast",
    )
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="in a batch (8)")
    parser.add_argument(
        "--side", choices=("both", "ours", "theirs"), default="both", help="measure one alone"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    parser.add_argument("--out", metavar="JSON", help="write the findings, with all times, to this file")
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios; needs matplotlib")


def words(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _add_model(parser: argparse.ArgumentParser, adapter: bool = True, spread: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", "-m", metavar="MODEL", help="a name, a folder, or a Hub id")
    if adapter:
        group.add_argument(
            "--adapter", metavar="FOLDER", help="a LoRA adapter; without --model, its own model is taken"
        )
    _add_machine(group, spread)


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        "-m",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="names, folders, Hub ids, or adapters' folders",
    )
    _add_machine(group)


def _add_machine(parser: argparse.ArgumentParser | argparse._ArgumentGroup, spread: bool = True) -> None:
    parser.add_argument(
        "--encoder",
        metavar="MODULE:FUNCTION",
        help="import the image encoder of a model that was trained with a function of one's own",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto (default): float32 for small models, else bfloat16 or float16 where the machine computes "
        "in it; int8 and nf4 are 8 and 4 bits for the language model",
    )
    parser.add_argument("--quantize-vision", action="store_true", help="int8, nf4: the image encoder too")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    if spread:
        parser.add_argument(
            "--max-memory",
            metavar="SIZES",
            help="weights that each device may hold, such as cpu=8GB,cuda:0=20GB; the model is spread over "
            "them",
        )
        parser.add_argument(
            "--offload-folder",
            metavar="FOLDER",
            help="keep on the disk, here, what --max-memory does not allow",
        )
    parser.add_argument(
        "--no-memory-check", action="store_true", help="load a model that may not fit into the free memory"
    )
    parser.add_argument(
        "--force", action="store_true", help="answer about pictures the model does not know too"
    )


def _add_style(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style",
        choices=STYLES,
        help="'Question: ... Answer:' (chat models: their own frame), '... Short answer:', or the text as it "
        "is; default: the model's own",
    )
    parser.add_argument(
        "--describe",
        type=int,
        choices=range(MAX_DESCRIPTIONS + 1),
        metavar="N",
        help=f"captions of its own that the model reads first, up to {MAX_DESCRIPTIONS}; default: its best",
    )


def _add_decoding(parser: argparse.ArgumentParser, default: str) -> None:
    """Fields of `Generation`; those left out keep the paper's values."""
    group = parser.add_argument_group("decoding", f"default: {default}")
    group.add_argument("--method", choices=METHODS)
    group.add_argument("--num-beams", type=int, metavar="N", help="beam: how many (5)")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--min-new-tokens", type=int, metavar="N")
    group.add_argument("--length-penalty", type=float, metavar="X", help="beam: below 0 for short answers")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 for less repetition")
    group.add_argument("--avoid", type=words, metavar="WORDS", help='never said, such as "photo,picture"')
    group.add_argument("--temperature", type=float, metavar="X", help="nucleus: above 0 (1)")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus: above 0, at most 1 (0.9)")
    group.add_argument("--seed", type=int, metavar="N", help="nucleus: makes it repeatable")
