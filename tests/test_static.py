"""The step that a GPU replays: on a CPU it is compiled at most, which shows its arithmetic and its shapes."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from blip2 import decoders, static
from blip2.generation import Generation, TextCache, decode
from blip2.packed import pack
from blip2.processing import Processor

PROMPTS = [
    "Question: what color? Answer:",
    "Question: what color? Answer: red. Question: how many? Answer:",
    "Question: how many? Answer:",
]


def setup():
    model = tiny.ours("opt").eval()
    processor = Processor(
        tiny.tokenizer("opt"), family="opt", image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    return model, processor, model.encode_image(tiny.pixels(1))


def turns(model, processor, image):
    cache, answers = TextCache(), []
    for prompt in PROMPTS:
        text = {name: part.to(model.device) for name, part in processor.text(prompt).items()}
        steps = decode(model, image, text, Generation(max_new_tokens=6), cache)
        answers.append([int(token) for token in steps])
    return answers, cache


def use_static(monkeypatch, backend=None):
    made = []

    class Step(static.StaticStep):
        def __init__(self, forward, model, like, room, _):
            made.append(room)
            super().__init__(forward, model, like, room, backend)

    monkeypatch.setattr(static, "StaticStep", Step)
    monkeypatch.setattr(decoders, "wanted", lambda model: True)
    return made


def test_static_turns_equal_plain_ones(monkeypatch):
    model, processor, image = setup()
    expected, cache = turns(model, processor, image)
    made = use_static(monkeypatch)
    answers, static_cache = turns(model, processor, image)
    assert answers == expected and made == [256]
    assert static_cache.ids == cache.ids and static_cache.key_values.length == cache.key_values.length
    for own, other in zip(static_cache.key_values.layers, cache.key_values.layers, strict=True):
        held = cache.key_values.length
        torch.testing.assert_close(own[:, :, :, :held], other[:, :, :, :held])


@pytest.mark.parametrize("packed", [False, True])
def test_one_compilation_serves_all_turns(packed, monkeypatch):
    model, processor, image = setup()
    expected, _ = turns(model, processor, image)
    if packed:
        pack(model)
    use_static(monkeypatch, "eager")
    torch._dynamo.reset()
    counters.clear()
    assert turns(model, processor, image)[0] == expected
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_interrupted_and_concurrent_answers(monkeypatch):
    model, processor, image = setup()
    expected, _ = turns(model, processor, image)
    use_static(monkeypatch)
    text, cache = processor.text(PROMPTS[0]), TextCache()
    first = decode(model, image, text, Generation(max_new_tokens=6), cache)
    begun = [int(next(first)) for _ in range(3)]
    # the step is in use: another answer goes the plain way
    other = [int(token) for token in decode(model, image, text, Generation(max_new_tokens=6))]
    assert other == expected[0] and begun == expected[0][:3]
    first.close()
    assert cache.key_values.length == tiny.NUM_QUERIES + len(cache.ids)
    again = [int(token) for token in decode(model, image, text, Generation(max_new_tokens=6), cache)]
    assert again == expected[0]


def test_changed_weights_are_seen(monkeypatch):
    model, processor, image = setup()
    made = use_static(monkeypatch)
    turns(model, processor, image)
    tiny.randomize(model.language_model, seed=5)
    model.language_model.double().float()  # to other addresses
    answers, _ = turns(model, processor, image)
    monkeypatch.setattr(decoders, "wanted", lambda model: False)
    assert answers == turns(model, processor, image)[0] and made == [256, 256]


def test_not_on_zerogpu_nor_in_bits(monkeypatch):
    class Model:
        device = torch.device("cuda")
        is_quantized = False

    assert static.wanted(Model())
    monkeypatch.setattr(Model, "is_quantized", True)
    assert not static.wanted(Model())
    monkeypatch.setattr(Model, "is_quantized", False)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert not static.wanted(Model())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_turns_equal_plain_ones(monkeypatch):
    model, processor, image = setup()
    model, image = model.cuda(), image.to("cuda")
    monkeypatch.setattr(decoders, "wanted", lambda model: False)
    expected, _ = turns(model, processor, image)
    monkeypatch.undo()
    assert turns(model, processor, image)[0] == expected
