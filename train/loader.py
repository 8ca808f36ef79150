"""What `fit` asks of a data loader, and a small one for data that an index addresses.

Every rank iterates over its own batches and never runs out. A batch is a dict of tensors of B rows, plus
"keys": B names that say where each row came from, so that an error can name its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

Batch = dict[str, Any]


class DataError(RuntimeError):
    """The data cannot be trained on: too much of it had to be skipped, or it is not there."""


class Loader(Protocol):
    """An endless source of batches that can say where it stands and go back there."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out; plain values only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the loader that returned `state` would have."""


class IndexLoader:
    """Batches of shuffled indices, a pure function of (seed, step): resuming needs only the step.

    Every epoch is a new permutation, of which each rank takes its slice of every global batch; the incomplete
    batch at the end of an epoch is dropped.

    Args:
        num_examples: indices are 0 .. num_examples - 1.
        batch_size: of one rank.
        fetch: (indices, generator) -> batch. The generator depends on seed, step and rank alone: draw a
            caption, a crop or a prefix split from it, and from nothing else.
        seed: of order and draws.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        fetch: Callable[[list[int], np.random.Generator], Batch],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.steps_per_epoch = num_examples // (batch_size * world_size)
        if batch_size < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                f"{num_examples} examples do not fill one batch of {batch_size} x {world_size} processes; "
                "lower the batch size"
            )
        self.num_examples, self.batch_size, self.fetch = num_examples, batch_size, fetch
        self.seed, self.rank, self.world_size, self.step = seed, rank, world_size, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.fetch(
                self.indices(self.step), np.random.default_rng((self.seed, self.step, self.rank))
            )
            self.step += 1
            yield batch

    def indices(self, step: int) -> list[int]:
        """This rank's indices at `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_examples))
        start = (place * self.world_size + self.rank) * self.batch_size
        return self._order[1][start : start + self.batch_size].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seed": self.seed,
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        for name in ("seed", "num_examples", "batch_size"):
            if state[name] != own[name]:
                raise ValueError(
                    f"the saved loader had {name} {state[name]}, this one has {own[name]}: not the same data"
                )
        self.step = state["step"]
