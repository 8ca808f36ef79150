"""What the paper's tables are made of: VQA accuracy, GQA's match, caption metrics, recall.

Paper: section 4. All of it is imported from here; answers are scored in `answer_metrics`, captions in
`caption_metrics`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.evaluation import Figures, MetricError
from train.evaluation.answer_metrics import (
    Lemmatizer,
    gqa_correct,
    lemmatizer,
    normalize_answer,
    vqa_accuracy,
)
from train.evaluation.caption_metrics import caption_figures

__all__ = [
    "Figures",
    "Lemmatizer",
    "MetricError",
    "caption_figures",
    "gqa_correct",
    "lemmatizer",
    "normalize_answer",
    "recalls",
    "vqa_accuracy",
    "vqa_figures",
]


def vqa_figures(records: Sequence[Mapping[str, Any]]) -> Figures:
    """Mean accuracy in percent: of all, by answer type, and by question type as "question: how many".

    Args:
        records: each with "score" (0 to 1), or with "prediction" and "references" to compute it from; and
            "answer_type" and "question_type" where they are known.

    Raises:
        MetricError: there are no records.
    """
    if not records:
        raise MetricError("there are no answers to score")
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        score = record.get("score")
        if score is None:
            score = vqa_accuracy(record["prediction"], record["references"])
        scores["accuracy"].append(score)
        if record.get("answer_type"):
            scores[record["answer_type"]].append(score)
        if record.get("question_type"):
            scores[f"question: {record['question_type']}"].append(score)
    order = sorted(scores, key=lambda name: (name != "accuracy", name.startswith("question: "), name))
    return {name: 100 * sum(scores[name]) / len(scores[name]) for name in order}


def recalls(scores: Tensor, positives: Sequence[Collection[int]], ks: Sequence[int] = (1, 5, 10)) -> Figures:
    """Share of queries, in percent, with a right candidate among the best k: {"R@1": ..., "R@5": ...}.

    A wrong candidate that scores as high as the best right one counts as before it: equal scores are no
    retrieval, and candidates that were never scored are all equal.

    Args:
        scores: (N, M), of M candidates for each of N queries.
        positives: for every query, the columns that are right; any of them counts, as any of a picture's
            five captions does.
        ks: how many of the best are looked at.

    Raises:
        MetricError: counts differ, a query has no right candidate or one outside of M, or a score is NaN.
    """
    if scores.ndim != 2 or len(scores) != len(positives) or not len(scores):
        raise MetricError(f"{len(positives)} queries need scores of (N, M); these are {tuple(scores.shape)}")
    if bool(torch.isnan(scores).any()):
        raise MetricError("a score is NaN: the model gave no number for some pair")
    ranks: list[int] = []
    for row, right in zip(scores, positives, strict=True):
        if not right or min(right) < 0 or max(right) >= len(row):
            raise MetricError(
                f"query {len(ranks)} has the right candidates {sorted(right)}; at least one of "
                f"0 to {len(row) - 1} is wanted"
            )
        columns = torch.tensor(sorted(set(right)), device=scores.device)
        best = row[columns].max()
        ranks.append(int((row >= best).sum() - (row[columns] >= best).sum()))
    return {f"R@{k}": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in ks}
