"""Precisions: 8 and 4 bits through bitsandbytes, what they leave alone, and dtypes that survive a folder."""

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from test_checkpoint import edit_config, make_processor

from blip2 import cli
from blip2.checkpoint import CheckpointError, load, save
from blip2.presets import PRESETS
from blip2.quantize import UNQUANTIZED
from blip2.shards import open_tensors

pytest.importorskip("bitsandbytes")
WIDE = {
    "opt": {"hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512},
    "t5": {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 8},
}
VISION = {"hidden_size": 256, "intermediate_size": 512}
BITS = ("int8", "nf4")
MOST = {"int8": 0.03, "nf4": 0.25}  # relative L2 of logits; random weights are harder than trained ones
TEXTS = ["what color is the circle?", "a photo of a red star"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """family -> a folder of a model wide enough that rounding averages out, in float32."""
    folder = tmp_path_factory.mktemp("wide")
    for family, text in WIDE.items():
        vision = VISION | {"num_attention_heads": 4}
        model = tiny.ours(family, text_config=text, vision_config=vision)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(4)  # to N(0, 1), as T5's begin
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                    module.weight.mul_(4 / module.in_features**0.5)  # randomize() drew from N(0, 1/16)
                if name.endswith("Attention.q"):
                    module.weight.mul_(text["d_kv"] ** -0.5)  # T5 scales no attention scores
        save(model, make_processor(family), folder / family)
    return folder


@torch.no_grad()
def logits(model, processor):
    """Those of real tokens, in float32."""
    text = processor.text(TEXTS)
    mask = text["attention_mask"].bool()
    if processor.family == "t5":
        text["decoder_input_ids"] = torch.tensor([[0, 7, 8, 9]] * 2)
    found = model(tiny.pixels(2), **text).logits.float()
    return found.flatten(0, 1) if processor.family == "t5" else found[:, -mask.shape[1] :][mask]


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def kinds(model):
    """Names of layers by class, those that are packed for inference under their own."""
    found = {}
    for name, module in model.named_modules():
        found.setdefault(type(module).__name__.removeprefix("Packed"), []).append(name)
    return found


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("family", WIDE)
def test_few_bits_load_answer_and_survive_a_folder(wide, tmp_path, family, precision, caplog):
    full = load(wide / family, device="cpu", precision="float32")
    few = load(wide / family, device="cpu", precision=precision)
    exact = logits(full.model, full.processor)
    saved = save(few.model, few.processor, tmp_path / "few")
    found = logits(few.model, few.processor)
    assert 0 < error(found, exact) < MOST[precision]

    few_kinds = kinds(few.model)
    name = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[precision]
    layers = few_kinds[name]
    assert all(layer.startswith("language_model.") for layer in layers)
    assert {layer for layer in kinds(full.model)["Linear"] if layer not in layers} == {
        *(n for n in kinds(full.model)["Linear"] if not n.startswith("language_model.")),
        *(n for n in kinds(full.model)["Linear"] if n.endswith(("lm_head", ".wo"))),
    }
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert size < 0.7 * sum(file.stat().st_size for file in (wide / family).glob("*.safetensors"))

    again = load(saved, device="cpu")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(saved)
    text = few.processor.text(TEXTS[0])
    ids = few.model.generate(tiny.pixels(1), **text, max_new_tokens=5)
    assert again.precision == precision and again.model.dtype == few.model.dtype == theirs.dtype
    assert torch.equal(logits(again.model, again.processor), found)
    assert torch.equal(again.model.generate(tiny.pixels(1), **text, max_new_tokens=5), ids)
    assert kinds(theirs)[name] == layers
    tokens = full.model.config.image_token_index * torch.ones(1, tiny.NUM_QUERIES, dtype=torch.long)
    mine = {
        key: torch.cat([start, text[key]], 1)
        for key, start in (("input_ids", tokens), ("attention_mask", tokens * 0 + 1))
    }
    said = theirs.generate(tiny.pixels(1), **mine, max_new_tokens=5)
    assert torch.equal(said[:, -ids.shape[1] :], ids)
    assert "inputs will be cast" not in caplog.text and "kernels" not in caplog.text


@pytest.mark.parametrize("precision", BITS)
def test_a_tied_head_is_never_quantized(wide, monkeypatch, precision):
    """With it OPT's embeddings would be, which are the same matrix: generation breaks off."""
    model = load(wide / "opt", device="cpu", precision=precision).model
    head = model.language_model.lm_head
    assert (
        type(head).__name__ in ("Linear", "PackedLinear")
        and head.weight is model.get_input_embeddings().weight
    )
    text = make_processor("opt").text(TEXTS[0])
    assert model.generate(tiny.pixels(1), **text, max_new_tokens=2).shape == (1, 2)
    monkeypatch.setattr("blip2.quantize.UNQUANTIZED", [name for name in UNQUANTIZED if name != "lm_head"])
    with pytest.raises((AttributeError, AssertionError, CheckpointError)):
        broken = load(wide / "opt", device="cpu", precision=precision).model
        broken.generate(tiny.pixels(1), **text, max_new_tokens=2)


@pytest.mark.parametrize("precision", BITS)
def test_the_image_encoder_by_choice(wide, tmp_path, precision):
    few = load(wide / "t5", device="cpu", precision=precision, quantize_vision=True)
    plain = load(wide / "t5", device="cpu", precision=precision)
    layers = kinds(few.model)[{"int8": "Linear8bitLt", "nf4": "Linear4bit"}[precision]]
    assert len([layer for layer in layers if layer.startswith("vision_model.encoder.layers.")]) == 2 * 4
    assert not [layer for layer in layers if "qformer" in layer or "projection" in layer.split(".")[0]]
    exact = load(wide / "t5", device="cpu", precision="float32")
    assert (
        error(logits(few.model, few.processor), logits(exact.model, exact.processor)) < 1.5 * MOST[precision]
    )
    saved = [save(m.model, m.processor, tmp_path / name) for m, name in ((few, "all"), (plain, "language"))]
    assert load(saved[0], device="cpu", quantize_vision=True).precision == precision
    with pytest.raises(CheckpointError, match="but for the image encoder"):
        load(saved[1], device="cpu", quantize_vision=True)
    with pytest.raises(ValueError, match="goes with precision int8 or nf4, not with float32"):
        load(wide / "t5", device="cpu", quantize_vision=True)


def test_matching_models_quantize_the_image_encoder_or_nothing(tmp_path):
    folder = save(tiny.ours("retrieval"), make_processor("retrieval"), tmp_path / "match")
    with pytest.raises(
        CheckpointError, match=r"no language model, .* choose bfloat16, or .*--quantize-vision"
    ):
        load(folder, device="cpu", precision="int8")
    few = load(folder, device="cpu", precision="int8", quantize_vision=True)
    assert len(kinds(few.model)["Linear8bitLt"]) == 2 * 4
    again = load(save(few.model, few.processor, tmp_path / "few"), device="cpu").model
    tokens = few.processor.text(TEXTS)
    with torch.no_grad():
        scores = [model.score(model.encode_image(tiny.pixels(2)), **tokens) for model in (few.model, again)]
    assert torch.equal(*scores)
    assert transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "few").dtype == few.model.dtype


@pytest.mark.parametrize("name", ["scenes-opt", "scenes-flan-t5"])
@torch.no_grad()
def test_int8_of_the_embedded_models(name):
    if not (PRESETS[name].folder / "model.safetensors").is_file():
        pytest.skip("takes the embedded checkpoints")
    full, few = load(name, device="cpu"), load(name, device="cpu", precision="int8")
    text = full.processor.text([full.processor.prompt("what color is the circle?")])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    extra = {} if full.model.is_decoder_only else {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]])}
    found = [loaded.model(pixels, **text, **extra).logits.float() for loaded in (few, full)]
    assert 0 < error(*found) < 0.03


def test_command_line(wide, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    command = ["caption", str(tmp_path / "red.png"), "--model", str(wide / "opt"), "--max-new-tokens", "3"]
    assert cli.main([*command, "--precision", "int8", "--quantize-vision", "--json"]) == 0
    assert '"precision": "int8"' in capsys.readouterr().out
    assert cli.main([*command, "--quantize-vision"]) == 1
    assert "goes with precision int8 or nf4, not with float32" in capsys.readouterr().err


# --- 16 bits ---


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_16_bits_survive_a_folder(tmp_path, family, precision):
    """A plain load, ours or theirs, makes no float32 of it; under float16 some parts were float32 before."""
    full = save(tiny.ours(family), make_processor(family), tmp_path / "full")
    half = load(full, device="cpu", precision=precision)
    saved = save(half.model, half.processor, tmp_path / "half")
    dtypes = {name: tensor.dtype for name, tensor in half.model.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    parts = {part for name in kept for part in ("qformer", "query_tokens", "wo") if part in name.split(".")}
    expected = {"qformer", "query_tokens"} | ({"wo"} if family == "t5" else set())
    assert parts == (expected if precision == "float16" else set())
    assert all(set(name.split(".")) & {"qformer", "query_tokens", "wo"} for name in kept)
    assert half.model.dtype == half.model.config.dtype == getattr(torch, precision)

    again = load(saved, device="cpu")
    assert again.precision == precision
    assert {name: tensor.dtype for name, tensor in again.model.state_dict().items()} == dtypes
    for name, tensor in half.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    if family in ("opt", "t5"):
        theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(saved)
    elif family == "retrieval":
        theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(saved)
    else:
        return  # their InstructBLIP keeps other parts in float32
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == dtypes[name], name
    assert load(saved, device="cpu", precision="float32").model.dtype == torch.float32


# --- reading ---


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [1, 1 << 20])
def test_tensors_are_read_in_pieces(tmp_path, monkeypatch, dtype, own):
    from safetensors.torch import save_file

    monkeypatch.setattr("blip2.shards.OWN", own)
    monkeypatch.setattr("blip2.shards.StoredTensor.PIECE", 64)
    monkeypatch.setattr("blip2.shards.StoredTensor.threads", type("Threads", (), {})())
    tensors = {
        "half": torch.randn(7, 33).half(), "whole": torch.randn(5, 3, 2), "one": torch.tensor(3.5),
        "none": torch.zeros(0, 4), "count": torch.arange(100), "bits": torch.arange(50, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    read = open_tensors([tmp_path / "a.safetensors"], lambda name: dtype)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            wanted = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
            assert read[name][...].dtype == wanted.dtype and torch.equal(read[name][...], wanted)
            assert read[name].get_shape() == file.get_slice(name).get_shape()
            assert read[name].get_dtype() == file.get_slice(name).get_dtype()
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "a.safetensors").stat().st_size - 3)
    with pytest.raises(CheckpointError, match="ended before"):
        [tensor[...] for tensor in read.values()]


def test_no_memory_for_a_tensor(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def refused(*_):
        raise OSError(12, "Cannot allocate memory")

    save_file({"big": torch.zeros(1 << 19)}, tmp_path / "a.safetensors")
    monkeypatch.setattr("blip2.shards.mmap.mmap", refused)
    with pytest.raises(MemoryError, match="2,097,152 bytes"):
        open_tensors([tmp_path / "a.safetensors"])["big"][...]


def test_a_saved_dtype_that_is_none(tmp_path):
    folder = save(tiny.ours("opt"), make_processor("opt"), tmp_path / "old")
    edit_config(folder, dtype=None, torch_dtype=None)
    assert load(folder, device="cpu").precision == "float32"
