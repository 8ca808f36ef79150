"""Faults: real training processes that are signalled, killed, orphaned, or run out of disk."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pretraining import OPTIONS, SMALL, make_parts
from test_engine import CONFIG, Toy, fetch, loader

from train import state
from train.engine import dataclasses, fit
from train.optim import adamw

ROOT = Path(__file__).parent.parent
ALONE = [sys.executable, "-m", "train.pretrain"]
PAIR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ALONE[1:]]
LONG = ["--steps=100000", "--save-every=20", "--log-every=1"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def arguments(parts, output, *more):
    start = ["--start-from", str(parts / "encoder"), "--output", str(output)]
    return ["scenes-stage1", *start, *OPTIONS, *SMALL, "--no-telling", *more]


@contextlib.contextmanager
def training(command, log, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, **options
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def logged(folder, step=2):
    """Whether the run has come to a step."""
    path = folder / "log.jsonl"
    return path.exists() and any(
        json.loads(line)["step"] >= step for line in path.read_text().splitlines()[:-1]
    )


def ranks(process):
    """The training processes below a launcher."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in found]


def alive(number):
    try:
        return "zombie" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


@pytest.mark.long
def test_a_launcher_that_is_told_to_end(parts, tmp_path):
    """Both ranks took part; the state is saved, the command is printed, and it goes on."""
    command = arguments(parts, tmp_path / "run", *LONG)
    with training(PAIR + command, tmp_path / "log") as process:
        until(lambda: logged(tmp_path / "run"))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    said = (tmp_path / "log").read_text()
    assert "2 process(es)" in said
    saved = state.latest(tmp_path / "run")
    step = int(saved.name.removeprefix("step-"))
    assert f"stopped by a signal after step {step}" in said
    assert re.search(r"to go on:\ntorchrun --nproc-per-node 2 -m train\.pretrain scenes-stage1 ", said)
    ranks = torch.load(saved / "state.pt", weights_only=True)["ranks"]
    assert len(ranks) == 2 and not torch.equal(ranks[0]["rng"]["torch"], ranks[1]["rng"]["torch"])

    short = [f"--steps={step + 3}" if word.startswith("--steps") else word for word in command]
    result = subprocess.run([*ALONE, *short], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "fit.steps" in result.stderr  # another length is another run


@pytest.mark.long
def test_a_rank_that_is_told_to_end(parts, tmp_path):
    """A signal to one training process ends both with exit code 0, which the launcher passes on."""
    with training(PAIR + arguments(parts, tmp_path / "run", *LONG), tmp_path / "log") as process:
        until(lambda: logged(tmp_path / "run"))
        os.kill(ranks(process)[1], signal.SIGINT)
        assert process.wait(60) == 0
    assert "to go on:" in (tmp_path / "log").read_text()
    assert state.latest(tmp_path / "run") is not None


@pytest.mark.long
def test_a_rank_that_dies(parts, tmp_path):
    """The other ends too, with a sentence, and soon."""
    with training(PAIR + arguments(parts, tmp_path / "run", *LONG), tmp_path / "log") as process:
        until(lambda: state.latest(tmp_path / "run") is not None)
        os.kill(ranks(process)[1], signal.SIGKILL)
        assert process.wait(60) != 0
    assert state.latest(tmp_path / "run").name >= "step-00000020"
    said = (tmp_path / "log").read_text()
    assert "error: rank 0 lost another process" in said and "to go on:" in said


@pytest.mark.long
@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_parent_that_dies(kept, parts, tmp_path):
    """Training saves and ends; under nohup it stays."""
    command = [*ALONE, *arguments(parts, tmp_path / "run", *LONG)]
    if kept:
        command = ["nohup", *command]
    parent = (  # the tests themselves may run under nohup
        "import signal, subprocess, sys, time; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    )
    with training([sys.executable, "-c", parent, *command], tmp_path / "log") as process:
        until(lambda: logged(tmp_path / "run"))
        [child] = ranks(process)
        process.kill()
        process.wait()
        if kept:
            time.sleep(3)
            assert alive(child)
            os.kill(child, signal.SIGTERM)
        until(lambda: not alive(child), 20)
    assert "the state is saved" in (tmp_path / "log").read_text()
    assert state.latest(tmp_path / "run") is not None


# --- the loop alone ---


def slow(indices, generator):
    time.sleep(0.002)
    return fetch(indices, generator)


def endless(folder):
    """A run that saves after every step; in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    fit(Toy(), loader(slow), dataclasses.replace(CONFIG, steps=100_000, save_every=1, log_every=1), folder)


@pytest.mark.long
def test_killed_at_twenty_moments(tmp_path):
    """Whatever has a state's name is whole, and the next process goes on from it."""
    chance, steps = random.Random(0), []
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=endless, args=(tmp_path,))
        process.start()
        before = state.latest(tmp_path)
        until(lambda before=before: state.latest(tmp_path) not in (None, before), 30)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        toy = Toy()
        found = state.latest(tmp_path)
        restored = state.load(found, toy, adamw(toy))
        assert found.name == f"step-{restored['step']:08d}" and restored["loader"]["step"] == restored["step"]
        steps.append(restored["step"])
    assert steps == sorted(steps) and len(set(steps)) == 20


def limited(folder, size, said):
    """A run that may write no file larger than `size` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        fit(Toy(), loader(), CONFIG, folder)
    except state.SaveError as error:
        said.send(str(error))


def test_a_full_disk(tmp_path):
    """The state that was there stays whole, and the run goes on once there is room."""
    fit(Toy(), loader(), dataclasses.replace(CONFIG, steps=10), tmp_path / "whole")
    fit(Toy(), loader(), dataclasses.replace(CONFIG, save_every=5, steps=10), tmp_path / "run")
    newest = state.latest(tmp_path / "run")
    size = (newest / "state.pt").stat().st_size
    subprocess.run(["rm", "-r", str(newest)], check=True)  # as if step 10 had still to come
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=limited, args=(tmp_path / "run", size // 2, there)
    )
    process.start()
    process.join(60)
    assert here.poll(1)
    said = here.recv()
    assert "step 10 could not be saved" in said and "step-00000005 is the last whole state" in said
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step-00000005"]
    fit(Toy(), loader(), CONFIG, tmp_path / "run")
    saved = [torch.load(state.latest(tmp_path / name) / "state.pt") for name in ("whole", "run")]
    assert saved[0]["step"] == saved[1]["step"] == 10
