"""The build of the embedded checkpoints: order, resuming, failures; and its suites on the shipped weights."""

import json

import pytest
import torch
import tyro
from safetensors.torch import save_file

from blip2.checkpoint import load
from train.recipes import RECIPES
from train.scenes import build, evaluate, experiment, text
from train.scenes.__main__ import parser
from train.scenes.build import Phase, PhaseError

FAKE = """
import pathlib, sys
name, flag, folder = sys.argv[1:]
assert flag == "--out", flag
folder = pathlib.Path(folder)
for needed in {"last": ["first", "second"], "second": ["first"]}.get(name, []):
    assert (folder.parent / needed / "product").exists(), needed
if name == "broken":
    sys.exit("nothing works")
(folder / "product").write_text(str(len(list(folder.parent.glob("*/product")))))
"""


@pytest.fixture
def phases(tmp_path, monkeypatch):
    (tmp_path / "fake_phase.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(build, "RUNS", tmp_path / "runs")
    names = {"first": (), "second": ("first",), "last": ("first", "second")}
    made = {name: Phase(("fake_phase", name), needs, "product") for name, needs in names.items()}
    monkeypatch.setattr(build, "PHASES", made)
    return made


def test_phases_run_in_order_and_are_not_run_again(phases, capsys):
    build.run_phases()
    products = {name: (build.RUNS / name / "product").read_text() for name in phases}
    assert products == {"first": "0", "second": "1", "last": "2"}
    (build.RUNS / "last" / "product").unlink()
    capsys.readouterr()
    build.run_phases()
    said = capsys.readouterr().out
    assert "first: done before" in said and "last: started" in said and "second: started" not in said


def test_a_failed_phase_says_where_its_log_is(phases):
    phases["second"] = Phase(("fake_phase", "broken"), ("first",), "product")
    with pytest.raises(PhaseError, match=r"second ended with exit code 1; see .*second\.log"):
        build.run_phases()
    assert "nothing works" in (build.RUNS / "second.log").read_text()
    assert not (build.RUNS / "last" / "product").exists()


def test_real_phases_name_what_there_is():
    for name, phase in build.PHASES.items():
        assert set(phase.needs) <= set(build.PHASES), name
    assert set(build.EMBEDDED.values()) <= set(build.PHASES)
    assert parser().parse_args(["encoder", "--out", "x"]).out.name == "x"


@pytest.mark.long
@pytest.mark.parametrize("name, least", [("scenes-opt", 0.9), ("scenes-flan-t5", 0.7)])
def test_questions_are_answered_from_the_right_picture(name, least):
    loaded = load(name)
    figures = evaluate.answers(loaded, 32, "validation", described=loaded.model.config.num_descriptions)
    below = evaluate.baselines(loaded, 32, "validation")
    assert figures["color"] > least > 0.35 > below["wrong picture"]["color"]
    assert below["blind"]["color"] < 0.35 and below["true text"]["color"] > 0.9
    assert evaluate.answers(loaded, 32, "validation")["color"] > least - 0.2


def test_captions_name_what_is_there():
    figures = evaluate.captions(load("scenes-opt"), 24, "validation")
    assert figures["object recall"] > 0.9 and figures["object precision"] > 0.9
    assert figures["relations true"] > 0.8


@pytest.mark.long
def test_retrieval_finds_its_own():
    figures = evaluate.retrieval(load("scenes-itm"), 24, "validation")
    assert figures["ITC image to text R@1"] > 0.9 and figures["ITC text to image R@1"] > 0.9


def test_cards_hold_the_figures_of_every_split(tmp_path):
    folder = tmp_path / "scenes-opt"
    folder.mkdir()
    save_file({"weight": torch.zeros(3, 5, dtype=torch.float16)}, folder / "model.safetensors")
    run = {"seed": 7, "steps": 1234, "batch_size": 64, "minutes": {"encoder": 40.2, "stage1": 42.1}}
    (folder / "training.json").write_text(json.dumps(run))
    build.record(folder, {"validation": {"answers": {"relation_yesno": 0.5}}})
    build.record(folder, {"test": {"captions": {"object recall": 0.25}}})
    build.record(folder, {"validation": {"answers": {"relation_yesno": 0.75}}})
    card = (folder / "README.md").read_text()
    assert (
        card.startswith("# scenes-opt\n") and "15 parameters" in card and "seed 7, 1,234 steps of 64" in card
    )
    assert "82 minutes of one CPU core in all (encoder 40, stage1 42)" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| validation | answers | relation yesno | 0.750 |",
        "| test | captions | object recall | 0.250 |",
    ]


def test_experiment_is_made_of_runs_that_exist():
    found = experiment.phases()
    assert len([name for name in found if name.endswith("-stage2")]) == 10
    for name, phase in found.items():
        assert set(phase.needs) <= set(found), name
        if phase.command[0] == "train.pretrain":
            choices = {key: (make.__doc__, make()) for key, make in RECIPES.items()}
            flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
            recipe = tyro.extras.overridable_config_cli(choices, args=list(phase.command[1:]), config=flat)
            assert recipe.data.features.endswith("hidden.npy") and recipe.fit.max_minutes is None
            if recipe.stage == 1:
                left_out = {"itc", "itm", "itg"} - set(recipe.objectives)
                assert left_out == {name.split("-")[0]} - {"with"}


def test_curves_and_report(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    for name in experiment.phases():
        if name.endswith("-stage2"):
            (tmp_path / name).mkdir()
            rows = [{"step": 20, "loss": 1.0}]
            for step in (200, 400):
                values = {f"eval/{kind}": step / 400 - ("without" in name) / 4 for kind in text.KINDS}
                rows.append({"step": step, "eval/loss_lm": 1.0, **values})
            (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment.report(tmp_path / "docs")
    table = (tmp_path / "docs" / "experiment.md").read_text()
    assert (
        "| without stage 1 | 3 | 0.750 (0.750 - 0.750) |" in table and "| without ITG | 1 | 1.000 |" in table
    )
    assert (tmp_path / "docs" / "experiment.png").stat().st_size > 10_000
