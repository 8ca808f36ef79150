"""python -m train.evaluate: every task end to end on small sets in the official layouts, stopped and gone on
with, by one process and by three.

Models are tiny and random: nothing here says how good any is.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import official
import pytest
import tiny
import torch

from blip2 import checkpoint
from blip2.processing import Processor
from train import distributed
from train.data.transforms import clean_caption
from train.evaluate import main
from train.evaluation import MetricError, captioning, predictions, scene_table, scenes, vqa
from train.evaluation.annotations import Example
from train.evaluation.predictions import Predictions, units
from train.evaluation.protocols import TASKS
from train.scenes.evaluate import gallery
from train.scenes.text import SHAPES, full_name
from train.scenes.world import sample

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"vqav2": 18, "okvqa": 12, "gqa": 18, "coco-caption": 5, "nocaps": 6, "coco-retrieval": 32,
          "flickr-retrieval": 32, "scenes-vqa": 44, "scenes-caption": 8, "scenes-retrieval": 16}  # fmt: skip
MODELS = {"vqa": "scenes-opt", "caption": "scenes-flan-t5", "retrieval": "scenes-itm"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return official.make(tmp_path_factory.mktemp("official"))


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    """Each model is read once: a quarter of a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", functools.cache(checkpoint.load))
        yield


@pytest.fixture
def overlap(monkeypatch):
    """Shared words in place of CIDEr, which takes a Java program: seconds each time."""

    def figures(said, references, *, spice=False):
        assert said.keys() == references.keys()
        each = {
            name: 100 * len(set(text.split()) & set(" ".join(references[name]).lower().split())) / 50
            for name, text in said.items()
        }
        return {"CIDEr": sum(each.values()) / len(each)}, each

    monkeypatch.setattr(captioning, "caption_figures", figures)


def command(task, sets, folder, *more, model=None, beams="2"):
    """Two beams, or None for the paper's five, which take their time."""
    words = [task, "--model", str(model or MODELS[TASKS[task].kind]), "--output", str(folder)]
    words += ["--scenes", "8"] if TASKS[task].drawn else official.options(task, sets)
    words += ["--num-beams", beams] if beams and TASKS[task].kind != "retrieval" else []
    return [*words, "--batch-size", "2", "--device", "cpu", *more]


def results(folder):
    """Records, and scores.json."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "scores.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_end_to_end(task, assets, sets, tmp_path, overlap, capsys):
    assert main(command(task, sets, tmp_path)) == 0, capsys.readouterr().err
    records, scores = results(tmp_path)
    if task != "scenes-vqa":  # how many kinds of question a scene gives is its own affair
        assert len(records) == COUNTS[task]
    assert max(Counter(record["id"] for record in records).values()) == 1
    assert all(isinstance(record["prediction"], str) and record["references"] for record in records)
    assert all("score" in record for record in records)
    assert len({record["prediction"] for record in records}) > 1
    kind = TASKS[task].kind
    main_figure = {"vqa": "accuracy", "caption": "CIDEr", "retrieval": "TR@1"}[kind]
    if task == "okvqa" and "accuracy" not in scores["figures"]:
        main_figure = "raw accuracy"
        assert "spacy" in scores["notes"][0]
    figures = scores["figures"]
    assert main_figure in figures and all(0 <= value <= 100 for value in figures.values())
    if task == "nocaps":
        assert {"CIDEr in", "CIDEr near", "CIDEr out"} < figures.keys()
    if kind == "retrieval":
        assert figures["TR@1"] <= figures["TR@5"] <= figures["TR@10"]
        assert list(tmp_path.glob("features")) == list(tmp_path.glob("pairs*")) == []
    else:
        mean = sum(record["score"] for record in records) / len(records)
        assert figures[main_figure] == pytest.approx(mean * (100 if kind == "vqa" else 1))
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["made_with"]["versions"]["torch"] == torch.__version__
    if not TASKS[task].drawn:
        assert all(len(digest) == 64 for digest in settings["files"].values()) and settings["files"]
    shown = capsys.readouterr().out
    assert re.search(rf"{re.escape(main_figure)} +{figures[main_figure]:.2f}", shown)


def test_settings_are_the_papers(assets, sets, tmp_path, overlap):
    for model, frame in (
        ("scenes-opt", "Question: {} Answer:"),
        ("scenes-flan-t5", "Question: {} Short answer:"),
    ):
        assert main(command("gqa", sets, tmp_path / model, "--limit", "1", model=model, beams=None)) == 0
        made = json.loads((tmp_path / model / "settings.json").read_text())["settings"]
        assert made == {
            "prompt": frame, "num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1,
            "length_penalty": -1.0, "repetition_penalty": 1.0, "descriptions": 0, "clean": True,
        }  # fmt: skip
    assert main(command("nocaps", sets, tmp_path / "c", "--limit", "1", beams=None)) == 0
    made = json.loads((tmp_path / "c" / "settings.json").read_text())["settings"]
    assert (made["prompt"], made["num_beams"]) == ("a photo of", 5)
    assert (made["min_new_tokens"], made["max_new_tokens"], made["length_penalty"]) == (8, 30, 1.0)


def test_a_question_is_asked_as_the_settings_say(assets, sets, tmp_path, monkeypatch):
    sent = []
    generate = vqa.generate
    monkeypatch.setattr(vqa, "generate", lambda *a, **k: sent.append((a[3], a[4], k)) or generate(*a, **k))
    more = ["--prompt", "Q: {} A:", "--num-beams", "1", "--limit", "3"]
    assert main(command("vqav2", sets, tmp_path, *more)) == 0
    asked = json.loads((sets / "coco" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())[
        "questions"
    ]
    prompts = [prompt for group, _, _ in sent for prompt in group]
    assert sorted(prompts) == sorted(f"Q: {one['question'].lower()} A:" for one in asked[:3])
    assert all(generation.method == "greedy" and generation.max_new_tokens == 10 for _, generation, _ in sent)


def test_a_question_can_enter_the_qformer_too(assets, sets, tmp_path, monkeypatch):
    """A model fine-tuned for VQA: the bare question goes to the Q-Former, the framed one to the LLM."""
    words = {"family": "opt", "image_size": tiny.IMAGE_SIZE, "num_query_tokens": tiny.NUM_QUERIES}
    processor = Processor(tiny.tokenizer("opt"), **words, qformer_tokenizer=tiny.tokenizer("bert"))
    checkpoint.save(tiny.ours("instruct"), processor, tmp_path / "run" / "model")
    asked = []
    generate = vqa.generate
    monkeypatch.setattr(vqa, "generate", lambda *a, **k: asked.append((a[3], k)) or generate(*a, **k))
    line = command("vqav2", sets, tmp_path / "out", "--limit", "4", model=tmp_path / "run" / "model")
    assert main(line) == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["model"] == "run"
    for prompts, options in asked:
        assert prompts == [f"Question: {question} Answer:" for question in options["questions"]]


def test_a_tuned_model_is_asked_as_it_was_trained(assets, sets, tmp_path):
    """The paper fine-tunes Flan-T5 on "Question: {} Answer:", and asks it zero-shot for a short answer."""
    loaded = checkpoint.load.__wrapped__("scenes-flan-t5", device="cpu")
    loaded.model.config.question_prompt = "Question: {} Answer:"
    checkpoint.save(loaded.model, loaded.processor, tmp_path / "tuned")
    assert main(command("gqa", sets, tmp_path / "out", "--limit", "1", model=tmp_path / "tuned")) == 0
    made = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert made["settings"]["prompt"] == "Question: {} Answer:" and not made["own_prompt"]


WRONG = [
    (["vqav2"], {"--questions": "coco/captions_val2014.json"}, "holds COCO captions, not VQA's questions"),
    (
        ["vqav2"],
        {"--annotations": None},
        "vqav2 needs --annotations, such as v2_mscoco_val2014_annotations.json",
    ),
    (["vqav2"], {"--images": None}, "vqav2 needs --images"),
    (["vqav2", "--split", "test-dev"], {}, "reads no --annotations"),
    (["vqav2", "--split", "test-dev"], {"--annotations": None}, "questions about val2014; this split is"),
    (["vqav2", "--split", "dev"], {}, "--split is dev; vqav2 has val, test-dev, test"),
    (["gqa"], {"--questions": "coco/v2_OpenEnded_mscoco_val2014_questions.json"}, "not GQA's questions"),
    (["nocaps"], {"--annotations": "coco/captions_val2014.json"}, "holds COCO captions, not NoCaps captions"),
    (["coco-caption"], {"--annotations": "coco/instances_val2014.json"}, "holds COCO's boxes"),
    (
        ["flickr-retrieval"],
        {"--annotations": "coco/dataset_coco.json"},
        "split of coco; this takes dataset_fl",
    ),
    (["vqav2", "--top-k", "3"], {}, "vqav2 has no setting --top-k; it has --num-beams"),
    (["vqav2", "--prompt", "Answer:"], {}, "has to hold {} once"),
    (["vqav2", "--limit", "0"], {}, "--limit is 0; it has to be 1 or more"),
    (["vqav2", "--model", "scenes-itm"], {}, "vqav2 takes a checkpoint with a language model"),
    (["coco-retrieval", "--model", "scenes-opt"], {}, "takes a stage-1 checkpoint"),
    (["scenes-vqa", "--images", "."], {}, "draws its pictures and reads no files"),
    (["vqav2", "--model", "scenes-otp"], {}, "Did you mean scenes-opt"),
]


@pytest.mark.parametrize(("words", "changes", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_cannot_be_is_refused(words, changes, message, assets, sets, tmp_path, capsys):
    line = command(words[0], sets, tmp_path / "new", *words[1:])
    for option, value in changes.items():
        place = line.index(option)
        line[place : place + 2] = [option, str(sets / value)] if value else []
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_interrupted_evaluation_goes_on(assets, sets, tmp_path, monkeypatch):
    """What was done is not done again, and the end is the same to the last bit."""
    assert main(command("vqav2", sets, tmp_path / "whole")) == 0
    done = []
    answering = vqa.answering

    def failing(*arguments):
        work = answering(*arguments)

        def once(unit, *rest):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append([example.id for example in unit])
            return work(unit, *rest)

        return once

    monkeypatch.setattr(vqa, "answering", failing)
    with pytest.raises(KeyboardInterrupt):
        main(command("vqav2", sets, tmp_path / "again"))
    part = tmp_path / "again" / "predictions-0-of-1.jsonl"
    assert len(part.read_text().splitlines()) == 12
    with part.open("a") as file:
        file.write('{"id": 58192')  # as a kill cuts a line short
    done.clear()
    assert main(command("vqav2", sets, tmp_path / "again")) == 0
    assert done == [[99999000, 99999001, 99999002, 100000, 100001, 100002]]
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not part.exists()
    done.clear()
    assert main(command("vqav2", sets, tmp_path / "again")) == 0  # scores anew, predicts nothing
    assert done == []


@pytest.mark.parametrize("task", ["vqav2", "nocaps", "coco-retrieval"])
def test_three_processes_do_what_one_does(task, assets, sets, tmp_path, monkeypatch, overlap, capsys):
    """One after another in this process; in processes of their own in the long test."""
    assert main(command(task, sets, tmp_path / "one")) == 0
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in (0, 1, 2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert main(command(task, sets, tmp_path / "three")) == (1 if rank == 0 else 0)
        if rank == 0:  # it waits for nobody here, and says what it misses
            assert "start again" in capsys.readouterr().err
    stem = "pairs" if task.endswith("retrieval") else "predictions"
    shares = sorted((tmp_path / "three").glob(f"{stem}-*-of-3.jsonl"))
    ids = [json.loads(line)["id"] for path in shares for line in path.read_text().splitlines()]
    assert len(shares) == 3 and len(ids) == len(set(ids))
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    assert main(command(task, sets, tmp_path / "three")) == 0
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_predictions_do_not_depend_on_the_batch(assets, sets, tmp_path):
    said = []
    for size in ("1", "4"):
        folder = tmp_path / size
        assert main(command("gqa", sets, folder, "--batch-size", size)) == 0
        said.append((folder / "predictions.jsonl").read_bytes())
    assert said[0] == said[1]


def test_another_evaluation_is_refused(assets, sets, tmp_path, capsys):
    folder = tmp_path / "results"
    assert main(command("vqav2", sets, folder, "--limit", "2")) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = sets / "changed.json"
    text = (sets / "coco" / "v2_mscoco_val2014_annotations.json").read_text()
    changed.write_text(text.replace('"answer": "', '"answer": "a '))
    for more, message in (
        (["--num-beams", "1"], "settings.num_beams: 2 there, 1 here"),
        (["--limit", "3"], "limit: 2 there, 3 here"),
        (["--model", "scenes-flan-t5"], "model: 'scenes-opt' there, 'scenes-flan-t5' here"),
        (["--annotations", str(changed)], "files.annotations: "),
        (["--precision", "bfloat16"], "precision: 'float32' there, 'bfloat16' here"),
    ):
        assert main(command("vqav2", sets, folder, "--limit", "2", *more)) == 1
        error = capsys.readouterr().err
        assert "holds another evaluation" in error and message in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_request_to_stop_is_kept(assets, sets, tmp_path, monkeypatch, capsys):
    asked = []
    predict = predictions.predict

    def stopping(*arguments, stop, **options):
        return predict(*arguments, stop=lambda: bool(asked.append(0)) or len(asked) > 1, **options)

    monkeypatch.setattr(predictions, "predict", stopping)
    monkeypatch.setattr(predictions, "stopped", lambda stop: len(asked) > 1)
    assert main(command("vqav2", sets, tmp_path)) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert len((tmp_path / "predictions-0-of-1.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "scores.json").exists()


def test_pictures_that_cannot_be_opened(assets, sets, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for path in (sets / "gqa" / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "2354788.jpg").write_bytes(b"<html>not found")
    line = command("gqa", sets, tmp_path / "out", "--images", str(images))
    assert main(line) == 1
    assert "2354788.jpg" in (error := capsys.readouterr().err) and "--skip-missing" in error
    assert main([*line, "--skip-missing"]) == 0
    records, scores = results(tmp_path / "out")
    assert len(records) == 18 and [r["id"] for r in records if "unusable" in r] == [
        "201920",
        "201921",
        "201922",
    ]
    assert scores["examples"] == 15 and "3 examples are left out" in scores["notes"][0]


def test_missing_pictures_are_said(assets, sets, tmp_path, overlap):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((sets / "nocaps" / "images").iterdir())[1:]:
        (images / path.name).write_bytes(path.read_bytes())
    line = command("nocaps", sets, tmp_path / "out", "--images", str(images), "--skip-missing")
    assert main(line) == 0
    records, scores = results(tmp_path / "out")
    assert len(records) == scores["examples"] == 5
    assert "1 pictures are missing and left out, such as 0013ea2087020901.jpg" in scores["notes"]


def test_a_secret_split_gives_a_submission(assets, sets, tmp_path, capsys):
    coco = sets / "coco"
    questions = coco / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    line = ["vqav2", "--split", "test-dev", "--model", "scenes-flan-t5", "--questions", str(questions)]
    assert main([*line, "--images", str(coco / "test2015"), "--output", str(tmp_path)]) == 0
    submitted = json.loads((tmp_path / "submission.json").read_text())
    asked = json.loads(questions.read_text())["questions"]
    assert [entry["question_id"] for entry in submitted] == [one["question_id"] for one in asked]
    assert all(entry.keys() == {"question_id", "answer"} for entry in submitted)
    _, scores = results(tmp_path)
    assert scores["figures"] == {} and "submission.json" in scores["notes"][0]


def test_retrieval_is_what_the_paper_says(assets, sets, tmp_path):
    """Against a loop over all pairs: with fewer candidates than there are, and with all."""
    loaded = checkpoint.load("scenes-itm", device="cpu")
    model, processor = loaded.model, loaded.processor
    entries = json.loads((sets / "coco" / "dataset_coco.json").read_text())["images"][:5]
    texts = [(row, s["raw"].strip()) for row, entry in enumerate(entries) for s in entry["sentences"]]
    tokens = processor.text([clean_caption(text) for _, text in texts], max_length=35)
    files = [sets / "coco" / "val2014" / entry["filename"] for entry in entries]
    image = model.encode_image(processor.images([str(path) for path in files]))
    cosine = model.score(image, **tokens, head="itc")
    both = cosine + model.match_logits(image, **tokens)[..., 1]
    for k in (3, 128):
        folder = tmp_path / str(k)
        assert main(command("coco-retrieval", sets, folder, "--top-k", str(k))) == 0
        records, scores = results(folder)
        by_text = records[5:]
        for row, record in enumerate(records[:5]):  # texts of equal tokens score alike
            best = max(both[row, text] for text in cosine[row].topk(min(k, len(texts))).indices)
            said = [text for text, (_, words) in enumerate(texts) if words == record["prediction"]]
            assert max(both[row, said]) == pytest.approx(best.item(), abs=1e-4)
        for text, record in enumerate(by_text):
            seen = cosine[:, text].topk(min(k, 5)).indices.tolist()
            found = max(seen, key=lambda row: both[row, text])
            assert Path(record["prediction"]).name == files[found].name
        ranks = [record["rank"] for record in by_text]
        assert scores["figures"]["IR@1"] == pytest.approx(100 * ranks.count(0) / len(ranks))
        nearest = cosine.argmax(0).tolist()
        right = sum(row == own for row, (own, _) in zip(nearest, texts, strict=True))
        assert scores["figures"]["ITC IR@1"] == pytest.approx(100 * right / len(texts))


def test_image_tokens_need_not_be_kept(assets, sets, tmp_path):
    for name, room in (("kept", "1"), ("again", "0")):
        assert main(command("flickr-retrieval", sets, tmp_path / name, "--keep-gb", room)) == 0
    assert len({(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("kept", "again")}) == 1


def test_table(assets, sets, tmp_path, capsys):
    for task, model in (("vqav2", "scenes-opt"), ("gqa", "scenes-opt"), ("gqa", "scenes-flan-t5")):
        folder = tmp_path / f"{task}-{model}"
        assert main(command(task, sets, folder, "--limit", "2", model=model)) == 0
    capsys.readouterr()
    assert main(["--table", "2", *map(str, sorted(tmp_path.iterdir()))]) == 0
    shown = capsys.readouterr().out
    figure = results(tmp_path / "vqav2-scenes-opt")[1]["figures"]["accuracy"]
    row = next(
        line
        for line in shown.splitlines()
        if line.startswith("scenes-opt (num_beams 2, of 2 examples, not 214,354)")
    )
    assert f" {figure:.1f} " in row and "VQAv2 val" in row
    assert "BLIP-2 ViT-g FlanT5-XXL" in shown and "65.0" in shown
    assert main(["--table", "7"]) == 1 and "table 7" in capsys.readouterr().err
    assert main(["--table", "2", str(tmp_path)]) == 1 and "holds no scores.json" in capsys.readouterr().err


def drawn(task, model, figures, scenes=500, **changes):
    """settings.json and scores.json of an evaluation on drawn scenes."""
    settings = {**TASKS[task].settings, **({"descriptions": 12} if task == "scenes-vqa" else {}), **changes}
    made_of = {"task": task, "split": "test", "model": model, "scenes": scenes, "settings": settings,
               "limit": None, "own_prompt": False, "adapter": None}  # fmt: skip
    return made_of, {"figures": figures}


def test_table_of_the_drawn_world():
    """A model is a row, however many folders it has; what was done otherwise is another, and says so."""
    found = {
        "a": drawn("scenes-caption", "scenes-opt", {"object recall": 98.4, "CIDEr": 237.53}),
        "b": drawn("scenes-vqa", "scenes-opt", {"accuracy": 80.04, "color": 70}, descriptions=0),
        "c": drawn("scenes-retrieval", "scenes-itm", {"TR@1": 99.6, "IR@1": 99.4, "ITC TR@1": 1}),
        "d": drawn("scenes-vqa", "scenes-opt", {"accuracy": 94.15, "color": 99}),
        "e": drawn("scenes-vqa", "scenes-opt", {"accuracy": 93, "color": 98}, unseen=True),
    }
    assert scene_table.markdown(found).splitlines() == [
        "| 500 test scenes | color | all questions | objects in captions | CIDEr | TR@1 | IR@1 |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        "| `scenes-opt` | 99.0 | 94.2 | 98.4 | 237.5 | | |",
        "| `scenes-opt`, unseen True | 98.0 | 93.0 | | | | |",
        "| `scenes-opt`, without captions | 70.0 | 80.0 | | | | |",
        "| `scenes-itm` | | | | | 99.6 | 99.4 |",
    ]
    with pytest.raises(MetricError, match="of 300 test scenes and of 500 test scenes; a table is of one set"):
        scene_table.markdown(found | {"f": drawn("scenes-vqa", "scenes-opt", {}, scenes=300)})
    with pytest.raises(MetricError, match=r"f: its row, `scenes-opt`.*, has its figures already"):
        scene_table.markdown(found | {"f": found["d"]})
    with pytest.raises(MetricError, match="results of no drawn scenes"):
        scene_table.markdown({"f": drawn("gqa", "scenes-opt", {})})


def test_the_readmes_table_is_the_commands():
    """Its heads, rows and form, for the figures that stand in it; of the embedded checkpoints, whole."""
    page = (ROOT / "README.md").read_text()
    shown = page.partition("<!-- evaluation: begin -->\n")[2].partition("<!-- evaluation: end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in shown.splitlines()]
    assert head[0] == "500 test scenes" and head[1:] == list(scene_table.COLUMNS)
    found = {}
    for name, *cells in rows:
        model, _, changed = name.partition(", ")
        for task in ("scenes-vqa", "scenes-caption", "scenes-retrieval"):
            columns = {head: figure for head, (of, figure) in scene_table.COLUMNS.items() if of == task}
            figures = {
                columns[h]: float(c) for h, c in zip(head[1:], cells, strict=True) if h in columns and c
            }
            if figures:
                without = {"descriptions": 0} if changed == "without captions" else {}
                found[f"{name} {task}"] = drawn(task, model.strip("`"), figures, **without)
    assert scene_table.markdown(found) == shown
    assert {name for name, *_ in rows} >= {"`scenes-opt`", "`scenes-flan-t5`", "`scenes-itm`"}


def test_objects_of_drawn_captions():
    told = [", ".join(f"a {t.color} {t.shape}" for t in sample(seed, "test").things) for seed in range(3)]
    records = [{"image": f"test-{seed}", "prediction": text} for seed, text in enumerate(told)]
    assert scenes.object_figures(records) == {"object recall": 100, "object precision": 100}
    thing = sample(0, "test").things[0]
    other = next(c for c in ("red", "green") if all(t.color != c for t in sample(0, "test").things))
    text = f"a {thing.color} {thing.shape} above a {other} circle"
    figures = scenes.object_figures([{"image": "test-0", "prediction": text}])
    assert figures["object precision"] == 50
    assert figures["object recall"] == pytest.approx(100 / len(sample(0, "test").things))


def test_drawn_data_is_the_drawn_worlds():
    data = scenes.pairs(5, "test")
    assert [one.references[0] for one in data.examples] == gallery(5, "test")[1]
    questions = scenes.questions(5, "validation").examples
    assert {one.image for one in questions} == {f"validation-{seed}" for seed in range(5)}
    assert data.picture(data.examples[0].image, 28).size == (28, 28)


def test_texts_that_fine_tuning_trains():
    told = scenes.captions(4, "test", tuned=True).examples
    for seed, example in enumerate(told):
        names = [full_name(thing) for thing in sample(seed, "test").things]
        assert all(name in caption for name in names for caption in example.references)
    keywords = [one.references[0] for one in scenes.pairs(40, "test", tuned=True).examples]
    assert len({" ".join(sorted(text.split())) for text in keywords}) >= 39
    assert all(text.split()[0] in SHAPES for text in keywords)


def test_units_and_groups():
    examples = [Example(number, image) for number, image in enumerate("abacbdd")]
    assert [[one.id for one in unit] for unit in units(examples, 2)] == [[0, 2, 1, 4], [3, 5, 6]]
    assert vqa.by_length([7, 5, 7, 7, 5], 2) == [[1, 4], [0, 2], [3]]


def test_lines_are_cut_where_a_kill_left_them(tmp_path):
    first = Predictions(tmp_path)
    first.add([{"id": 1}, {"id": "b"}])
    with first.own.open("ab") as file:
        file.write(b'{"id": 3, "prediction": "a r')
    second = Predictions(tmp_path)
    assert list(second.done) == [1, "b"]
    second.add([{"id": 3}])
    assert list(Predictions(tmp_path).done) == [1, "b", 3]
    assert second.own.read_bytes() == b'{"id": 1}\n{"id": "b"}\n{"id": 3}\n'


# ---------------------------------------------------------------- long


def start(processes, *words):
    """The command in processes of its own."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launch, "train.evaluate", *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("task", ["scenes-vqa", "scenes-retrieval"])
def test_killed_and_gone_on_by_three_processes(task, assets, tmp_path):
    """A SIGKILL on the way; three processes do the rest; as one process does it undisturbed."""
    model = assets / MODELS[TASKS[task].kind]
    words = [task, "--model", str(model), "--scenes", "160", "--batch-size", "4", "--device", "cpu"]
    words += ["--num-beams", "5"] if task == "scenes-vqa" else []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = start(1, *words, "--output", str(whole))
    assert one.communicate()[0] is not None and one.returncode == 0

    first = start(1, *words, "--output", str(cut))
    deadline = time.monotonic() + 120
    part = cut / ("pairs-0-of-1.jsonl" if task.endswith("retrieval") else "predictions-0-of-1.jsonl")
    while not (part.exists() and part.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and not (cut / "scores.json").exists()
    before = part.read_bytes().count(b"\n")

    rest = start(3, *words, "--output", str(cut))
    said, _ = rest.communicate(timeout=300)
    assert rest.returncode == 0, said
    for name in ("predictions.jsonl", "scores.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    total = len((whole / "predictions.jsonl").read_text().splitlines())
    print(f"{task}: killed after {before} records, {total} in the end, equal to the last bit")


@pytest.mark.long
@pytest.mark.parametrize("task", ["coco-caption", "nocaps", "scenes-caption"])
def test_captions_are_scored_by_pycocoevalcap(task, assets, sets, tmp_path):
    assert main(command(task, sets, tmp_path, "--min-new-tokens", "1")) == 0
    records, scores = results(tmp_path)
    wanted = {"BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    assert wanted <= scores["figures"].keys()
    mean = sum(record["score"] for record in records) / len(records)
    assert scores["figures"]["CIDEr"] == pytest.approx(mean)
    if task == "nocaps":
        assert {"CIDEr in", "METEOR near", "BLEU-4 out"} < scores["figures"].keys()
