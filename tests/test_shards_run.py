"""Both stages trained from shards on disk by the command: resumed, signalled, killed, on two processes."""

import json
import shutil
import signal

import pytest
from pretraining import OPTIONS, SMALL, make_parts
from safetensors.torch import load_file
from test_faults import ALONE, PAIR, training, until

from blip2.checkpoint import load
from train import pretrain, recipes, state
from train.domain import domain, read_source
from train.recipes import RECIPES, RecipeError
from train.scenes.pack import write

OFF = {"num-scenes", "num-validation"}
CHANGES = [option for option in OPTIONS if option.split("=")[0][2:] not in OFF]
COMMON = [*CHANGES, "--steps=10", "--batch-size=8", "--log-every=1", "--save-every=5", "--keep-states=9"]
STAGES = ("stage1", "opt", "t5")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What runs start from, shards to read, and a finished stage 1."""
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    write(folder / "shards", 96, 16, captions=3)
    assert pretrain.main(arguments(folder, "stage1", folder / "stage1")) == 0
    return folder


def arguments(parts, stage, output, workers=2):
    data = ["--folder", str(parts / "shards"), "--output", str(output), f"--workers={workers}", *COMMON]
    if stage == "stage1":
        return ["scenes-stage1", "--start-from", str(parts / "encoder"), *SMALL, "--dropout=0", *data]
    name = {"opt": "scenes-stage2-opt", "t5": "scenes-stage2-flan-t5"}[stage]
    start = ["--start-from", str(parts / "stage1" / "model"), "--language-model", str(parts / stage)]
    return [name, *start, *data]


def lines(folder):
    """What was logged, but for the clock."""
    clock = ("seconds", "samples_per_second", "data_wait")
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def same_run(one, other):
    assert lines(one) == lines(other)
    ours, theirs = (load_file(state.latest(run) / "weights.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted run of ten steps of each stage."""
    runs = {"stage1": parts / "stage1"}
    for stage in ("opt", "t5"):
        runs[stage] = tmp_path_factory.mktemp(stage)
        assert pretrain.main(arguments(parts, stage, runs[stage])) == 0
    return runs


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_equal_five_and_five(stage, parts, whole, tmp_path):
    """Order of the data, captions and prefix splits included, with two loader workers; bit by bit."""
    shutil.copytree(whole[stage], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "states" / "step-00000010")  # as if it had ended after step 5
    shutil.rmtree(tmp_path / "run" / "model")
    assert pretrain.main(arguments(parts, stage, tmp_path / "run")) == 0
    same_run(whole[stage], tmp_path / "run")
    loaded = load(tmp_path / "run" / "model", device="cpu")
    assert loaded.processor.image_size == 64
    assert len({line["loss"] for line in lines(tmp_path / "run") if "loss" in line}) == 10


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
@pytest.mark.parametrize("stage", ["stage1", pytest.param("t5", marks=pytest.mark.long)])
def test_a_run_that_is_told_to_end_goes_on(number, stage, parts, tmp_path):
    """After SIGTERM from where it was, after kill -9 from the last save; to the same end either way."""
    command = [*arguments(parts, stage, tmp_path / "run"), "--steps=60", "--save-every=20"]
    with training([*ALONE, *command], tmp_path / "log") as process:
        until(lambda: state.latest(tmp_path / "run") is not None)
        process.send_signal(number)
        code = process.wait(60)
    if number == signal.SIGTERM:
        said = (tmp_path / "log").read_text()
        assert code == 0 and ("to go on:\npython -m train.pretrain" in said or "saved" in said)
    assert pretrain.main(command) == 0
    shutil.move(tmp_path / "run", tmp_path / "broken")
    assert pretrain.main(command) == 0
    saved = (state.latest(tmp_path / name) / "weights.safetensors" for name in ("broken", "run"))
    ours, theirs = map(load_file, saved)
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_read_and_learn_as_one(stage, parts, whole, tmp_path):
    """Two processes with a worker each: the losses of one process with two, to 1e-5."""
    command = [*PAIR, *arguments(parts, stage, tmp_path / "run", workers=1)]
    with training(command, tmp_path / "log") as process:
        assert process.wait(120) == 0
    assert "2 process(es)" in (tmp_path / "log").read_text()
    for ours, theirs in zip(lines(whole[stage]), lines(tmp_path / "run"), strict=True):
        names = [name for name in ours if "loss" in name and "eval" not in name]
        assert {name: theirs[name] for name in names} == pytest.approx(
            {name: ours[name] for name in names}, abs=1e-5
        )


# --- your own folder ---


def test_a_folder_with_a_table(tmp_path):
    """A csv beside its pictures becomes shards, once; steps and learning rate follow its size."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(200):
        Image.new("RGB", (20, 16), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,A picture of red number {number}.")
    (folder / "pictures.csv").write_text("\n".join(rows))
    (folder / "source.json").write_text('{"flip": 0.0, "max_words": 12}')
    made = recipes.domain(RECIPES["stage1-vitg"](), folder)
    [source] = made.data.settings.values()
    assert (source.flip, source.max_words, source.crop) == (0.0, 12, 0.5)
    assert (made.batch_size, made.fit.steps, made.save, made.fit.probe) == (32, 100, "best", "retrieval")
    assert made.fit.learning_rate == pytest.approx(1e-4 * (32 / 1680) ** 0.5)
    assert made.output == "runs/stage1-vitg-pictures" and made.data.missing() == []
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.tar")}
    assert domain(RECIPES["stage2-opt-2-7b"](), folder).fit.collapse == pytest.approx(2 / 3)
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.tar")} == before


def test_folders_that_cannot_be_trained_on(tmp_path, capsys):
    recipe = RECIPES["stage1-vitg"]()
    with pytest.raises(RecipeError, match="there is no folder"):
        domain(recipe, tmp_path / "nothing")
    with pytest.raises(
        RecipeError, match=r"no shards \(\.tar\), nor what they are made of: .* has no pictures"
    ):
        domain(recipe, tmp_path)
    (tmp_path / "source.json").write_text('{"flips": 0}')
    with pytest.raises(RecipeError, match=r"flips.*its fields are max_words, clean"):
        read_source(tmp_path)
    write(tmp_path / "shards", 8, 4, captions=1)
    assert read_source(tmp_path / "shards").flip == 0
    assert pretrain.main(["scenes-stage1", "--folder", str(tmp_path / "nothing")]) == 2
    assert "error: there is no folder" in capsys.readouterr().err
