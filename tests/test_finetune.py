"""Fine-tuning: labels that count, soft targets, an image encoder that learns, and how models are saved."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import tiny
import torch
import transformers
import tuned
from pairing import run_pair
from serving import tiny_checkpoints

import blip2
from blip2.vision import interpolate_positions
from train import finetune, plan, pretrain, state
from train.count import Counts
from train.datasets import RecipeError, Scenes
from train.domain import domain
from train.engine import FitConfig, Result, _backward, fit, make_accelerator
from train.loader import DataError
from train.objectives import Retrieval, Stage2
from train.tuning import data, recipes, shapes, start
from train.tuning.recipes import RECIPES, Questions
from train.tuning.tokens import prompted

KEYS = 39 * 1408  # biases of EVA-CLIP's keys, which change nothing; LAVIS has none
FIT = FitConfig(
    steps=4,
    learning_rate=1e-3,
    warmup_steps=1,
    precision="fp32",
    log_every=2,
    save_every=2,
    keep_states=5,
    layer_decay=0.8,
    trackers=(),
)


def objective(family, micro=None, dropout=0.0, **changes):
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny.ours(family, qformer_config=chances, **changes)
    if family == "retrieval":
        return Retrieval(model, micro_batch_size=micro, train_vision=True)
    made = Stage2(model, micro, train_vision=True)
    if model.question_in_qformer:
        start.freeze_unread(model)
    return made


def gradients(trained, batch):
    trained.zero_grad()
    values = _backward(trained, trained.split(batch, 5, 1), make_accelerator("fp32", cpu=True))
    return values, {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with a tiny model under each embedded checkpoint's name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoints(folder)
    return folder


# --- what counts in the loss ---


def test_only_what_a_decoder_says_counts():
    processor = tuned.processor("opt")
    words = processor.tokenizer
    tokens = prompted(processor, ["a photo of"] * 2, ["a red circle", "dog"])
    said = words("a photo of a red circle\n")["input_ids"]
    assert tokens["input_ids"][0].tolist() == said and len(said) == 8
    assert tokens["labels"][0].tolist() == [-100] * 4 + said[4:]  # </s> a photo of
    dog, end = words.convert_tokens_to_ids(["dog", "\n"])
    assert tokens["labels"][1].tolist() == [-100] * 4 + [dog, end] + [-100] * 2
    assert tokens["attention_mask"][1].tolist() == [1] * 6 + [0] * 2
    cut = prompted(processor, ["a photo of"], ["a red circle"], max_length=2)
    assert cut["input_ids"].tolist() == [said[:6]]  # the prompt stays whole, the end is not taught
    bare = prompted(processor, [""], ["dog"])["labels"].tolist()
    assert bare == [[words.bos_token_id, dog, end]]  # as in stage 2


def test_only_what_the_other_half_says_counts():
    processor = tuned.processor("t5")
    ids = processor.tokenizer.convert_tokens_to_ids
    tokens = prompted(processor, ["a photo of", "a"], ["a red circle", "dog"])
    assert tokens["input_ids"][0].tolist() == ids(["a", "photo", "of", "</s>"])
    assert tokens["attention_mask"][1].tolist() == [1, 1, 0, 0]
    assert tokens["labels"].tolist() == [
        ids(["a", "red", "circle", "</s>"]),
        [*ids(["dog", "</s>"]), -100, -100],
    ]
    assert prompted(processor, ["a"], ["a red circle"], max_length=3)["labels"].tolist() == [
        ids(["a", "red", "</s>"])
    ]


@torch.no_grad()
def test_the_loss_is_that_of_the_answers():
    """By hand: minus the mean log-probability of each answer's tokens, the question in front of them."""
    trained, batch = objective("instruct").eval(), tuned.rows("instruct", [0, 1, 2])
    model, terms = trained.model, []
    words = tiny.tokenizer("opt")
    for row in range(3):
        prompt = words(tuned.FRAME.format(tuned.QUESTIONS[row]))["input_ids"]
        answer = words(f"{tuned.ANSWERS[row]}\n", add_special_tokens=False)["input_ids"]
        asked = tiny.tokenizer("bert")(tuned.QUESTIONS[row], return_tensors="pt")
        logits = model(
            batch["pixel_values"][row : row + 1],
            torch.tensor([prompt + answer]),
            qformer_input_ids=asked["input_ids"],
        ).logits[0]
        chances = logits.float().log_softmax(-1)[-len(answer) - 1 : -1]
        terms += [-chances[i, token] for i, token in enumerate(answer)]
    assert len(terms) == 2 + 2 + 4
    assert torch.isclose(trained(batch)["loss_lm"], torch.stack(terms).mean(), atol=1e-5)


def test_answers_come_up_as_often_as_they_were_given():
    generator = np.random.default_rng(0)
    given = ("red",) * 6 + ("dark red",) * 3 + ("maroon",)
    drawn = [data.draw_answer(given, generator) for _ in range(4000)]
    for answer, share in (("red", 0.6), ("dark red", 0.3), ("maroon", 0.1)):
        assert drawn.count(answer) / 4000 == pytest.approx(share, abs=0.03)


# --- retrieval ---


def test_soft_targets_are_the_written_out_formula():
    """0.9 of a row's target is shared by all pairs of its picture, 0.1 by all of the batch."""
    trained, batch = objective("retrieval").eval(), tuned.rows("retrieval", [0, 1, 3, 2, 6])
    assert [name[-1] for name in batch["images"]] == ["0", "1", "0", "2", "0"]
    batch["pixel_values"] = batch["pixel_values"] + tiny.pixels(5, seed=9)  # as if each were another crop
    with torch.no_grad():
        model = trained.model
        image = model.encode_image(batch["pixel_values"])
        images = model.image_feats(image.query_output)
        texts = model.text_feats(batch["input_ids"], batch["attention_mask"])
        closeness = torch.stack([(images[i] @ texts.T).amax(0) for i in range(5)]) / model.temperature
        losses = trained(batch)
    total = 0.0
    for logits in (closeness, closeness.T):
        for row in range(5):
            same = [float(name == batch["images"][row]) for name in batch["images"]]
            target = 0.9 * torch.tensor(same) / sum(same) + 0.1 / 5
            total -= (target * logits[row].log_softmax(0)).sum() / 5
    assert torch.isclose(losses["loss_itc"], total / 2, atol=1e-4)
    hard = Retrieval.__mro__[1].forward(trained, {k: v for k, v in batch.items() if k != "images"})
    assert not torch.isclose(losses["loss_itc"], hard["loss_itc"], atol=1e-4)


@pytest.mark.parametrize("micro", [None, 3])
def test_a_caption_of_the_same_picture_is_no_mismatch(micro):
    """Over many draws, ITM's negatives are of other pictures; in parts too, where they come from all rows."""
    trained, batch = objective("retrieval", micro), tuned.rows("retrieval", [0, 1, 2, 3, 4, 5])
    seen, of = [], {tuple(ids.tolist()): i % 3 for i, ids in enumerate(batch["input_ids"])}
    compute = trained.model.itm

    def itm(images, ids, *rest, **options):
        seen.extend(zip(ids[0].tolist(), ids[1].tolist(), strict=True))
        return compute(images, ids, *rest, **options)

    trained.model.itm = itm
    for step in range(6):
        with torch.no_grad():
            for part in trained.split(dict(batch), step):
                trained(part)
    pairs = {(of[tuple(own)], of[tuple(drawn)]) for own, drawn in seen}
    assert len(seen) == 6 * 6 and len(pairs) >= 4
    assert not any(own == drawn for own, drawn in pairs)


@pytest.mark.parametrize("family", ["retrieval", "instruct", "t5"])
def test_parts_equal_the_whole_batch(family):
    """With an image encoder that learns: loss and gradients, those of ITM's negative pictures included."""
    batch = tuned.rows(family, [0, 1, 2, 3, 4, 5])
    expected, of_whole = gradients(objective(family), dict(batch))
    found, of_parts = gradients(objective(family, 2), dict(batch))
    assert expected.keys() == found.keys() and of_whole.keys() == of_parts.keys()
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5, rtol=1e-4), name
    for name in of_whole:
        assert torch.allclose(of_whole[name], of_parts[name], atol=2e-5, rtol=1e-3), name
    assert of_whole["model.vision_model.encoder.layers.0.mlp.fc1.weight"].abs().sum() > 0
    assert not any(name.startswith("model.language_model") for name in of_whole)
    trained = {n for n, p in objective(family).named_parameters() if p.requires_grad}
    assert of_whole.keys() == trained  # else DistributedDataParallel would wait for them


def work(rank, folder, accelerator):
    trained = objective("retrieval")
    config = dataclasses.replace(FIT, steps=3, log_every=1)
    fit(trained, tuned.loader("retrieval", rank, 2, 6), config, folder / "run", accelerator=accelerator)
    return {name: p.detach() for name, p in trained.named_parameters()}


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path):
    """Negative pictures of the other process give its encoder gradients, too."""
    alone = objective("retrieval")
    config = dataclasses.replace(FIT, steps=3, log_every=1)
    fit(alone, tuned.loader("retrieval", number=6), config, tmp_path / "alone")
    for seen in run_pair(work, tmp_path):
        for name, value in seen.items():
            if not name.endswith(("key.bias", "qkv.bias")):  # keys' gradient is rounding, which Adam blows up
                assert torch.allclose(value, alone.get_parameter(name), atol=2e-4), name


# --- the image encoder ---


@pytest.mark.parametrize("clip", [False, True])
@torch.no_grad()
def test_resizing_equals_interpolating_each_time(clip, tmp_path):
    vision = {"pre_layernorm": True, "patch_bias": False} if clip else {}
    model, processor = tiny.ours("retrieval", vision_config=vision), tuned.processor("retrieval")
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    expected = model.vision_model(pixels, interpolate=True)
    at_first = model.vision_model(tiny.pixels())
    start.resize(model, processor, 42)
    found = model.vision_model(pixels)
    assert torch.allclose(found, expected, atol=1e-6) and found.shape == (2, 37, 24)
    assert model.config.vision_config.image_size == processor.image_size == 42
    start.resize(model, processor, 28)
    assert not torch.equal(model.vision_model(tiny.pixels()), at_first)  # down again is not the way back
    with pytest.raises(RecipeError, match="resolution: image_size 40 is no multiple of patch_size 7"):
        start.resize(model, processor, 40)


@torch.no_grad()
def test_a_resized_model_loads_in_transformers(tmp_path):
    model, processor = tiny.ours("opt"), tuned.processor("opt")
    positions = model.vision_model.embeddings.position_embedding.clone()
    start.resize(model, processor, 42)
    blip2.save(model, processor, tmp_path / "model")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    embeds = theirs.vision_model(pixels).last_hidden_state
    assert torch.allclose(model.image_embeds(pixels), embeds, atol=1e-4)
    assert theirs.config.vision_config.image_size == 42
    made = theirs.vision_model.embeddings.position_embedding
    assert torch.allclose(made, interpolate_positions(positions, 6, 6), atol=1e-6)
    assert blip2.load(tmp_path / "model", device="cpu").processor.image_size == 42


def test_drop_path():
    encoder = tiny.ours("opt").vision_model
    with torch.no_grad():
        before = encoder(tiny.pixels())
        encoder.set_drop_path(0.5)
        assert torch.equal(encoder(tiny.pixels()), before)  # outside of training
        encoder.train()
        torch.manual_seed(0)
        assert not torch.equal(encoder(tiny.pixels()), before)
    first, last = encoder.encoder.layers
    assert (first.drop_path, last.drop_path) == (0.0, 0.5)
    kept = last._branch(torch.ones(1000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}  # whole pictures, and the mean stays
    assert torch.equal(kept[:, :1, :1].expand_as(kept), kept) and kept.mean() == pytest.approx(1, abs=0.1)
    encoder.set_drop_path(0.0)
    assert torch.equal(encoder(tiny.pixels()), before)


def test_layer_decay_scales_each_block_of_a_real_run(tmp_path):
    """After a step of `fit`, block i of L has moved 0.5^(L - i) times as far as the Q-Former."""
    trained = objective("opt")
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    config = dataclasses.replace(FIT, steps=1, warmup_steps=0, weight_decay=0.0, layer_decay=0.5)
    fit(trained, tuned.loader("opt"), config, tmp_path)
    moved = {name: (p - before[name]).abs().max().item() for name, p in trained.named_parameters()}
    blocks = "model.vision_model.encoder.layers"
    for name, scale in {
        "model.vision_model.embeddings.patch_embedding.weight": 0.125,
        f"{blocks}.0.mlp.fc1.weight": 0.25,
        f"{blocks}.1.mlp.fc1.weight": 0.5,
        "model.vision_model.post_layernorm.weight": 1.0,
        "model.query_tokens": 1.0,
    }.items():  # Adam's first step is the rate, whatever the gradient's size
        assert moved[name] == pytest.approx(1e-3 * scale, rel=0.02), name
    assert moved["model.language_model.model.decoder.layers.0.fc1.weight"] == 0


@pytest.mark.parametrize("family", ["retrieval", "instruct"])
def test_training_resumes_bitwise(family, tmp_path):
    """Two steps and two more equal four, dropout, drop path and negatives included."""

    def made():
        trained = objective(family, 2, dropout=0.1)
        trained.model.vision_model.set_drop_path(0.3)
        return trained

    whole, parts, again = made(), made(), made()
    fit(whole, tuned.loader(family), FIT, tmp_path / "whole")
    fit(parts, tuned.loader(family), FIT, tmp_path / "parts")
    state.latest(tmp_path / "parts").rename(tmp_path / "gone")  # as if the run had died after step 2
    assert state.latest(tmp_path / "parts").name.endswith("2")
    assert fit(again, tuned.loader(family), FIT, tmp_path / "parts").finished
    for name, p in again.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


# --- questions in the Q-Former ---


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_a_vqa_model_has_both_halves_and_loads_in_transformers(family, models, tmp_path):
    """Queries' half of stage 2, text half of stage 1; saved, transformers' InstructBLIP computes the same."""
    name = {"opt": "scenes-opt", "t5": "scenes-flan-t5"}[family]
    recipe = dataclasses.replace(
        RECIPES["scenes-vqa-opt"](), start_from=str(models / name), stage1=str(models / "scenes-itm"),
        resolution=42,
    )  # fmt: skip
    made, processor = start.start(recipe)
    model, stage1 = made.model.eval(), blip2.load(models / "scenes-itm", device="cpu").model
    stage2 = blip2.load(models / name, device="cpu").model
    taken = model.qformer.state_dict()
    for key, value in stage2.qformer.state_dict().items():
        assert torch.equal(taken.pop(key), value), key
    assert len(taken) == 3 * 6 and all(
        torch.equal(stage1.qformer.state_dict()[k], v) for k, v in taken.items()
    )
    assert torch.equal(model.embeddings.word_embeddings.weight, stage1.embeddings.word_embeddings.weight)
    blip2.save(model, processor, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "instructblip"
    theirs = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    questions = ["what color is the circle?", "a dog"]
    text = {**processor.text(questions), **processor.question(questions)}
    images = torch.full((2, tiny.NUM_QUERIES), theirs.config.image_token_index)
    ids = torch.cat([images, text["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(images), text["attention_mask"]], 1)
    options = {} if family == "opt" else {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])}
    a = model(pixels, **text, **options).logits
    b = theirs(pixels, **{**text, "input_ids": ids, "attention_mask": mask}, **options).logits
    real = mask.bool() if family == "opt" else torch.ones(2, 3, dtype=torch.bool)
    assert torch.allclose(a[real], b[real], atol=1e-4)
    other = model(pixels, **{**text, **processor.question(["a cat", "two"])}, **options).logits
    assert not torch.allclose(a[real], other[real], atol=1e-3)  # the Q-Former reads the question


def test_what_does_not_fit_is_named(models):
    recipe = RECIPES["scenes-vqa-opt"]()
    wrong = dataclasses.replace(recipe, start_from=str(models / "scenes-itm"))
    with pytest.raises(RecipeError, match="is a stage-1 model; vqa starts from one of stage 2"):
        start.start(wrong)
    wrong = dataclasses.replace(
        recipe, start_from=str(models / "scenes-opt"), stage1=str(models / "scenes-opt")
    )
    with pytest.raises(RecipeError, match="is no stage-1 model; the text half"):
        start.start(wrong)
    with pytest.raises(RecipeError, match=r"has hidden_size 192, the model's own 32"):
        start.start(dataclasses.replace(wrong, stage1="scenes-itm"))
    for changes, message in {
        "vision_precision": ({"execution": recipes.Execution(vision_precision="float16")}, "takes float32"),
        "nf4": ({"execution": recipes.Execution(language_precision="nf4")}, "goes with LoRA alone"),
        "lora": ({"lora": recipes.LoRA()}, "leave out stage1 and resolution"),
        "prompt": ({"prompt": "Question:"}, "says where the question goes"),
        "task": ({"task": "caption", "fit": dataclasses.replace(recipe.fit, probe=None)}, "a way into"),
        "drop_path": ({"drop_path": 1.0}, "drop_path is 1.0"),
        "probe": ({"fit": dataclasses.replace(recipe.fit, probe="cider")}, "vqa has accuracy"),
    }.values():
        with pytest.raises(RecipeError, match=message):
            dataclasses.replace(recipe, **changes)


# --- questions as published ---


def questions(folder, **changes):
    (train, answers), genome = tuned.write_vqa(folder), tuned.write_genome(folder)
    return Questions(
        **{
            "questions": (str(train),), "annotations": (str(answers),), "images": str(folder),
            "visual_genome": str(genome), "visual_genome_images": str(folder), "num_validation": 2,
        } | changes
    )  # fmt: skip


def test_questions_in_the_official_layout(tmp_path):
    train, held_out, genome = data.read_questions(questions(tmp_path))
    assert (len(train), len(held_out), len(genome)) == (8, 4, 10)
    assert not {row.image for row in train} & {row.image for row in held_out}
    assert train[0].question.startswith("what color is dog ") and train[0].question.endswith("?")
    assert train[0].answers == ("red",) * 7 + ("dark red",) * 3
    assert {row.answers for row in genome} == {("a dog",)}
    recipe = dataclasses.replace(
        RECIPES["scenes-vqa-opt"](), data=questions(tmp_path, visual_genome=None, visual_genome_images=None),
        batch_size=4,
    )  # fmt: skip
    load, batches = data.loaders(recipe, tuned.processor("instruct"))
    first, again = load(), load()
    found = [batch for batch, _ in zip(first, range(5), strict=False)]
    again.load_state_dict({**again.state_dict(), "step": 3})
    repeated = next(iter(again))
    assert found[3]["keys"] == repeated["keys"] and torch.equal(found[3]["labels"], repeated["labels"])
    assert torch.equal(found[3]["pixel_values"], repeated["pixel_values"])  # crops and flips, too
    assert found[0]["pixel_values"].shape == (4, 3, 28, 28) and "qformer_input_ids" in found[0]
    assert found[0]["prompts"][0].startswith("Question: what color") and len(found[0]["answers"][0]) == 10
    held = [
        key for batch, _ in zip(load("validation"), range(batches), strict=False) for key in batch["keys"]
    ]
    assert len(held) == len(set(held)) == 4


def test_a_fifth_of_visual_genome_comes_up_in_an_epoch(tmp_path):
    recipe = dataclasses.replace(RECIPES["scenes-vqa-opt"](), data=questions(tmp_path), batch_size=5)
    load, _ = data.loaders(recipe, tuned.processor("instruct"))
    keys = [key for batch, _ in zip(load(), range(20), strict=False) for key in batch["keys"]]
    genome = [key for key in keys if "what is it" in key]  # 8 questions of VQAv2 and 2 of 10 an epoch
    assert len(genome) == 2 * len(keys) // 10 and len(set(genome)) > 4


def test_files_that_are_no_questions(tmp_path):
    made = questions(tmp_path)
    swapped = dataclasses.replace(made, questions=made.annotations)
    with pytest.raises(
        RecipeError,
        match=r"train_annotations.json holds VQA's annotations \(the answers\), not VQA's questions",
    ):
        data.read_questions(swapped)
    with pytest.raises(RecipeError, match="no list of images with questions"):
        data.read_questions(dataclasses.replace(made, visual_genome=made.questions[0]))
    with pytest.raises(RecipeError, match="2 files of questions with 1 of annotations"):
        questions(tmp_path, questions=("a", "b"))
    with pytest.raises(RecipeError, match="num_validation is 6 of 6 pictures"):
        data.read_questions(
            questions(tmp_path, visual_genome=None, visual_genome_images=None, num_validation=6)
        )
    recipe = dataclasses.replace(RECIPES["scenes-vqa-opt"](), data=made, batch_size=4)
    assert recipe.missing() == []
    alone = dataclasses.replace(made, visual_genome=None, visual_genome_images=None)
    recipe = dataclasses.replace(recipe, data=alone)
    for path in tmp_path.glob("train2014/*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"the picture of the question 'what color.* is not there: .*COCO_train2014"
    ):
        load, _ = data.loaders(recipe, tuned.processor("instruct"))
        next(iter(load()))


# --- recipes and the command ---


def test_recipes_have_the_papers_numbers():
    """Tables 7 to 9: epochs, warm-up, rate, batch, betas, layer decay, image size."""
    coco, vqa = 566_747, 443_757 + 214_354
    usual, other = (1e-5, (0.9, 0.999)), (5e-6, (0.9, 0.98))
    table = {
        "caption-flan-t5-xl": (coco, 256, *usual, 1.0, 364),
        "caption-opt-2-7b": (coco, 256, *usual, 1.0, 364),
        "caption-opt-6-7b": (coco, 256, *usual, 0.95, 364),
        "vqa-flan-t5-xl": (vqa, 128, *usual, 0.95, 490),
        "vqa-opt-2-7b": (vqa, 128, *usual, 0.95, 490),
        "vqa-opt-6-7b": (vqa, 128, *usual, 0.9, 490),
        "retrieval-vitl": (coco, 224, *other, 1.0, 364),
        "retrieval-vitg": (coco, 224, *usual, 0.95, 364),
    }
    for name, (examples, batch_size, rate, betas, decay, size) in table.items():
        recipe = RECIPES[name]()
        chosen = recipe.fit
        assert chosen.steps == 5 * examples // batch_size and recipe.batch_size == batch_size, name
        assert (chosen.learning_rate, chosen.betas, chosen.layer_decay) == (rate, betas, decay), name
        assert (chosen.warmup_steps, chosen.weight_decay, recipe.resolution) == (1000, 0.05, size), name
        assert recipe.drop_path == 0 and recipe.trains_vision and recipe.lora is None
        assert recipe.prompt == {"c": "a photo of", "v": "Question: {} Answer:", "r": ""}[name[0]]
    assert len({make().output for make in RECIPES.values()}) == len(RECIPES)
    assert all(
        bool(made.prompt) != (made.task == "retrieval") for made in (make() for make in RECIPES.values())
    )


def options(folder, **changes):
    made = {
        "steps": 4, "batch-size": 4, "log-every": 2, "save-every": 2, "eval-every": 0, "warmup-steps": 1,
        "precision": "fp32", "max-minutes": None, "num-scenes": 40, "num-validation": 8, "output": folder,
    } | changes  # fmt: skip
    return [f"--{name}={value}" for name, value in made.items()]


@pytest.mark.parametrize(
    "name",
    [
        "scenes-vqa-opt",
        *(pytest.param(f"scenes-{rest}", marks=pytest.mark.long) for rest in ("caption-opt", "vqa-flan-t5")),
        pytest.param("scenes-retrieval", marks=pytest.mark.long),
    ],
)
def test_command(name, models, tmp_path):
    recipe = RECIPES[name]()
    wanted = {"start-from": models / recipe.start_from, "resolution": 42, "save": "best"}
    if recipe.stage1:
        wanted |= {"stage1": models / recipe.stage1, "prompt": "{} It is"}
    assert finetune.main([name, *options(tmp_path / "run", **wanted)]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"] == name and config["resolution"] == 42 and config["fit"]["layer_decay"] == 0.9
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert f"eval/{recipe.fit.probe}" in last and (tmp_path / "run" / "samples" / "step-00000004.md").exists()
    loaded = blip2.load(tmp_path / "run" / "model", device="cpu")
    before = blip2.load(models / recipe.start_from, device="cpu").model
    key = "encoder.layers.1.mlp.fc1.weight"
    assert not torch.equal(loaded.model.vision_model.state_dict()[key], before.vision_model.state_dict()[key])
    assert loaded.processor.image_size == 42
    if recipe.task == "vqa":
        assert loaded.processor.prompt("what?", loaded.processor.question_style) == "what? It is"
    if recipe.task != "retrieval":
        assert loaded.model.question_in_qformer == (recipe.task == "vqa")
        for key, value in before.language_model.state_dict().items():
            assert torch.equal(loaded.model.language_model.state_dict()[key], value), key


@pytest.mark.long
def test_lora_by_command(models, tmp_path):
    wanted = {
        "start-from": models / "scenes-opt",
        "rank": 4,
        "learning-rate": 1e-2,
        "min-learning-rate": 1e-2,
    }
    assert finetune.main(["scenes-vqa-opt", "--lora", *options(tmp_path / "run", **wanted)]) == 0
    assert not (tmp_path / "run" / "model").exists()
    plain = blip2.load(models / "scenes-opt", device="cpu").model
    worn = blip2.load(adapter=tmp_path / "run" / "adapter", device="cpu").model
    text = tuned.processor("opt").text(["a dog"])
    with torch.no_grad():
        a, b = (model(tiny.pixels(1), **text).logits for model in (plain, worn))
    assert not torch.allclose(a, b, atol=1e-4)
    trained = state.load_file(state.latest(tmp_path / "run") / "weights.safetensors")
    assert trained and all(".lora_" in name for name in trained)


def test_a_recipe_without_its_parts_stops_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["vqa-opt-2-7b"]) == 2
    message = capsys.readouterr().err
    for part in (
        "blip2-opt-2.7b",
        "blip2-itm-vit-g",
        "v2_OpenEnded_mscoco_train2014",
        "train.finetune vqa-opt",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("caption-opt-2-7b", 1_093_619_584 + KEYS),
        # The last layer's text feed-forward, 4,723,968 numbers, is left out: no output depends on it.
        pytest.param("vqa-opt-2-7b", 1_174_915_072 + KEYS - 4_723_968, marks=pytest.mark.long),
        pytest.param("vqa-opt-6-7b", 1_176_096_256 + KEYS - 4_723_968, marks=pytest.mark.long),
        pytest.param("retrieval-vitg", 1_173_191_358 + KEYS, marks=pytest.mark.long),
        pytest.param("retrieval-vitl", 474_177_342, marks=pytest.mark.long),
    ],
)
def test_trained_parameters(name, trained):
    assert shapes.shapes.sizes(RECIPES[name]())["trained"] == trained


def test_a_plan_starts_what_was_planned(monkeypatch, capsys):
    """Its start command gives the recipe that the plan is of: options, adapters and a folder included."""
    seen = []
    monkeypatch.setattr(pretrain, "domain", lambda made, folder: dataclasses.replace(made, output=folder))
    monkeypatch.setattr(finetune, "run", lambda recipe, *rest: seen.append(recipe) or Result(1, True))

    def planned(recipe, name, options, *, gpus, gpu_memory, **rest):  # counting takes seconds
        seen.append(recipe)
        counts, memory = Counts(1, 0, 1e9, 1e6), {"the step": 1e9}
        chosen = dataclasses.replace(recipe.execution, checkpointing=True)
        return plan.Plan(
            name, recipe, chosen, "a100", gpus, 1, gpu_memory, 0.3, 1, 1, memory, counts, 1.0, options
        )

    monkeypatch.setattr(plan, "plan", planned)
    given = ["--lora", "--rank=3", "--folder", "my pictures", "--prompt", "one of", "--micro_batch_size", "6"]
    assert finetune.main(["scenes-caption-opt", "--gpus", "2", *given, "--plan", "--gpu-memory", "80"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].strip()
    start, _, words = command.partition(" -m train.finetune ")
    assert start == "torchrun --nproc-per-node 2 --standalone" and words.count("micro") == 1
    assert finetune.main(shlex.split(words)) == 0
    of_plan, started = seen
    assert started.execution.checkpointing and not of_plan.execution.checkpointing
    assert dataclasses.replace(started, execution=of_plan.execution) == of_plan
    assert (started.lora.rank, started.prompt) == (3, "one of")
    assert started.output == "my pictures" and started.execution.micro_batch_size == 6


@pytest.mark.long
@pytest.mark.parametrize("name", ["caption-flan-t5-xl", "vqa-opt-6-7b", "retrieval-vitg"])
def test_plan(name, capsys):
    assert finetune.main([name, "--plan", "--nodes", "2", "--gpu-memory", "80"]) == 0
    page = capsys.readouterr().out
    assert f"-m train.finetune {name}" in page and "trained weights, AdamW, buckets" in page
    assert "image encoder, frozen" not in page  # it learns


@pytest.mark.long
@pytest.mark.parametrize("name", ["caption-flan-t5-xl", "vqa-opt-2-7b", "vqa-flan-t5-xl", "retrieval-vitg"])
def test_any_recipe_runs_small(name, tmp_path, monkeypatch):
    """--smoke: the recipe's own objective, precisions and layer decay on drawn scenes, to a model."""
    monkeypatch.setattr("train.tuning.smoke.STEPS", 4)
    monkeypatch.chdir(tmp_path)
    assert finetune.main([name, "--smoke", "--batch-size=8", "--num-validation=8", "--warmup-steps=1"]) == 0
    run = tmp_path / "runs" / "smoke" / name
    config = json.loads((run / "config.json").read_text())
    assert config["fit"]["betas"] == [0.9, 0.999] and config["fit"]["learning_rate"] == 3e-4
    assert blip2.load(run / "model", device="cpu").processor.image_size == 80


def test_scenes_give_each_task_its_text():
    made = {}
    for name in ("scenes-caption-opt", "scenes-vqa-opt", "scenes-retrieval"):
        recipe = dataclasses.replace(
            RECIPES[name](), data=Scenes(num_scenes=8, num_validation=4, telling=True)
        )
        family = "retrieval" if recipe.task == "retrieval" else "instruct"
        load, batches = data.loaders(dataclasses.replace(recipe, batch_size=4), tuned.processor(family))
        made[recipe.task] = next(iter(load()))
        assert batches == 1 and len(next(iter(load("validation")))["keys"]) == 4
        assert next(iter(load("validation")))["keys"][0].startswith("validation/")
    assert all("small" in text or "large" in text for text in made["caption"]["captions"])
    assert any(". " in text for text in made["caption"]["captions"])
    assert all(len(answers) == 1 for answers in made["vqa"]["answers"])
    assert "qformer_input_ids" in made["vqa"] and "qformer_input_ids" not in made["retrieval"]


@pytest.mark.parametrize("name", ["scenes-opt", "scenes-flan-t5"])
def test_the_language_model_is_read_in_its_precision(name, models, monkeypatch):
    """It alone is in bfloat16, rounded once, and no float32 copy of any of its tensors was ever made."""
    exact = blip2.load(models / name, precision="float32", device="cpu").model
    blip2.packed.unpack(exact)
    language = {tuple(p.shape) for p in exact.language_model.parameters()}
    language -= {tuple(p.shape) for n, p in exact.named_parameters() if not n.startswith("language_model.")}
    assert len(language) >= 2
    made = []  # dtypes of what lies in memory in one of those shapes

    def watched(function):
        def watching(*arguments, **options):
            tensor = function(*arguments, **options)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tuple(tensor.shape) in language:
                made.append(tensor.dtype)
            return tensor

        return watching

    monkeypatch.setattr("blip2.shards._empty", watched(blip2.shards._empty))
    for method in ("to", "float", "type", "clone"):
        monkeypatch.setattr(torch.Tensor, method, watched(getattr(torch.Tensor, method)))
    monkeypatch.setattr(torch, "empty_like", watched(torch.empty_like))
    recipe = dataclasses.replace(
        RECIPES["scenes-caption-opt"](), start_from=str(models / name),
        execution=recipes.Execution(language_precision="bfloat16"),
    )  # fmt: skip
    model, _ = start.load(recipe)
    monkeypatch.undo()
    assert set(made) == {torch.bfloat16}
    for key, value in model.state_dict().items():
        dtype = torch.bfloat16 if key.startswith("language_model.") else torch.float32
        assert value.dtype == dtype and torch.equal(value, exact.state_dict()[key].to(dtype)), key
    with pytest.raises(ValueError, match="'int8' with precision 'float32': both have to be of float32, bf"):
        blip2.load(models / name, precision="float32", language_precision="int8")


def test_frozen_parts_are_saved_as_they_were_stored(models):
    """The language model was held in bfloat16; what is saved has all its digits, and what was trained."""
    recipe = dataclasses.replace(
        RECIPES["scenes-caption-opt"](), start_from=str(models / "scenes-opt"),
        execution=recipes.Execution(language_precision="bfloat16"),
    )  # fmt: skip
    made, _ = start.start(recipe)
    assert {p.dtype for p in made.model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        made.model.query_tokens.add_(1)
    model, reader = start.finished(recipe, made.model)
    stored = blip2.load(models / "scenes-opt", device="cpu").model
    for key, value in stored.language_model.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[key], value), key
    assert torch.equal(model.query_tokens, stored.query_tokens + 1) and reader == ""


@pytest.mark.long
@pytest.mark.parametrize("name", ["scenes-caption-opt", "scenes-retrieval"])
def test_a_folder_of_ones_own(name, models, tmp_path):
    """Pictures with two captions each in a table; batches name the picture, for soft targets."""
    from PIL import Image

    from train.data.samples import picture_of

    folder, lines = tmp_path / "own", ["image,caption"]
    folder.mkdir()
    for number in range(44):
        Image.new("RGB", (40, 30), (5 * number, 0, 200)).save(folder / f"{number}.png")
        lines += [f"{number}.png,a red circle", f"{number}.png,two dog"]
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    recipe = RECIPES[name]()
    wanted = options(tmp_path / "run", **{"start-from": models / recipe.start_from})
    wanted = [word for word in wanted if not word.startswith("--num-")]
    assert finetune.main([name, "--folder", str(folder), *wanted]) == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert f"eval/{recipe.fit.probe}" in last
    sample = {"__key__": "4_1", "txt": b"a dog"}
    assert picture_of(sample) == "4_1" and picture_of({**sample, "json": b'{"image_id": 4}'}) == "4"
    if name == "scenes-retrieval":
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        made = dataclasses.replace(recipe, data=domain(recipe, folder).data, batch_size=8)
        assert config["save"] == "best" and config["fit"]["probe"] == "retrieval"
        batch = next(iter(data.loaders(made, tuned.processor("retrieval"))[0]()))
        assert len(batch["images"]) == 8 and all("/0000" in image for image in batch["images"])
