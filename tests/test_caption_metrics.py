"""Caption metrics on a small fixed set: pycocoevalcap's beside the same computed here by definition."""

import gc
import math
import os
import warnings
from collections import Counter
from pathlib import Path

import psutil
import pytest
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from train.evaluation import MetricError, caption_metrics
from train.evaluation.caption_metrics import caption_figures, tokenize

REFERENCES = {
    "cat": ["A cat sat on the mat.", "The cat is on a mat!", "a small cat, sitting on its mat"],
    "dog": ["A dog runs across the green field", "the dog is running in a field of grass"],
    "bus": ["Two red buses wait at the station", "A red bus on a street, near people"],
    "sea": ["Waves break on the beach at sunset", "the sun goes down over the sea"],
}
PREDICTIONS = {
    "cat": "a cat sits on the mat",
    "dog": "a dog runs in a field of grass near the trees",
    "bus": "a red bus at the station",
    "sea": "the sun goes down over the sea",
}


@pytest.fixture(scope="module")
def words():
    cut = tokenize({name: [text, *REFERENCES[name]] for name, text in PREDICTIONS.items()})
    cut = {name: [text.split() for text in texts] for name, texts in cut.items()}
    return {name: texts[0] for name, texts in cut.items()}, {name: texts[1:] for name, texts in cut.items()}


@pytest.fixture
def no_meteor(monkeypatch):
    """Its program takes seconds to start."""
    monkeypatch.setattr(caption_metrics, "_meteor", lambda truths, told: 0.25)


# ---------------------------------------------------------------- definitions


def grams(words, n):
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu(told, truths, n):
    """Papineni et al., 2002: clipped precision over all pictures, brevity by the closest reference."""
    logs, length, closest = [], 0, 0
    for size in range(1, n + 1):
        right = total = 0
        for name, words in told.items():
            given = grams(words, size)
            most = Counter()
            for truth in truths[name]:
                most |= grams(truth, size)
            right += (given & most).total()
            total += given.total()
        logs.append(math.log(right / total))
    for name, words in told.items():
        length += len(words)
        closest += min((abs(len(truth) - len(words)), len(truth)) for truth in truths[name])[1]
    return 100 * math.exp(sum(logs) / n + min(0, 1 - closest / length))


def cider(told, truths):
    """Vedantam et al., 2015, CIDEr-D: tf-idf cosines clipped to the reference, a Gaussian of the lengths."""
    in_pictures = Counter()
    for given in truths.values():
        in_pictures.update({gram for truth in given for n in range(1, 5) for gram in grams(truth, n)})

    def vector(words, n):
        weight = {gram: math.log(len(truths) / max(1, in_pictures[gram])) for gram in grams(words, n)}
        return {gram: count * weight[gram] for gram, count in grams(words, n).items()}

    def similarity(words, truth):
        total = 0.0
        for n in range(1, 5):
            a, b = vector(words, n), vector(truth, n)
            norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
            total += sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / (norm or 1)
        return total / 4 * math.exp(-((len(words) - len(truth)) ** 2) / (2 * 6**2))

    return {
        name: 100 * 10 * sum(similarity(words, truth) for truth in truths[name]) / len(truths[name])
        for name, words in told.items()
    }


def longest_common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge(told, truths):
    """Lin, 2004, with beta 1.2: the best precision and the best recall over the references."""
    scores = []
    for name, words in told.items():
        common = [longest_common(words, truth) for truth in truths[name]]
        precision = max(common) / len(words)
        recall = max(c / len(truth) for c, truth in zip(common, truths[name], strict=True))
        scores.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    return 100 * sum(scores) / len(scores)


def test_figures_follow_their_definitions(words, no_meteor):
    figures, each = caption_figures(PREDICTIONS, REFERENCES)
    assert list(figures) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    for n in (1, 2, 3, 4):
        assert figures[f"BLEU-{n}"] == pytest.approx(bleu(*words, n), rel=1e-6)
    assert figures["ROUGE-L"] == pytest.approx(rouge(*words))
    assert each == pytest.approx(cider(*words))
    assert figures["CIDEr"] == pytest.approx(sum(each.values()) / 4)
    assert figures["METEOR"] == 25
    assert min(each.values()) > 0 and each["sea"] == max(each.values())


def test_bleu_of_one_sentence_by_hand(no_meteor):
    """6 words, 5 of them in a reference; 3 of 5 pairs: "a cat", "on the", "the mat"; one triple of 4."""
    figures, each = caption_figures({"cat": PREDICTIONS["cat"]}, {"cat": REFERENCES["cat"][:2]})
    assert figures["BLEU-1"] == pytest.approx(100 * 5 / 6)
    assert figures["BLEU-2"] == pytest.approx(100 * math.sqrt(5 / 6 * 3 / 5))
    assert figures["BLEU-3"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert figures["BLEU-4"] == pytest.approx(0, abs=0.1)
    assert "CIDEr" not in figures and each == {}  # nothing to weigh words by


def test_a_reference_repeated_is_perfect(no_meteor):
    given = {"one": ["a tall green tree stands here"], "two": ["seven boats cross that wide lake"]}
    figures, each = caption_figures({name: texts[0].upper() + "!" for name, texts in given.items()}, given)
    assert [figures[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert figures["ROUGE-L"] == pytest.approx(100)
    assert each == pytest.approx({"one": 1000, "two": 1000})


def test_a_caption_without_words_scores_nothing(no_meteor):
    figures, each = caption_figures(PREDICTIONS | {"cat": "", "dog": "..."}, REFERENCES)
    assert each["cat"] == each["dog"] == 0 < each["sea"]
    assert 0 < figures["BLEU-1"] < 100


# ---------------------------------------------------------------- the tokenizer


def test_tokenizer():
    """Brackets and joined marks stay: pycocoevalcap looks for them in capitals, and one by one."""
    texts = [
        "A man's dog, running (fast)!",
        'He can\'t read "STOP"; it is black-and-white...',
        "  two\nlines\u2028and\x85more ",
        "",
        "Un café – 5,000 $",
        "?!",
        "the end",
    ]
    assert tokenize({"a": texts[:3], "b": texts[3:]}) == {
        "a": [
            "a man 's dog running -lrb- fast -rrb-",
            "he ca n't read stop it is black-and-white",
            "two lines and more",
        ],
        "b": ["", "un café 5,000 $", "?!", "the end"],
    }


def test_tokenizer_equals_pycocoevalcaps():
    told = {name: [{"caption": text} for text in texts] for name, texts in REFERENCES.items()}
    assert tokenize(REFERENCES) == PTBTokenizer().tokenize(told)


def test_tokenizer_does_not_depend_on_the_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert tokenize({"a": ["Ein Café"]}) == {"a": ["ein café"]}


def test_missing_java_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MetricError, match="apt-get install"):
        caption_figures(PREDICTIONS, REFERENCES)


def broken_java(folder: Path, monkeypatch, script: str) -> None:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_failing_java_is_told(tmp_path, monkeypatch):
    broken_java(tmp_path, monkeypatch, "echo 'no room for a heap' >&2; exit 1")
    with pytest.raises(MetricError, match="no room for a heap"):
        caption_figures(PREDICTIONS, REFERENCES)
    broken_java(tmp_path, monkeypatch, "echo one line")
    with pytest.raises(MetricError, match="1 of 13 lines"):
        caption_figures(PREDICTIONS, REFERENCES)


# ---------------------------------------------------------------- METEOR and SPICE


def children() -> list[str]:
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


@pytest.mark.long
def test_meteor(monkeypatch):
    """By properties: a repeated reference is perfect, two words in common are something. 10 s each.

    Also on a machine whose decimals have a comma.
    """
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    given = {"one": ["a tall green tree stands here"], "two": ["seven boats cross that wide lake"]}
    texts = {name: [text] for name, [text] in given.items()}
    assert caption_metrics._meteor(given, texts) == pytest.approx(1)
    worse = caption_metrics._meteor(given, {"one": ["x y z"], "two": ["seven boats rest at home"]})
    assert 0.05 < worse < 0.45
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Duser.language=de -Duser.country=DE"
    assert not [line for line in children() if "meteor" in line]


@pytest.mark.parametrize("script", ["echo 'no room' >&2; exit 1", "read line; echo 'no room' >&2; echo no"])
def test_meteor_that_fails_is_left_out_and_ended(tmp_path, monkeypatch, script):
    monkeypatch.delenv("JAVA_TOOL_OPTIONS", raising=False)
    broken_java(tmp_path, monkeypatch, script)
    truths = {name: [texts[0]] for name, texts in REFERENCES.items()}
    with pytest.raises(MetricError, match="no room"):
        caption_metrics._meteor(truths, truths)
    assert "JAVA_TOOL_OPTIONS" not in os.environ
    gc.collect()  # pycocoevalcap's scorer waits here for ever if its lock is still taken
    assert not [line for line in children() if "meteor" in line]


def test_interrupted_meteor_is_ended(tmp_path, monkeypatch):
    broken_java(tmp_path, monkeypatch, "exec sleep 60")

    def interrupted(self, truths, told):
        self.lock.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(meteor.Meteor, "compute_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caption_metrics._meteor({"a": ["b"]}, {"a": ["b"]})
    gc.collect()
    assert not [line for line in children() if "sleep 60" in line]


def test_what_cannot_run_is_left_out(monkeypatch):
    monkeypatch.setattr(meteor, "METEOR_JAR", "none.jar")
    monkeypatch.setattr("pycocoevalcap.spice.get_stanford_models.JAR", "none")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figures, _ = caption_figures(PREDICTIONS, REFERENCES, spice=True)
    assert "METEOR" not in figures and "SPICE" not in figures and figures["CIDEr"] > 0
    said = [str(one.message) for one in told]
    assert any("METEOR is left out" in text and "none.jar" in text for text in said)
    assert any("SPICE is left out" in text and "get_stanford_models()" in text for text in said)


@pytest.mark.network
def test_spice():
    """Needs its language models, which are a download, and takes 8 GB."""
    figures, _ = caption_figures(PREDICTIONS, REFERENCES, spice=True)
    assert 10 < figures["SPICE"] < 100


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({"a": "b"}, {"a": ["b"], "c": ["d"]}, r"1 pictures .*\(c\)"),
        ({"a": "b", "c": "d"}, {"a": ["b"]}, r"1 pictures .*\(c\)"),
        ({"a": "b"}, {"a": []}, r"no reference \(a\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(predictions, references, message):
    with pytest.raises(MetricError, match=message):
        caption_figures(predictions, references)
