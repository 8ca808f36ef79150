"""Loading and saving: old and new layouts, precisions, and a clear word about everything that is wrong."""

import json
import pickle
import shutil

import pytest
import tiny
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.checkpoint import CheckpointError, load, save
from blip2.config import Blip2AnyConfig
from blip2.model import Blip2
from blip2.presets import PRESETS, resolve
from blip2.processing import Processor


def make_processor(family: str) -> Processor:
    return Processor(
        tiny.tokenizer(tiny.language_family(family)),
        family={"instruct": "opt", "retrieval": "bert"}.get(family, family),
        image_size=tiny.IMAGE_SIZE,
        num_query_tokens=tiny.NUM_QUERIES,
        qformer_tokenizer=tiny.tokenizer("bert") if family == "instruct" else None,
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """family -> a folder of ours; not to be changed."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = save(
                tiny.ours(family), make_processor(family), tmp_path_factory.mktemp("original") / family
            )
        return made[family]

    return get


@pytest.fixture
def folder(originals, tmp_path):
    """family -> a copy of a folder of ours, to be changed."""

    def get(family="opt"):
        return shutil.copytree(originals(family), tmp_path / "copy")

    return get


def edit_config(folder, **changes):
    """Change fields of config.json; a dict changes fields of that part, None removes one."""
    raw = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, update = (raw[name], value) if isinstance(value, dict) else (raw, {name: value})
        for key, new in update.items():
            part.pop(key, None) if new is None else part.update({key: new})
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refuse(folder, *words, **options):
    """Loading fails with a CheckpointError whose one-line message holds the words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, device="cpu", **options)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message and len(message) < 900, message


# --- round trips ---


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trip_is_bitwise(originals, family):
    loaded = load(originals(family), device="cpu")
    expected = tiny.ours(family).state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert (loaded.precision, loaded.notes, loaded.processor.family) == (
        "float32",
        [],
        make_processor(family).family,
    )


@pytest.mark.parametrize("family", ["opt", "t5", "instruct", "retrieval"])
def test_files_suit_transformers_4_and_5(originals, family):
    folder = originals(family)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"} <= names
    raw = json.loads((folder / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    assert raw["architectures"] == [type(tiny.theirs(family)).__name__]
    if family == "t5":  # what version 4 ties by, and what version 5 scales by
        text = raw["text_config"]
        assert (text["tie_word_embeddings"], text["scale_decoder_outputs"]) == (False, False)
    # Version 4 would be given the image processor twice, and knows no tokenizer class of version 5.
    assert set(json.loads((folder / "processor_config.json").read_text())) == {
        "processor_class",
        "num_query_tokens",
    }
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(transformers.AutoProcessor.from_pretrained(folder), transformers.ProcessorMixin)


def test_tied_flan_t5_is_stored_for_both_versions(tmp_path):
    """Built by version 5 it is tied without scaling; version 4 needs the output matrix stored for that."""
    config = tiny.config("t5")
    model = tiny.randomize(Blip2(config))
    assert model.language_model.lm_head.weight is model.language_model.shared.weight
    folder = save(model, make_processor("t5"), tmp_path / "t5")
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["language_model.lm_head.weight"], stored["language_model.shared.weight"])
    again = load(folder, device="cpu").model
    assert again.language_model.lm_head.weight is again.language_model.shared.weight


def test_shards(tmp_path):
    model, processor = tiny.ours("opt"), make_processor("opt")
    folder = save(model, processor, tmp_path / "model", max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3 and (folder / "model.safetensors.index.json").is_file()
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in load(folder, device="cpu").model.state_dict().items())
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in theirs.items())
    # A later checkpoint replaces all of them and keeps what is not its own.
    (folder / "README.md").write_text("mine")
    save(model, processor, folder)
    assert not list(folder.glob("model-*")) and (folder / "README.md").read_text() == "mine"
    shards[0].parent.joinpath("model.safetensors").unlink()
    save(model, processor, folder, max_shard_size="40KB")
    shards[1].unlink()
    refuse(folder, f"1 of {len(shards)} weight files are missing: {shards[1].name}", "download")


def test_bin_files(folder):
    path = folder()
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    expected = tiny.ours("opt").state_dict()
    loaded = load(path, device="cpu").model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_save_is_all_or_nothing(tmp_path, monkeypatch):
    model, processor = tiny.ours("opt"), make_processor("opt")
    folder = save(model, processor, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("blip2.saving.save_file", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save(tiny.ours("opt", seed=5), processor, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_save_does_not_replace_other_things(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    for target in (tmp_path / "photos", tmp_path / "photos" / "cat.jpg"):
        with pytest.raises(CheckpointError, match="is no checkpoint: choose another folder"):
            save(tiny.ours("opt"), make_processor("opt"), target)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_half_size_storage(tmp_path):
    """Weights stored in float16 under a config that says float32: half the file, float32 arithmetic."""
    folder = save(tiny.ours("opt"), make_processor("opt"), tmp_path / "m", weights_dtype="float16")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert load(folder, device="cpu").model.query_tokens.dtype == torch.float32
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folder)
    assert theirs.query_tokens.dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip of LAVIS", "AutoModel"])
def test_another_encoder_is_refused_by_transformers(tmp_path, kind):
    """It would read such a folder as `blip-2`, with random weights; so it must find none."""
    raw = tiny.config("opt").to_dict()
    raw.pop("model_type")
    raw["vision_config"] |= {"pre_layernorm": True, "patch_bias": False, "hidden_act": "quick_gelu"}
    if kind == "AutoModel":
        raw["vision_config"] |= {"model_type": "clip_vision_model"}
    model = tiny.randomize(Blip2(Blip2AnyConfig(**raw)))
    folder = save(model, make_processor("opt"), tmp_path / "clip")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "blip2-any"
    again = load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    for theirs in (
        transformers.Blip2ForConditionalGeneration,
        transformers.Blip2Model,
        transformers.AutoModelForImageTextToText,
    ):
        with pytest.raises((OSError, ValueError)):
            theirs.from_pretrained(folder)


# --- older revisions ---


def test_old_stage2_revision(folder):
    """No image_token_index, no processor_config.json, the output matrix and an index buffer stored."""
    path = folder()
    edit_config(path, image_token_index=None, dtype=None)
    (path / "processor_config.json").unlink()
    edit_weights(
        path,
        lambda w: w.update(
            {
                "language_model.lm_head.weight": w[
                    "language_model.model.decoder.embed_tokens.weight"
                ].clone(),
                "qformer.embeddings.position_ids": torch.arange(48)[None],
            }
        ),
    )
    loaded = load(path, device="cpu")
    assert loaded.model.config.image_token_index == tiny.config("opt").image_token_index
    assert torch.equal(loaded.model.query_tokens, tiny.ours("opt").query_tokens)
    assert loaded.processor.num_query_tokens == tiny.NUM_QUERIES


def test_old_retrieval_revision(folder):
    """`qformer_text_input`, `vision_proj`, `text_proj`; none of the extra parameters of stage 1."""
    path = folder("retrieval")
    edit_config(path, qformer_config={"use_qformer_text_input": None, "qformer_text_input": True})

    def rename(weights):
        for name in list(weights):
            if name == "temperature" or name.startswith("lm_head."):
                del weights[name]
            for new, old in (("vision_projection.", "vision_proj."), ("text_projection.", "text_proj.")):
                if name.startswith(new):
                    weights[name.replace(new, old)] = weights.pop(name)

    edit_weights(path, rename)
    loaded = load(path, device="cpu")
    assert "no temperature" in loaded.notes[0]
    assert loaded.model.temperature.item() == pytest.approx(0.07)
    expected = tiny.ours("retrieval").state_dict()
    for name, value in loaded.model.state_dict().items():
        assert name == "temperature" or name.startswith("lm_head.") or torch.equal(value, expected[name])


def test_explicit_activation_of_flan_t5(folder):
    """`dense_act_fn` in the file wins over what feed_forward_proj would mean."""
    path = folder("t5")
    assert load(path, device="cpu").model.config.text_config.dense_act_fn == "gelu"
    edit_config(path, text_config={"dense_act_fn": None})
    assert load(path, device="cpu").model.config.text_config.dense_act_fn == "gelu_new"


# --- precision ---


def test_precisions(originals):
    for precision in ("bfloat16", "float16"):
        loaded = load(originals("t5"), precision=precision, device="cpu")
        dtype = getattr(torch, precision)
        model = loaded.model
        assert model.dtype == model.config.dtype == model.language_projection.weight.dtype == dtype
        kept = torch.float32 if precision == "float16" else dtype
        names = [
            "query_tokens",
            "qformer.layernorm.weight",
            "language_model.encoder.block.0.layer.1.DenseReluDense.wo.weight",
        ]
        assert {model.state_dict()[name].dtype for name in names} == {kept}
        assert len(loaded.notes) == (precision == "float16")
        text = loaded.processor.text("what color is the circle?")
        assert model.generate(tiny.pixels(1), **text, max_new_tokens=3).shape[0] == 1
    with pytest.raises(
        ValueError, match="unknown precision 'fp16': choose auto, float32, bfloat16, float16, int8, nf4"
    ):
        load(originals("t5"), precision="fp16")


@torch.no_grad()
def test_saved_dtype_is_the_models(originals, tmp_path):
    loaded = load(originals("opt"), precision="float16", device="cpu")
    folder = save(loaded.model, loaded.processor, tmp_path / "half")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "float16"
    stored = load_file(folder / "model.safetensors")
    assert stored["query_tokens"].dtype == torch.float32
    assert stored["language_projection.weight"].dtype == torch.float16


def test_auto_precision(originals, monkeypatch):
    assert load(originals("opt"), device="cpu").precision == "float32"
    monkeypatch.setattr("blip2.quantize.SMALL", 1000)
    for bf16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert load(originals("opt"), device="cpu").precision == expected


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@torch.no_grad()
def test_quantized(tmp_path, precision, caplog):
    pytest.importorskip("bitsandbytes")
    sizes = {
        "vision_config": {"hidden_size": 64, "intermediate_size": 128},
        "text_config": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    }
    folder = save(tiny.ours("opt", **sizes), make_processor("opt"), tmp_path / "full")
    exact, loaded = load(folder, device="cpu"), load(folder, device="cpu", precision=precision)
    quantized = [name for name, module in loaded.model.named_modules() if "bit" in type(module).__name__]
    linear = [name for name, module in exact.model.named_modules() if isinstance(module, torch.nn.Linear)]
    spared = [name for name in linear if name not in quantized]
    assert len(quantized) == 2 * 6  # OPT's, all of them
    kept = ("vision_model", "qformer", "language_model.lm_head", "language_projection")
    assert all(name.startswith(kept) for name in spared)

    text = loaded.processor.text("what color is the circle?")
    logits = loaded.model(tiny.pixels(1), **text).logits
    close = exact.model(tiny.pixels(1), **text).logits
    assert (logits - close).norm() / close.norm() < {"int8": 0.1, "nf4": 0.6}[precision]
    loaded.model.generate(tiny.pixels(1), **text, max_new_tokens=3)
    assert "inputs will be cast" not in caplog.text and "kernels" not in caplog.text

    again = load(save(loaded.model, loaded.processor, tmp_path / "small"), device="cpu")
    assert again.precision == precision
    # The CPU repacks 4-bit weights at the first use, which costs a little.
    again_logits = again.model(tiny.pixels(1), **text).logits
    assert (again_logits - logits).norm() / logits.norm() < {"int8": 1e-6, "nf4": 0.05}[precision]
    with pytest.raises(CheckpointError, match=f"is stored in {precision}, it cannot be loaded as bfloat16"):
        load(tmp_path / "small", device="cpu", precision="bfloat16")


def test_adapter(originals, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(originals("opt"), device="cpu").model
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    text = make_processor("opt").text("what color is the circle?")
    with torch.no_grad():
        expected = lora(tiny.pixels(1), **text).logits
        adapted = load(originals("opt"), device="cpu", adapter=tmp_path / "lora").model
        plain = load(originals("opt"), device="cpu").model(tiny.pixels(1), **text).logits
        assert torch.allclose(adapted(tiny.pixels(1), **text).logits, expected, atol=1e-6)
        assert not torch.allclose(plain, expected, atol=1e-2)
    with pytest.raises(CheckpointError, match="wears an adapter"):
        save(adapted, make_processor("opt"), tmp_path / "both")
    refuse(originals("opt"), "holds no adapter_config.json", adapter=originals("opt"))


# --- what is wrong is said ---


def test_missing_keys(folder):
    path = folder()
    edit_weights(
        path, lambda w: [w.pop(name) for name in list(w) if ".layers.1.fc1" in name or name == "query_tokens"]
    )
    refuse(
        path,
        "3 missing keys: language_model.model.decoder.layers.1.fc1.bias",
        "query_tokens",
        "image size 28",
    )


def test_unexpected_keys(folder):
    path = folder()
    edit_weights(path, lambda w: w.update({f"extra.{index}": torch.zeros(1) for index in range(7)}))
    refuse(path, "7 unexpected keys: extra.0, extra.1, extra.2, extra.3, extra.4, ...")


def test_mis_shaped_keys(folder):
    path = folder()
    edit_config(path, text_config={"vocab_size": 50})
    refuse(
        path,
        "1 mis-shaped key: language_model.model.decoder.embed_tokens.weight [56, 32] instead of [50, 32]",
    )


def test_part_of_the_stage1_extras(folder):
    path = folder("retrieval")
    edit_weights(path, lambda w: w.pop("lm_head.bias"))
    refuse(path, "1 missing key: lm_head.bias")


def test_output_matrix_of_flan_t5(folder):
    path = folder("t5")
    edit_weights(path, lambda w: w.pop("language_model.lm_head.weight"))
    refuse(path, "1 missing key: language_model.lm_head.weight", "tie_word_embeddings")


def test_a_released_config_that_fits_is_named():
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (1408, 3, 14, 14),
        "vision_model.embeddings.position_embedding": (1, 677, 1408),
        "query_tokens": (1, 32, 768),
        "language_projection.weight": (2560, 768),
    }
    sentence = checkpoint.describe(shapes)
    assert "image size 364" in sentence and "Salesforce/blip2-opt-2.7b-coco would fit" in sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llava"}, ["model_type 'llava'", "blip-2, instructblip, blip2-any"]),
        (
            {"vision_config": {"num_attention_heads": 5}},
            ["vision_config.hidden_size 24 is not divisible by", "5"],
        ),
        (
            {"qformer_config": {"num_attention_heads": 7}},
            ["qformer_config.hidden_size 32 is not divisible by"],
        ),
        ({"text_config": {"num_attention_heads": 3}}, ["text_config.hidden_size 32 is not divisible by"]),
        ({"qformer_config": {"encoder_hidden_size": 99}}, ["encoder_hidden_size is 99", "hidden_size is 24"]),
        ({"vision_config": {"image_size": 30}}, ["image_size 30 is not a multiple of patch_size 7"]),
        ({"num_query_tokens": 8}, ["processor_config.json says num_query_tokens 6", "8"]),
        ({"num_query_tokens": 0}, ["num_query_tokens is 0"]),
        ({"qformer_config": {"cross_attention_frequency": 0}}, ["cross_attention_frequency is 0"]),
        ({"use_decoder_only_language_model": False}, ["use_decoder_only_language_model is False", "opt"]),
        ({"text_config": {"model_type": "no-such-model"}}, ["config.json cannot be used", "no-such-model"]),
        ({"num_query_tokens": "many"}, ["config.json cannot be used", "num_query_tokens"]),
        ({"vision_config": {"hidden_act": "gelü"}}, ["vision_config.hidden_act 'gelü' is unknown"]),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, ["never run"]),
        ({"text_config": {"num_hidden_layers": 0}}, ["text_config.num_hidden_layers is 0"]),
    ],
)
def test_contradictions(folder, changes, words):
    path = folder()
    edit_config(path, **changes)
    refuse(path, *words)


def test_damaged_files(folder, tmp_path):
    path = folder()
    weights, config = path / "model.safetensors", path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuse(path, "model.safetensors is damaged or cut off")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse(path, "Git LFS pointer", "git lfs pull")
    weights.unlink()
    refuse(path, "holds no weights: expected model.safetensors")
    config.write_text("{")
    refuse(path, "config.json is not JSON")
    config.unlink()
    refuse(path, "holds no config.json")


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickles_are_not_run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = folder()
    (path / "model.safetensors").unlink()
    torch.save({"query_tokens": Bomb()}, path / "pytorch_model.bin")
    refuse(path, "Python objects beside tensors", "it is not read")
    with (path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"query_tokens": Bomb()}, file)
    refuse(path, "pytorch_model.bin")
    (path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    refuse(path, "pytorch_model.bin")
    assert not (tmp_path / "exploded").exists()


# --- names ---


def test_names(tmp_path):
    assert resolve("Salesforce/blip2-opt-2.7b") is resolve("BLIP2-OPT-2.7B") is PRESETS["blip2-opt-2.7b"]
    with pytest.raises(ValueError, match=r"unknown model 'blip2-opt-2.7'. Did you mean blip2-opt-2.7b"):
        load("blip2-opt-2.7")
    with pytest.raises(ValueError, match=r"unknown model 'scene-opt'. Did you mean scenes-opt"):
        load("scene-opt")
    with pytest.raises(ValueError, match=r"unknown model 'xyz'. Known models: scenes-opt"):
        load("xyz")
    refuse(tmp_path / "nothing", "there is no folder")
    refuse("./blip2-opt-2.7b", "there is no folder ./blip2-opt-2.7b", "Did you mean")
    (tmp_path / "blip2_pretrained.pth").write_bytes(b"")
    refuse(tmp_path / "blip2_pretrained.pth", "is a file", "blip2 convert")


def cache(root, repo, source, complete=True):
    """Put a folder into a Hub cache as a download would."""
    base = root / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("0" * 40)
    if not complete:
        (snapshot / "model.safetensors").unlink()


def test_hub_ids(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    missing = ["is not in the cache", "blip2 download blip2-opt-2.7b", "(15.0 GB)"]
    refuse("blip2-opt-2.7b", *missing)
    assert not checkpoint.is_available("blip2-opt-2.7b")
    refuse("someone/blip2-own", "blip2 download someone/blip2-own --revision v1", revision="v1")
    cache(tmp_path, "someone/blip2-own", originals("opt"))
    assert checkpoint.is_available("someone/blip2-own")
    loaded = load("someone/blip2-own", device="cpu")
    assert (loaded.name, type(loaded.model)) == ("someone/blip2-own", Blip2)
    cache(tmp_path, "Salesforce/blip2-opt-2.7b", originals("opt"), complete=False)
    refuse("blip2-opt-2.7b", *missing)  # a download that was broken off


@pytest.mark.parametrize("complete", [True, False])
def test_files_left_out_on_purpose_are_not_missed(originals, tmp_path, monkeypatch, complete):
    """The releases hold every weight twice; the Hub's client keeps the list of all files beside the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, "Salesforce/blip2-opt-2.7b", originals("opt"), complete)
    base = tmp_path / "models--Salesforce--blip2-opt-2.7b"
    files = [path.name for path in (base / "snapshots" / ("0" * 40)).iterdir()]
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in [*files, "README.md", "pytorch_model.bin"]}
    (base / "trees").mkdir()
    (base / "trees" / f"{'0' * 40}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
    assert checkpoint.is_available("blip2-opt-2.7b") is complete
    if complete:
        assert load("blip2-opt-2.7b", device="cpu", local_files_only=True).name == "blip2-opt-2.7b"


def test_weights_are_tensors_once(originals):
    """Tied tensors are stored once, as safetensors and transformers 5 have it."""
    with safe_open(originals("opt") / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
        assert stored.metadata() == {"format": "pt"}
    assert "language_model.lm_head.weight" not in names
    assert names == set(tiny.ours("opt").state_dict()) - {"language_model.lm_head.weight"}


@pytest.mark.parametrize("module, expected", [("httpx2", CheckpointError), ("somewhere", RuntimeError)])
def test_no_network_says_what_to_run_later(module, expected, monkeypatch):
    """The Hub's client passes on its HTTP library's errors, which are no OSError; others are bugs."""
    refused = type("ConnectError", (RuntimeError,), {"__module__": module})

    def fail(*args, **kwargs):
        raise refused("connection refused")

    def nothing_cached(*args, **kwargs):
        raise LocalEntryNotFoundError("")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("blip2.hub.snapshot_download", nothing_cached)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(expected, match="connection refused") as caught:
        checkpoint.load("blip2-opt-2.7b")
    assert (module == "httpx2") == ("blip2 download blip2-opt-2.7b" in str(caught.value))
