"""Two processes (gloo) against one, and against the reference: gathers, losses, gradients, fit.

One pair of processes does everything and writes down what it saw; the tests compare. Nothing relies on fork.
"""

import os
import signal

import lavis
import numpy as np
import pytest
import torch
from pairing import run_pair
from torch import nn

from train import distributed, state
from train.engine import FitConfig, fit
from train.loader import IndexLoader

pytestmark = pytest.mark.long

CONFIG = FitConfig(
    steps=6,
    learning_rate=1e-2,
    warmup_steps=2,
    precision="fp32",
    log_every=3,
    save_every=3,
    seed=3,
    trackers=(),
)


class Contrast(nn.Module):
    """A loss that looks at every process's rows, with and without gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, batch):
        x = self.layer(batch["x"])
        scores = x @ distributed.gather(x).T + (x @ distributed.gather_with_grad(x.tanh()).T).square()
        target = distributed.rank() * len(x) + torch.arange(len(x))
        return {
            "loss": nn.functional.cross_entropy(scores, target),
            "rank": torch.tensor(float(distributed.rank())),
        }


def fetch(indices, generator):
    rows = [np.random.default_rng(index).standard_normal(3) for index in indices]
    return {"x": torch.tensor(np.array(rows), dtype=torch.float32), "keys": [f"sample-{i}" for i in indices]}


def loader(make=fetch):
    rank, world = distributed.rank(), distributed.world_size()
    return IndexLoader(17, 4 // world, make, seed=1, rank=rank, world_size=world)


def acting(step, action):
    calls = []

    def make(indices, generator):
        calls.append(1)
        batch = fetch(indices, generator)
        if len(calls) == step:
            action(batch)
        return batch

    return make


# --- the reference model ---


def reference_step(rank):
    """Losses of this rank on its three pairs with the recorded negatives, and the gradients after DDP."""
    model, tensors = lavis.model("stage1_two_ranks")
    model.eval()
    negatives = tuple(tensors[f"outputs.rank{rank}.negative_{kind}_index"] for kind in ("text", "image"))
    own = {
        name: tensors[f"inputs.{name}"][3 * rank : 3 * rank + 3] for name in ("input_ids", "attention_mask")
    }
    pixels = tensors["inputs.pixel_values"][3 * rank : 3 * rank + 3]
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = wrapped(
        pixels, **own, gather=distributed.gather, gather_with_grad=distributed.gather_with_grad,
        rank=rank, sample_negatives=lambda *_: negatives,
    )  # fmt: skip
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {name: value.detach() for name, value in losses.items()}, gradients


# --- the two processes ---


def work(rank, folder, accelerator):
    seen = {}
    seen["world"] = (distributed.rank(), distributed.world_size())

    x = torch.arange(4.0).reshape(2, 2) + 10 * rank
    x.requires_grad_()
    plain, attached = distributed.gather(x), distributed.gather_with_grad(x)
    (attached * (1 + rank) * torch.arange(8.0).reshape(4, 2)).sum().backward()
    seen["gather"] = (plain, plain.requires_grad, attached.detach(), x.grad)

    seen["reference"] = reference_step(rank)

    whole = Contrast()
    result = fit(whole, loader(), CONFIG, folder / "whole", accelerator=accelerator)
    seen["fit"] = (result.step, result.metrics, whole.state_dict())

    # Only rank 1 is signalled; both stop after the same step and go on together.
    def stop(batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = fit(Contrast(), loader(acting(4, stop)), CONFIG, folder / "parts", accelerator=accelerator)
    again = Contrast()
    fit(again, loader(), CONFIG, folder / "parts", accelerator=accelerator)
    seen["stopped"] = (stopped.step, stopped.finished, again.state_dict())

    # Only rank 0 has a bad sample; both stop.
    def poison(batch):
        if rank == 0:
            batch["x"][0] = float("nan")

    try:
        fit(Contrast(), loader(acting(2, poison)), CONFIG, folder / "bad", accelerator=accelerator)
    except RuntimeError as error:
        seen["bad"] = str(error)
    return seen


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What the two ranks saw, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    return run_pair(work, folder), folder


def test_both_ranks_take_part(pair):
    assert [seen["world"] for seen in pair[0]] == [(0, 2), (1, 2)]


def test_gathers(pair):
    """Rows in rank order; with gradient, the gradients of both ranks' uses are summed."""
    rows = torch.arange(4.0).reshape(2, 2)
    both, use = torch.cat([rows, rows + 10]), torch.arange(8.0).reshape(4, 2)
    for rank, seen in enumerate(pair[0]):
        plain, tracked, attached, gradient = seen["gather"]
        assert torch.equal(plain, both) and torch.equal(attached, both) and not tracked
        assert torch.equal(gradient, (1 + 2) * use[2 * rank : 2 * rank + 2])


def test_single_process_gathers():
    x = torch.ones(2, 2, requires_grad=True)
    assert not distributed.gather(x).requires_grad
    assert distributed.gather_with_grad(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather_object("a") == ["a"]


def test_reference_losses(pair):
    _, tensors = lavis.read("stage1_two_ranks")
    for rank, seen in enumerate(pair[0]):
        losses = seen["reference"][0]
        for ours, theirs in (("loss_itc", "loss_itc"), ("loss_itm", "loss_itm"), ("loss_itg", "loss_lm")):
            expected = tensors[f"outputs.rank{rank}.{theirs}"].item()
            assert losses[ours].item() == pytest.approx(expected, abs=2e-5)


def test_reference_gradients(pair):
    """Averaged over ranks as DistributedDataParallel does; here a wrong gather would show."""
    _, tensors = lavis.read("stage1_two_ranks")
    for seen in pair[0]:
        errors = lavis.gradient_errors(seen["reference"][1], tensors)
        assert len(errors) == 17 and max(errors.values()) <= 1e-4


def test_two_processes_train_as_one(pair, tmp_path):
    """Half batches on two ranks equal whole batches on one: weights, and the logged mean loss."""
    whole = Contrast()
    result = fit(whole, loader(), CONFIG, tmp_path)
    for seen in pair[0]:
        step, metrics, trained = seen["fit"]
        assert step == 6 and metrics["rank"] == 0.5  # the mean over ranks
        assert metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
        for name, value in whole.state_dict().items():
            assert torch.allclose(value, trained[name], atol=1e-5), name


def test_a_signal_to_one_rank_stops_both(pair):
    for seen in pair[0]:
        step, finished, weights = seen["stopped"]
        assert (step, finished) == (5, False)
        assert all(torch.equal(value, weights[name]) for name, value in seen["fit"][2].items())


def test_a_bad_sample_on_one_rank_stops_both(pair):
    good, bad = pair[0][1]["bad"], pair[0][0]["bad"]
    assert "rank 0 had loss nan" in bad and "sample-" in bad
    assert "step 2" in good and "rank 1" in good


def test_another_number_of_processes_is_refused(pair):
    with pytest.raises(state.StateError, match=r"saved by 2 process\(es\), this run has 1"):
        fit(Contrast(), loader(), CONFIG, pair[1] / "whole")


def test_a_launcher_that_starts_fewer_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2, but 1 process"):
        distributed.check_launch(1)
