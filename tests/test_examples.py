"""The notebooks of `examples/`: each is one that Jupyter opens, holds no outputs, and runs to its end.

They are plain Python, without magics: a script of their cells runs them, in a copy of the folder.
"""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
LONG = {"train_your_own"}


def code(path):
    """The cells of a notebook, as a program."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") + "\n"


def run(names, folder, change=lambda program: program):
    """Run notebooks, each as a program of its own, in a copy of their folder; what each printed."""
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("runs", "captioned", "searched"))
    printed = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("BLIP2_CLONE", str(ROOT))
        patch.setattr("sys.path", [*sys.path])
        for name in names:
            Path(f"{name}.py").write_text(change(code(NOTEBOOKS[name])), "utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as printed[name]:
                runpy.run_path(f"{name}.py")
    return {name: stream.getvalue() for name, stream in printed.items()}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return run([name for name in NOTEBOOKS if name not in LONG], tmp_path_factory.mktemp("run") / "examples")


def test_there_are_notebooks():
    assert set(NOTEBOOKS) == {"caption_folder", "search_folder", "chat", "train_your_own"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_one(name):
    """As nbformat's schema has it, and without what a run leaves behind."""
    notebook = json.loads(NOTEBOOKS[name].read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in ids)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear its outputs"
            wanted |= {"outputs", "execution_count"}
            assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.M), "a magic: scripts cannot run it"
        assert set(cell) == wanted and cell["metadata"] == {}
        assert all(line.endswith("\n") for line in cell["source"][:-1]), "lines end with \\n"


def test_a_folder_is_captioned(printed):
    said = printed["caption_folder"]
    assert "scene-1.png: a small green circle and a large red star (two)" in said.replace("(2)", "(two)")
    assert "not captioned: broken.png is not an image" in said
    assert "image,caption,match,how many things are there?" in said


def test_a_folder_is_searched(printed):
    said = printed["search_folder"].splitlines()
    assert said[0] == "6 pictures, 6 encoded now" and said[1].startswith("6 pictures, 0 encoded now")
    assert said[2].endswith("scene-3.png") and said[5].startswith("scene-3.png fits with probability")
    assert float(said[5].split()[-1]) > 0.5 and said[6].endswith("1.000  scene-4.png")


def test_a_chat_goes_on(printed):
    said = printed["chat"].splitlines()
    assert "green" in said[0] and "red" in said[3] and said[4] == "2 turns are left"
    assert "does not look like one" in said[5]


@pytest.mark.long
def test_little_training_runs_to_its_end(tmp_path):
    def hurried(program):
        little = "--steps 2 --warmup-steps 1 --batch-size 16 --micro-batch-size None --num-validation 16"
        program, stages = re.subn(r"--steps \d+", little, program)
        assert stages == 2
        return program

    said = run(["train_your_own"], tmp_path / "examples", hurried)["train_your_own"]
    assert re.search(r"^\d+ of 64 scenes found$", said, re.M)
    assert len(re.findall("^said: ", said, re.M)) == 5


@pytest.mark.long
def test_a_model_is_trained(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # this test is alone, and as slow as training is
    said = run(["train_your_own"], tmp_path / "examples")["train_your_own"]
    print(said)
    found = int(re.search(r"(\d+) of 64 scenes found", said)[1])
    assert found > 50, "by chance one is found"
    assert len(re.findall(r"^said: \w", said, re.M)) == 5
