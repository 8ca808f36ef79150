"""Starting weights: encoders and text models brought into form, whole or not at all; downloads that go on."""

import base64
import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_convert
import tiny
import torch
import transformers
from hub import Hub, point_to
from safetensors.torch import load_file, save_file
from test_convert import tower

from blip2.checkpoint import load
from blip2.errors import CheckpointError
from blip2.vision import VisionTransformer
from train import pretrain, recipes, weight_files, weights
from train.encoders import load_encoder
from train.recipes import RECIPES, RecipeError
from train.weights import WEIGHTS, Weights

EVA = transformers.Blip2VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
CLIP = transformers.CLIPConfig(
    vision_config={
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu",
    },
    text_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
)  # fmt: skip


def clip_config():
    """`weights.vit_l`, but small."""
    small = {name: getattr(CLIP.vision_config, name) for name in ("hidden_size", "intermediate_size")}
    return transformers.Blip2VisionConfig(
        **{
            **weights.vit_l().to_dict(),
            **small,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
        }
    )


def eva_file(path, **changes):
    """An encoder's file as LAVIS has it: half precision, a block too many, and a head."""
    model = tiny.randomize(VisionTransformer(EVA), seed=1)
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("post_layernorm"):
            continue
        new = name.replace("encoder.layers.", "blocks.").replace("layer_norm", "norm")
        new = new.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
        new = new.replace("embeddings.class_embedding", "cls_token").replace(
            "embeddings.patch_embedding", "patch_embed.proj"
        )
        new = new.replace("embeddings.position_embedding", "pos_embed")
        if new.endswith("qkv.bias"):
            query, _, value = value.chunk(3)
            state[new.replace("qkv.bias", "q_bias")], state[new.replace("qkv.bias", "v_bias")] = query, value
        else:
            state[new] = value
    state = {f"visual_encoder.{name}": value.half() for name, value in state.items()}
    raw = tower(state) | changes
    raw["norm.weight"] = torch.ones(16)
    torch.save(raw, path)
    return model


def test_eva_file(tmp_path):
    """40 blocks become 39: names, shapes and values are ours, half precision stays, the key bias is zero."""
    model = eva_file(tmp_path / "eva.pth")
    lines = weight_files.write_vision(tmp_path / "eva.pth", tmp_path, EVA)
    assert any("block 3: BLIP-2 uses the first 2" in line for line in lines)
    assert any("behind the last block" in line for line in lines)
    state = load_file(tmp_path / "model.safetensors")
    loaded = VisionTransformer(transformers.Blip2VisionConfig.from_json_file(tmp_path / "config.json"))
    loaded.load_state_dict({name: value.float() for name, value in state.items()})
    assert state["encoder.layers.0.mlp.fc1.weight"].dtype == torch.float16
    bias = state["encoder.layers.1.self_attn.qkv.bias"]
    assert bias[16:32].abs().max() == 0 and bias[:16].abs().min() > 0
    for name in ("encoder.layers.1.self_attn.qkv.weight", "embeddings.position_embedding"):
        torch.testing.assert_close(loaded.state_dict()[name], model.state_dict()[name], atol=1e-3, rtol=1e-3)
    assert torch.equal(loaded.post_layernorm.weight, torch.ones(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.norm1.weight": torch.full((16,), torch.nan)},
            "1 tensors not finite: encoder.layers.0.layer_norm1",
        ),
        (
            {"pos_embed": torch.zeros(1, 17, 16)},
            r"of another shape: embeddings.position_embedding \(1, 17, 16\)",
        ),
        ({"blocks.0.extra": torch.zeros(3)}, "not of a LAVIS BLIP-2 checkpoint"),
    ],
)
def test_a_wrong_encoder_is_refused(tmp_path, change, message):
    eva_file(tmp_path / "eva.pth", **change)
    with pytest.raises(CheckpointError, match=message):
        weight_files.write_vision(tmp_path / "eva.pth", tmp_path, EVA)
    assert not (tmp_path / "model.safetensors").exists()


def test_clip_folder(tmp_path):
    """CLIP's own folder: the text tower and the last block stay out, and the outputs are transformers'."""
    torch.manual_seed(0)
    theirs = tiny.randomize(transformers.CLIPModel(CLIP))
    theirs.save_pretrained(tmp_path / "clip")
    (tmp_path / "out").mkdir()
    lines = weight_files.write_vision(tmp_path / "clip", tmp_path / "out", clip_config())
    assert any("block 3" in line for line in lines) and any(
        "not of the image encoder" in line for line in lines
    )
    ours = load_encoder(str(tmp_path / "out")).encoder.eval()  # as training reads it
    assert isinstance(ours, VisionTransformer)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours.encode(pixels), hidden, atol=1e-5, rtol=1e-5)


def language_model(folder, pickled):
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tiny.randomize(transformers.T5ForConditionalGeneration(config))
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().flip(0).clone()
    )  # untied, as Flan-T5's
    model.save_pretrained(folder)
    tiny.tokenizer("t5").save_pretrained(folder)
    if pickled:  # in two files, as older repositories have it
        (folder / "model.safetensors").unlink()
        items = list(model.state_dict().items())
        for number, part in enumerate((items[:9], items[9:]), 1):
            torch.save(dict(part), folder / f"pytorch_model-0000{number}-of-00002.bin")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
    return model


@pytest.mark.parametrize(
    "lost", ["lm_head.weight", "shared.weight", "decoder.block.1.layer.0.layer_norm.weight"]
)
def test_a_language_model_in_part_is_refused(tmp_path, lost):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    config = language_model(tmp_path / "in", pickled=True).config
    for path in (tmp_path / "in").glob("*.bin"):
        torch.save({n: v for n, v in torch.load(path).items() if n != lost}, path)
    with pytest.raises(CheckpointError, match=f"1 tensors missing or of another shape: {lost}"):
        weight_files.write_text_model(tmp_path / "in", tmp_path / "out", config)


def test_a_decoder_as_meta_released_it(tmp_path):
    """OPT's .bin files have neither the model's prefix nor the tied head."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        vocab_size=40,
    )
    model = tiny.randomize(transformers.OPTForCausalLM(config))
    config.save_pretrained(tmp_path / "in")
    names = {n.removeprefix("model."): v.half() for n, v in model.state_dict().items() if "lm_head" not in n}
    torch.save(names, tmp_path / "in" / "pytorch_model.bin")
    weight_files.write_text_model(tmp_path / "in", tmp_path / "out", config, torch.float16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half()), name


@pytest.mark.parametrize("pickled", [False, True])
def test_language_model(tmp_path, pickled):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    model = language_model(tmp_path / "in", pickled)
    wanted = transformers.T5Config(**{**model.config.to_dict(), "dense_act_fn": "gelu"})
    weight_files.write_text_model(tmp_path / "in", tmp_path / "out", wanted, torch.bfloat16)
    assert not list((tmp_path / "out").glob("*.bin*"))
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.config.dense_act_fn == "gelu"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.bfloat16(), rtol=0, atol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    wanted.d_ff = 32
    with pytest.raises(CheckpointError, match="missing or of another shape"):
        weight_files.write_text_model(tmp_path / "in", tmp_path / "out", wanted, torch.bfloat16)


# --- fetching ---


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose folders lie in an empty place, and weights of its own, small."""
    monkeypatch.chdir(tmp_path)
    clip = Weights("vitl", "CLIP", "vision", "someone/clip", 0.001, "MIT.", clip_config)
    monkeypatch.setitem(WEIGHTS, "vitl", clip)
    made = recipes.stage1_vitl()
    return dataclasses.replace(made, bert=None, tokenizer=None)


def test_fetch_from_the_hub(recipe, tmp_path, monkeypatch):
    tiny.randomize(transformers.CLIPModel(CLIP)).save_pretrained(tmp_path / "clip")
    said = []
    assert weights.hint(recipe, "stage1-vitl") == "python -m train.pretrain stage1-vitl --fetch"
    with Hub(tmp_path / "clip", "someone/clip") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        made = weights.fetch(recipe, said.append)
        requests = len(hub.log)
        assert made == [Path("weights/vitl")] and requests
        assert weights.is_there(tmp_path / "weights" / "vitl")
        assert said[0] == "weights/vitl: CLIP, 0.001 GB from someone/clip. MIT."
        assert weights.fetch(recipe, said.append) == made and len(hub.log) == requests
        assert said[-1] == "weights/vitl is here"
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["vitl"]
    assert (tmp_path / "weights/vitl/SOURCE.txt").read_text().startswith("CLIP, from someone/clip. MIT.")
    assert not any("vitl" in line for line in recipe.missing()) and weights.hint(recipe, "x") == ""


def test_a_broken_off_fetch_leaves_nothing_half_done(recipe, tmp_path, monkeypatch):
    broken = tiny.randomize(transformers.CLIPModel(CLIP))
    broken.vision_model.encoder.layers[0].mlp.fc1.weight.data.fill_(torch.inf)
    broken.save_pretrained(tmp_path / "clip")
    with Hub(tmp_path / "clip", "someone/clip") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        with pytest.raises(
            RecipeError, match=r"weights/vitl cannot be had: .* not finite: encoder.layers.0.mlp"
        ):
            weights.fetch(recipe, print)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_finished_stage1_of_lavis(tmp_path, monkeypatch, capsys):
    """Its file, the encoder's and BERT's tokenizer make a folder that stage 2 starts from."""
    monkeypatch.chdir(tmp_path)
    _, state = test_convert.weights("stage1_a")
    (tmp_path / "web").mkdir()
    test_convert.write(tmp_path / "web" / "s1.pth", test_convert.without(state, "visual_encoder."))
    torch.save(tower(state, 0), tmp_path / "web" / "eva.pth")
    tiny.tokenizer("bert").save_pretrained("weights/bert-base-uncased")
    save_file({"x": torch.zeros(1)}, "weights/bert-base-uncased/model.safetensors")
    Path("weights/bert-base-uncased/config.json").write_text("{}")
    with Hub(tmp_path / "web", "a/b") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        for name, file in (("vitg", "eva.pth"), ("stage1-vitg", "s1.pth")):
            source = f"{hub.url}/a/b/resolve/main/{file}"
            changed = dataclasses.replace(WEIGHTS[name], source=source, parts=WEIGHTS[name].parts[1:])
            monkeypatch.setitem(WEIGHTS, name, changed)
        monkeypatch.setitem(WEIGHTS, "opt-2.7b", WEIGHTS["bert-base-uncased"])
        made = dataclasses.replace(
            recipes.stage2_opt_2_7b(),
            start_from="weights/stage1-vitg",
            language_model="weights/bert-base-uncased",
        )
        weights.fetch(made)
    assert "weights/stage1-vitg: " in capsys.readouterr().out
    loaded = load("weights/stage1-vitg", device="cpu")
    assert torch.equal(loaded.model.temperature, state["temp"])


def test_what_stage1_has_to_make(tmp_path, monkeypatch):
    """A stage-2 recipe says where its beginning comes from."""
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(weights, "is_there", lambda folder: True)
    weights.fetch(recipes.stage2_opt_2_7b(), said.append)
    assert "--start-from weights/stage1-vitg" in said[-1] and "runs/stage1-vitg/model" in said[-1]


def test_hub_ids_are_fetched_too(tmp_path, monkeypatch):
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip" / "config.json").write_text("{}")
    made = dataclasses.replace(recipes.stage1_vitg(), start_from="someone/siglip", bert=None, tokenizer=None)
    with Hub(tmp_path / "siglip", "someone/siglip") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        assert weights.on_the_hub(made) == ["someone/siglip"]
        said = []
        weights.fetch(made, said.append)
        assert said[-1].startswith("someone/siglip is in the Hub's cache: ")


def test_offline(recipe, capsys):
    with pytest.raises(RecipeError, match=r"weights/vitl cannot be had: someone/clip .* downloading is off"):
        weights.fetch(recipe)
    assert "CLIP, 0.001 GB from someone/clip. MIT." in capsys.readouterr().out
    eva = recipes.stage1_vitg()
    with pytest.raises(
        RecipeError, match=r"downloading is off .* copy https://.*eva_vit_g.pth to weights/.downl"
    ):
        weights.fetch(dataclasses.replace(eva, bert=None, tokenizer=None), print)


def test_no_room(recipe, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(RecipeError, match=r"the weights need up to 0.0 GB .* 0.0 GB are free"):
        weights.fetch(recipe, print)


def test_a_web_servers_file_goes_on(tmp_path, monkeypatch):
    """The part that is here is kept, asked for no second time, and the whole is checked."""
    (tmp_path / "web").mkdir()
    data = bytes(range(256)) * 40
    (tmp_path / "web" / "eva.pth").write_bytes(data)
    parts = tmp_path / "to" / "eva.pth.part"
    parts.parent.mkdir()
    parts.write_bytes(data[:5000])
    with Hub(tmp_path / "web", "a/b") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        url = f"{hub.url}/a/b/resolve/main/eva.pth"
        target = weights.fetch_file(url, tmp_path / "to")
        assert target.read_bytes() == data and not parts.exists()
        assert hub.log[-1] == ("GET", "eva.pth", "bytes=5000-")
        asked = len(hub.log)
        weights.fetch_file(url, tmp_path / "to")
        assert len(hub.log) == asked
        with pytest.raises(CheckpointError, match=r"could not be downloaded: .*404"):
            weights.fetch_file(f"{hub.url}/a/b/resolve/main/other.pth", tmp_path / "to")


@pytest.mark.parametrize("right", [True, False])
def test_a_stated_checksum_is_checked(tmp_path, monkeypatch, right):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "eva.pth").write_bytes(b"x" * 2000)
    digest = base64.b64encode(hashlib.md5(b"x" * 2000 if right else b"y").digest()).decode()
    with Hub(tmp_path / "web", "a/b") as hub:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
        session = weights.get_session()

        class Session:
            def head(self, *args, **options):
                answer = session.head(*args, **options)
                answer.headers["x-goog-hash"] = f"crc32c=AAAA==, md5={digest}"
                return answer

        monkeypatch.setattr(weights, "get_session", Session)
        url = f"{hub.url}/a/b/resolve/main/eva.pth"
        if right:
            assert weights.fetch_file(url, tmp_path / "to").stat().st_size == 2000
        else:
            with pytest.raises(CheckpointError, match="arrived damaged"):
                weights.fetch_file(url, tmp_path / "to")
            assert list((tmp_path / "to").iterdir()) == []


def test_every_recipe_names_weights_that_can_be_fetched():
    for name, make in RECIPES.items():
        if name.startswith("scenes"):
            continue
        made = make()
        named = {Path(path) for path in (made.start_from, made.bert, made.language_model) if path}
        found = weights.wanted(made)
        assert named - found.keys() <= {Path(f"runs/stage1-{which}/model") for which in ("vitg", "vitl")}
        assert all(entry.license and entry.gigabytes for entry in found.values())
    again = dataclasses.replace(recipes.stage2_opt_2_7b(), start_from="weights/stage1-vitg")
    assert [path.name for path in weights.wanted(again)] == [
        "vitg",
        "bert-base-uncased",
        "stage1-vitg",
        "opt-2.7b",
    ]


def test_full_sizes_are_the_releases():
    """The configurations built from the code have the parameters of the real encoders and language models."""
    counts = {"vitg": 985_952_256, "vitl": 290_583_552, "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984}
    for name, number in counts.items():
        config = WEIGHTS[name].config()
        with torch.device("meta"):
            if WEIGHTS[name].kind == "vision":
                model = VisionTransformer(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == number, name


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["stage1-vitg", "--fetch"]) == 2
    printed = capsys.readouterr()
    assert "EVA-CLIP ViT-g/14, 2.0 GB" in printed.out and "downloading is off" in printed.err
