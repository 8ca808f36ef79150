"""Image-text shards for training: weighted blends of folders or remote stores, read by megatron-energon.

    python -m train.data prepare coco --help    # annotation files and images -> shards
    python -m train.data bench                  # images a second, against plain Pillow

`shards_loader` gives the loader that `fit` takes; docs/data.md describes the shards. Every rank has `workers`
energon workers, and world size x workers is what fixes the order of the samples: two processes with one
worker each read what one process with two reads. `train/data/samples.py` is what happens within a worker.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader
from megatron.energon.errors import reraise_exception
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import ConcatDataset, RepeatDataset

from blip2.images import CLIP_MEAN, CLIP_STD
from train import distributed
from train.captions import Tokenize
from train.data.plain import from_plain, to_plain
from train.data.reading import open_folders
from train.data.samples import Encoder, concatenate, describe
from train.datasets import Shards, Source
from train.loader import Batch, DataError

log = logging.getLogger("train.data")
SKIP_LIMIT, SKIP_LEAST = 0.01, 1000  # stop above this share, once so many samples were drawn
# A worker reads its share as runs of 10 neighbors in random order, and draws from 100 samples at hand. Longer
# runs would serve only disks that turn: a sample is a request of its own, to a disk as to a store.
READ = {"max_samples_per_sequence": 10, "parallel_shard_iters": 1}
SHUFFLE = {"shuffle_buffer_size": 100}
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TIME_OUT = 600  # seconds without a batch from a worker: the store hangs


def shards_loader(
    shards: Shards,
    tokenize: Tokenize,
    batch_size: int,
    *,
    image_size: int,
    seed: int,
    micro_batch_size: int | None = None,
    workers: int = 0,
    split: str = "train",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    rank: int | None = None,
    world_size: int | None = None,
    pictures: bool = False,
) -> ShardsLoader:
    """This rank's batches of a blend.

    Args:
        shards: folders and their weights.
        tokenize: of `train.captions.tokenize_for`.
        batch_size: over all processes; each gets batch_size / world size rows a step.
        image_size: S, pixels.
        seed: of order, captions, crops, flips and prefix splits.
        micro_batch_size: rows that a worker makes at a time, by default a rank's rows / workers. Where it
            times `workers` divides a rank's rows, every step takes as much from every worker, and the samples
            of a step do not depend on how the workers are spread over processes.
        workers: processes beside this one that read and augment; 0 does it here.
        split: "train" draws captions and crops, in random order and without end; "validation" takes each
            sample's first caption and whole picture, in a fixed order, and begins again after the last.
        mean: of the channels, in [0, 1], for folders whose `Source` has none.
        std: likewise.
        rank: of this process, by default torch.distributed's.
        world_size: number of processes, likewise.
        pictures: batches name the picture of each row in `images`, the same for all captions of one.

    Raises:
        DataError: a folder is not prepared, has no such split, or is smaller than the number of workers.
        ValueError: the batch size does not divide.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split is {split!r}; it is "train" or "validation"')
    rank = distributed.rank() if rank is None else rank
    world = distributed.world_size() if world_size is None else world_size
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} is no multiple of the {world} processes")
    rows = batch_size // world
    if micro_batch_size is None:
        micro_batch_size = rows // max(1, workers) if rows % max(1, workers) == 0 else rows
    if micro_batch_size < 1 or rows % micro_batch_size:
        raise ValueError(
            f"a process has {rows} rows a step, no multiple of micro_batch_size {micro_batch_size}; "
            "choose one that divides it"
        )
    return ShardsLoader(
        shards, tokenize, rows, micro_batch_size, image_size=image_size, seed=seed, split=split,
        mean=tuple(mean), std=tuple(std), pictures=pictures,
        workers=WorkerConfig(
            rank=rank, world_size=world, num_workers=workers, seed_offset=seed,
            global_error_handler=reraise_exception,
        ),
    )  # fmt: skip


class ShardsLoader:
    """A `train.loader.Loader` over tar shards; made by `shards_loader`.

    Attributes:
        drawn: samples this rank has drawn so far, skipped ones included.
        skipped: how many of them could not be used, by kind.
        examples: names of some of those, by kind.
        num_samples: in the split, over all ranks; each counted once.
    """

    def __init__(
        self,
        shards: Shards,
        tokenize: Tokenize,
        rows: int,
        micro_batch_size: int,
        *,
        image_size: int,
        seed: int,
        split: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: WorkerConfig,
        pictures: bool = False,
    ):
        self.rows, self.micro_batch_size = rows, micro_batch_size
        self.workers, self.train = workers, split == "train"
        folders = open_folders(shards, split, workers, READ)
        sources = {folder: shards.settings.get(folder, Source()) for folder in folders}
        self.encoder = Encoder(
            sources, tokenize, image_size=image_size, seed=seed, train=self.train, mean=mean, std=std,
            pictures=pictures,
        )  # fmt: skip
        self.folders, self.weights = folders, {**dict.fromkeys(folders, 1.0), **shards.weights}
        self.num_samples = sum(map(len, folders.values()))
        self._identity = {
            "split": split,
            "seed": seed,
            "processes": workers.world_size,
            "workers": workers.num_workers,
            "rows a step": rows,
            "micro_batch_size": micro_batch_size,
            "image_size": image_size,
            "folders": [[name, float(self.weights[name]), len(found)] for name, found in folders.items()],
        }
        self.drawn, self.skipped, self.examples = 0, dict[str, int](), dict[str, list[str]]()
        self._start()

    def __len__(self) -> int:
        """Steps of one pass, the incomplete batch at its end left out; the same on every rank."""
        return max(1, self.num_samples // (self.rows * self.workers.world_size))

    def _start(self) -> None:
        self._loader: SavableDataLoader = self._open()
        self._batches: Iterator[Batch] | None = None
        # While the workers' queues still live, and before torch's atexit, which would wait for workers that
        # nobody told to end.
        self._stop = weakref.finalize(self, _stop, self._loader)
        self._stop.atexit = False

    def _open(self) -> SavableDataLoader:
        workers, encoder, size = self.workers, self.encoder, self.micro_batch_size
        found = [LoadedDataset(dataset=f, weight=self.weights[name]) for name, f in self.folders.items()]
        if self.train:
            dataset = encoder.build_train_datasets(
                datasets=found, worker_config=workers, batch_size=size,
                blend_mode=DatasetBlendMode.DATASET_WEIGHT, **SHUFFLE,
            )  # fmt: skip
        else:
            parts = [folder.build() for folder in self.folders.values()]
            dataset = RepeatDataset(ConcatDataset(*parts, worker_config=workers), worker_config=workers)
            dataset = encoder.build_encode_sample(dataset, worker_config=workers)
            dataset = encoder.build_batch(dataset, batch_size=size, worker_config=workers)
        loader = get_savable_loader(
            dataset,
            watchdog_timeout_seconds=TIME_OUT,
            fail_on_timeout=True,
        )
        loader.pin_memory = torch.cuda.is_available()
        loader.collate_fn = _as_it_is  # torch's would look through every batch for arrays; there are none
        if workers.num_workers:
            loader.worker_init_fn = _InitWorker(loader.worker_init_fn)
        return loader

    # --- batches ---

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = iter(self._loader)
            atexit.register(self._stop)
        while True:
            parts = []
            for _ in range(self.rows // self.micro_batch_size):
                try:
                    part = next(self._batches)
                except DataError as error:  # a worker's, with its traceback in the text
                    raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None
                self._count(*part.pop("report"))
                parts.append(part)
            parts.sort(key=lambda part: part["worker"])
            for part in parts:
                del part["worker"]
            yield concatenate(parts)

    def _count(self, drawn: int, skipped: dict[str, int], examples: dict[str, list[str]]) -> None:
        before = sum(self.skipped.values())
        self.drawn += drawn
        for kind, count in skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
            names = self.examples.setdefault(kind, [])
            names.extend(examples[kind][: max(0, 3 - len(names))])
        total = sum(self.skipped.values())
        told = (
            f"{total:,} of {self.drawn:,} samples could not be used: {describe(self.skipped, self.examples)}"
        )
        if self.drawn >= SKIP_LEAST and total > SKIP_LIMIT * self.drawn:
            self.close()
            raise DataError(
                f"{told}. That is {total / self.drawn:.1%}, above the limit of {SKIP_LIMIT:.0%}: repair or "
                "re-download these shards, or prepare the data again, which leaves such samples out"
            )
        if total and len(str(total)) > len(str(before or "")):  # the first, the tenth, the hundredth ...
            log.warning("skipped %s", told)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, and the counts; plain values only."""
        return {
            "identity": self._identity,
            "energon": to_plain(self._loader.save_state_rank()),
            "drawn": self.drawn,
            "skipped": dict(self.skipped),
            "examples": {kind: list(names) for kind, names in self.examples.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the loader that returned `state` would have.

        Raises:
            ValueError: it read other data, or in another order.
        """
        for name, ours in self._identity.items():
            if (theirs := state["identity"][name]) != ours:
                raise ValueError(
                    f"the saved loader had {name} {theirs}, this one has {ours}: another order of samples"
                )
        if self._batches is not None:
            self.close()
            self._start()
        self._loader.restore_state_rank(from_plain(state["energon"]))
        self.drawn, self.skipped = state["drawn"], dict(state["skipped"])
        self.examples = {kind: list(names) for kind, names in state["examples"].items()}

    def close(self) -> None:
        """Stop the workers; the loader hands out no more batches."""
        self._stop()


def _as_it_is(batch: Any) -> Any:
    return batch


def _stop(loader: SavableDataLoader) -> None:
    if (running := getattr(loader, "_iterator", None)) is not None:
        workers = list(running._workers)
        try:
            running._shutdown_workers()
        finally:  # what is still there hangs, and this process would wait for it at its end
            for worker in workers:
                worker.kill()
                worker.join()


class _InitWorker:
    """Readies a worker process: it lives as long as the training process, whatever signals reach it.

    Ctrl-C and a scheduler's SIGTERM reach every process; a worker that died of them would take away the state
    that the training process is about to save. When that process dies, however, Linux ends the worker.
    """

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, worker: int) -> None:
        self.inner(worker)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
