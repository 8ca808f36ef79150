"""Explanations: probabilities as in generation, the parts that matter, attention that adds up."""

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from blip2 import explain
from blip2.checkpoint import load
from blip2.generation import Generation, decode, generate
from blip2.processing import Processor

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["scenes-opt", "scenes-flan-t5"])
def test_probabilities_are_those_of_generation(name):
    loaded = load(name, precision="float32")
    model, processor = loaded.model, loaded.processor
    image = model.encode_image(processor.images(Image.open(EXAMPLES / "scene-6.png").convert("RGB")))
    [[answer]] = generate(model, processor, image, "a photo of", Generation())
    found = explain.token_probabilities(model, processor, image, "a photo of", answer)
    assert "".join(token.text for token in found) == answer
    text = processor.text("a photo of")
    said = [int(token) for token in decode(model, image, text, Generation())]
    probability, state = [], text["input_ids"]
    for place, token in enumerate(said[: len(found)]):
        if model.is_decoder_only:
            ids = torch.cat([state, torch.tensor([said[:place]], dtype=torch.long)], 1)
            logits = model(image=image, input_ids=ids).logits[0, -1]
        else:
            start = torch.tensor([[0, *said[:place]]])
            logits = model(image=image, **text, decoder_input_ids=start).logits[0, -1]
        probability.append(logits.softmax(-1)[token].item())
    assert [token.probability for token in found] == pytest.approx(probability, abs=1e-5)
    for token in found:  # greedy: nothing was likelier
        assert len(token.others) == 4 and max(chance for _, chance in token.others) <= token.probability
    with pytest.raises(ValueError, match="empty"):
        explain.token_probabilities(model, processor, image, "a photo of", " ")


@pytest.mark.parametrize("name", ["scenes-opt", "scenes-flan-t5"])
def test_what_an_answer_is_about_matters_most_to_it(name):
    loaded = load(name, precision="float32")
    picture = Image.open(EXAMPLES / "scene-1.png").convert("RGB")  # a green circle at 100, 40 of 256
    prompt = loaded.processor.prompt("what color is the circle?", loaded.processor.question_style)
    found = explain.occlusion(loaded.model, loaded.processor, picture, prompt, "green", grid=4)
    row, column = divmod(int(found.argmax()), 4)
    assert (row, column) in ((0, 1), (0, 0)) and found.max() > 0.5 and found.shape == (4, 4)
    assert found[3].abs().max() < found.max() / 2  # nothing is there
    small = explain.occlusion(loaded.model, loaded.processor, picture, prompt, "green", grid=4, batch_size=3)
    assert torch.allclose(found, small, atol=1e-4)
    with pytest.raises(ValueError, match="grid is 65"):
        explain.occlusion(loaded.model, loaded.processor, picture, prompt, "green", grid=65)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_is_what_the_queries_read_with(family):
    model = tiny.ours(family)
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    image, question = model.encode_image(pixels), {}
    if family == "instruct":
        words = tiny.tokenizer("bert")
        processor = Processor(
            tiny.tokenizer("opt"), family="opt", image_size=tiny.IMAGE_SIZE, qformer_tokenizer=words
        )
        question = processor.question(["what color?", "how many?"])
    found = explain.query_attention(model, image, question)
    crossed = [layer for layer in model.qformer.encoder.layers if layer.crossattention is not None]
    heads, tokens = model.config.qformer_config.num_attention_heads, image.image_embeds.shape[1]
    assert found.shape == (len(crossed), 2, heads, tiny.NUM_QUERIES, tokens)
    assert torch.allclose(found.sum(-1), torch.ones(found.shape[:-1]))
    # attended by these probabilities, the values are what the first cross-attention gave
    seen = []
    handle = crossed[0].crossattention.attention.register_forward_hook(lambda *given: seen.append(given[2]))
    model.read_image(image.image_embeds, **question)
    handle.remove()
    values = crossed[0].crossattention.attention.key_values(image.image_embeds)[1]
    assert torch.allclose((found[0] @ values).transpose(1, 2).flatten(2), seen[0], atol=1e-5)

    side = int((tokens - 1) ** 0.5)
    shown = explain.attention_map(found, layer=0, query=1, heads=(0,))
    assert torch.equal(shown, found[0][:, 0, 1, 1:].reshape(2, side, side))
    assert torch.allclose(explain.attention_map(found), found[-1].mean((1, 2))[:, 1:].reshape(2, side, side))
    for wrong in ({"layer": 9}, {"query": 99}, {"heads": (99,)}):
        with pytest.raises(ValueError, match="allowed"):
            explain.attention_map(found, **wrong)


def test_a_map_lies_over_the_picture():
    picture = Image.new("RGB", (90, 60), (0, 200, 0))
    shown = explain.overlay(picture, torch.tensor([[4.0, -9.0, 0.0], [0.0, 0.0, 0.0]]))
    assert shown.size == picture.size
    red, green, _ = shown.getpixel((5, 5))
    assert red > 150 and green < 60
    assert len(set(shown.getpixel((80, 50)))) == 1  # gray
    explain.overlay(picture, torch.zeros(2, 3))  # nothing mattered
