"""Ours against transformers', through saved folders, both ways: logits, losses, generated ids, scores.

Tiny random models in float32; differences of at most 1e-5 are allowed.
"""

import pytest
import tiny
import torch
import transformers

from blip2.checkpoint import load, save
from blip2.processing import Processor

CLASSES = {
    "opt": transformers.Blip2ForConditionalGeneration,
    "t5": transformers.Blip2ForConditionalGeneration,
    "retrieval": transformers.Blip2ForImageTextRetrieval,
    "instruct": transformers.InstructBlipForConditionalGeneration,
}
PROMPTS = ["Question: what color is the circle? Answer:", "a photo of the"]


def close(a, b, tolerance=1e-5):
    difference = (a - b).abs().max().item()
    assert a.shape == b.shape and difference <= tolerance, difference


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> [(ours, theirs, processor)] of equal weights: saved by them, loaded by us; and back."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            their_first = tiny.theirs(family, seed=1)
            their_first.save_pretrained(folder / "theirs")
            tiny.theirs_processor(family).save_pretrained(folder / "theirs")
            loaded = load(folder / "theirs", device="cpu")
            our_first = tiny.ours(family, seed=2)
            save(our_first, loaded.processor, folder / "ours")
            their_second = CLASSES[family].from_pretrained(folder / "ours")
            made[family] = [
                (loaded.model, their_first, loaded.processor),
                (our_first, their_second, loaded.processor),
            ]
        return made[family]

    return get


def text_of(processor: Processor, prompts=PROMPTS):
    return {**processor.text(prompts), **processor.question(prompts)}


def for_theirs(model, text):
    """The same text as transformers wants it: with image tokens in front."""
    ids, mask = text["input_ids"], text["attention_mask"]
    images = torch.full((len(ids), tiny.NUM_QUERIES), model.config.image_token_index)
    return {
        **text,
        "input_ids": torch.cat([images, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], 1),
    }


@pytest.mark.parametrize("direction", [0, 1], ids=["theirs-to-ours", "ours-to-theirs"])
@pytest.mark.parametrize("family", ["opt", "instruct"])
@torch.no_grad()
def test_decoder_logits_and_loss(pairs, family, direction):
    ours, theirs, processor = pairs(family)[direction]
    pixels, text = tiny.pixels(), text_of(processor)
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    full = torch.cat([labels.new_full((2, tiny.NUM_QUERIES), -100), labels], 1)
    a = ours(pixels, **text, labels=labels)
    b = theirs(pixels, **for_theirs(theirs, text), **({} if family == "instruct" else {"labels": full}))
    real = torch.cat([torch.ones(2, tiny.NUM_QUERIES), text["attention_mask"]], 1).bool()
    close(a.logits[real], b.logits[real])
    if family == "opt":  # transformers' InstructBlip ignores labels
        close(a.loss, b.loss)
    # with image tokens, as transformers' own processor writes them, the result is the same
    close(ours(pixels, **for_theirs(ours, text)).logits[real], a.logits[real])


@pytest.mark.parametrize("direction", [0, 1], ids=["theirs-to-ours", "ours-to-theirs"])
@torch.no_grad()
def test_encoder_decoder_logits_and_loss(pairs, direction):
    ours, theirs, processor = pairs("t5")[direction]
    pixels, text = tiny.pixels(), text_of(processor)
    labels = processor.text(["the red circle", "two"])
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    a = ours(pixels, **text, labels=labels)
    b = theirs(pixels, **for_theirs(theirs, text), labels=labels)
    close(a.logits, b.logits)
    close(a.loss, b.loss)


GENERATION = {
    "greedy": {"max_new_tokens": 8},
    "beam": {"max_new_tokens": 8, "num_beams": 5, "length_penalty": -1.0},
    "many": {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 3},
}


@pytest.mark.parametrize("direction", [0, 1], ids=["theirs-to-ours", "ours-to-theirs"])
@pytest.mark.parametrize("method", GENERATION)
@pytest.mark.parametrize("family", ["opt", "t5", "instruct"])
def test_generated_ids(pairs, family, method, direction):
    ours, theirs, processor = pairs(family)[direction]
    pixels, text, options = tiny.pixels(), text_of(processor), GENERATION[method]
    a = ours.generate(pixels, **text, **options)
    b = theirs.generate(pixels, **for_theirs(theirs, text), **options)
    b = b[:, 1:] if family == "t5" else b[:, -a.shape[1] :]
    assert torch.equal(a, b)
    if method == "many":
        assert a.unique().numel() > 3, "the tiny model repeats itself: the test sees nothing"


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_caption_without_prompt(pairs, family):
    ours, theirs, _ = pairs(family)[0]
    pixels = tiny.pixels(3)
    a = ours.generate(pixels, max_new_tokens=6)
    b = theirs.generate(pixels, max_new_tokens=6)
    b = b[:, 1:] if family == "t5" else b[:, tiny.NUM_QUERIES + 1 :]
    assert torch.equal(a, b)


@pytest.mark.parametrize("direction", [0, 1], ids=["theirs-to-ours", "ours-to-theirs"])
@torch.no_grad()
def test_retrieval_scores(pairs, direction):
    ours, theirs, processor = pairs("retrieval")[direction]
    pixels, text = tiny.pixels(3), processor.text([*PROMPTS, "one star and"])
    image = ours.encode_image(pixels)
    ids, mask = text["input_ids"], text["attention_mask"]
    # transformers cuts the image tokens off again, from the mask only for the contrastive head
    padded = for_theirs(theirs, text)
    b = theirs(pixels, **padded, use_image_text_matching_head=True)
    logits = ours.match_logits(image, ids, mask)
    close(logits.diagonal().T, b.logits_per_image)
    close(ours.score(image, ids, mask).diagonal(), b.logits_per_image.softmax(-1)[:, 1])
    b = theirs(pixels, **padded, use_image_text_matching_head=False)
    close(ours.score(image, ids, mask, head="itc"), b.logits_per_image)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keys_and_values(pairs, family):
    """A folder of ours gives transformers every tensor it wants, bit for bit, and nothing unknown."""
    ours, theirs, _ = pairs(family)[1]
    names = set(theirs.state_dict())
    renamed = {"qformer.layernorm": "qformer.embeddings.layernorm", "embeddings.": "qformer.embeddings."}
    values = {}
    for name, value in ours.state_dict().items():
        for old, new in renamed.items() if family == "instruct" else ():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        values[name] = value
    extra = set(values) - names
    assert extra == set() if family != "retrieval" else len(extra) == 6
    assert names <= set(values)
    assert all(torch.equal(values[name], value) for name, value in theirs.state_dict().items())
