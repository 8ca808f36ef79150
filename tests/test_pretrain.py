"""Both stages end to end on tiny models: tokens, objectives, recipes, and the command."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
import torch
from pretraining import OPTIONS, SMALL, make_parts
from transformers import (
    BertConfig,
    BertForMaskedLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from blip2.checkpoint import load
from train import captions, pretrain, recipes, state
from train.engine import FitConfig, fit
from train.loader import IndexLoader
from train.objectives import Stage1, Stage2
from train.recipes import QFormerConfig
from train.scenes.text import build_tokenizer

CAPTIONS = ["a red ring", "a small blue star left of a green circle", "circle"]
FIT = FitConfig(
    steps=4,
    learning_rate=1e-3,
    warmup_steps=1,
    precision="fp32",
    log_every=2,
    save_every=2,
    keep_states=5,
    trackers=(),
)


# --- tokens ---


def test_representation_tokens():
    words = build_tokenizer("bert")
    tokens = captions.representation_tokens(words, CAPTIONS, 8)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.shape == mask.shape == (3, 8)
    assert (ids[:, 0] == words.cls_token_id).all()
    assert ids[0, 4] == ids[1, 7] == words.sep_token_id  # the long one is cut and still ends
    assert mask[0].tolist() == [1] * 5 + [0] * 3


def test_decoder_tokens():
    """</s> caption newline, padded on the right; every token counts, </s> too; padding does not."""
    words = build_tokenizer("opt")
    words.padding_side = "left"  # as the processor leaves it
    tokens = captions.decoder_tokens(words, CAPTIONS)
    ids, mask, labels = tokens["input_ids"], tokens["attention_mask"], tokens["labels"]
    newline = words.convert_tokens_to_ids("\n")
    assert (ids[:, 0] == words.bos_token_id).all() and (labels[:, 0] == words.bos_token_id).all()
    assert ids[0, :5].tolist() == [words.bos_token_id, *words("a red ring").input_ids[1:], newline]
    assert torch.equal(mask.bool(), ids != words.pad_token_id) and mask[0].tolist() == [1] * 5 + [0] * 5
    assert torch.equal(labels, torch.where(mask.bool(), ids, -100))
    cut = captions.decoder_tokens(words, CAPTIONS[1:2], max_length=4)["input_ids"]
    assert cut.shape == (1, 4) and newline not in cut


def test_prefix_tokens():
    """Prefix and suffix make the caption; splits reach from position 1 to the middle, and no further."""
    words = build_tokenizer("t5")
    whole = words(CAPTIONS[1], add_special_tokens=False)["input_ids"]
    assert len(whole) == 8
    seen = set()
    for seed in range(60):
        tokens = captions.prefix_tokens(words, CAPTIONS, np.random.default_rng(seed))
        rows = [tokens["input_ids"][1], tokens["labels"][1]]
        prefix, suffix = ([int(i) for i in row if i not in (words.pad_token_id, -100)] for row in rows)
        assert prefix[-1] == suffix[-1] == words.eos_token_id
        assert prefix[:-1] + suffix[:-1] == whole
        seen.add(len(prefix) - 1)
        assert (
            tokens["input_ids"][2].tolist()[0] == words.eos_token_id
        )  # one token: all of it is the decoder's
        assert torch.equal(tokens["attention_mask"].bool(), tokens["input_ids"] != words.pad_token_id)
    assert seen == {1, 2, 3, 4}
    tokens = captions.prefix_tokens(words, CAPTIONS, np.random.default_rng(0), whole=1.0)
    assert tokens["input_ids"].tolist() == [[words.eos_token_id]] * 3
    assert [int(i) for i in tokens["labels"][1] if i != -100] == [*whole, words.eos_token_id]


# --- objectives ---


def objective(family):
    model = tiny.ours(family)
    return Stage1(model) if family == "retrieval" else Stage2(model)


def batches(family):
    language = tiny.language_family(family)
    tokenize = captions.tokenize_for(tiny.tokenizer(language), language, 12)

    def fetch(indices, generator):
        words = [["a red circle", "two blue star on the left", "a dog", "green ring"][i % 4] for i in indices]
        pixels = torch.cat([tiny.pixels(1, seed=i) for i in indices])
        return {"pixel_values": pixels, **tokenize(words, generator), "keys": indices}

    return IndexLoader(12, 4, fetch, seed=7)


@pytest.mark.parametrize("family", ["retrieval", "opt", "t5"])
def test_training_resumes_bitwise(family, tmp_path):
    """Two steps and two more equal four, dropout, hard negatives and prefix splits included."""
    whole, parts = objective(family), objective(family)
    start = {name: p.clone() for name, p in whole.named_parameters()}
    fit(whole, batches(family), FIT, tmp_path / "whole")
    fit(parts, batches(family), FIT, tmp_path / "parts")
    latest = state.latest(tmp_path / "parts")
    latest.rename(tmp_path / "gone")  # as if the run had died after step 2
    again = objective(family)
    assert fit(again, batches(family), FIT, tmp_path / "parts").finished
    for name, p in again.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name
        assert torch.equal(p, start[name]) != p.requires_grad, name


@pytest.mark.parametrize("family", ["retrieval", "opt", "t5"])
def test_cached_encoder_outputs_train_alike(family):
    """`image_hidden` in place of pixels: same losses, same gradients, post_layernorm's included."""
    batch = next(iter(batches(family)))
    results = []
    for cached in (False, True):
        trained = objective(family).eval()
        if cached:
            hidden = trained.model.vision_model.encode(batch.pop("pixel_values"))
            batch["image_hidden"] = hidden
        torch.manual_seed(0)
        losses = trained(batch)
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        results.append((losses, {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}))
    (a, grads_a), (b, grads_b) = results
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert grads_a.keys() == grads_b.keys() and "model.vision_model.post_layernorm.weight" in grads_a
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


def test_the_last_query_predicts_the_start_token():
    """Stage 2 with a decoder scores </s> too; leaving it out gives another loss."""
    trained, batch = objective("opt").eval(), next(iter(batches("opt")))
    with torch.no_grad():
        scored = trained(batch)["loss_lm"]
        model = trained.model
        image = model.encode_image(batch["pixel_values"])
        logits = model(
            image=image, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        text = logits[:, tiny.NUM_QUERIES - 1 : -1]
        expected = torch.nn.functional.cross_entropy(text.flatten(0, 1), batch["labels"].flatten())
    assert scored.item() == pytest.approx(expected.item(), abs=1e-5)


# --- recipes ---


def test_recipes_have_the_papers_numbers():
    made = {name: make() for name, make in recipes.RECIPES.items()}
    table = {
        "stage1-vitg": (1, 250_000, 1680, 1e-5),
        "stage1-vitl": (1, 250_000, 2320, 1e-5),
        "stage2-opt-2-7b": (2, 80_000, 1920, 5e-5),
        "stage2-opt-6-7b": (2, 80_000, 1920, 5e-5),
        "stage2-flan-t5-xl": (2, 80_000, 1520, 5e-5),
        "stage2-flan-t5-xxl": (2, 80_000, 1520, 5e-5),
    }
    for name, (stage, steps, batch_size, floor) in table.items():
        recipe = made[name]
        found = (recipe.stage, recipe.fit.steps, recipe.batch_size, recipe.fit.min_learning_rate)
        assert found == (stage, steps, batch_size, floor), name
        assert (recipe.fit.learning_rate, recipe.fit.warmup_steps, recipe.fit.weight_decay) == (
            1e-4,
            2000,
            0.05,
        )
        assert (recipe.fit.betas, recipe.fit.clip_norm, recipe.max_text_length) == ((0.9, 0.98), None, 32)
    assert len({recipe.output for recipe in made.values()}) == len(made)


def test_a_recipe_without_its_parts_stops_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["stage2-opt-2-7b"]) == 2
    message = capsys.readouterr().err
    for part in ("runs/stage1-vitg/model", "weights/opt-2.7b", "data/coco", "image-text shards"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_contradictory_recipes():
    with pytest.raises(recipes.RecipeError, match="language_model"):
        dataclasses.replace(recipes.scenes_stage1(), stage=2)
    with pytest.raises(recipes.RecipeError, match="batch_size is 1"):
        dataclasses.replace(recipes.scenes_stage1(), batch_size=1)


# --- the command, end to end on drawn scenes ---


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage1") / "run"
    arguments = [
        "scenes-stage1",
        "--start-from",
        f"{parts / 'encoder'}",
        "--output",
        f"{output}",
        *OPTIONS,
        *SMALL,
    ]
    assert pretrain.main(arguments) == 0
    return output, arguments


def test_stage1_command(stage1, parts):
    output, _ = stage1
    config = json.loads((output / "config.json").read_text())
    assert config["recipe"] == "scenes-stage1" and config["fit"]["steps"] == 4
    assert config["qformer"]["num_query_tokens"] == 6 and config["data"]["num_scenes"] == 40
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert {"eval/loss_itc", "eval/loss_itm", "eval/loss_itg", "eval/retrieval"} <= last.keys()
    [events] = output.rglob("events.out.tfevents.*")
    assert b"eval/retrieval" in events.read_bytes() and b"its caption" in events.read_bytes()
    loaded = load(output / "model", device="cpu")
    frozen = loaded.model.vision_model.encoder.layers[0].mlp.fc1.weight
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loaded.model.vision_model.post_layernorm.weight, torch.ones(24))
    from safetensors.torch import load_file

    start = load_file(parts / "encoder" / "model.safetensors")
    assert torch.equal(frozen, start["encoder.layers.0.mlp.fc1.weight"].float())
    image = loaded.model.encode_image(torch.randn(2, 3, 64, 64))
    assert loaded.model.score(image, **loaded.processor.text(["a red ring"])).shape == (2, 1)


def test_another_run_in_the_folder(stage1, capsys):
    _, arguments = stage1
    assert pretrain.main([*arguments, "--learning-rate", "1e-3"]) == 2
    assert re.search(r"holds another run \(1 settings differ: fit\.learning_rate", capsys.readouterr().err)
    assert pretrain.main(arguments) == 0  # the finished run itself


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage2_command(family, stage1, parts, tmp_path):
    name = {"opt": "scenes-stage2-opt", "t5": "scenes-stage2-flan-t5"}[family]
    start = ["--start-from", f"{stage1[0] / 'model'}", "--language-model", f"{parts / family}"]
    assert pretrain.main([name, *start, "--output", f"{tmp_path / 'run'}", *OPTIONS]) == 0
    loaded = load(tmp_path / "run" / "model", device="cpu")
    before = load(stage1[0] / "model", device="cpu").model
    model = loaded.model
    assert not torch.equal(model.query_tokens, before.query_tokens)
    name = "encoder.layer.0.attention.attention.query.weight"
    assert not torch.equal(model.qformer.state_dict()[name], before.qformer.state_dict()[name])
    unread = (OPTForCausalLM if family == "opt" else T5ForConditionalGeneration).from_pretrained(
        parts / family
    )
    for key, value in unread.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[key], value), key
    words = model.generate(torch.randn(1, 3, 64, 64), max_new_tokens=4)
    assert words.shape[0] == 1
    if family == "opt":
        assert model.language_model.generation_config.eos_token_id == loaded.processor.tokenizer.vocab["\n"]


def test_stage2_wants_stage1(stage1, parts, tmp_path):
    recipe = dataclasses.replace(
        recipes.scenes_stage2_opt(), start_from=str(parts / "opt"), language_model=str(parts / "opt"), fit=FIT
    )
    with pytest.raises(ValueError, match="opt"):
        pretrain.run(dataclasses.replace(recipe, output=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "states").exists()


def test_stage1_starts_from_bert(parts, tmp_path):
    """The Q-Former takes BERT's weights, and [DEC] is added to a tokenizer that has none."""
    words = build_tokenizer("bert")
    words.bos_token = None
    words.save_pretrained(tmp_path)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=words.convert_tokens_to_ids("[DEC]"),  # BERT has no such row
        max_position_embeddings=512,
    )
    bert = BertForMaskedLM(config)
    bert.save_pretrained(tmp_path)
    sizes = QFormerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_query_tokens=4
    )
    recipe = dataclasses.replace(
        recipes.scenes_stage1(),
        start_from=str(parts / "encoder"),
        bert=str(tmp_path),
        tokenizer=str(tmp_path),
        qformer=sizes,
    )
    objective, processor = pretrain.start(recipe)
    model = objective.model
    layer = bert.bert.encoder.layer[0]
    assert torch.equal(
        model.qformer.encoder.layers[0].intermediate_query.dense.weight, layer.intermediate.dense.weight
    )
    assert torch.equal(
        model.qformer.encoder.layers[0].intermediate.dense.weight, layer.intermediate.dense.weight
    )
    assert processor.tokenizer.bos_token_id == model.decoder_start_token_id
    assert model.embeddings.word_embeddings.num_embeddings == model.decoder_start_token_id + 1


def test_stage1_goes_on_from_a_stage1_model(stage1, parts, tmp_path, capsys):
    """Its Q-Former, heads and tokenizer are taken over; a stage-2 model is refused."""
    model = stage1[0] / "model"
    recipe = dataclasses.replace(recipes.scenes_stage1(), start_from=str(model))
    objective, processor = pretrain.start(recipe)
    before = load(model, device="cpu")
    for name, value in before.model.state_dict().items():
        assert torch.equal(objective.model.state_dict()[name], value), name
    assert processor.tokenizer.get_vocab() == before.processor.tokenizer.get_vocab()
    start = ["--start-from", str(model), "--output", str(tmp_path / "run"), *OPTIONS]
    assert pretrain.main(["scenes-stage1", *start]) == 0
    second = ["--start-from", str(model), "--language-model", str(parts / "opt")]
    assert pretrain.main(["scenes-stage2-opt", *second, "--output", str(tmp_path / "opt"), *OPTIONS]) == 0
    wrong = ["--start-from", str(tmp_path / "opt" / "model"), "--output", str(tmp_path / "no"), *OPTIONS]
    assert pretrain.main(["scenes-stage1", *wrong]) == 2
    assert "is a stage-2 model; stage 1 starts from an encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "stage1-vitg",
        pytest.param("stage2-opt-2-7b", marks=pytest.mark.long),
        pytest.param("stage2-flan-t5-xl", marks=pytest.mark.long),
    ],
)
def test_any_recipe_runs_small(name, tmp_path, monkeypatch):
    """--smoke: the recipe's own objectives, precisions and optimizer on drawn scenes, to a model."""
    monkeypatch.setattr("train.smoke.STEPS", 4)
    monkeypatch.setattr("train.smoke.SCENES", 96)
    monkeypatch.chdir(tmp_path)
    assert pretrain.main([name, "--smoke", "--batch-size=8", "--num-validation=8", "--warmup-steps=1"]) == 0
    run = tmp_path / "runs" / "smoke" / name
    config = json.loads((run / "config.json").read_text())
    assert config["execution"]["vision_precision"] == "bfloat16" and config["fit"]["betas"] == [0.9, 0.98]
    assert load(run / "model", device="cpu").processor.image_size == 64
