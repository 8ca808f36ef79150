"""`blip2 bench`: folders with random weights, fair pairs of runs, tables, and a clean end."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

import blip2
from blip2.bench import folders, measures, run, table
from blip2.bench.folders import config, make_folder, num_bytes, tensor_shapes
from blip2.bench.measures import Measure, agreement, bytes_per_token, make_inputs, measure
from blip2.bench.sides import Ours, Theirs
from blip2.cli import main
from blip2.processing import Processor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each family, one layer deep, the first in shards."""
    parent = tmp_path_factory.mktemp("folders")
    return {
        size: make_folder(size, parent / size, depth=1, max_shard_size="100MB" if size == "mid" else "5GB")
        for size in ("mid", "mid-t5", "mid-itm")
    }


def stop(*_):
    raise KeyboardInterrupt


# --- folders with random weights ---


@pytest.mark.long
@pytest.mark.parametrize("size", ["mid", "mid-t5", "mid-itm"])
def test_transformers_reads_all_of_it_and_nothing_else(made, size):
    kind = Blip2ForImageTextRetrieval if size == "mid-itm" else Blip2ForConditionalGeneration
    model, info = kind.from_pretrained(made[size], output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32  # what config.json says, as in the releases
    if size == "mid-t5":
        language = model.language_model
        assert not torch.equal(language.lm_head.weight, language.shared.weight)


@pytest.mark.long
@pytest.mark.parametrize("size", ["mid", "mid-t5"])
def test_random_model_answers_as_transformers_does(made, size):
    """And says several words, which depend on the picture: else equal answers would show little."""
    ours, theirs = (side(made[size], "float32", CPU) for side in (Ours, Theirs))
    inputs = make_inputs(ours.processor.tokenizer, pictures=2)
    assert len(ours.processor.tokenizer(inputs.prompt, add_special_tokens=False)["input_ids"]) == 12
    said = ours.caption(inputs.pictures, inputs.prompt, 8)
    assert said == theirs.caption(inputs.pictures, inputs.prompt, 8)
    assert said[0] != said[1] and len(set(said[0].split())) > 3
    assert len(ours.processor.tokenizer(said[0], add_special_tokens=False)["input_ids"]) == 8
    assert ours.chat(inputs.pictures[0], list(inputs.questions[:2]), 3) == theirs.chat(
        inputs.pictures[0], list(inputs.questions[:2]), 3
    )


@pytest.mark.long
def test_random_scores_are_those_of_transformers(made):
    ours, theirs = (side(made["mid-itm"], "float32", CPU) for side in (Ours, Theirs))
    inputs = make_inputs(ours.processor.tokenizer, pictures=1)
    for action in ("match", "contrast"):
        theirs.batch[action] = 2  # its own batches must not change what comes out
        scores = [getattr(side, action)(inputs.pictures[0], inputs.texts[:5]) for side in (ours, theirs)]
        torch.testing.assert_close(*scores)
        assert scores[0].std() > 1e-3


def test_folder_is_the_same_for_a_seed_and_in_shards(made, tmp_path):
    index = json.loads((made["mid"] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(tensor_shapes(config("mid", 1)))
    name = "query_tokens"
    stored = []
    for seed in (0, 1):
        again = make_folder("mid", tmp_path / str(seed), depth=1, seed=seed, max_shard_size="100MB")
        with safe_open(again / index["weight_map"][name], "pt") as tensors:
            stored.append(tensors.get_tensor(name))
        shutil.rmtree(again)
    with safe_open(made["mid"] / index["weight_map"][name], "pt") as tensors:
        assert torch.equal(tensors.get_tensor(name), stored[0])
    assert not torch.equal(*stored)


def test_keys_of_the_encoder_have_no_bias(made):
    """As in the releases."""
    bias = (
        blip2.load(made["mid"], precision="float32").model.vision_model.encoder.layers[0].self_attn.qkv.bias
    )
    query, key, value = bias.detach().chunk(3)
    assert not key.any() and query.all() and value.all()


@pytest.mark.parametrize("size", ["opt-2.7b", "itm"])
def test_released_sizes(size):
    assert num_bytes(size) == 2 * blip2.PRESETS[folders.RELEASED[size]].parameters


def test_no_room_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    with pytest.raises(OSError, match=r"needs 0\.\d GB and the disk has 0\.1 GB left"):
        make_folder("mid", tmp_path / "mid", depth=1)
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        make_folder("mid", tmp_path / "mid", depth=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": "huge"}, "unknown size 'huge': choose mid,"),
        ({"depth": 0}, "depth is 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"folder": "."}, "is there already"),
    ],
)
def test_bad_folder_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        make_folder(**({"size": "mid", "folder": tmp_path / "new"} | change))


# --- pairs of runs ---


class Clock:
    """Sides that take so long as they are told, on a clock that only they move."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(measures.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measures.gc, "collect", lambda: 0)  # there is much to look through in a test run

    def side(self, name, *seconds):
        """One that takes the seconds, one after the other, and again."""
        times = iter(seconds * 100)

        def work(words):
            self.order.append(name)
            self.now += next(times)
            return words

        return SimpleNamespace(work=work)


def test_pairs_take_turns_and_ratios_are_within_pairs(monkeypatch):
    clock = Clock(monkeypatch)
    sides = {"ours": clock.side("ours", 9, 1, 2, 4), "theirs": clock.side("theirs", 9, 3, 4, 4)}
    what = Measure(
        "x", "x of {pictures}", "generate", lambda side, inputs: side.work(["a b"]), None, "images/s"
    )
    found = measure(what, sides, measures.Inputs([None] * 2, "", (), []), CPU, repeats=3)
    assert clock.order[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]  # two warm up
    assert found["times"] == {"ours": [1, 2, 4], "theirs": [3, 4, 4]}
    assert (found["ours"], found["theirs"], found["ratio"]) == (2, 4, 2)
    assert (found["lower"], found["upper"], found["label"], found["count"]) == (1.5, 2.5, "x of 2", 2)
    assert found["agreement"] == {"equal": True, "shared": 2, "words": 2}


def test_less_is_subtracted_and_long_measures_end(monkeypatch):
    clock = Clock(monkeypatch)
    side = clock.side("ours", 31, 1)
    what = Measure(
        "x", "x", "generate", lambda s, i: s.work([]), 60, "tokens/s", less=lambda s, i: s.work([])
    )
    found = measure(what, {"ours": side}, measures.Inputs([], "", (), []), CPU)
    assert found["times"]["ours"] == [30, 30, 30] and "ratio" not in found


def test_short_measures_take_more_pairs(monkeypatch):
    what = Measure("x", "x", "generate", lambda s, i: s.work([]))
    pairs = []
    for seconds in (0.01, 0.5, 2, 40):
        side = Clock(monkeypatch).side("ours", seconds)
        found = measure(what, {"ours": side}, measures.Inputs([], "", (), []), CPU)
        pairs.append(len(found["times"]["ours"]))
    assert pairs == [51, 11, 7, 3]


def test_transformers_gets_its_best_batch(monkeypatch):
    """Here the fixed cost of a call is 1 second, and a text costs more where many are together."""
    clock = Clock(monkeypatch)

    def work(texts):
        clock.now += 1 + 0.1 * len(texts) * (1 + len(texts) / 16)

    side = SimpleNamespace(batch={}, work=work)
    what = Measure("match", "", "match", lambda s, i: s.work(i.texts), batches="match")
    inputs = measures.Inputs([], "", (), [""] * 100)
    assert measures.best_batch(what, side, inputs, CPU) == 16 == side.batch["match"]


def test_agreement():
    assert agreement(["a b c"], ["a x c"]) == {"equal": False, "shared": 1, "words": 3}
    assert agreement(["a b"], ["a b c"]) == {"equal": False, "shared": 2, "words": 3}
    numbers = agreement(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    assert numbers == {"equal": False, "difference": 0.5, "scale": 2.5}


def test_bytes_of_a_token():
    """OPT without places and last norm; Flan-T5 without encoder, embeddings and what is made of it once."""
    for size, left_out in (
        ("mid", r"embed_positions|decoder\.final_layer_norm"),
        ("mid-t5", r"encoder\.|shared|decoder\.final_layer_norm|EncDecAttention\.[kv]"),
    ):
        shapes = tensor_shapes(config(size, 2))
        wanted = [n for n in shapes if n.startswith("language_model") and not measures.re.search(left_out, n)]
        count = sum(torch.Size(shapes[name]).numel() for name in wanted)
        assert bytes_per_token(shapes, "float32") == 4 * count
        assert bytes_per_token(shapes, "bfloat16") == 2 * count
        assert bytes_per_token(shapes, "int8") < 2 * count


# --- the command ---


@pytest.mark.long
def test_command_end_to_end(tmp_path, capsys):
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    words = "bench --size embedded --repeats 1 --threads 1 --only caption --pictures 2"
    assert main([*words.split(), "--out", str(out), "--plot", str(plot)]) == 0
    [found] = json.loads(out.read_text())["tables"]  # auto is float32 here, so the second one is left out
    assert found["machine"]["threads"] == 1 and found["precisions"] == {
        "ours": "float32",
        "theirs": "float32",
    }
    assert [row["name"] for row in found["rows"]] == ["caption"]
    assert found["rows"][0]["agreement"]["equal"] and found["rows"][0]["ratio"] > 0
    shown = capsys.readouterr().out
    assert "| caption, greedy, 20 tokens |" in shown and "float32 on both sides, 1 thread" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_stop_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        list(run.run(run.Options(note=stop)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_stop_ends_the_process(tmp_path, monkeypatch):
    """It is another process that measures."""
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    started = []

    class Watched(run.subprocess.Popen):
        def __init__(self, *arguments, **settings):
            started.append(self)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(run.subprocess, "Popen", Watched)
    options = run.Options(only=["preprocess"], repeats=1, threads=[1], note=lambda _: started and stop())
    with pytest.raises(KeyboardInterrupt):
        list(run.run(options))
    assert started[0].poll() is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size huge", "unknown size 'huge': choose embedded, mid,"),
        ("--only speed", "unknown measure 'speed': choose load,"),
        ("--repeats 0", "repeats is 0"),
        ("--threads -1", "threads is -1"),
    ],
)
def test_bad_words(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_bits_are_for_language_models():
    both = {"generate": "a", "match": "b"}
    assert run._suited(both, {"ours": "auto", "theirs": "float32"}) == both
    assert run._suited(both, {"ours": "int8"}) == {"generate": "a"}
    assert run._suited({"match": "b"}, {"ours": "nf4"}) == {"match": "b"}  # `load` says what is wrong


def test_two_models_that_do_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(run, "main_memory", lambda: SimpleNamespace(free=10**9))
    assert main(["bench", "--device", "cpu", "--only", "caption", "--precision", "float32"]) == 1
    assert "1.0 GB are free: choose a lower --precision" in capsys.readouterr().err


def test_only_one_type_is_compared(tmp_path):
    model = tiny.ours("instruct")
    words = {"tokenizer": tiny.tokenizer("opt"), "qformer_tokenizer": tiny.tokenizer("bert")}
    processor = Processor(
        **words, family="opt", image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    folder = blip2.save(model, processor, tmp_path / "instruct")
    with pytest.raises(ValueError, match=r"instruct is of type instructblip: .* add --side ours"):
        Theirs(folder, "float32", CPU)


def test_plot_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "blip2.bench.plot", None)
    assert main(["bench", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_table_of_one_side():
    row = {"name": "caption", "label": "caption", "times": {"ours": [0.5]}, "ours": 0.5}
    machine = {
        "processor": "P", "cores": 2, "threads": 2, "half_precision": "bfloat16", "bandwidth": 1e10,
        "load_average": 0.0, "python": "3",
    }  # fmt: skip
    decode = {"name": "decode", "label": "decode", "ours": 2.0, "count": 60, "unit": "tokens/s"}
    decode["bytes"] = {"ours": 200_000_000}
    found = {"size": "mid", "weights": "random", "precisions": {"ours": "int8"}, "machine": machine}
    found |= {"rows": [row, decode], "loads": {"ours": {"seconds": 1.5, "load": 2e9, "use": 3e9}}}
    lines = list(table.lines(found))
    assert "| caption | 500 ms |  |  |  |  |" in lines and "| decode | 30 tokens/s |  |  |  |  |" in lines
    assert "| most memory of the load | 2.00 GB |  |  |  |  |" in lines
    assert lines[-1].endswith("Reached: blip2 6 GB/s (60%).")
