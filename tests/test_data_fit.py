"""fit() over image-text shards, resumed bitwise; and two processes of a process group against one."""

import contextlib
import os
import socket

import making as made
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from train import distributed
from train.data.loader import shards_loader
from train.data.samples import concatenate
from train.datasets import Shards
from train.engine import FitConfig, fit, make_accelerator


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, 4)

    def forward(self, batch):
        words = batch["input_ids"].float().mean(1, keepdim=True) / 100
        return {"loss": (self.layer(batch["pixel_values"].flatten(1)) - words).square().mean()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.make(tmp_path_factory.mktemp("shards") / "web", 60)


def loader(folder, workers):
    return shards_loader(Shards({folder: 1.0}), made.tokenize, 8, image_size=8, seed=5, workers=workers)


def train(folder, output, steps, workers):
    config = FitConfig(
        steps=8, learning_rate=1e-2, warmup_steps=2, precision="fp32", log_every=2, save_every=steps
    )
    source = loader(folder, workers)
    stopped = Stop(source, steps) if steps < 8 else source
    module = Tiny()
    with contextlib.suppress(KeyError):
        fit(module, stopped, config, output, accelerator=make_accelerator("fp32", cpu=True))
    source.close()
    return module.layer.weight.detach().clone()


class Stop:
    """A loader that fails after so many steps."""

    def __init__(self, source, steps):
        self.source, self.steps = source, steps
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict

    def __iter__(self):
        for number, batch in enumerate(self.source):
            if number == self.steps:
                raise KeyError("cut off")
            yield batch


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_cut_off_ends_as_the_whole_one(folder, tmp_path, workers):
    whole = train(folder, tmp_path / "whole", 8, workers)
    train(folder, tmp_path / "parts", 4, workers)
    assert (tmp_path / "parts" / "states" / "step-00000004").exists()
    assert torch.equal(train(folder, tmp_path / "parts", 8, workers), whole)


def _rank(rank, port, folder, output):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    source = loader(folder, workers=1)
    batches = [batch for batch, _ in zip(source, range(4), strict=False)]
    gathered = distributed.all_gather_object(batches)
    if rank == 0:
        torch.save(gathered, output)
    source.close()
    torch.distributed.destroy_process_group()


@pytest.mark.long  # test_data.py compares the same ranks without a process group
def test_two_processes_read_in_order_what_one_reads(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, args=(port, folder, str(tmp_path / "seen")), nprocs=2, start_method="spawn")
    ranks = torch.load(tmp_path / "seen", weights_only=True)
    source = loader(folder, workers=2)
    for ours, *theirs in zip(source, *ranks, strict=False):
        joined = concatenate(theirs)
        assert ours["keys"] == joined["keys"]
        tensors = [name for name in ours if isinstance(ours[name], torch.Tensor)]
        assert tensors and all(torch.equal(ours[name], joined[name]) for name in tensors)
    assert len(ranks[0]) == 4
    source.close()
