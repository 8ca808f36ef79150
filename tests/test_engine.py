"""fit(): what it promises about resuming, stopping, bad numbers, logs and time.

10 steps equal a crash after 5 and a second call, bitwise; SIGTERM saves and ends the call; a step that is not
finite changes no weight and names its samples; a folder belongs to one run; evaluation does not disturb the
run.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train import state
from train.best import CollapseError, load_best
from train.engine import FitConfig, NonFiniteError, fit, make_accelerator
from train.loader import IndexLoader

CONFIG = FitConfig(
    steps=10,
    learning_rate=1e-2,
    warmup_steps=2,
    precision="fp32",
    log_every=5,
    save_every=5,
    seed=3,
    trackers=(),
)


class Toy(nn.Module):
    """Two losses, dropout, a frozen part, a tied weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.tied = self.head.weight
        self.dropout = nn.Dropout(0.3)

    def forward(self, batch):
        hidden = self.dropout(self.layer(self.frozen(batch["x"])))
        return {
            "loss_fit": (self.head(hidden) - batch["x"]).square().mean(),
            "loss_size": 0.1 * hidden.square().mean(),
            "size": hidden.abs().mean(),
        }


def fetch(indices, generator):
    noise = generator.standard_normal((len(indices), 4))
    return {
        "x": torch.tensor(noise + np.array(indices)[:, None] % 3, dtype=torch.float32),
        "keys": [f"sample-{i}" for i in indices],
    }


def loader(make=fetch, seed=1):
    return IndexLoader(13, 4, make, seed=seed)


def breaking(step, action):
    """`fetch` that acts when it makes the batch of a step, counted from 1."""
    calls = []

    def make(indices, generator):
        calls.append(1)
        batch = fetch(indices, generator)
        return action(batch) or batch if len(calls) == step else batch

    return make


def crash(batch):
    raise KeyboardInterrupt


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run of ten steps."""
    toy = Toy()
    result = fit(toy, loader(), CONFIG, tmp_path / "whole")
    assert (result.step, result.finished) == (10, True)
    return toy, tmp_path / "whole"


def test_ten_steps_equal_five_and_five(whole, tmp_path):
    toy, folder = whole
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(), loader(breaking(8, crash)), CONFIG, tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts" / "states").iterdir()] == ["step-00000005"]
    again = Toy()
    result = fit(again, loader(), CONFIG, tmp_path / "parts")
    assert (result.step, result.finished) == (10, True)
    assert same(weights(again), weights(toy))
    untimed = {"seconds", "samples_per_second", "data_wait"}
    for ours, theirs in zip(lines(folder), lines(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in ours.items() if k not in untimed} == {
            k: v for k, v in theirs.items() if k not in untimed
        }
    states = [
        torch.load(state.latest(f) / "state.pt", weights_only=True) for f in (folder, tmp_path / "parts")
    ]
    moments = [s["optimizer"]["state"] for s in states]
    assert all(
        torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i]
    )


def test_training_moves_only_what_may_move(whole):
    toy, _ = whole
    start = Toy()
    moved = {name for name, p in toy.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved == {"layer.weight", "layer.bias", "tied"}


def test_state_holds_the_trainable_weights_once(whole):
    from safetensors.torch import load_file

    toy, folder = whole
    saved = load_file(state.latest(folder) / "weights.safetensors")
    assert saved.keys() == {"layer.weight", "layer.bias", "tied"}
    assert same(saved, {name: weights(toy)[name] for name in saved})


def test_a_finished_run_is_left_alone(whole):
    toy, folder = whole
    before = weights(toy)
    again = Toy()
    assert fit(again, loader(), CONFIG, folder).finished
    assert same(weights(again), before)
    assert len(lines(folder)) == 2


def test_log_lines(whole):
    _, folder = whole
    first, last = lines(folder)
    assert (first["step"], last["step"]) == (5, 10)
    assert last["loss"] == pytest.approx(last["loss_fit"] + last["loss_size"], rel=1e-5)
    assert last["learning_rate"] < first["learning_rate"] <= CONFIG.learning_rate
    assert last["grad_norm"] > 0 and last["samples_per_second"] > 0 and 0 <= last["data_wait"] <= 1
    assert {"size", "seconds", "total_steps"} <= last.keys()
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == CONFIG.learning_rate


def test_keeps_the_last_states(tmp_path):
    config = dataclasses.replace(CONFIG, save_every=2, keep_states=3)
    fit(Toy(), loader(), config, tmp_path)
    names = sorted(p.name for p in (tmp_path / "states").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000010"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(number, whole, tmp_path, capsys):
    toy, _ = whole
    before = signal.getsignal(number)
    signalled = breaking(3, lambda batch: os.kill(os.getpid(), number))
    result = fit(Toy(), loader(signalled), CONFIG, tmp_path / "run")
    assert not result.finished and 3 <= result.step <= 4
    assert state.latest(tmp_path / "run").name == f"step-{result.step:08d}"
    assert "same command goes on" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    again = Toy()
    fit(again, loader(), CONFIG, tmp_path / "run")
    assert same(weights(again), weights(toy))


PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_engine import *
def slow(indices, generator):
    time.sleep(0.02)
    return fetch(indices, generator)
config = dataclasses.replace(CONFIG, steps=100_000, log_every=5, save_every=3)
result = fit(Toy(), loader(slow), config, {folder!r})
print("ended", result.step, result.finished)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_process_that_is_told_to_end(number, tmp_path):
    """SIGTERM: exit code 0 and nothing lost. SIGKILL: the last whole state is there and loads."""
    tests = Path(__file__).parent
    program = PROGRAM.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (
        (tmp_path / "log.jsonl").exists() and state.latest(tmp_path) is not None
    ):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    found = state.latest(tmp_path)
    step = int(found.name.removeprefix("step-"))
    if number == signal.SIGTERM:
        assert process.returncode == 0
        assert output.splitlines()[-1] == f"ended {step} False"
    toy = Toy()
    from train.optim import adamw

    restored = state.load(found, toy, adamw(toy))
    assert restored["step"] == restored["loader"]["step"] == step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite(bad, tmp_path):
    """It changes no weight, names the samples, and leaves the last state as it was."""
    seen = []

    def poison(batch):
        batch["x"][1, 2] = bad
        seen.extend(batch["keys"])

    class Watched(Toy):
        def forward(self, batch):
            self.history.append(weights(self))
            return super().forward(batch)

    toy = Watched()
    toy.history = []
    with pytest.raises(NonFiniteError, match=r"step 7: .*not applied") as error:
        fit(toy, loader(breaking(7, poison)), CONFIG, tmp_path)
    assert len(seen) == 4 and all(key in str(error.value) for key in seen)
    assert len(toy.history) == 8  # the host reads the flag one step late
    assert same(toy.history[6], toy.history[7])  # before and after step 7
    assert not same(toy.history[5], toy.history[6])
    assert state.latest(tmp_path).name == "step-00000005"


def test_a_bad_last_step_is_not_saved(tmp_path):
    def poison(batch):
        batch["x"][:] = float("nan")

    with pytest.raises(NonFiniteError, match="step 10"):
        fit(Toy(), loader(breaking(10, poison)), CONFIG, tmp_path)
    assert state.latest(tmp_path).name == "step-00000005"


def test_folder_of_another_run(whole):
    _, folder = whole
    other = dataclasses.replace(CONFIG, learning_rate=2e-2, weight_decay=0.1)
    with pytest.raises(
        state.StateError, match=r"another run \(2 settings differ: learning_rate: 0.01 there, 0.02 he"
    ):
        fit(Toy(), loader(), other, folder)
    operational = dataclasses.replace(CONFIG, log_every=1, save_every=3, max_minutes=5.0)
    assert fit(Toy(), loader(), operational, folder).finished


def test_state_of_another_model(whole):
    _, folder = whole

    class Wider(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(1, 1)

    with pytest.raises(state.StateError, match=r"2 parameters missing: extra\.bias, extra\.weight"):
        fit(Wider(), loader(), CONFIG, folder)
    thawed = Toy()
    thawed.frozen.requires_grad_(True)
    with pytest.raises(state.StateError, match="other frozen parts"):
        fit(thawed, loader(), CONFIG, folder)
    with pytest.raises(ValueError, match="seed 1, this one has 2"):
        fit(Toy(), loader(seed=2), CONFIG, folder)


def test_a_save_cut_short_leaves_the_last_state(whole, tmp_path, monkeypatch):
    """An error in the middle of saving leaves the state before; the rest is swept away at the next start."""
    toy, _ = whole
    original, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(state.SaveError, match=r"No space left.*step-00000005 is the last whole state"):
        fit(Toy(), loader(), CONFIG, tmp_path / "run")
    monkeypatch.undo()
    assert state.latest(tmp_path / "run").name == "step-00000005"
    again = Toy()
    fit(again, loader(), CONFIG, tmp_path / "run")
    assert same(weights(again), weights(toy))
    assert not list((tmp_path / "run" / "states").glob(".*"))


def test_evaluation_does_not_disturb_the_run(whole, tmp_path):
    toy, _ = whole
    modes = []

    def evaluate(objective, step):
        modes.append((objective.training, torch.is_grad_enabled()))
        torch.rand(3)
        np.random.rand(3)
        return {"score": len(modes)}

    watched = Toy()
    result = fit(
        watched, loader(), dataclasses.replace(CONFIG, eval_every=4), tmp_path / "run", evaluate=evaluate
    )
    assert modes == [(False, False)] * 3  # after 4, 8 and at the end
    assert same(weights(watched), weights(toy)) and watched.training
    assert result.metrics["eval/score"] == 3
    assert [line["step"] for line in lines(tmp_path / "run") if "eval/score" in line] == [4, 8, 10]


def test_time_budget_ends_with_a_complete_schedule(tmp_path):
    def slow(indices, generator):
        time.sleep(0.01)
        return fetch(indices, generator)

    config = dataclasses.replace(CONFIG, steps=100_000, max_minutes=1.5 / 60, log_every=5, save_every=0)
    began = time.perf_counter()
    result = fit(Toy(), loader(slow), config, tmp_path)
    assert result.finished and 10 < result.step < 100_000
    assert time.perf_counter() - began < 10
    rates = [line["learning_rate"] for line in lines(tmp_path)]
    floor, peak = config.min_learning_rate, config.learning_rate
    assert rates[-1] < floor + 0.1 * (peak - floor) < max(rates)


def test_bf16_trains_close_to_fp32(whole, tmp_path):
    """Under autocast the weights stay float32."""
    from accelerate.state import AcceleratorState

    toy, _ = whole
    AcceleratorState._reset_state()  # accelerate keeps one precision per process
    other = Toy()
    fit(other, loader(), dataclasses.replace(CONFIG, precision="bf16"), tmp_path / "run")
    AcceleratorState._reset_state()
    assert all(p.dtype == torch.float32 for p in other.parameters())
    distance = max(
        (a - b).abs().max().item() for a, b in zip(other.parameters(), toy.parameters(), strict=True)
    )
    assert 0 < distance < 0.05


def test_an_accelerator_of_another_precision(tmp_path):
    with pytest.raises(ValueError, match="precision is bf16, the accelerator's no"):
        config = dataclasses.replace(CONFIG, precision="bf16")
        fit(Toy(), loader(), config, tmp_path / "run", accelerator=make_accelerator("fp32", cpu=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"warmup_steps": 10}, "warmup_steps is 10"),
        ({"min_learning_rate": 1.0}, "min_learning_rate"),
        ({"max_minutes": 0.0}, "max_minutes"),
    ],
)
def test_contradictory_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_index_loader_is_a_function_of_seed_and_step():
    """Each epoch shows every full batch's worth once; ranks share a global batch without overlap."""
    one = IndexLoader(13, 4, fetch, seed=5)
    epoch = [one.indices(step) for step in range(3)]
    assert len({i for row in epoch for i in row}) == 12
    assert epoch != [one.indices(step) for step in range(3, 6)]
    ranks = [IndexLoader(13, 2, fetch, seed=5, rank=r, world_size=2) for r in range(2)]
    assert [ranks[0].indices(s) + ranks[1].indices(s) for s in range(3)] == epoch

    batches = iter(one)
    skipped = [next(batches)["x"] for _ in range(5)]
    again = IndexLoader(13, 4, fetch, seed=5)
    again.load_state_dict({**one.state_dict(), "step": 4})
    assert torch.equal(next(iter(again))["x"], skipped[4])
    with pytest.raises(ValueError, match="do not fill one batch"):
        IndexLoader(3, 4, fetch)


# --- the probe ---


def judged(values, folder, steps=None, **changes):
    """Train a toy whose probe takes these values, an evaluation every 2 steps."""
    values = iter(values)
    config = dataclasses.replace(CONFIG, eval_every=2, save_every=2, probe="score", **changes)
    toy = Toy()
    fit(toy, loader(), config, folder, evaluate=lambda objective, step: {"score": next(values)})
    return toy


def test_the_best_weights_are_kept(tmp_path):
    last, best = judged([1.0, 5.0, 4.0, 4.5, 4.9], tmp_path), Toy()
    known = json.loads((tmp_path / "best" / "best.json").read_text())
    assert known == {"step": 4, "metric": "score", "value": 5.0}
    assert load_best(tmp_path, best) == 4
    assert not same(weights(best), weights(last))


def test_a_collapse_stops_the_run(tmp_path, capsys):
    """A single bad evaluation is told; two in a row end it, and the best weights are there."""
    with pytest.raises(CollapseError, match=r"step 8: score has fallen from 5 to 3\.1: .*--collapse 0"):
        judged([5.0, 3.4, 3.2, 3.1], tmp_path, collapse=2 / 3)
    assert capsys.readouterr().out.count("warning: score has fallen from 5 to 3.2") == 1
    assert load_best(tmp_path, Toy()) == 2
    judged([5.0, 0.1, 4.0, 0.1, 4.0], tmp_path / "noisy", collapse=2 / 3)
    judged([5.0, 0.1, 0.1, 0.1, 0.1], tmp_path / "never")


def test_the_best_survives_a_stop(tmp_path):
    """A run that goes on compares with the best before it stopped."""
    with pytest.raises(StopIteration):
        judged([9.0, 1.0], tmp_path)
    judged([1.0] * 5, tmp_path)
    assert load_best(tmp_path, Toy()) == 2
