"""Bulk runs: what is read, what comes out, stops at any moment, bad input.

All without Ray, by the code that its actors run (`--workers 0`), on tiny random models; `test_bulk_ray.py`
has the rest.
"""

import io
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from PIL import Image
from pyarrow import parquet
from tarring import read_tar, write_tar

from blip2.bulk import cluster, results, run, tasks
from blip2.bulk import work as working
from blip2.bulk.cluster import Pool, StoppedError
from blip2.bulk.preview import preview
from blip2.bulk.rows import rows
from blip2.bulk.settings import BulkError, Model, Settings, Source
from blip2.bulk.tables import choose_columns
from blip2.bulk.unit import Unit
from blip2.bulk.units import Found, about, cut, find
from blip2.checkpoint import Loaded
from blip2.cli import bulk as command
from blip2.cli import main
from blip2.folder import caption_folder
from blip2.generation import Generation
from blip2.pictures import Captioning
from blip2.processing import Processor

ROOT = Path(__file__).resolve().parent.parent
GREEDY = Generation(max_new_tokens=8, min_new_tokens=6, repetition_penalty=3.0)
TEXTS = ("a red circle", "two dogs on the left")


def loaded(family: str) -> Loaded:
    words = tiny.language_family(family)
    processor = Processor(
        tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    return Loaded(tiny.ours(family), processor, family, "float32", torch.device("cpu"), None, [])


@pytest.fixture(scope="module")
def models():
    return {family: loaded(family) for family in ("opt", "retrieval")}


@pytest.fixture(autouse=True)
def at_hand(models, monkeypatch):
    """The models are made once, and known by their families' names."""
    monkeypatch.setattr(tasks, "load", lambda name, **_: models[name])


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures, some in a folder, one of them broken, each with a text; and what is none."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for seed in range(10):
        name = f"deep/{seed}" if seed > 6 else str(seed)
        (folder / f"{name}.png").write_bytes(png(seed)[:-2000] if seed == 4 else png(seed))
        (folder / f"{name}.txt").write_text("\n".join(TEXTS[: 1 + seed % 2]))
    (folder / ".hidden" / "no.png").write_bytes(png(99))
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def shards(tmp_path):
    """Two tar shards of four samples, one of which has a damaged json, and a file that is none."""
    folder = tmp_path / "shards"
    for shard in range(2):
        samples = {
            f"{seed:09d}": {
                "png": png(seed),
                "txt": b"alt text",
                "json": json.dumps({"url": f"u{seed}"}).encode(),
            }
            for seed in range(4 * shard, 4 * shard + 4)
        }
        samples["000000001"] = samples.get("000000001", {}) | {"json": b"{"} if shard == 0 else {"txt": b"x"}
        write_tar(folder / f"x/{shard:05d}.tar", samples)
    (folder / "x" / "00002.tar").write_bytes(b"nothing" * 100)
    return folder


def settings(source, out, to="jsonl", task="caption", **changes) -> Settings:
    values = {
        "model": Model("opt" if task == "caption" else "retrieval"),
        "captioning": Captioning(GREEDY),
        "batch_size": 2,
        "per_file": 4,
        "workers": 0,
    }
    source = source if isinstance(source, Source) else Source(str(source))
    return Settings(task, source, str(out), to, **{**values, **changes})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def outcome(folder: Path) -> dict[str, bytes | dict]:
    """All that a run left, times aside."""
    found: dict[str, bytes | dict] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock"):
        content = path.read_bytes()
        if path.suffix == ".json":
            report = json.loads(content)
            report.pop("seconds", None)
            for name in ("seconds_in_all", "errors"):
                report.get("summary", {}).pop(name, None)
            found[str(path.relative_to(folder))] = report
        else:
            found[str(path.relative_to(folder))] = content
    return found


# ---------------------------------------------------------------- what is read


def test_a_folder_is_cut_into_the_same_units_every_time(pictures):
    found = find(Source(str(pictures)))
    names = [f"{n}.png" for n in range(7)] + [f"deep/{n}.png" for n in (7, 8, 9)]
    assert (found.kind, list(found.names), found.total) == ("pictures", names, 10)
    units = cut(found, batch_size=2, per_file=4)
    assert units == cut(find(Source(str(pictures))), 2, 4)
    assert [(unit.number, unit.name, unit.start, unit.count) for unit in units] == [
        (0, "00000", 0, 4), (1, "00001", 4, 4), (2, "00002", 8, 2),
    ]  # fmt: skip
    assert [name for unit in units for name in unit.names] == names
    assert [Unit.from_json(unit.json()) for unit in units] == units


@pytest.mark.parametrize(
    ("total", "size"), [(3, 32), (5_000, 96), (10_000, 160), (1_000_000, 1024), (10**9, 50_016)]
)
def test_units_are_whole_batches_and_neither_too_many_nor_too_large(total, size):
    units = cut(Found("parquet", "x", ("a",), (total,)), batch_size=32)
    assert units[0].count == min(size, total) and {unit.count for unit in units[:-1]} <= {size}
    assert sum(unit.count for unit in units) == total and len(units) <= 20_000
    assert [unit.start for unit in units] == list(range(0, total, size))


def test_globs_and_single_files(pictures):
    assert find(Source(f"{pictures}/**/[89].png")).names == ("deep/8.png", "deep/9.png")
    assert find(Source(f"{pictures}/deep/*")).names == ("7.png", "8.png", "9.png")
    assert find(Source(str(pictures / "3.png"))).names == ("3.png",)
    [[row]] = _read(f"{pictures}/**/[9].png")
    assert row.key == "deep/9.png" and row.read().image == png(9)


def _read(address, images=True, texts=False, per_file=4, **columns):
    source = Source(str(address), **columns)
    found = []
    for unit in cut(find(source, not images), 2, per_file):
        with rows(unit, source, images, texts) as some:
            found.append(some)
    return found


def test_remote_folders_are_read(pictures):
    memory = fsspec.filesystem("memory")
    memory.put(str(pictures), "/pictures", recursive=True)
    parts = _read("memory://pictures", texts=True)
    assert [row.key for part in parts for row in part] == list(find(Source(str(pictures))).names)
    sample = parts[0][1].read()
    assert (sample.image, sample.texts, sample.extension) == (png(1), TEXTS, "png")
    memory.rm("/pictures", recursive=True)


def test_tar_shards_are_units(shards):
    source = Source(str(shards))
    found = find(source)
    assert found.total is None and about(found) == (9, True)
    assert [unit.name for unit in cut(found, 2)] == ["x/00000", "x/00001", "x/00002"]
    with rows(cut(found, 2)[0], source) as some:
        assert (some[0].key, some[0].sample_key) == ("x/00000/000000000", "000000000")
        sample = some[0].read()
    assert (sample.image, sample.texts, sample.metadata) == (png(0), ("alt text",), {"url": "u0"})


@pytest.fixture
def table(pictures):
    """A parquet file of three row groups; its pictures are bytes, paths, and both as Hugging Face has it."""
    count = 10
    columns = {
        "id": [f"id{seed}" for seed in range(count)],
        "image": pa.array(
            [{"bytes": png(seed) if seed % 2 else None, "path": f"{seed}.png"} for seed in range(7)]
            + [None, {"bytes": b"", "path": ""}, {"bytes": None, "path": "gone.png"}]
        ),
        "file": [f"{seed}.png" for seed in range(count)],
        "raw": [png(seed) for seed in range(count)],
        "caption": [[TEXTS[0], " "] if seed % 2 else list(TEXTS) for seed in range(9)] + [[]],
    }
    parquet.write_table(pa.table(columns), pictures / "table.parquet", row_group_size=3)
    return pictures / "table.parquet"


def test_parquet_rows_cross_row_groups(table):
    parts = _read(table)
    assert [[row.key for row in part] for part in parts] == [
        [f"table.parquet:{place}" for place in part] for part in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))
    ]
    read = [row for part in parts for row in part]
    assert [row.read().image for row in read[:7]] == [
        (table.parent / f"{seed}.png").read_bytes() if seed % 2 == 0 else png(seed) for seed in range(7)
    ]
    for row in read[7:]:
        with pytest.raises(ValueError, match=r"no picture|not here any more"):
            row.read()
    raw = _read(table, image_column="raw", key_column="id", texts=True, per_file=5)
    assert [row.key for row in raw[1]] == ["id5", "id6", "id7", "id8", "id9"]
    assert raw[1][0].read().image == png(5) and raw[1][0].read().texts == TEXTS[:1]
    assert _read(table, image_column="file")[0][2].read().image == png(2)
    with pytest.raises(ValueError, match="no text"):
        raw[1][4].read()


def test_columns_are_chosen_or_asked_for(table):
    names = ["id", "url", "text"]
    assert choose_columns(names, Source("t"), True, True) == {"image": "url", "text": "text"}
    with pytest.raises(BulkError, match=r"no column 'x': its columns are id, url, text; choose with --image"):
        choose_columns(names, Source("t", image_column="x"), True, False)
    with pytest.raises(BulkError, match="no column that looks like texts"):
        choose_columns(["id"], Source("t"), False, True)
    with pytest.raises(BulkError, match="no column 'y'"):
        choose_columns(names, Source("t", key_column="y"), False, False)


def test_lines_of_a_text_file(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\n two \nthree\n")
    parts = _read(tmp_path / "texts.txt", images=False, texts=True, per_file=2)
    assert [[(row.key, row.read().texts) for row in part] for part in parts] == [
        [("texts.txt:1", ("one",)), ("texts.txt:3", ("two",))], [("texts.txt:4", ("three",))],
    ]  # fmt: skip


def test_a_data_set_of_hugging_face(monkeypatch, tmp_path):
    """Against a stand-in for the library, which is not installed here."""

    class Stored:
        def __init__(self, data):
            self.data = data
            self.column_names = list(data)
            self.features = {name: ImageFeature() if name == "image" else None for name in data}

        def __len__(self):
            return len(self.data["id"])

        def select_columns(self, names):
            return Stored({name: self.data[name] for name in names})

        def cast_column(self, name, feature):
            assert not feature.decode
            return self

        def select(self, places):
            return [{name: column[place] for name, column in self.data.items()} for place in places]

    class ImageFeature:
        def __init__(self, decode=True):
            self.decode = decode

    ImageFeature.__name__ = "Image"
    data = Stored(
        {
            "id": [f"id{seed}" for seed in range(6)],
            "image": [{"bytes": png(seed), "path": None} for seed in range(6)],
        }
    )
    asked = []

    def load_dataset(*words, split):
        asked.append((*words, split))
        return data

    with pytest.raises(BulkError, match="pip install datasets"):
        find(Source("dataset:user/name"))
    library = types.SimpleNamespace(load_dataset=load_dataset, Image=ImageFeature)
    monkeypatch.setitem(sys.modules, "datasets", library)
    parts = _read("dataset:user/name", split="test", subset="small", key_column="id")
    assert asked[0] == ("user/name", "small", "test")
    assert [[row.key for row in part] for part in parts] == [["id0", "id1", "id2", "id3"], ["id4", "id5"]]
    assert parts[1][1].read().image == png(5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no .*nowhere: give a folder"),
        ("empty", "empty holds none of what can be read: pictures, tar shards or parquet"),
        ("mixed", r"mixed holds 1 picture and 1 tar shard: name one kind by a glob"),
        ("nosuch://bucket/x", "cannot look at nosuch://bucket/x"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(png(0))
    write_tar(tmp_path / "mixed" / "a.tar", {"a": {"png": png(0)}})
    address = source if "://" in source else tmp_path / source
    with pytest.raises(BulkError, match=message):
        run.run(settings(address, tmp_path / "out.jsonl"))
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- what comes out


def test_captions_are_those_of_a_folder(pictures, tmp_path, models):
    """In every form, in the source's order, with the broken picture listed."""
    names = find(Source(str(pictures))).names
    wanted = Captioning(GREEDY, batch_size=2)
    expected = {
        entry.image: list(entry.captions)
        for entry in caption_folder(models["opt"], pictures, names, None, wanted)
        if not hasattr(entry, "reason")
    }
    assert len(expected) == 9 and len({tuple(texts) for texts in expected.values()}) > 4

    summary = run.run(settings(pictures, tmp_path / "all.jsonl"))
    assert (summary["rows"], summary["failed"], summary["this_call"]["rows"]) == (9, 1, 10)
    assert [(one["image"], one["captions"]) for one in lines(tmp_path / "all.jsonl")] == list(
        expected.items()
    )
    [error] = lines(tmp_path / "all.jsonl.bulk" / "errors.jsonl")
    assert error["image"] == "4.png" and "damaged" in error["reason"]
    assert {path.name for path in (tmp_path / "all.jsonl.bulk").iterdir()} == {
        "bulk.json", "errors.jsonl", ".units",
    }  # fmt: skip

    run.run(settings(pictures, tmp_path / "parts"))
    parts = [lines(tmp_path / "parts" / f"{number:05d}.jsonl") for number in range(3)]
    assert [one["image"] for part in parts for one in part] == list(expected)

    run.run(settings(pictures, tmp_path / "all.parquet", "parquet"))
    found = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [(one["image"], one["captions"]) for one in found] == list(expected.items())

    run.run(settings(pictures, tmp_path / "beside", ".caption"))
    assert len(list((tmp_path / "beside").rglob("*.caption"))) == 9
    for name, texts in expected.items():
        beside = (tmp_path / "beside" / name).with_suffix(".caption")
        assert beside.read_text("utf-8") == f"{texts[0]}\n"

    run.run(settings(pictures, tmp_path / "tars", "shards"))
    found = {}
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        for key, files in read_tar(path).items():
            record = json.loads(files["json"])
            found[record["image"]] = record["captions"]
            assert files["png"] == (pictures / names[int(key)]).read_bytes()
    assert found == expected


def test_several_prompts_captions_questions_and_scores(pictures, tmp_path, models):
    generation = GREEDY.with_(method="beam", num_beams=3, num_captions=2)
    wanted = Captioning(
        generation, prompts=("a photo of", "the dog"), keep_prompt=True, questions=("how many?",)
    )
    made = settings(
        pictures, tmp_path / "x.parquet", "parquet", captioning=wanted, prompted=True, scorer="retrieval"
    )
    run.run(made)
    found = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    alone = {}
    for prompt in wanted.prompts:
        one = replace(wanted, prompts=(), prompt=prompt, batch_size=2)
        names = [row["image"] for row in found]
        alone[prompt] = list(caption_folder(models["opt"], pictures, names, None, one, models["retrieval"]))
    for place, row in enumerate(found):
        entries = [alone[prompt][place] for prompt in wanted.prompts]
        assert row["captions"] == [text for entry in entries for text in entry.captions]
        assert row["prompts"] == ["a photo of"] * 2 + ["the dog"] * 2
        assert row["match"] == pytest.approx([score for entry in entries for score in entry.match], abs=1e-5)
        assert dict(row["answers"]) == entries[0].answers and list(entries[0].answers) == ["how many?"]


def test_shards_keep_what_they_held(shards, tmp_path):
    summary = run.run(settings(shards, tmp_path / "out", "shards"))
    assert (summary["rows"], summary["failed"]) == (7, 3)
    before, after = read_tar(shards / "x/00000.tar"), read_tar(tmp_path / "out/x/00000.tar")
    assert list(after) == ["000000000", "000000002", "000000003"]
    for key, files in after.items():
        assert files["png"] == before[key]["png"] and files["txt"] == b"alt text"
        record = json.loads(files["json"])
        assert record["url"] == f"u{int(key)}" and len(record["captions"]) == 1
    errors = lines(tmp_path / "out" / "errors.jsonl")
    assert [error.get("image") or error["file"] for error in errors] == [
        "x/00000/000000001", "x/00001/000000001", "x/00002.tar",
    ]  # fmt: skip
    assert ["json is damaged" in errors[0]["reason"], "no image" in errors[1]["reason"]] == [True, True]


def test_what_is_drawn_differs_by_batch_and_not_by_run(pictures, tmp_path):
    one = png(0)
    for path in pictures.rglob("*.png"):
        path.write_bytes(one)
    generation = GREEDY.with_(method="nucleus", temperature=3.0, top_p=1.0, seed=5)
    for name in "ab":
        run.run(settings(pictures, tmp_path / f"{name}.jsonl", captioning=Captioning(generation)))
    captions = [row["captions"][0] for row in lines(tmp_path / "a.jsonl")]
    assert len(set(captions[::2])) > 1  # the first of every batch, of the same picture
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with pytest.raises(BulkError, match="batch_size 2, now 3"):
        run.run(settings(pictures, tmp_path / "a.jsonl", captioning=Captioning(generation), batch_size=3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_of_pictures(pictures, tmp_path, models, dtype):
    model, processor = models["retrieval"].model, models["retrieval"].processor
    for out in ("e.parquet", "e.jsonl"):
        run.run(settings(pictures, tmp_path / out, out[2:], "embed", dtype=dtype))
    found = parquet.read_table(tmp_path / "e.parquet")
    assert json.loads(found.schema.metadata[b"embedding_shape"]) == [tiny.NUM_QUERIES, 16]
    assert found.schema.field("embedding").type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 96)
    rows = found.to_pylist()
    assert [row["image"] for row in rows] == [row["image"] for row in lines(tmp_path / "e.jsonl")]
    for row, line in zip(rows, lines(tmp_path / "e.jsonl"), strict=True):
        seen = model.encode_image(processor.images(Image.open(pictures / row["image"])))
        expected = model.image_feats(seen.query_output)[0].detach().numpy()
        tolerance = 1e-3 if dtype == "float16" else 1e-5
        assert np.allclose(np.array(row["embedding"]).reshape(expected.shape), expected, atol=tolerance)
        assert np.allclose(line["embedding"], expected, atol=tolerance)


def test_embeddings_of_texts(tmp_path, models, table):
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "dog " * 100]))
    made = settings(tmp_path / "texts.txt", tmp_path / "t.jsonl", "jsonl", "embed", texts_only=True)
    models["retrieval"].processor.context = 48 + tiny.NUM_QUERIES  # so that the long one is cut
    run.run(made)
    found = lines(tmp_path / "t.jsonl")
    assert [row["text"] for row in found[:2]] == list(TEXTS) and len(found) == 3
    tokens = models["retrieval"].processor.text(list(TEXTS))
    expected = models["retrieval"].model.text_feats(**tokens).detach().numpy()
    assert np.allclose([row["embedding"] for row in found[:2]], expected, atol=1e-3)
    models["retrieval"].processor.context = None
    run.run(settings(table, tmp_path / "p.parquet", "parquet", "embed", texts_only=True))
    assert parquet.read_table(tmp_path / "p.parquet")["key"].to_pylist()[-1] == "table.parquet:8"
    [error] = lines(tmp_path / "p.parquet.bulk" / "errors.jsonl")
    assert error["key"] == "table.parquet:9"


@pytest.mark.parametrize("own", [True, False])
def test_scores(pictures, tmp_path, models, own):
    """A picture's with its own texts, or the same for all, are those of the model one by one."""
    (pictures / "2.txt").unlink()
    (pictures / "3.txt").write_text(" \n")
    run.run(settings(pictures, tmp_path / "s.jsonl", "jsonl", "score", texts=() if own else TEXTS))
    found = {row["image"]: row for row in lines(tmp_path / "s.jsonl")}
    missing = {"4.png", *(("2.png", "3.png") if own else ())}
    assert set(find(Source(str(pictures))).names) - set(found) == missing
    model, processor = models["retrieval"].model, models["retrieval"].processor
    for name, row in found.items():
        texts = (pictures / name).with_suffix(".txt").read_text().splitlines() if own else list(TEXTS)
        assert row["texts"] == texts
        seen = model.encode_image(processor.images(Image.open(pictures / name)))
        for head in ("itm", "itc"):
            expected = model.score(seen, **processor.text(texts), head=head)[0].tolist()
            assert row[head] == pytest.approx(expected, abs=1e-5)
    assert len({row["itm"][0] for row in found.values()}) > 4


def test_a_batch_that_does_not_fit_is_halved(pictures, tmp_path, models, monkeypatch):
    model = models["retrieval"].model
    encode, sizes = model.encode_image, []

    def small(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return encode(pixels)

    monkeypatch.setattr(model, "encode_image", small)
    summary = run.run(settings(pictures, tmp_path / "e.jsonl", "jsonl", "embed"))
    assert summary["rows"] == 9 and sizes[:3] == [2, 1, 1]


# ---------------------------------------------------------------- stops


@pytest.mark.parametrize(("out", "to"), [("out", "jsonl"), ("out.parquet", "parquet"), ("out", ".caption")])
def test_a_stop_in_the_middle_changes_nothing(pictures, tmp_path, monkeypatch, out, to):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, stopped = (settings(pictures, tmp_path / name / out, to) for name in ("whole", "stopped"))
    run.run(whole)
    task, calls = tasks.Caption.__call__, []

    def stopping(self, batch, chance):
        calls.append(chance)
        if chance == "1 1":  # the second batch of the second unit
            raise KeyboardInterrupt
        return task(self, batch, chance)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Caption, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            run.run(stopped)
    assert calls == ["0 0", "0 1", "1 0", "1 1"]
    home = tmp_path / "stopped" / (f"{out}.bulk" if "." in out else out)
    assert {path.name for path in (home / ".units").glob("*.json")} == {"00000.json"}
    assert not (tmp_path / "stopped" / "out.parquet").exists() and not list(home.rglob(".*.part"))
    (home / ".units" / ".00001.json.0123abcd.part").write_bytes(b"of a run that was killed")
    first = (home / ".units" / "00000.json").stat().st_mtime_ns
    (pictures / "5a.png").write_bytes(png(50))  # what has come since is not in the plan
    summary = run.run(stopped)
    assert summary["this_call"]["rows"] == 6 and summary["rows"] == 9
    assert (home / ".units" / "00000.json").stat().st_mtime_ns == first
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_finished_run_has_nothing_to_do(pictures, tmp_path, monkeypatch):
    made = settings(pictures, tmp_path / "out.jsonl")
    first = run.run(made)
    with monkeypatch.context() as patch:
        patch.setattr(working, "make_task", lambda *_: pytest.fail("a model was loaded"))
        again = run.run(made)
    assert again["rows"] == first["rows"] and again["this_call"]["rows"] == 0
    text = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    run.run(made)  # someone has removed it, and wants it
    assert (tmp_path / "out.jsonl").read_bytes() == text


def test_texts_beside_pictures_are_left_alone_and_new_pictures_get_theirs(pictures, tmp_path):
    made = settings(pictures, pictures, ".caption")
    (pictures / "0.caption").write_text("mine")
    assert run.run(made)["rows"] == 8
    assert (pictures / "0.caption").read_text() == "mine"
    written = (pictures / "1.caption").stat().st_mtime_ns
    (pictures / "new.png").write_bytes(png(77))
    summary = run.run(made)
    assert summary["rows"] == 1 and (pictures / "new.caption").exists()
    assert (pictures / "1.caption").stat().st_mtime_ns == written
    assert [error["image"] for error in lines(pictures / "errors.jsonl")] == ["4.png"]


def test_a_destination_belongs_to_its_settings(pictures, tmp_path, models):
    run.run(settings(pictures, tmp_path / "out.jsonl"))
    other = Captioning(GREEDY.with_(max_new_tokens=7))
    with pytest.raises(BulkError, match=r"captioning.generation.max_new_tokens 8, now 7"):
        run.run(settings(pictures, tmp_path / "out.jsonl", captioning=other))
    with pytest.raises(BulkError, match="force False, now True"):
        run.run(settings(pictures, tmp_path / "out.jsonl", force=True))
    run.run(settings(pictures, tmp_path / "out.jsonl", batch_size=3, per_file=9))  # these change nothing
    (tmp_path / "theirs.jsonl").write_text("{}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "theirs.parquet").write_text("x")
    for out, to in (("theirs.jsonl", "jsonl"), ("folder", "parquet")):
        with pytest.raises(BulkError, match="not of a bulk run"):
            run.run(settings(pictures, tmp_path / out, to))
    assert (tmp_path / "theirs.jsonl").read_text() == "{}\n"


def test_one_run_at_a_time(pictures, tmp_path):
    made = settings(pictures, tmp_path / "out.jsonl")
    out = results.Destination(run.anywhere(made))
    with run._alone(out), pytest.raises(BulkError, match="another run is writing"):
        run.run(made)
    assert run.run(made)["rows"] == 9


def test_what_ends_a_run_is_told(pictures, tmp_path, monkeypatch):
    made = settings(pictures, tmp_path / "out.jsonl")

    def full(self, record, sample, sample_key):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results.Lines, "add", full)
        with pytest.raises(StoppedError, match=r"No space left on device. The same command goes on"):
            run.run(made)
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "load", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such model")))
        with pytest.raises(StoppedError, match="no such model"):
            run.run(made)
    assert run.run(made)["rows"] == 9


def test_a_model_for_something_else(pictures, tmp_path):
    with pytest.raises(StoppedError, match="opt does not embed: choose a checkpoint such as scenes-itm"):
        run.run(settings(pictures, tmp_path / "e.jsonl", "jsonl", "embed", model=Model("opt")))


def test_remote_destinations(pictures, tmp_path):
    memory = fsspec.filesystem("memory")
    run.run(settings(pictures, tmp_path / "here.jsonl"))
    for _ in range(2):
        summary = run.run(settings(pictures, "memory://there/x.jsonl"))
    assert summary["this_call"]["rows"] == 0
    assert memory.cat("/there/x.jsonl") == (tmp_path / "here.jsonl").read_bytes()
    assert b"4.png" in memory.cat("/there/x.jsonl.bulk/errors.jsonl")
    assert not [path for path in memory.find("/there/x.jsonl.bulk") if path.endswith("0.jsonl")]
    memory.rm("/", recursive=True)


# ---------------------------------------------------------------- actors and figures


def test_actors_for_a_machine(tmp_path, monkeypatch):
    made = settings("a", "b.jsonl", workers=None, model=Model("scenes-opt"))
    large = replace(made, model=Model("blip2-opt-2.7b"))
    assert run.choose_pool(made, [{"CPU": 16, "GPU": 2}, {"CPU": 8}]) == Pool(2, 1.0, 8)
    assert run.choose_pool(replace(made, device="cpu"), [{"CPU": 4, "GPU": 1}]) == Pool(4, 0.0, 1)
    assert run.choose_pool(made, [{"CPU": 2}]) == Pool(2, 0.0, 1)
    assert run.choose_pool(large, [{"CPU": 32}]) == Pool(4, 0.0, 8)
    assert run.choose_pool(large, [{"CPU": 32}], free=24 * 10**9) == Pool(2, 0.0, 16)
    assert run.choose_pool(replace(made, workers=3), [{"CPU": 8}]) == Pool(3, 0.0, 2)
    with pytest.raises(BulkError, match="--workers is 3; a CPU core each, there is room for 2"):
        run.choose_pool(replace(made, workers=3), [{"CPU": 2}])
    with pytest.raises(BulkError, match="--workers is 3; a GPU each, there is room for 2"):
        run.choose_pool(replace(made, workers=3), [{"CPU": 8, "GPU": 2}])
    with pytest.raises(BulkError, match="no GPU"):
        run.choose_pool(replace(made, device="cuda"), [{"CPU": 2}])
    (tmp_path / "x.safetensors").write_bytes(bytes(1000))
    assert run.weight_bytes(str(tmp_path)) == 1000 and run.weight_bytes("some/hub-id") is None


def test_figures_leave_out_the_start_and_first_batches(monkeypatch):
    units = [Unit(number, str(number), "pictures", "x", (), 0, 30) for number in range(4)]
    tally = run.Tally(units, [{"rows": 29, "errors": [{}]}])
    monkeypatch.setattr(run.time, "time", lambda: 120.0)
    for actor, unit, ends in (
        ("a", 1, [(105.0, 10), (106.0, 10), (107.0, 10)]),
        ("b", 2, [(110.0, 10), (112.0, 20)]),
        ("a", 3, [(108.0, 10), (110.0, 20)]),
    ):
        ready = 104.0 if actor == "a" else 109.0
        tally.add(
            {"unit": str(unit), "rows": 30, "errors": [], "actor": actor, "ready": ready, "batches": ends}
        )
    figures = tally.figures(begun=100.0)
    assert figures["rows"] == 90 and figures["workers"] == 2 and figures["start_seconds"] == 9.0
    assert figures["rows_per_second"] == 50 / 5 + 20 / 2 and figures["seconds_for_a_million"] == 50_000
    progress = tally.progress()
    assert (progress.units, progress.rows, progress.of_rows, progress.left) == (4, 120, 120, 0)
    assert progress.per_second == 90 / 16
    text = command.cost({"rows": 119, "this_call": figures}, "x.jsonl")
    assert text == [
        "119 rows in x.jsonl; 90 now, in 20 s",
        "9.0 s of it to start, until the last worker had its model",
        "20.0 rows/s once under way, with 2 workers; a million rows take 13.9 h",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.14, "3.1 s"), (60, "60 s"), (600, "10 min"), (7200, "2.0 h"), (864_000, "10.0 days")],
)
def test_durations(seconds, text):
    assert command.duration(seconds) == text


def test_a_plan_writes_nothing(pictures, tmp_path):
    facts = preview(settings(pictures, tmp_path / "out.jsonl"))
    assert (facts["rows"], facts["exact"], facts["parts"]) == (10, True, 3)
    assert len(facts["first"]) == 5 and "damaged" in facts["first"][4]["reason"]
    assert facts["rows_per_second"] > 0 and facts["seconds"] == pytest.approx(
        10 / facts["rows_per_second"], abs=0.1
    )
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- the command


@pytest.fixture
def bulk(capsys, monkeypatch):
    """Run `blip2 bulk`: exit code, stdout, stderr."""
    monkeypatch.setattr(command, "_model_name", lambda args, console: args.model)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["bulk", *map(str, words)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command(bulk, pictures, tmp_path):
    flags = ("--model", "opt", "--workers", 0, "--method", "greedy", "--max-new-tokens", 4)
    code, said, noted = bulk("caption", pictures, "--out", tmp_path / "x.parquet", *flags)
    assert code == 0 and said.startswith(f"9 rows in {tmp_path / 'x.parquet'}; 10 now")
    assert "10 pictures, in 1 part" in noted and "1 row could not be used" in noted
    assert len(parquet.read_table(tmp_path / "x.parquet")) == 9
    code, said, _ = bulk(
        "embed", pictures, "--out", tmp_path / "e", "--model", "retrieval", "--workers", 0, "--json"
    )
    assert code == 0 and json.loads(said)["rows"] == 9 and (tmp_path / "e" / "00000.parquet").exists()
    code, said, _ = bulk("caption", pictures, "--out", tmp_path / "y", *flags, "--plan", "--start-with", "a")
    assert (
        code == 0 and "10 rows: 10 pictures" in said and "0.png: a " in said and not (tmp_path / "y").exists()
    )
    code, _, noted = bulk("caption", pictures, "--out", tmp_path / "x.parquet", *flags, "--prompt", "a")
    assert code == 1 and "made with other settings" in noted and "captioning.prompts" in noted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embed", "--prompt", "a"), "--prompt is of `bulk caption`, not of `bulk embed`"),
        (("caption", "--text", "a"), "--text is of `bulk score`"),
        (("caption", "--texts",), "--texts is of `bulk embed`"),
        (("embed", "--to", "shards"), "to is 'shards'; allowed for embed: jsonl, parquet"),
        (("score", "--text", " "), "allowed for score: texts that are not empty"),
        (("caption", "--batch-size", 0), "batch_size is 0"),
        (("caption", "--temperature", 2), "add --method nucleus"),
        (("caption", "--start-with", "a", "--prompt", "b"), "give one of them"),
        (("caption", "--ask", " "), "--ask is empty"),
        (("paint",), "invalid choice: 'paint'"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(bulk, tmp_path, words, message):
    code, _, noted = bulk(words[0], tmp_path, "--out", tmp_path / "out", "--model", "opt", *words[1:])
    assert code == 2 and message in " ".join(noted.split())
    assert not (tmp_path / "out").exists()


def test_ray_is_asked_for_where_it_is_missing(bulk, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, noted = bulk("caption", pictures, "--out", tmp_path / "x.jsonl", "--model", "opt")
    assert code == 1 and "Ray is not installed" in noted and "ray[data]" in noted


def test_the_command_starts_without_torch():
    program = "import sys, blip2.cli.bulk; print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_room():
    assert cluster.room([{"CPU": 5}, {"CPU": 2, "GPU": 1}], 0.0, 2) == 3
    assert cluster.room([{"CPU": 5}, {"CPU": 2, "GPU": 1}], 0.5, 1) == 2
