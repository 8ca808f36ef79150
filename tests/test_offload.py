"""A model that memory does not hold in one piece: part of it on the disk, or over devices."""

import copy
import gc

import pytest
import tiny
import torch
from test_checkpoint import make_processor

from blip2 import cli
from blip2.checkpoint import CheckpointError, load, save
from blip2.errors import DoesNotFitError
from blip2.model import Blip2
from blip2.placement import blocks, main_device, place, read_budget, spread
from blip2.quantize import weight_bytes
from blip2.representation import Blip2Representation

CLASSES = {"retrieval": Blip2Representation}
SIZES = {"vision_config": {"num_hidden_layers": 3}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each layout."""
    folder = tmp_path_factory.mktemp("folders")
    for family in tiny.FAMILIES:
        save(tiny.ours(family, **copy.deepcopy(SIZES)), make_processor(family), folder / family)
    return folder


def tight(family, precision="float32"):
    """Bytes that hold what is not split, a block that is brought in, and a little more."""
    with torch.device("meta"):
        model = CLASSES.get(family, Blip2)(tiny.config(family, **copy.deepcopy(SIZES)))
    sizes = weight_bytes(model, precision)
    movable = blocks(model)
    weights = [sum(size for name, size in sizes.items() if name.startswith(f"{b}.")) for b in movable]
    return sum(sizes.values()) - sum(weights) + 2 * max(weights)


def on_disk(model):
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_part_on_the_disk_answers_the_same(folders, tmp_path, family, caplog):
    loaded = load(folders / family, max_memory={"cpu": "1GB"})
    assert not loaded.offloaded
    whole = loaded.model
    loaded = load(folders / family, max_memory={"cpu": tight(family)}, offload_folder=tmp_path / "scratch")
    model, pixels = loaded.model, tiny.pixels(2)
    away = on_disk(model)
    assert away and len(list((tmp_path / "scratch").iterdir())) == 1
    assert all(".layers." in name or ".block." in name for name in away)  # nothing but blocks
    assert (
        loaded.offloaded
        and loaded.device == model.device == torch.device("cpu")
        and model.dtype == torch.float32
    )
    tokens = loaded.processor.text(["what color is the circle?", "a photo of"])
    if family == "retrieval":
        for head in ("itm", "itc"):
            assert torch.equal(
                *(m.score(m.encode_image(pixels), **tokens, head=head) for m in (whole, model))
            )
    else:
        if family == "instruct":
            question = loaded.processor.question(["what color is the circle?", "a photo of"])
            tokens |= question
        extra = {"decoder_input_ids": torch.tensor([[0, 7, 8]] * 2)} if family == "t5" else {}
        assert torch.equal(*(m(pixels, **tokens, **extra).logits for m in (whole, model)))
        for options in ({}, {"num_beams": 3}):
            ids = [m.generate(pixels, **tokens, **options, max_new_tokens=6) for m in (whole, model)]
            assert torch.equal(*ids)
    with pytest.raises(CheckpointError, match="part of this model is on the disk"):
        save(model, loaded.processor, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    del model, loaded
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir())


def test_float16_on_the_disk_keeps_every_dtype(folders, tmp_path):
    """T5's `wo` is float32 there as it is in memory."""
    options = {
        "precision": "float16",
        "offload_folder": tmp_path,
        "max_memory": {"cpu": tight("t5", precision="float16")},
    }
    with torch.no_grad():
        whole = load(folders / "t5", device="cpu", precision="float16")
        parted = load(folders / "t5", **options)
        away = on_disk(parted.model)
        assert any(name.endswith("wo.weight") for name in away)
        ids = torch.tensor([[0, 7, 8]])
        text = whole.processor.text("a photo of")
        models = (whole.model, parted.model)
        logits = [model(tiny.pixels(1), **text, decoder_input_ids=ids).logits for model in models]
    assert torch.equal(*logits) and parted.precision == "float16" and parted.model.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": {"cpu": "1KB"}}, "have to be there: what is not split, and a block at a time"),
        ({"max_memory": "cpu=TIGHT"}, r"the weights take .* and max_memory allows .*--offload-folder"),
        ({"max_memory": {"cpu": "much"}}, "cpu=much cannot be read: .* such as cpu=8GB,cuda:0=20GB"),
        ({"max_memory": {"disk": "8GB"}}, "disk=8GB cannot be read"),
        ({"max_memory": ""}, "names no device"),
        ({"offload_folder": "."}, "offload_folder goes with max_memory"),
        ({"max_memory": {"cpu": "1GB"}, "adapter": "."}, "an adapter needs a model in one piece"),
        ({"max_memory": {"cuda:7": "1GB"}}, "'cuda:7' is not on this machine"),
        ({"max_memory": "cpu=100KB", "offload_folder": ".", "precision": "int8"}, "weights in int8 stay"),
    ],
)
def test_what_cannot_be_spread(folders, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    options = {
        name: value.replace("TIGHT", str(tight("opt"))) if isinstance(value, str) else value
        for name, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        load(folders / "opt", **options)
    assert not list(tmp_path.iterdir())


def test_a_load_that_fails_leaves_nothing_on_the_disk(folders, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folders / "opt", max_memory={"cpu": tight("opt")}, offload_folder=tmp_path, watch=stop)
    assert not list(tmp_path.iterdir())


def test_budgets():
    assert read_budget("cpu=8GB, cuda:1=2GiB,0=500m") == {0: 5 * 10**8, 1: 2 * 2**30, "cpu": 8 * 10**9}
    assert list(read_budget({"cpu": 7, "cuda": "1.5KB"}).items()) == [(0, 1500), ("cpu", 7)]
    assert main_device(None, "cpu") == main_device({"cpu": 1}, "auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device mps is not the first|'mps' is not on this machine"):
        main_device({"cpu": 1}, "mps")


def test_blocks_fill_devices_in_order():
    """The language model's first: every token needs them, and the image encoder's once an image."""
    with torch.device("meta"):
        model = Blip2(tiny.config("t5", **copy.deepcopy(SIZES)))
    sizes = dict.fromkeys(weight_bytes(model, "float32"), 0)
    movable = blocks(model)
    assert len(movable) == 2 + 2 + 3 and movable[0] == "language_model.encoder.block.0"
    for block in movable:
        sizes[next(name for name in sizes if name.startswith(f"{block}."))] = 10
    sizes["query_tokens"] = 5
    found = place(model, sizes, {0: 26, 1: 20, "cpu": 10}, disk=True)
    devices = [0, 1, 1, "cpu", "disk", "disk", "disk"]  # 10 stay free on 0
    assert [found[block] for block in movable] == devices
    assert {device for part, device in found.items() if part not in movable} == {0}
    bare = [name for name in sizes if not any(f"{name}.".startswith(f"{part}.") for part in found)]
    assert bare == [] and found["query_tokens"] == 0
    assert set(place(model, sizes, {0: 36, 1: 40}, disk=False).values()) == {0, 1}  # to the last byte
    with pytest.raises(DoesNotFitError, match=r"cuda:0, and at least"):
        place(model, sizes, {0: 14, 1: 20}, disk=True)


def test_several_gpus_only_where_one_is_not_enough(folders, monkeypatch):
    from blip2 import placement
    from blip2.devices import Memory
    from blip2.layout import read_layout

    layout, cuda = read_layout(folders / "opt"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "needed", lambda *_: 8 * 10**9)
    for free, expected in ((9 * 10**9, None), (7.4 * 10**9, {0: 6_090_909_090, 1: 6_090_909_090})):
        monkeypatch.setattr(placement, "memory", lambda device, free=free: Memory(10**11, int(free)))
        assert spread(layout, "float32", cuda, False) == expected
    assert spread(layout, "float32", torch.device("cpu"), False) is None


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_and_main_memory_answer_the_same(folders):
    whole = load(folders / "opt", device="cuda", precision="float32")
    parted = load(folders / "opt", max_memory={"cuda:0": tight("opt"), "cpu": "1GB"}, precision="float32")
    assert on_disk(parted.model) and parted.device.type == "cuda"
    text = {name: value.to("cuda") for name, value in whole.processor.text("a photo of").items()}
    pixels = tiny.pixels(1).to("cuda")
    ids = [m.generate(pixels, **text, max_new_tokens=6) for m in (whole.model, parted.model)]
    assert torch.equal(*ids)


def test_command_line(folders, tmp_path, capsys, caplog):
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    command = [
        "caption",
        str(tmp_path / "red.png"),
        "--model",
        str(folders / "opt"),
        "--json",
        "--max-new-tokens=4",
    ]
    assert cli.main(command) == 0
    plain = capsys.readouterr().out
    spread_out = ["--max-memory", f"cpu={tight('opt')}", "--offload-folder", str(tmp_path / "scratch")]
    assert cli.main([*command, *spread_out]) == 0
    assert capsys.readouterr().out == plain
    for wrong, message in (
        (["--max-memory", "cpu:8GB"], "such as cpu=8GB,cuda:0=20GB"),
        (["--offload-folder", "x"], "--offload-folder goes with --max-memory"),
        (
            ["--quantize-vision", "--precision", "float16"],
            "--quantize-vision goes with --precision int8 or nf4",
        ),
    ):
        assert cli.main([*command[:4], *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not any("meta device" in record.getMessage() for record in caplog.records)
