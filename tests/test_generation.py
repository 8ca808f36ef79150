"""Decoding: our loop equals transformers', batches equal single rows, settings are checked."""

import threading

import pytest
import tiny
import torch

from blip2 import decoders, threads
from blip2.cache import KeyValues
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


@pytest.mark.parametrize("family", ["opt", "t5", "library opt", "library t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 5, "max_new_tokens": 8},
        {"num_beams": 3, "max_new_tokens": 12, "length_penalty": -1.0, "num_captions": 2},
        {"num_beams": 4, "max_new_tokens": 9, "length_penalty": 2.0, "min_new_tokens": 4},
        {"num_beams": 2, "max_new_tokens": 7, "repetition_penalty": 2.0, "avoid": ("red", "what color")},
        {"num_beams": 1, "max_new_tokens": 6},
    ],
)
def test_beams_equal_the_library(family, settings, monkeypatch):
    if family.startswith("library"):
        for lean in (decoders.OPTDecoder, decoders.T5Decoder):
            monkeypatch.setattr(lean, "fits", staticmethod(lambda model: False))
    model, processor, image = setup(family.split()[-1])
    tiny.randomize(model.language_model, seed=len(settings))
    generation = Generation(method="beam", **settings)
    text = processor.text(PROMPTS)
    avoid = processor.spellings(generation.avoid) or None
    theirs = model.generate(image=image, **text, **generation.options(), bad_words_ids=avoid)
    flat = [text for texts in generate(model, processor, image, PROMPTS, generation) for text in texts]
    assert flat == processor.decode(theirs)
    assert len(set(flat)) > 1


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_rows_that_have_ended_are_not_read_on(family):
    model, processor, image = setup(family)
    text, generation = processor.text(PROMPTS), Generation(max_new_tokens=12)
    config = model.language_model.generation_config
    config.eos_token_id = 55
    longest = said(model, image, text, generation)
    assert longest.shape[1] == 12  # none ends
    rows = []
    hook = model.language_model.lm_head.register_forward_hook(
        lambda _, args, logits: rows.append(len(logits))
    )
    config.eos_token_id = int(longest[1, 2])  # row 1 ends with its third token
    shorter = said(model, image, text, generation)
    hook.remove()
    assert rows[:3] == [3, 3, 3] and rows[3] < 3
    for row, whole in zip(shorter, longest, strict=True):
        end = (whole == config.eos_token_id).nonzero()
        length = int(end[0]) + 1 if len(end) else len(whole)
        assert row[:length].tolist() == whole[:length].tolist()
        assert (row[length:] == config.pad_token_id).all()


def test_nucleus_repeats_by_seed_and_gives_several():
    model, processor, image = setup("opt")
    generation = Generation(method="nucleus", num_captions=3, max_new_tokens=6, seed=7, top_p=1.0)
    first = generate(model, processor, image[0], PROMPTS[0], generation)
    assert first == generate(model, processor, image[0], PROMPTS[0], generation)
    assert first != generate(model, processor, image[0], PROMPTS[0], generation.with_(seed=8))
    assert len(first) == 1 and len(first[0]) == 3


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_seed_means_the_same_alone_and_in_a_batch(family):
    model, processor, image = setup(family)
    generation = Generation(method="nucleus", num_captions=3, max_new_tokens=6, seed=7, top_p=1.0)
    single = [generate(model, processor, image[row], PROMPTS[row], generation)[0] for row in range(3)]
    assert generate(model, processor, image, PROMPTS, generation, alone=True) == single
    other = generate(model, processor, image, PROMPTS, generation)  # noise of the whole batch
    assert other[0] != single[0] or other[1] != single[1]
    many = generation.with_(seed=None, num_captions=1)
    unlike = {
        tuple(text for [text] in generate(model, processor, image[[0, 0, 0]], PROMPTS[0], many, alone=True))
        for _ in range(3)
    }
    assert any(len(set(texts)) > 1 for texts in unlike)  # without a seed, nobody gets another's words


def test_rows_that_are_given_up_end():
    model, processor, image = setup("opt")
    text, settings = processor.text(PROMPTS), Generation(max_new_tokens=8, min_new_tokens=8)
    whole = said(model, image, text, settings)
    pad, given_up = model.language_model.generation_config.pad_token_id, torch.zeros(3, dtype=torch.bool)
    steps = []
    for token in decode(model, image, text, settings, given_up=given_up):
        steps.append(token)
        given_up[1] = len(steps) >= 2
        given_up[:] |= len(steps) == 5
    ours = torch.stack(steps, dim=1)
    assert ours.shape[1] == 5 and torch.equal(ours[[0, 2]], whole[[0, 2], :5])
    assert torch.equal(ours[1, :2], whole[1, :2]) and (ours[1, 2:] == pad).all()


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
    assert cache.key_values.length == tiny.NUM_QUERIES + len(cache.ids)


def test_cache_reads_only_what_is_new():
    model, processor, image = setup("opt")
    cache, read = TextCache(), []
    said(
        model, image[0], processor.text("Question: what color? Answer:"), Generation(max_new_tokens=1), cache
    )
    first = model.language_model.model.decoder.layers[0]
    hook = first.fc1.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
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


def test_prompts_of_one_length_are_encoded_together():
    encoder = tiny.ours("t5").eval().language_model.get_encoder()
    lengths = torch.tensor([10, 30, 11, 12, 28])
    mask = (torch.arange(30) < lengths[:, None]).long()
    embeds = torch.randn(5, 30, encoder.config.d_model, generator=torch.Generator().manual_seed(0))
    whole = encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    shapes = []
    hook = encoder.register_forward_hook(
        lambda _, args, kwargs, out: shapes.append(out[0].shape[:2]), with_kwargs=True
    )
    parts = decoders.encode(encoder, embeds, mask)
    assert shapes == [(3, 12), (2, 30)]
    torch.testing.assert_close(parts[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)
    for other in (torch.ones_like(mask), mask.flip(1)):  # nothing to gain; padding in front
        del shapes[:]
        decoders.encode(encoder, embeds, other)
        assert shapes == [(5, 30)]
    hook.remove()


def test_rows_are_copied_as_far_as_they_were_read():
    past = KeyValues()
    keys, values = torch.randn(2, 3, 2, 5, 4).unbind()
    past.write(0, keys, values)
    past.length = 5
    past.repeat(2)
    past.keep(torch.tensor([1, 4, 5]))
    more = torch.randn(3, 2, 1, 4)
    found = past.write(0, more, -more)
    rows = [0, 2, 2]
    torch.testing.assert_close(found[0], torch.cat([keys[rows], more], 2))
    torch.testing.assert_close(found[1], torch.cat([values[rows], -more], 2))


@pytest.mark.parametrize("passive", [True, False])
def test_short_work_is_left_to_one_thread_where_threads_sleep(monkeypatch, passive):
    monkeypatch.setattr(threads, "PASSIVE", passive)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, processor, image = setup("opt")
        layer = model.language_model.model.decoder.layers[0]
        seen = {"out_proj": [], "fc1": []}
        for name, part in (("out_proj", layer.self_attn.out_proj), ("fc1", layer.fc1)):
            part.register_forward_hook(lambda *_, name=name: seen[name].append(torch.get_num_threads()))
        said(model, image[0], processor.text(PROMPTS[:1]), Generation(max_new_tokens=3, min_new_tokens=3))
        assert seen == {"out_proj": [2, 1, 1] if passive else [2, 2, 2], "fc1": [2, 2, 2]}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
