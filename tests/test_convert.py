"""LAVIS files into folders, with every entry accounted for; BERT into a Q-Former.

The small LAVIS checkpoints are those of tests/reference, under LAVIS's own names and with its outputs.
"""

import os

import lavis
import pytest
import tiny
import torch
import transformers

from blip2.checkpoint import CheckpointError, load
from blip2.convert import convert, qformer_from_bert
from blip2.lavis_names import infer_config, rename
from blip2.layout import describe
from blip2.model import Blip2
from blip2.presets import PRESETS
from blip2.qformer import text_mask
from blip2.representation import Blip2Representation


def weights(name):
    """A reference model's weights under LAVIS's names."""
    sizes, tensors = lavis.read(name)
    return sizes, {
        key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")
    }


def without(state, *prefixes):
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def tower(state, blocks=1):
    """An encoder's file: bare names, more blocks than are used, and a head."""
    found = {
        n.removeprefix("visual_encoder."): v for n, v in state.items() if n.startswith("visual_encoder.")
    }
    depth = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
    for extra in range(depth, depth + blocks):
        found |= {
            name.replace("blocks.0.", f"blocks.{extra}."): value
            for name, value in list(found.items())
            if name.startswith("blocks.0.")
        }
    return found | {
        "head.weight": torch.zeros(3, 40),
        "head.bias": torch.zeros(3),
        "norm.weight": torch.ones(40),
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for family in ("opt", "t5", "bert"):
        tiny.tokenizer(family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def llm(tmp_path):
    """A reference model's language model as a folder of its own."""

    def make(name):
        sizes, state = weights(name)
        family = sizes["language_model"]
        config = lavis.config(sizes).text_config
        model = transformers.AutoModelForCausalLM if family == "opt" else transformers.AutoModelForSeq2SeqLM
        made = tiny.untie(model.from_config(config))
        part = {
            n.removeprefix(f"{family}_model."): v
            for n, v in state.items()
            if n.startswith(f"{family}_model.")
        }
        made.lm_head.weight = torch.nn.Parameter(part["lm_head.weight"].clone())
        made.load_state_dict(part, strict=False)
        if family == "opt":
            made.tie_weights()
        made.save_pretrained(tmp_path / family)
        tiny.tokenizer(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


def write(path, state, **others):
    torch.save({"model": state, **others}, path)
    return path


def close(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 2e-5


def test_stage1_with_a_separate_encoder(tmp_path, tokenizers):
    """Losses of the converted, saved and loaded model are LAVIS's: nothing got lost, the epsilon included."""
    sizes, state = weights("stage1_a")
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(64)[None]
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    pth = write(tmp_path / "s1.pth", without(state, "visual_encoder."), optimizer={"lr": 1e-4}, epoch=9)
    vit = tmp_path / "vit.pth"
    torch.save({name: value.half().float() for name, value in tower(state).items()}, vit)
    torch.save(tower(state), vit)
    converted = convert(
        pth, tmp_path / "out", vision=vit, tokenizer=tokenizers / "bert", config=lavis.config(sizes)
    )
    reasons = set(converted.dropped.values())
    assert "tied to the word embeddings" in reasons and "indices, not weights" in reasons
    assert "block 4: BLIP-2 uses the first 3" in reasons
    assert "visual_encoder.head.weight" in converted.dropped
    total = len(without(state, "visual_encoder.")) + len(tower(state))
    assert converted.mapped + len(converted.dropped) == total

    loaded = load(tmp_path / "out", device="cpu")
    assert loaded.notes == [] and loaded.processor.family == "bert"
    reference, tensors = lavis.model("stage1_a")
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    losses = loaded.model(
        tensors["inputs.pixel_values"],
        tensors["inputs.input_ids"],
        tensors["inputs.attention_mask"],
        sample_negatives=lambda *_: (
            tensors["outputs.negative_text_index"],
            tensors["outputs.negative_image_index"],
        ),
    )
    close(sum(losses.values()), tensors["outputs.loss"])
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.itm_head.weight, loaded.model.itm_head.weight)


@pytest.mark.parametrize("name", ["stage2_opt", "stage2_t5"])
@torch.no_grad()
def test_stage2_with_a_separate_language_model(tmp_path, llm, name):
    sizes, state = weights(name)
    family = sizes["language_model"]
    pth = write(tmp_path / "s2.pth", without(state, f"{family}_model."))
    convert(pth, tmp_path / "out", llm=llm(name), config=lavis.config(sizes))
    loaded = load(tmp_path / "out", device="cpu")
    assert (type(loaded.model), loaded.processor.family) == (Blip2, family)
    _, tensors = lavis.model(name)
    features = loaded.model.encode_image(tensors["inputs.pixel_values"])
    close(features.language_inputs, tensors["outputs.language_model_inputs"])
    ids, mask = tensors["inputs.input_ids"], tensors["inputs.attention_mask"]
    target, target_mask = (
        (ids, mask)
        if family == "opt"
        else (tensors["inputs.target_ids"], tensors["inputs.target_attention_mask"])
    )
    labels = target.masked_fill(target_mask == 0, -100)
    extra = {} if family == "opt" else {"decoder_attention_mask": target_mask}
    output = loaded.model(image=features, input_ids=ids, attention_mask=mask, labels=labels, **extra)
    close(output.loss, tensors["outputs.loss"])


def test_settings_that_lavis_gives_the_language_model(tmp_path, llm):
    for name in ("stage2_opt", "stage2_t5"):
        sizes, state = weights(name)
        family = sizes["language_model"]
        folder = llm(name)
        if family == "opt":  # inferred sizes fit only heads 64 wide: widths do not matter for this
            settings = lavis.config(sizes)
            pth = write(tmp_path / "o.pth", without(state, "opt_model."))
            convert(pth, tmp_path / "opt-out", llm=folder, config=settings)
            config = load(tmp_path / "opt-out", device="cpu").model.config
            words = tiny.tokenizer("opt")
            assert config.text_config.eos_token_id == words.convert_tokens_to_ids("\n")
            assert config.image_token_index == words.convert_tokens_to_ids("<image>")
        else:
            mapped, _ = rename(state, 3)
            text = transformers.AutoConfig.from_pretrained(folder)
            assert infer_config(mapped, text).text_config.model_type == "t5"


def test_fine_tuned_file_holds_its_encoder(tmp_path, tokenizers):
    """Its position embeddings decide the image size; passing another encoder is refused."""
    sizes, state = weights("stage1_a")
    mapped, _ = rename(state, 3)
    inferred = infer_config(mapped)
    vision = sizes["vision"]
    assert inferred.vision_config.image_size == vision["image_size"]
    assert inferred.vision_config.patch_size == vision["patch_size"]
    assert inferred.vision_config.num_hidden_layers == 3
    assert inferred.vision_config.post_layernorm_eps == 1e-5
    assert inferred.qformer_config.cross_attention_frequency == 2
    assert (inferred.num_query_tokens, inferred.image_text_hidden_size) == (6, 24)
    larger = torch.zeros(1, 1 + 8 * 8, 40)
    mapped["vision_model.embeddings.position_embedding"] = larger
    assert infer_config(mapped).vision_config.image_size == 8 * vision["patch_size"]
    pth, vit = write(tmp_path / "f.pth", state), tmp_path / "vit.pth"
    torch.save(tower(state), vit)
    with pytest.raises(CheckpointError, match="holds its own, fine-tuned image encoder: leave `vision` out"):
        convert(pth, tmp_path / "out", vision=vit, tokenizer=tokenizers / "bert")


def test_question_in_the_qformer(tmp_path, llm, tokenizers, monkeypatch):
    """A VQA model keeps the text half of the Q-Former, and is saved as transformers' instructblip."""
    sizes, state = weights("stage2_opt")
    text_half = {n: v for n, v in weights("stage1_a")[1].items() if n.startswith("Qformer.bert.")}
    settings = lavis.config(sizes)
    settings.qformer_config.use_qformer_text_input = True
    settings.qformer_config.vocab_size, settings.qformer_config.max_position_embeddings = 103, 64
    pth = write(tmp_path / "vqa.pth", text_half | without(state, "opt_model."))
    monkeypatch.setattr("blip2.convert.BERT", str(tokenizers / "bert"))
    convert(pth, tmp_path / "out", llm=llm("stage2_opt"), config=settings)
    theirs = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out")
    expected = text_half["Qformer.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(theirs.qformer.embeddings.word_embeddings.weight, expected)
    loaded = load(tmp_path / "out", device="cpu")
    assert loaded.model.question_in_qformer and loaded.processor.qformer_tokenizer is not None


def test_clip_names():
    """CLIP ViT-L/14 in OpenAI's names: 24 blocks, of which 23 are used; no patch bias, a norm in front."""
    width, state = 128, weights("stage1_a")[1]
    state = without(state, "visual_encoder.")
    state |= {f"ln_vision.{kind}": torch.ones(width) for kind in ("weight", "bias")}
    state |= {
        "visual_encoder.class_embedding": torch.zeros(width),
        "visual_encoder.positional_embedding": torch.zeros(17, width),
        "visual_encoder.conv1.weight": torch.zeros(width, 3, 7, 7),
        "visual_encoder.proj": torch.zeros(width, 9),
    }
    for norm in (
        "ln_pre",
        "ln_post",
        *(f"transformer.resblocks.{i}.ln_{n}" for i in range(24) for n in (1, 2)),
    ):
        state |= {f"visual_encoder.{norm}.{kind}": torch.ones(width) for kind in ("weight", "bias")}
    shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (64, width),
        "mlp.c_fc.bias": (64,),
        "mlp.c_proj.weight": (width, 64),
        "mlp.c_proj.bias": (width,),
    }
    for block in range(24):
        for name, shape in shapes.items():
            state[f"visual_encoder.transformer.resblocks.{block}.{name}"] = torch.zeros(shape)
    mapped, dropped = rename(state)
    assert {reason for reason in dropped.values()} >= {"block 24: BLIP-2 uses the first 23"}
    config = infer_config(mapped)
    assert (config.model_type, config.vision_config.num_hidden_layers) == ("blip2-any", 23)
    config.qformer_config.encoder_hidden_size = width
    with torch.device("meta"):
        model = Blip2Representation(config)
    expected = {name: value.shape for name, value in model.vision_model.state_dict().items()}
    found = {
        n.removeprefix("vision_model."): v.shape for n, v in mapped.items() if n.startswith("vision_model.")
    }
    assert found == expected


def lavis_names(preset):
    """The entries of a released LAVIS file by the patterns that are known of it, on the meta device."""
    made = {}
    pair = ("weight", "bias")

    def add(name, *shape):
        made[name] = torch.empty(shape, device="meta")

    def linear(name, out, size):
        add(f"{name}.weight", out, size)
        add(f"{name}.bias", out)

    def norm(name, width=768):
        for kind in pair:
            add(f"{name}.{kind}", width)

    stage1 = preset.kind == "match"
    add("query_tokens", 1, 32, 768)
    norm("ln_vision", 1408)
    add("Qformer.bert.embeddings.position_ids", 1, 512)
    norm("Qformer.bert.embeddings.LayerNorm")
    for i in range(12):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for kind, size in (("attention", 768), ("crossattention", 1408)):
            if kind == "attention" or i % 2 == 0:
                for part in ("query", "key", "value"):
                    linear(f"{layer}.{kind}.self.{part}", 768, 768 if part == "query" else size)
                linear(f"{layer}.{kind}.output.dense", 768, 768)
                norm(f"{layer}.{kind}.output.LayerNorm")
        for suffix in ("", "_query") if stage1 else ("_query",):
            linear(f"{layer}.intermediate{suffix}.dense", 3072, 768)
            linear(f"{layer}.output{suffix}.dense", 768, 3072)
            norm(f"{layer}.output{suffix}.LayerNorm")
    if stage1:
        add("temp")
        add("Qformer.bert.embeddings.word_embeddings.weight", 30523, 768)
        add("Qformer.bert.embeddings.position_embeddings.weight", 512, 768)
        head = "Qformer.cls.predictions"
        add(f"{head}.bias", 30523)
        linear(f"{head}.transform.dense", 768, 768)
        norm(f"{head}.transform.LayerNorm")
        linear("vision_proj", 256, 768)
        linear("text_proj", 256, 768)
        linear("itm_head", 2, 768)
    else:
        linear("opt_proj" if preset.language_model == "opt" else "t5_proj", preset.text_size[0], 768)
    return made


def eva_names(blocks=40):
    made = {
        "cls_token": (1, 1, 1408),
        "pos_embed": (1, 257, 1408),
        "patch_embed.proj.weight": (1408, 3, 14, 14),
        "patch_embed.proj.bias": (1408,),
        "head.weight": (1000, 1408),
        "head.bias": (1000,),
    }
    for i in range(blocks):
        block = {
            "norm1.weight": (1408,),
            "norm1.bias": (1408,),
            "norm2.weight": (1408,),
            "norm2.bias": (1408,),
            "attn.q_bias": (1408,),
            "attn.v_bias": (1408,),
            "attn.qkv.weight": (4224, 1408),
            "attn.proj.weight": (1408, 1408),
            "attn.proj.bias": (1408,),
            "mlp.fc1.weight": (6144, 1408),
            "mlp.fc1.bias": (6144,),
            "mlp.fc2.weight": (1408, 6144),
            "mlp.fc2.bias": (1408,),
        }
        made |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {f"visual_encoder.{name}": torch.empty(shape, device="meta") for name, shape in made.items()}


@pytest.mark.parametrize("name", ["blip2-itm-vit-g", "blip2-opt-2.7b", "blip2-flan-t5-xl"])
def test_released_files_entry_by_entry(name):
    """At full size, LAVIS's entries give exactly our parameters, and the sizes are read off them."""
    preset = PRESETS[name]
    raw = lavis_names(preset) | eva_names()
    mapped, dropped = rename(raw)
    assert len(dropped) == 13 + 2 + 1  # the 40th block, the head, position_ids
    stage1 = preset.kind == "match"
    with torch.device("meta"):
        model = (Blip2Representation if stage1 else Blip2)(preset.config())
    expected = {n: v.shape for n, v in model.state_dict().items() if not n.startswith("language_model.")}
    assert {n: v.shape for n, v in mapped.items()} == expected
    inferred = infer_config(mapped, None if stage1 else preset.config().text_config)
    for part in ("vision_config", "qformer_config"):
        ours, released = getattr(inferred, part).to_dict(), getattr(preset.config(), part).to_dict()
        ours.pop("post_layernorm_eps", None)
        released["vocab_size"] = (
            ours["vocab_size"] if "vocab_size" in ours and not stage1 else released.get("vocab_size")
        )
        assert {k: v for k, v in ours.items() if k in released} == {
            k: v for k, v in released.items() if v is not None or k in ours
        }
    assert f"Salesforce/{name} would fit" in describe({n: tuple(v.shape) for n, v in mapped.items()})


# --- refusals ---


def test_what_is_missing_is_named(tmp_path, tokenizers, llm):
    _, state = weights("stage1_a")
    _, second = weights("stage2_opt")
    pth = write(tmp_path / "a.pth", without(state, "visual_encoder."))
    with pytest.raises(
        CheckpointError, match=r"a.pth holds no image encoder .* pass LAVIS's eva_vit_g.pth as `vision`"
    ):
        convert(pth, tmp_path / "out")
    pth = write(tmp_path / "b.pth", without(second, "opt_model."))
    with pytest.raises(CheckpointError, match=r"b.pth holds no language model .* as `llm`"):
        convert(pth, tmp_path / "out")
    pth = write(tmp_path / "c.pth", state)
    with pytest.raises(
        CheckpointError, match="stage-1 checkpoint, it has no language model: leave `llm` out"
    ):
        convert(pth, tmp_path / "out", llm="facebook/opt-2.7b")
    with pytest.raises(CheckpointError, match="there is no file"):
        convert(tmp_path / "none.pth", tmp_path / "out")
    pth = write(tmp_path / "d.pth", {"Qformer.bert.embeddings.LayerNorm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="holds no query_tokens"):
        convert(pth, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_entries(tmp_path):
    _, state = weights("stage1_a")
    state |= {f"momentum.{index}": torch.zeros(1) for index in range(7)}
    pth = write(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError) as caught:
        convert(pth, tmp_path / "out")
    assert f"7 of {len(state)} entries are not of a LAVIS BLIP-2 checkpoint: momentum.0, momentum.1" in str(
        caught.value
    )
    assert str(caught.value).endswith("momentum.4, ...")


def test_entries_that_do_not_belong_together(tmp_path, tokenizers):
    sizes, state = weights("stage1_a")
    state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.cls.predictions.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match=r"decoder.weight is not tied"):
        rename(state)
    _, state = weights("stage1_a")
    del state["visual_encoder.blocks.1.attn.v_bias"]
    with pytest.raises(CheckpointError, match=r"blocks|layers.1.*q_bias has no"):
        rename(state)
    _, state = weights("stage1_a")
    del state["itm_head.weight"]
    pth = write(tmp_path / "x.pth", state)
    with pytest.raises(CheckpointError, match=r"1 missing key: itm_head.weight"):
        convert(pth, tmp_path / "out", tokenizer=tokenizers / "bert", config=lavis.config(sizes))
    assert not (tmp_path / "out").exists()


def test_wrong_language_model(tmp_path, llm):
    sizes, state = weights("stage2_opt")
    state = without(state, "opt_model.")
    state["opt_proj.weight"], state["opt_proj.bias"] = torch.zeros(2560, 48), torch.zeros(2560)
    pth = write(tmp_path / "w.pth", state)
    with pytest.raises(CheckpointError, match=r"has width 32, .* trained with 2560: use facebook/opt-2.7b"):
        convert(pth, tmp_path / "out", llm=llm("stage2_opt"), config=lavis.config(sizes))
    with pytest.raises(CheckpointError, match="the language model /nowhere cannot be loaded"):
        convert(pth, tmp_path / "out", llm="/nowhere", config=lavis.config(sizes))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_not_run(tmp_path):
    torch.save({"model": {"query_tokens": Bomb(tmp_path / "exploded")}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth holds Python objects beside tensors"):
        convert(tmp_path / "evil.pth", tmp_path / "out")
    (tmp_path / "noise.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"noise.pth"):
        convert(tmp_path / "noise.pth", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth", "noise.pth"]


def test_existing_folder_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(CheckpointError, match="is there already: choose a new folder"):
        convert(tmp_path / "any.pth", tmp_path / "out")


# --- BERT ---


def tiny_bert(**changes):
    settings = {
        "vocab_size": tiny.config("retrieval").qformer_config.vocab_size - 1,  # [DEC] is added
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 48,
    }
    return transformers.BertConfig(**(settings | changes))


@torch.no_grad()
def test_text_pass_is_berts():
    bert = tiny.randomize(transformers.BertModel(tiny_bert(), add_pooling_layer=False))
    bert.embeddings.token_type_embeddings.weight[0] = 0
    model = tiny.ours("retrieval", seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qformer_from_bert(bert, model)
    text = tiny.tokenizer("bert")(
        ["a red circle", "what color is the star ?"], padding=True, return_tensors="pt"
    )
    ids, mask = text["input_ids"], text["attention_mask"]
    mine = model.qformer(text_embeds=model.embeddings(ids), mask=text_mask(mask)).text_output
    theirs = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (mine - theirs)[mask.bool()].abs().max() <= 1e-6

    after = model.state_dict()
    for name in after:
        if ".output_query." in name or ".intermediate_query." in name:
            assert torch.equal(after[name], after[name.replace("_query", "")])
        untouched = ".crossattention." in name or name.startswith(
            ("query_tokens", "vision_", "itm_head", "lm_head")
        )
        assert (
            torch.equal(after[name], before[name]) == untouched
            or "text_projection" in name
            or name == "temperature"
        )
    rows = after["embeddings.word_embeddings.weight"]
    assert torch.equal(rows[:-1], bert.embeddings.word_embeddings.weight)
    assert 0 < rows[-1].std() < 0.05  # [DEC], drawn from N(0, 0.02)


@torch.no_grad()
def test_head_comes_along(tmp_path):
    bert = tiny.randomize(transformers.BertForMaskedLM(tiny_bert()))
    bert.save_pretrained(tmp_path / "mlm")
    model = tiny.ours("retrieval", seed=4)
    qformer_from_bert(tmp_path / "mlm", model)
    head = bert.cls.predictions
    assert torch.equal(model.lm_head.dense.weight, head.transform.dense.weight)
    assert torch.equal(model.lm_head.bias[:-1], head.bias) and model.lm_head.bias[-1] == 0
    # a folder without a head leaves ours as it is
    bert.bert.save_pretrained(tmp_path / "plain")
    other = tiny.ours("retrieval", seed=4)
    dense = other.lm_head.dense.weight.clone()
    qformer_from_bert(tmp_path / "plain", other)
    assert torch.equal(other.lm_head.dense.weight, dense)
    assert torch.equal(other.qformer.layernorm.weight, model.qformer.layernorm.weight)


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"num_hidden_layers": 2}, {"vocab_size": 99}])
def test_a_bert_of_another_size(changes):
    bert = transformers.BertModel(tiny_bert(**changes))
    model = tiny.ours("retrieval")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="this BERT does not fit the Q-Former"):
        qformer_from_bert(bert, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
