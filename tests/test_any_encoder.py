"""An image encoder of one's own, precisions of what is frozen, and what does not fit."""

import sys

import others
import pytest
import torch
import transformers
from test_any import eva, eva_stage1, parts, picture, trained  # noqa: F401 - fixtures

from blip2 import cli, encoders
from blip2.checkpoint import CheckpointError, load, save
from blip2.encoders import ExternalEncoder, register_encoder
from train.encoders import load_encoder
from train.recipes import Execution, RecipeError, scenes_stage1
from train.start import start

SOURCE = "others:patches"


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(encoders, "_EXTERNAL", {})


@pytest.fixture(scope="module")
def own(parts, tmp_path_factory):  # noqa: F811
    """The folders of both stages around an encoder of one's own."""
    folder = tmp_path_factory.mktemp("own")
    first = trained(1, SOURCE, folder / "one")
    changes = {"language_model": str(parts("qwen")), "encoder": SOURCE}
    return first, trained(2, first, folder / "two", **changes)


def test_ones_own_encoder_is_trained_and_saved(own, tmp_path):
    """Its weights are frozen and saved, and its place is taken by what the user registers."""
    kept = others.patches()
    register_encoder(SOURCE, lambda: ExternalEncoder(others.Patches(), width=32, image_size=64))
    for folder in own:
        loaded = load(folder, device="cpu")
        for name, value in loaded.model.vision_model.external.state_dict().items():
            assert torch.equal(value, kept.encode.state_dict()[name])
        assert loaded.processor.mean == (0.5, 0.5, 0.5) and loaded.processor.image_size == 64
        pixels = torch.randn(2, 3, 64, 64)
        hidden = loaded.model.vision_model.encode(pixels)
        torch.testing.assert_close(hidden, kept.encode(pixels))
        half = load(folder, precision="bfloat16", device="cpu").model
        assert half.vision_model.encode(pixels).dtype == torch.bfloat16
        if folder == own[0]:  # stage 1 has no language model
            with pytest.raises(CheckpointError, match="no language model, which is what int8 quantizes"):
                load(folder, precision="int8", device="cpu")
            continue
        few = load(folder, precision="int8", device="cpu")
        again = load(save(few.model, few.processor, tmp_path / folder.parent.name), device="cpu").model
        assert torch.equal(again.vision_model.encode(pixels), few.model.vision_model.encode(pixels))


def test_no_code_is_run_because_a_folder_names_it(own, picture, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delitem(sys.modules, "others")
    for folder in own:
        with pytest.raises(CheckpointError, match=f"--encoder {SOURCE}"):
            load(folder, device="cpu")
    with pytest.raises((OSError, ValueError)):
        transformers.Blip2ForConditionalGeneration.from_pretrained(own[1])
    assert cli.main(["info", str(own[1])]) == 0
    told = capsys.readouterr().out
    assert f"the function {SOURCE}" in told and "source others:patches" in told
    size = sum(p.numel() for p in others.Patches().parameters()) + 2 * 32
    assert f"{size:,}" in told  # with post_layernorm
    assert cli.main(["caption", picture, "--model", str(own[1])]) == 1
    assert "others" not in sys.modules
    assert cli.main(["caption", picture, "--model", str(own[1]), "--encoder", SOURCE]) == 0
    assert "others" in sys.modules


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (ExternalEncoder(others.Patches(width=16), 16, 64), "width 16 .* trained with 32 and 64"),
        (ExternalEncoder(others.Patches(), 32, 32), "images of 32 pixels"),
        (ExternalEncoder(others.Patches(width=16), 32, 64), "size mismatch"),
        (ExternalEncoder(lambda pixels: pixels, 32, 64), "2 names differ"),
    ],
)
def test_another_encoder_under_the_name(own, made, message):
    register_encoder(SOURCE, lambda: made)
    with pytest.raises(CheckpointError, match=message):
        load(own[0], device="cpu")


def test_a_plain_function(tmp_path):
    """A callable without weights trains too; its folder needs it again."""

    def cells(pixel_values):
        return pixel_values.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).flatten(2).transpose(1, 2)

    register_encoder("cells", lambda: ExternalEncoder(cells, width=3, image_size=64))
    folder = trained(1, "cells", tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(folder, device="cpu").model.vision_model.encode(pixels), cells(pixels))


def test_clip_as_lavis_has_it(eva_stage1, tmp_path):  # noqa: F811
    """Its norm before the blocks is beyond transformers' BLIP-2, which would read it with random weights."""
    folder = tmp_path / "clip"
    eva(folder, pre_layernorm=True, patch_bias=False)
    saved = trained(1, folder, tmp_path / "one")
    assert load(saved, device="cpu").model.config.model_type == "blip2-any"
    with pytest.raises((OSError, ValueError)):
        transformers.Blip2ForImageTextRetrieval.from_pretrained(saved)
    assert load(eva_stage1, device="cpu").model.config.model_type == "blip-2"


# --- what cannot be ---


def sam(folder):
    """An image encoder whose last hidden state is no sequence of tokens."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
    transformers.ResNetModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/where", "no image encoder in no/where; .*hf download no/where"),
        ("eva-vit-g", "no image encoder in eva-vit-g$"),
        ("others:nothing", "has no attribute 'nothing'"),
        ("nowhere:patches", "No module named 'nowhere'"),
        ("wide", r"gave \(1, 16, 32\); expected .* \(1, any, 48\)"),
        ("resnet", "no single hidden_size"),
        ("bare", "preprocessor_config.json"),
        ("cut", "weights of its image encoder are missing"),
    ],
)
def test_encoders_that_do_not_fit(source, message, tmp_path, parts):  # noqa: F811
    register_encoder("wide", lambda: ExternalEncoder(others.Patches(), width=48, image_size=64))
    if source == "resnet":
        sam(tmp_path)
        source = str(tmp_path)
    elif source in ("bare", "cut"):
        from safetensors.torch import load_file, save_file

        others.encoder("vit", tmp_path)
        if source == "bare":
            (tmp_path / "preprocessor_config.json").unlink()
        else:
            weights = load_file(tmp_path / "model.safetensors")
            weights = {name: value for name, value in weights.items() if "layer.1." not in name}
            save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        source = str(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_encoder(source)


def test_decoders_that_do_not_fit(parts, eva_stage1, tmp_path):  # noqa: F811
    """BART is an encoder-decoder that transformers' BLIP-2 takes for a decoder."""
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    others.tokenizer("llama").save_pretrained(tmp_path / "bart")
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    others.tokenizer("llama").save_pretrained(tmp_path / "mamba")
    for name, message in (
        ("bart", "type bart work neither"),
        ("mamba", "linear_attention"),
        ("vit", "Unrecognized configuration"),
    ):
        folder = parts("vit") if name == "vit" else tmp_path / name
        if name == "vit":
            others.tokenizer("llama").save_pretrained(folder)
        with pytest.raises(RecipeError, match=message):
            trained(2, eva_stage1, tmp_path / "two", language_model=str(folder))


# --- precisions ---


@pytest.mark.parametrize("language", ["bfloat16", "int8", "nf4"])
def test_frozen_parts_in_few_bits(language, own, parts, tmp_path):  # noqa: F811
    """They train in few bits and are saved as they were; what trains, `post_layernorm` too, is float32."""
    import dataclasses

    execution = Execution(vision_precision="bfloat16", language_precision=language)
    first = trained(1, parts("siglip"), tmp_path / "one", execution=execution)
    changes = {"language_model": str(parts("qwen")), "execution": execution}
    second = trained(2, first, tmp_path / "two", **changes)
    recipe = dataclasses.replace(
        scenes_stage1(), stage=2, start_from=str(first), output=str(tmp_path / "two"), **changes
    )
    model, _ = start(recipe)
    assert model.vision_model.post_layernorm.weight.dtype == torch.float32
    assert model.vision_model.model.dtype == torch.bfloat16
    kind = type(model.language_model.model.layers[0].mlp.down_proj).__name__
    assert kind == {"bfloat16": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}[language]
    saved = load(second, device="cpu").model
    siglip = transformers.AutoModel.from_pretrained(parts("siglip")).vision_model.state_dict()
    for name, value in saved.vision_model.model.state_dict().items():
        assert torch.equal(value, siglip[name]), name
    qwen = transformers.AutoModelForCausalLM.from_pretrained(parts("qwen")).state_dict()
    for name, value in saved.language_model.state_dict().items():
        assert torch.equal(value, qwen[name]), name
    assert not torch.equal(saved.query_tokens, load(first, device="cpu").model.query_tokens)
    assert "quantization_config" not in saved.config.text_config.to_dict()
