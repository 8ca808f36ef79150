"""The drawn world's language: captions and answers are true, tokenizers reload, both trainers resume."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from train.scenes import documents, language, text
from train.scenes.text import split
from train.scenes.world import COLORS, SHAPES, relation, sample

SCENES = [sample(seed, "validation") for seed in range(60)]


def named(words: str, scene) -> list:
    """The things of a scene that a name such as "small red ring" or "red thing" fits."""
    attributes = [word for word in words.split() if word != "thing"]
    return [t for t in scene.things if all(word in (t.size, t.color, t.shape) for word in attributes)]


def test_relation_captions_are_true():
    for scene in SCENES:
        for a, b in text.clear_pairs(scene.things):
            said = re.sub(r"\ban\b", "a", text.relation_caption(a, b))
            where = next(name for name in text.INVERSE if f" {name} " in said)
            first, second = (part.removeprefix("a ") for part in said.split(f" {where} "))
            (one,), (other,) = named(first, scene), named(second, scene)
            assert relation(one, other) == where


def test_captions_are_clean_and_absent_things_are_absent():
    for scene in SCENES:
        rng = random.Random(scene.seed)
        for said in [*text.captions(scene, rng), text.caption(scene, rng)]:
            assert said == said.lower().strip() and not said.endswith(".")
            assert set(text.split(said)) <= set(text.WORDS)
            if said.startswith("there is no "):
                assert not named(said.removeprefix("there is no "), scene)


def test_list_caption_reads_left_to_right():
    for scene in SCENES:
        said = text.split(text.list_caption(scene.things, random.Random(scene.seed)))
        assert [word for word in said if word in SHAPES] == [thing.shape for thing in scene.things]
        assert [word for word in said if word in COLORS] == [thing.color for thing in scene.things]


@pytest.mark.parametrize("unseen", [False, True])
def test_answers_are_true(unseen):
    seen_kinds = set()
    for scene in SCENES:
        for asked, answer, kind in text.questions(scene, random.Random(scene.seed), unseen=unseen):
            seen_kinds.add(kind)
            words = [word for word in text.split(asked) if word != "?"]
            assert set(words) <= set(text.WORDS)
            name = " ".join(words[len(words) - words[::-1].index("the") :]) if "the" in words else ""
            if kind in ("color", "shape", "size"):
                (thing,) = named(name, scene)
                assert getattr(thing, kind) == answer
            elif kind == "relation":
                where = next(where for where in text.INVERSE if f" {where} " in asked)
                (thing,) = named(name, scene)
                (there,) = [t for t in scene.things if t is not thing and relation(t, thing) == where]
                assert answer == f"{there.color} {there.shape}"
            elif kind == "count":
                plurals = {text.plural(shape): shape for shape in SHAPES}
                asked_of = [w for w in words if w in plurals or w in COLORS]
                things = named(" ".join(plurals.get(word, word) for word in asked_of), scene)
                assert answer == text.NUMBERS[len(things)]
            elif kind == "exist":
                after = words[len(words) - next(i for i, w in enumerate(words[::-1]) if w in ("a", "an")) :]
                after = [word for word in after if word not in ("in", "the", *text.IMAGES)]
                assert answer == ("yes" if named(" ".join(after), scene) else "no")
    assert seen_kinds == set(text.KINDS)


def test_wordings_for_tests_are_not_trained_on():
    for wordings in text.WORDINGS.values():
        trained, unseen = set(wordings[: -text.UNSEEN]), set(wordings[-text.UNSEEN :])
        assert len(trained) >= 5 and len(unseen) == text.UNSEEN and not trained & unseen


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="weight"):
        text.question(SCENES[0], "weight", random.Random(0))
    with pytest.raises(ValueError, match="gpt"):
        text.build_tokenizer("gpt")


@pytest.mark.parametrize("family", ["opt", "t5", "bert"])
def test_tokenizer_reloads_and_speaks_naturally(family, tmp_path):
    text.build_tokenizer(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocab = text.vocabulary(family)
    asked = "Question: What color is the red ring, the big one? Answer:"
    ids = tokenizer(asked)["input_ids"]
    first, last = {"opt": ("</s>", ":"), "t5": ("question", "</s>"), "bert": ("[CLS]", "[SEP]")}[family]
    assert (ids[0], ids[-1]) == (vocab[first], vocab[last])
    assert tokenizer.decode(ids, skip_special_tokens=True) == asked.lower()
    assert tokenizer.convert_tokens_to_ids("<image>") == len(vocab) - 1 == len(tokenizer) - 1
    assert tokenizer("<image><image>ring", add_special_tokens=False)["input_ids"] == [
        len(vocab) - 1, len(vocab) - 1, vocab["ring"],
    ]  # fmt: skip
    if family == "opt":
        assert tokenizer("red\n", add_special_tokens=False)["input_ids"] == [vocab["red"], vocab["\n"]]
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    if family == "t5":
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_documents_spell_what_the_tokenizer_spells():
    tokenizer, vocab = text.build_tokenizer("opt"), text.vocabulary("opt")
    rng = random.Random(0)
    for _ in range(50):
        words, targets, weights = documents.opt_document(rng)
        assert len(words) == len(targets) == len(weights)
        ids = [vocab[word] for word in words]
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
        encoder, answer, weights = documents.t5_document(rng)
        assert len(answer) == len(weights) and encoder[-1] == answer[-1] == "</s>"


def test_an_answer_is_followed_by_the_end_token():
    rng = random.Random(0)
    for _ in range(50):
        words, targets, _ = documents.opt_document(rng)
        for index in range(2, len(words) - 3):
            if words[index - 2 : index] == ["answer", ":"] and words[index + 1] == ".":
                assert targets[index] == "\n"


@pytest.mark.parametrize(("train", "auto"), [("opt", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_trainers_resume_and_save_what_transformers_loads(train, auto, tmp_path, monkeypatch):
    run = {"opt": language.train_opt, "t5": language.train_t5}[train]
    arguments = {"steps": 4, "size": 4, "every": 2, "scenes": 2}
    run(tmp_path / "whole", **arguments)
    kept = language.os.replace

    def stop(source, target):
        kept(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(language.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", **arguments)
    monkeypatch.setattr(language.os, "replace", kept)
    figures = run(tmp_path / "parts", **arguments)
    whole, parts = (auto.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert set(text.KINDS) <= set(figures["validation"]) and not (tmp_path / "parts" / "state.pt").exists()
    assert json.loads((tmp_path / "parts" / "figures.json").read_text()) == figures
    AutoTokenizer.from_pretrained(tmp_path / "parts")


def test_untrained_flan_t5_already_looks_where_the_list_goes_on():
    model = language.new_t5(0)
    model.set_attn_implementation("eager")
    scenes = [scene for seed in range(40) if len((scene := sample(seed, "validation")).things) > 2]
    lists = [split(text.list_caption(scene.things, random.Random(0), 1, 0)) for scene in scenes]
    batch = language.collate_t5([([*said, "</s>"], said, [1.0] * len(said)) for said in lists])
    with torch.no_grad():
        heads = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["targets"].clamp(min=0).roll(1, 1),
            output_attentions=True,
        ).cross_attentions[0]
    for head, least in ((6, 0.2), (7, 0.8), (8, 0.8)):  # by one word, by five
        looks = [heads[row, head, at, at] for row, said in enumerate(lists) for at in range(5, len(said))]
        assert torch.stack(looks).mean() > least
