"""Decoding: our loop equals transformers', batches equal single rows, settings are checked."""

import threading

import pytest
import tiny
import torch

from blip2.generation import Generation, TextCache, decode, generate
from blip2.processing import Processor

PROMPTS = ["Question: what color is the circle? Answer:", "a photo of", "Question: how many? Answer:"]


def setup(family):
    model = tiny.ours(family).eval()
    processor = Processor(
        tiny.tokenizer(family), family=family, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    return model, processor, model.encode_image(tiny.pixels(3))


def said(model, image, text, generation, cache=None):
    return torch.stack(list(decode(model, image, text, generation, cache)), dim=1)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_greedy_loop_equals_the_library(family):
    model, processor, image = setup(family)
    text = processor.text(PROMPTS)
    ours = said(model, image, text, Generation(max_new_tokens=8, min_new_tokens=3))
    theirs = model.generate(image=image, **text, max_new_tokens=8, min_new_tokens=3, do_sample=False)
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize("family", ["opt", "t5"])
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_padded_batch_equals_single_rows(family, method):
    model, processor, image = setup(family)
    generation = Generation(method=method, max_new_tokens=6)
    batch = generate(model, processor, image, PROMPTS, generation)
    single = [generate(model, processor, image[row], PROMPTS[row], generation)[0] for row in range(3)]
    assert batch == single


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_repetition_penalty_equals_the_library(family):
    model, processor, image = setup(family)
    text = processor.text(PROMPTS[:1])
    ours = said(model, image[0], text, Generation(max_new_tokens=8, repetition_penalty=3.0))
    theirs = model.generate(
        image=image[0], **text, max_new_tokens=8, min_new_tokens=1, repetition_penalty=3.0
    )
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)
    assert not torch.equal(ours, said(model, image[0], text, Generation(max_new_tokens=8)))


def test_nucleus_repeats_by_seed_and_gives_several():
    model, processor, image = setup("opt")
    generation = Generation(method="nucleus", num_captions=3, max_new_tokens=6, seed=7, top_p=1.0)
    first = generate(model, processor, image[0], PROMPTS[0], generation)
    assert first == generate(model, processor, image[0], PROMPTS[0], generation)
    assert first != generate(model, processor, image[0], PROMPTS[0], generation.with_(seed=8))
    assert len(first) == 1 and len(first[0]) == 3


def test_cache_answers_as_a_fresh_start():
    model, processor, image = setup("opt")
    cache, generation = TextCache(), Generation(max_new_tokens=5)
    for prompt in (
        "Question: what color? Answer:",
        "Question: what color? Answer: red. Question: how many? Answer:",
        "Question: how many? Answer:",  # shares only the beginning
    ):
        text = processor.text(prompt)
        kept = said(model, image[0], text, generation, cache)
        assert torch.equal(kept, said(model, image[0], text, generation))
    held = cache.key_values.get_seq_length()
    assert held == tiny.NUM_QUERIES + len(cache.ids)


def test_cache_reads_only_what_is_new():
    model, processor, image = setup("opt")
    cache, read = TextCache(), []
    said(
        model, image[0], processor.text("Question: what color? Answer:"), Generation(max_new_tokens=1), cache
    )
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    text = processor.text("Question: what color? Answer: red. Question: how many? Answer:")
    next(decode(model, image[0], text, Generation(), cache))
    hook.remove()
    assert read == [
        text["input_ids"].shape[1] - len(processor.text("Question: what color? Answer:")["input_ids"][0])
    ]


def test_stop_ends_every_method():
    model, processor, image = setup("opt")
    stop = threading.Event()
    stop.set()
    for method in ("greedy", "beam", "nucleus"):
        generation = Generation(method=method, max_new_tokens=20, min_new_tokens=20)
        [[text]] = generate(model, processor, image[0], PROMPTS[0], generation, stop)
        assert len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "best"},
        {"num_beams": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": 0.0},
        {"max_new_tokens": 0},
        {"min_new_tokens": 40},
        {"repetition_penalty": 0.0},
        {"num_captions": 2},
        {"method": "beam", "num_beams": 2, "num_captions": 3},
    ],
)
def test_settings_that_cannot_be_followed(settings):
    with pytest.raises(ValueError, match=next(key for key in reversed(settings))):
        Generation(**settings)
