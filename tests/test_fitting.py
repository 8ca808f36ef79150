"""Memory is looked at before a model is loaded: what is needed, what is free, and what would fit."""

from pathlib import Path

import pytest
import tiny
import torch
from test_checkpoint import make_processor

from blip2 import cli, fitting
from blip2.bench.folders import tensor_shapes
from blip2.checkpoint import load, save
from blip2.devices import Memory
from blip2.errors import CheckpointError, DoesNotFitError
from blip2.layout import Layout
from blip2.presets import PRESETS, room

GB = 10**9
CPU = torch.device("cpu")


def released(name):
    """What `read_layout` would tell of a released checkpoint."""
    config = PRESETS[name].config()
    return Layout(Path(name), config, PRESETS[name].kind == "match", tensor_shapes(config), {})


@pytest.fixture(scope="module")
def opt():
    return released("blip2-opt-2.7b")


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    monkeypatch.setattr(fitting, "accelerator_memory", lambda device: None)
    monkeypatch.setattr(fitting, "why_not_quantized", lambda device: None)
    monkeypatch.setattr(fitting, "half_precision", lambda device, model: "bfloat16")
    monkeypatch.setattr("blip2.quantize.half_precision", lambda device, model: "bfloat16")


def free(monkeypatch, gigabytes):
    monkeypatch.setattr(fitting, "main_memory", lambda: Memory(64 * GB, int(gigabytes * GB)))


def test_a_folder_and_its_preset_need_the_same(opt):
    for precision in ("float32", "float16", "int8"):
        by_names = fitting.needed(opt, precision, CPU)
        assert by_names == pytest.approx(fitting.needed(PRESETS["blip2-opt-2.7b"], precision, CPU), rel=1e-6)
    assert fitting.needed(opt, "bfloat16", CPU) == room(2 * 3_744_761_856)
    language = 2_651_596_800 + 32 * 2560  # the release has 32 more rows of embeddings
    held = fitting.needed(opt, "float32", CPU, language_precision="bfloat16")
    assert held == room(4 * 3_744_761_856 - 2 * language)


@pytest.mark.parametrize(
    ("gigabytes", "precision", "advice"),
    [
        (9.1, "bfloat16", None),
        (8.9, "bfloat16", "--precision int8 needs 6.2 GB"),
        (8.9, "float32", "--precision int8 needs 6.2 GB"),
        (12, "float32", "--precision bfloat16 needs 8.9 GB"),
        (6, "int8", "--precision nf4 needs 4.8 GB"),
        (4, "int8", "--precision nf4 --quantize-vision needs 3.2 GB"),
        (3, "float32", "--max-memory and --offload-folder"),
        (3, "nf4", "choose a smaller model"),
    ],
)
def test_what_is_proposed(opt, monkeypatch, gigabytes, precision, advice):
    free(monkeypatch, gigabytes)
    if advice is None:
        fitting.check("blip2-opt-2.7b", opt, precision, CPU)
        return
    with pytest.raises(DoesNotFitError) as caught:
        fitting.check("blip2-opt-2.7b", opt, precision, CPU)
    message = str(caught.value)
    assert (
        f"blip2-opt-2.7b needs {fitting.needed(opt, precision, CPU) / 1e9:.1f} GB in {precision}" in message
    )
    assert f"{gigabytes:.1f} GB of memory are free" in message and "--no-memory-check" in message
    assert advice in message
    assert isinstance(caught.value, CheckpointError)


def test_matching_models_and_machines_without_few_bits(monkeypatch, opt):
    free(monkeypatch, 2.5)
    match = released("blip2-itm-vit-g")
    with pytest.raises(DoesNotFitError, match=r"--precision int8 --quantize-vision needs 2\.2 GB"):
        fitting.check("itm", match, "bfloat16", CPU)
    monkeypatch.setattr(fitting, "why_not_quantized", lambda device: "no bitsandbytes")
    with pytest.raises(DoesNotFitError, match=r"choose a smaller model, or keep a part of it on the disk"):
        fitting.check("itm", match, "bfloat16", CPU)


def test_load_checks_unless_told_not_to(tmp_path, monkeypatch, capsys):
    folder = save(tiny.ours("opt"), make_processor("opt"), tmp_path / "small")
    load(folder, device="cpu")
    monkeypatch.setattr(fitting, "SAFE", 0)
    free(monkeypatch, 0.0001)
    with pytest.raises(DoesNotFitError, match=r"small needs 0\.0 GB in float32"):
        load(folder, device="cpu")
    assert load(folder, device="cpu", check_memory=False).model.dtype == torch.float32
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    command = ["caption", str(tmp_path / "red.png"), "--model", str(folder), "--max-new-tokens", "2"]
    assert cli.main(command) == 1
    assert "--no-memory-check loads it all the same" in capsys.readouterr().err
    assert cli.main([*command, "--no-memory-check"]) == 0


def test_a_quantized_folder_needs_what_it_stores(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    text = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    folder = save(tiny.ours("opt", text_config=text), make_processor("opt"), tmp_path / "full")
    few = load(folder, device="cpu", precision="int8")
    saved = save(few.model, few.processor, tmp_path / "few")
    monkeypatch.setattr(fitting, "SAFE", 0)
    size = (saved / "model.safetensors").stat().st_size
    free(monkeypatch, room(size) / GB)
    assert load(saved, device="cpu").precision == "int8"
    free(monkeypatch, (room(size) - 1) / GB)
    with pytest.raises(DoesNotFitError, match=r"in int8, and .* choose a smaller model; --no-memory-check"):
        load(saved, device="cpu")


@pytest.mark.gpu
def test_a_gpu_is_asked_for_its_own_memory():
    assert fitting.memory("cuda").total == torch.cuda.get_device_properties(0).total_memory
