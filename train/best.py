"""The best weights of a run so far, by a metric of its evaluation, and what is told when it falls.

RUN/best/                            weights.safetensors and best.json: step, metric, value
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from train import distributed
from train.state import trainable


class CollapseError(RuntimeError):
    """What a model could do it can do no more, though its loss may still fall."""


class Best:
    """Keeps the best weights; each evaluation is shown to `judge`, on every rank.

    Args:
        folder: of the run.
        metric: the higher, the better.
        collapse: share of the best below which the metric may not stay for two evaluations; 0: it may.
        step: that the run goes on from; what was best only later does not count.
        say: prints a line.
    """

    def __init__(self, folder: Path, metric: str, collapse: float, step: int, say: Callable[[str], None]):
        self.folder, self.metric, self.collapse, self.say = folder / "best", metric, collapse, say
        path = self.folder / "best.json"
        known = json.loads(path.read_text()) if path.exists() else None
        self.value: float | None = known["value"] if known and known["step"] <= step else None
        self.fallen = False

    def judge(self, step: int, value: float, objective: nn.Module) -> None:
        """Keep the weights if they are the best.

        Raises:
            CollapseError: the metric has fallen below `collapse` of its best, twice in a row.
        """
        if self.value is None or value >= self.value:
            self.value, self.fallen = value, False
            self._save(step, objective)
        elif value >= self.collapse * self.value:
            self.fallen = False
        else:
            told = f"{self.metric} has fallen from {self.value:.4g} to {value:.4g}"
            if self.fallen:
                raise CollapseError(
                    f"step {step}: {told}: the model unlearns to look at the picture. The best weights are "
                    f"in {self.folder}. A lower learning rate, more or cleaner data, or fewer steps help; "
                    "--collapse 0 trains on regardless"
                )
            self.fallen = True
            self.say(f"warning: {told}; if it stays so low, the run stops at the next evaluation")

    def _save(self, step: int, objective: nn.Module) -> None:
        if distributed.rank() != 0:
            return
        temporary = self.folder.with_name(".best.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {k: p.detach().contiguous() for k, p in trainable(objective).items()}
        save_file(weights, temporary / "weights.safetensors")
        known = {"step": step, "metric": self.metric, "value": self.value}
        (temporary / "best.json").write_text(json.dumps(known) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        temporary.rename(self.folder)


def load_best(folder: Path, objective: nn.Module) -> int:
    """Restore the best weights of a run's folder into `objective`; returns their step."""
    weights = load_file(folder / "best" / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in trainable(objective).items():
            parameter.copy_(weights[name])
    step: int = json.loads((folder / "best" / "best.json").read_text())["step"]
    return step
