"""VQA's answer normalization and accuracy, GQA's match, OK-VQA's lemmatization.

Written from the published rules of the VQA challenge (visualqa.org/evaluation) and held to the behavior of
its tools, quirks included: a figure is of use only beside others that were computed alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from train.evaluation import MetricError

Lemmatizer = Callable[[str], str]
Rules = Literal["2017", "2021"]

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBER_WORDS.split())}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the apostrophe and the colon are none, nor are $ % & * #
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its own
MOST_PERIODS = 32  # that the official tool removes: it passes re.UNICODE where re.sub takes a count
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""  # not those that are words without it: we're, he'll, she'd, let's, it's


def _without_one(word: str) -> Iterator[str]:
    """The ways to write a contraction with one apostrophe forgotten."""
    for place, letter in enumerate(word):
        if letter == "'":
            yield word[:place] + word[place + 1 :]


CONTRACTIONS = {short: word for word in CONTRACTED.split() for short in _without_one(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official list has this one backwards


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Marks become spaces; those become nothing that stand beside a space anywhere in the answer.

    So "red/blue" is two words and "red, blue" too. A comma between digits makes every mark of the answer
    vanish: "2,000" is one number.
    """
    joined = COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        gone = joined or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if gone else " ")
    return PERIOD.sub("", found, count=MOST_PERIODS)


def _plain_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_answer(text: str) -> str:
    """An answer as VQA's tool compares it: no marks, articles or capitals; digits; "don't" for "dont".

    Args:
        text: an answer of a model or a person.

    Returns:
        What is left; "" of an answer that is but an article.
    """
    return _plain_words(_without_punctuation(_one_line(text)))


def vqa_accuracy(answer: str, references: Sequence[str], *, rules: Rules = "2017") -> float:
    """How far an answer agrees with those that people gave: min(1, n/3), where n of them said the same.

    It is the mean over all references of leaving one out, so that 3 of 10 give 0.9 and 2 of 10 give 0.6.

    Args:
        answer: of the model.
        references: of people, 10 in VQAv2 and OK-VQA. A single one is compared with after normalization
            of both (leave-one-out would leave none).
        rules: "2017" is the tool of VQA v2.0, which LAVIS has: the answer is normalized, references lose
            their punctuation if they are not all equal. "2021" is the tool's last revision: both are
            normalized, if references are not all equal, and compared as they stand if they are.

    Returns:
        0 to 1.

    Raises:
        MetricError: there is no reference.
    """
    if not references:
        raise MetricError("an answer cannot be scored without references: the list is empty")
    answer, truths = _one_line(answer), list(references)
    if len(truths) == 1:
        return float(gqa_correct(answer, truths[0]))
    if rules == "2021":
        truths = [_one_line(truth) for truth in truths]
    differ = len(set(truths)) > 1
    if rules == "2017":
        answer = normalize_answer(answer)
        truths = [_without_punctuation(truth) for truth in truths] if differ else truths
    elif differ:
        answer, truths = normalize_answer(answer), [normalize_answer(truth) for truth in truths]
    same = [truth == answer for truth in truths]
    agree = sum(same)
    return sum(min(1.0, (agree - left_out) / 3) for left_out in same) / len(same)


def gqa_correct(answer: str, truth: str) -> bool:
    """Whether two answers are equal after normalization of both; GQA's accuracy is the share of these."""
    return normalize_answer(answer) == normalize_answer(truth)


def lemmatizer(nlp: Callable[[str], Any] | None = None) -> Lemmatizer:
    """A function that brings the nouns and verbs of an answer to their base form, for OK-VQA.

    OK-VQA's references come stemmed; LAVIS lemmatizes its predictions (alone) to meet them, before they are
    normalized. It is worth about 5 points to Flan-T5 (LAVIS issue 156).

    Args:
        nlp: what cuts a text into tokens with pos_, lemma_ and text; by default spaCy's en_core_web_sm.

    Raises:
        MetricError: spaCy or its model is not installed.
    """
    tagged = nlp or _spacy_model()

    def lemmatize(answer: str) -> str:
        tokens = tagged(answer)
        return " ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in tokens)

    return lemmatize


def _spacy_model() -> Callable[[str], Any]:
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise MetricError(
            "OK-VQA is scored after lemmatization by spaCy's en_core_web_sm, which is not installed: "
            "pip install spacy && python -m spacy download en_core_web_sm"
        ) from error
