"""Caption metrics by pycocoevalcap with its own tokenizer, as LAVIS computes them; most are Java programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.evaluation import Figures, MetricError


def caption_figures(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, spice: bool = False
) -> tuple[Figures, dict[str, float]]:
    """BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and, if wanted, SPICE of captions, by pycocoevalcap.

    METEOR or SPICE is left out, with a warning that says what to fetch, where it cannot run. CIDEr is left
    out of a single picture: a word's weight is how few pictures share it, and there is nothing to compare.

    Args:
        predictions: a caption by picture.
        references: the captions that people gave, by picture; the same pictures as in `predictions`, since
            CIDEr weighs words by all of them.
        spice: whether SPICE is wanted; it is slow and needs a download.

    Returns:
        Figures of all, in percent, and each picture's CIDEr in the same unit; its mean is the figure.

    Raises:
        MetricError: pictures differ, one has no reference, or there is no Java.
    """
    _check_pictures(predictions, references)
    words = tokenize({name: [predictions[name], *given] for name, given in references.items()})
    told = {name: texts[:1] for name, texts in words.items()}
    truths = {name: texts[1:] for name, texts in words.items()}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(truths, told, verbose=0)
    figures = {f"BLEU-{n}": 100 * float(value) for n, value in enumerate(bleu, start=1)}
    _add(figures, "METEOR", _meteor, truths, told)
    figures["ROUGE-L"] = 100 * float(Rouge().compute_score(truths, told)[0])
    each: dict[str, float] = {}
    if len(truths) > 1:
        mean, scores = Cider().compute_score(truths, told)
        figures["CIDEr"] = 100 * float(mean)
        each = {name: 100 * float(score) for name, score in zip(truths, scores, strict=True)}
    if spice:
        _add(figures, "SPICE", _spice, truths, told)
    return figures, each


def _check_pictures(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise MetricError("there are no captions to score")
    odd = sorted(predictions.keys() ^ references.keys(), key=str)
    if odd:
        raise MetricError(
            f"{len(odd)} pictures have a prediction or references alone ({', '.join(map(str, odd[:5]))}); "
            "captions are scored over the same pictures"
        )
    empty = [name for name, captions in references.items() if not captions]
    if empty:
        raise MetricError(f"{len(empty)} pictures have no reference ({', '.join(map(str, empty[:5]))})")


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Captions in lower case, words apart, punctuation gone: pycocoevalcap's Penn Treebank tokenizer.

    Its program is run here rather than by pycocoevalcap, which writes into its own folder and does not look
    whether the program failed.

    Raises:
        MetricError: there is no Java, or the program failed.
    """
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise MetricError(
            "captions are scored by pycocoevalcap, which is not installed: pip install pycocoevalcap"
        ) from error

    flat = [" ".join(caption.split()) for given in captions.values() for caption in given]
    lines = [line for line in flat if line]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [_java(), "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8")
    cut = done.stdout.removesuffix("\n").split("\n")
    if lines and (done.returncode or len(cut) != len(lines)):
        raise MetricError(
            f"the caption tokenizer gave {len(cut)} of {len(lines)} lines; Java said: {_reason(done.stderr)}"
        )
    gone = set(ptbtokenizer.PUNCTUATIONS)
    words = (" ".join(word for word in line.split() if word not in gone) for line in cut)
    found = iter([next(words) if line else "" for line in flat])
    return {name: [next(found) for _ in given] for name, given in captions.items()}


def _java() -> str:
    found = shutil.which("java")
    if found is None:
        raise MetricError(
            "captions are cut into words by a Java program, and there is no java here: install one "
            "(Debian and Ubuntu: apt-get install default-jre-headless; macOS: brew install openjdk; "
            "conda: conda install openjdk)"
        )
    return found


@contextmanager
def _english() -> Iterator[None]:
    """Java programs that start in this block write 0.5; METEOR cannot read its own 0,5 of other places."""
    name = "JAVA_TOOL_OPTIONS"
    before = os.environ.get(name)
    os.environ[name] = f"{before or ''} -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reason(said: str) -> str:
    """What a Java program complained of, on one line, without its call stack."""
    lines = [line.strip() for line in said.splitlines() if not line.startswith(("\tat", "Picked up "))]
    return " ".join(" ".join(lines).split())[:200] or "nothing"


Captions = Mapping[str, list[str]]


def _add(
    figures: Figures, name: str, compute: Callable[[Captions, Captions], float], *sets: Captions
) -> None:
    """Put a figure beside the others, or warn why it is left out."""
    try:
        figures[name] = 100 * compute(*sets)
    except MetricError as error:
        warnings.warn(f"{name} is left out: {error}", stacklevel=3)


def _meteor(truths: Captions, told: Captions) -> float:
    """METEOR 1.5: a Java program that reads captions as long as it is let live.

    Raises:
        MetricError: its files are not there, or it ended early.
    """
    from pycocoevalcap.meteor import meteor

    folder = Path(meteor.__file__).parent
    for name in (meteor.METEOR_JAR, "data/paraphrase-en.gz"):
        if not (folder / name).exists():
            raise MetricError(f"its {name} is missing: pip install --force-reinstall pycocoevalcap")
    bare = {name: [text.replace("|||", "") for text in texts] for name, texts in truths.items()}
    with _english():
        started = meteor.Meteor()
    with _ended(started) as scorer:
        try:
            mean, _ = scorer.compute_score(bare, told)
        except (OSError, ValueError) as error:
            scorer.meteor_p.kill()
            said = scorer.meteor_p.stderr.read().decode(errors="replace")
            raise MetricError(f"its program failed; Java said: {_reason(said)}") from error
    return float(mean)


@contextmanager
def _ended(scorer: Any) -> Iterator[Any]:
    """Let METEOR's program live no longer than this block.

    pycocoevalcap ends it when the object is collected, and waits for ever there if scoring failed, for a lock
    that scoring had taken.
    """
    process = scorer.meteor_p
    try:
        yield scorer
    finally:
        if scorer.lock.locked():
            scorer.lock.release()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # what was still to be written to it
                pipe.close()


def _spice(truths: Captions, told: Captions) -> float:
    """SPICE 1.0.

    Raises:
        MetricError: the language models that it reads were not downloaded, or its program failed.
    """
    from pycocoevalcap.spice import get_stanford_models as models
    from pycocoevalcap.spice.spice import Spice

    folder = Path(models.SPICEDIR) / models.SPICELIB
    if not all((folder / f"{models.JAR}{part}.jar").exists() for part in ("", "-models")):
        raise MetricError(
            f"it needs Stanford CoreNLP 3.6.0 (some hundred MB) in {folder}; with a network: "
            "python -c 'from pycocoevalcap.spice.get_stanford_models import *; get_stanford_models()'"
        )
    try:
        with _english():
            return float(Spice().compute_score(truths, told)[0])
    except (OSError, subprocess.CalledProcessError) as error:
        raise MetricError(f"its program failed ({error}); it was made for Java 8 and takes 8 GB") from error
