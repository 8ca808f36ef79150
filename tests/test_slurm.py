"""The scripts under examples/slurm: they parse, name what exists, start, stop and queue again as they say."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tyro

from train import plan
from train.recipes import RECIPES

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*"))
STUBS = {
    "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || exit $?; done',
    "scontrol": 'echo "scontrol $*" >> log; echo node-1; echo node-2',
    "python": 'echo "rank $RANK of $WORLD_SIZE at $MASTER_ADDR: $*" >> log; eval "$TRAINING"',
    "torchrun": 'echo "torchrun $*" >> log',
}


def run(script, *arguments, folder, training="true"):
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "TRAINING": training,
    }
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    log = folder / "log"
    return done, log.read_text() if log.exists() else ""


def test_there_are_scripts():
    assert [path.name for path in SCRIPTS] == ["one-node.sbatch", "torchrun.sh", "two-nodes.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(path):
    """It parses, and every command it tells one to type is one of ours."""
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    told = re.findall(r"^#   (?:\w+=\S+ )*(.+?)(?:  +#.*)?$", path.read_text(), re.M)
    assert told
    for line in told:
        words = line.split()
        name = next(i for i, word in enumerate(words) if word in RECIPES)
        assert (FOLDER.parent.parent / words[name - 1]).exists() or words[:2] == ["python", "-m"]
        rest = plan.take_options([word for word in words[name:] if word != "--fetch"])[1]
        flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
        choices = {recipe: ("", make()) for recipe, make in RECIPES.items()}
        made = tyro.extras.overridable_config_cli(choices, args=[*rest, "--output", "x"], config=flat)
        gpus = 16 if "two" in path.name else 8
        assert made.batch_size // gpus % (made.execution.micro_batch_size or 1) == 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_signals_the_processes(nodes):
    """The step is signalled, not the script, and a process for every GPU is what srun starts."""
    text = (FOLDER / ("one-node.sbatch" if nodes == 1 else "two-nodes.sbatch")).read_text()
    for line in (
        "--signal=TERM@120",
        "--requeue",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        f"--nodes={nodes}",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "torchrun" not in text


@pytest.mark.parametrize("script", ["one-node.sbatch", "two-nodes.sbatch"])
def test_every_process_is_started_and_a_stopped_run_queued_again(script, tmp_path):
    done, log = run(FOLDER / script, "stage1-vitg", "--seed", "a b", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (
            f"rank {rank} of 2 at node-1: -m train.pretrain stage1-vitg --output runs/stage1-vitg --seed a b"
            in log
        )
    assert "scontrol requeue 7" in log


def test_a_finished_run_is_not_queued_again(tmp_path):
    done, log = run(FOLDER / "one-node.sbatch", "x", folder=tmp_path, training="mkdir -p runs/x/model")
    assert done.returncode == 0 and "requeue" not in log


def test_a_failed_run_is_not_queued_again(tmp_path):
    done, log = run(FOLDER / "one-node.sbatch", "x", folder=tmp_path, training="exit 3")
    assert done.returncode == 3 and "requeue" not in log


def test_usage(tmp_path):
    done, log = run(FOLDER / "one-node.sbatch", folder=tmp_path)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr and log == ""


def test_torchrun(tmp_path):
    done, log = run(FOLDER / "torchrun.sh", "stage1-vitl", "--steps", "5", folder=tmp_path)
    assert done.returncode == 0
    assert log.startswith("torchrun --nnodes 1 --nproc-per-node 8 ") and log.endswith(
        "-m train.pretrain stage1-vitl --steps 5\n"
    )
