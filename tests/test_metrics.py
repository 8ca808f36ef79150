"""Scores of answers and of retrieval: the published rules, written out case by case."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from train.evaluation import MetricError
from train.evaluation.answer_metrics import CONTRACTIONS
from train.evaluation.metrics import (
    gqa_correct,
    lemmatizer,
    normalize_answer,
    recalls,
    vqa_accuracy,
    vqa_figures,
)

RULES = {
    # lower case, articles, blanks
    "Yes": "yes",
    "the": "",
    "A big  dog\n\tand an ant ": "big dog and ant",
    "theater": "theater",
    # number words up to ten, and none
    "two": "2",
    "None": "0",
    "One of the three": "1 of 3",
    "eleven": "eleven",
    # periods go unless a digit follows
    "yes.": "yes",
    "a.m.": "am",
    "U.S.A.": "usa",
    "3.5": "3.5",
    "5.": "5",
    ".5": ".5",
    "wait... 5": "wait 5",
    "." * 33: ".",  # the official tool removes 32
    # other marks become blanks, or nothing where a blank is beside one of their kind
    "red/blue": "red blue",
    "red, blue": "red blue",
    "t-shirt": "t shirt",
    "t - shirt": "t shirt",
    "up/down / left": "updown left",
    "-5": "5",
    "what?!": "what",
    '"stop"': "stop",
    "!": "",
    # a comma between digits makes all marks vanish
    "2,000": "2000",
    "1,000-2,000": "10002000",
    "1, 2": "1 2",
    # what is no punctuation
    "10:30": "10:30",
    "dog's": "dog's",
    "black & white": "black & white",
    "$5": "$5",
    "50%": "50%",
    # contractions get their apostrophe back; those that are words without it do not
    "dont": "don't",
    "don't": "don't",
    "Thats": "that's",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",
    "ow's'at": "'ow's'at",
    "twas": "'twas",
    "oclock": "o'clock",
    "hell": "hell",
    "were": "were",
    "its": "its",
    "somebody'd": "somebodyd",  # backwards in the official list
    "she dont": "she don't",
}


@pytest.mark.parametrize("text", RULES)
def test_normalization(text):
    assert normalize_answer(text) == RULES[text]


def test_every_contraction_has_lost_one_apostrophe():
    assert CONTRACTIONS.pop("somebody'd") == "somebodyd"
    try:
        for short, word in CONTRACTIONS.items():
            assert short.count("'") == word.count("'") - 1
            assert short.replace("'", "") == word.replace("'", "")
            assert short == short.lower()  # capitals never come this far
    finally:
        CONTRACTIONS["somebody'd"] = "somebodyd"
    assert len(CONTRACTIONS) > 110


def leave_one_out(agree: int, people: int = 10) -> float:
    """The published formula: over all subsets of all people but one."""
    said = [person < agree for person in range(people)]
    subsets = list(itertools.combinations(said, people - 1))
    return sum(min(1, sum(subset) / 3) for subset in subsets) / len(subsets)


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
@pytest.mark.parametrize("rules", ["2017", "2021"])
def test_leave_one_out(agree, accuracy, rules):
    assert accuracy == pytest.approx(leave_one_out(agree))
    references = ["red"] * agree + ["blue"] * (10 - agree)
    assert vqa_accuracy("red", references, rules=rules) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "references", "of_2017", "of_2021"),
    [
        # people who agree are taken at their word; of the two tools only the first still changes the answer
        ("Yes.", ["yes"] * 10, 1, 0),
        ("yes", ["yes"] * 10, 1, 1),
        ("two", ["two"] * 10, 0, 1),
        ("t-shirt", ["t-shirt"] * 10, 0, 1),
        # where people differ the first changes their punctuation alone, the second all
        ("t-shirt", ["t-shirt"] * 5 + ["shirt"] * 5, 1, 1),
        ("two", ["two"] * 8 + ["2"] * 2, 0.6, 1),
        ("the dog", ["The dog"] * 9 + ["dog"], 0.3, 1),
        ("dont", ["dont"] * 9 + ["don't"], 0.3, 1),
        ("a.m.", ["am"] * 3 + ["a.m."] + ["noon"] * 6, 1, 1),
        # blanks at the ends
        (" blue\n", ["blue"] * 4 + ["red"] * 6, 1, 1),
        ("blue", ["blue "] * 10, 0, 1),
        ("", ["red"] * 10, 0, 0),
    ],
)
def test_two_revisions_of_the_official_tool(answer, references, of_2017, of_2021):
    assert vqa_accuracy(answer, references) == pytest.approx(of_2017)
    assert vqa_accuracy(answer, references, rules="2021") == pytest.approx(of_2021)


def test_few_references():
    assert vqa_accuracy("The dog.", ["dog"]) == 1  # leave-one-out would leave nobody
    assert vqa_accuracy("cat", ["dog"]) == 0
    assert vqa_accuracy("dog", ["dog", "dog"]) == pytest.approx(1 / 3)
    with pytest.raises(MetricError, match="references"):
        vqa_accuracy("dog", [])


def test_figures_by_type():
    records = [
        {"score": 1.0, "answer_type": "yes/no", "question_type": "is the"},
        {"score": 0.3, "answer_type": "other", "question_type": "what is"},
        {"prediction": "red", "references": ["red"] * 2 + ["blue"] * 8, "answer_type": "other"},
        {"score": 0.0},
    ]
    figures = vqa_figures(records)
    assert list(figures) == ["accuracy", "other", "yes/no", "question: is the", "question: what is"]
    assert list(figures.values()) == pytest.approx([47.5, 45, 100, 100, 30])
    with pytest.raises(MetricError, match="no answers"):
        vqa_figures([])


def test_gqa():
    assert gqa_correct("The left.", "left") and gqa_correct("two", "2")
    assert not gqa_correct("left", "right") and not gqa_correct("lefts", "left")


TAGS = {"dogs": ("NOUN", "dog"), "running": ("VERB", "run"), "better": ("ADJ", "good"), "two": ("NUM", "2")}


def tagged(text):
    tokens = ((word, *TAGS.get(word, ("X", "?"))) for word in text.split())
    return [SimpleNamespace(text=word, pos_=tag, lemma_=lemma) for word, tag, lemma in tokens]


def test_lemmatization_is_of_nouns_and_verbs_alone():
    assert lemmatizer(tagged)("two better dogs running") == "two better dog run"


def test_missing_lemmatizer_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MetricError, match="spacy download en_core_web_sm"):
        lemmatizer()


@pytest.mark.network
def test_lemmatization_by_spacy():
    """Needs spaCy and its model, which are downloads; see the message of `lemmatizer`."""
    assert lemmatizer()("two dogs running") == "two dog run"


def test_recalls():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    assert recalls(scores, [{0}, {2}, {3}], ks=(1, 2, 3, 4)) == pytest.approx(
        {"R@1": 100 / 3, "R@2": 200 / 3, "R@3": 200 / 3, "R@4": 100}
    )
    # any of several counts, and right ones are not in each other's way
    assert recalls(scores, [{0, 1}, {0, 3}, {2, 3}], ks=(1, 3))["R@1"] == pytest.approx(200 / 3)
    assert recalls(scores[2:], [{2, 3}], ks=(2, 3)) == {"R@2": 0, "R@3": 100}


def test_recalls_equal_a_sort():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 60, generator=generator)
    positives = [{row, (7 * row) % 60} for row in range(40)]
    found = recalls(scores, positives)
    for k in (1, 5, 10):
        best = [set(row.argsort(descending=True)[:k].tolist()) for row in scores]
        hits = sum(bool(top & right) for top, right in zip(best, positives, strict=True))
        assert found[f"R@{k}"] == pytest.approx(100 * hits / 40)


def test_equal_scores_are_no_retrieval():
    assert recalls(torch.zeros(2, 20), [{0}, {19}]) == {"R@1": 0, "R@5": 0, "R@10": 0}
    unranked = torch.full((1, 20), -100.0)
    unranked[0, 3] = 5.0
    assert recalls(unranked, [{3}])["R@1"] == 100
    assert recalls(unranked, [{4}])["R@10"] == 0  # one of nineteen that nothing was said of


@pytest.mark.parametrize(
    ("scores", "positives", "message"),
    [
        (torch.zeros(2, 3), [{0}], "1 queries need scores"),
        (torch.zeros(0, 3), [], "0 queries"),
        (torch.zeros(1, 3), [set()], "query 0"),
        (torch.zeros(1, 3), [{3}], "0 to 2"),
        (torch.full((1, 3), float("nan")), [{0}], "NaN"),
    ],
)
def test_impossible_retrieval_is_refused(scores, positives, message):
    with pytest.raises(MetricError, match=message):
        recalls(scores, positives)
