"""Stage 2: what trains, which image tokens are accepted, and images shared by rows."""

import pytest
import tiny
import torch

STAGE2 = ["opt", "t5"]


def batch(rows=2):
    ids = torch.randint(8, 30, (rows, 5), generator=torch.Generator().manual_seed(1))
    return tiny.pixels(rows), ids


@pytest.mark.parametrize("family", STAGE2)
def test_only_queries_qformer_projection_and_last_norm_train(family):
    model = tiny.ours(family)
    model.freeze_vision()
    model.freeze_language()
    model.train()
    assert not any(m.training for part in (model.vision_model, model.language_model) for m in part.modules())
    assert model.qformer.training
    pixels, ids = batch()
    model(pixels, ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    bridge = ("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm.")
    assert with_gradient == {name for name, _ in model.named_parameters() if name.startswith(bridge)}


@pytest.mark.parametrize("family", STAGE2)
def test_image_tokens_may_be_there_or_not(family):
    model = tiny.ours(family).eval()
    pixels, ids = batch()
    image_tokens = torch.full((2, tiny.NUM_QUERIES), model.config.image_token_index)
    whole = torch.cat([image_tokens, ids], dim=1)
    assert torch.equal(model(pixels, ids, labels=ids).logits, model(pixels, whole, labels=ids).logits)
    for wrong in (whole[:, 1:], torch.cat([whole, image_tokens[:, :1]], 1), whole.flip(1)):
        with pytest.raises(ValueError, match="image tokens"):
            model(pixels, wrong, labels=ids)


@pytest.mark.parametrize("family", STAGE2)
def test_one_image_serves_many_prompts_and_one_prompt_many_images(family):
    model = tiny.ours(family).eval()
    pixels, ids = batch(3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    image = model.encode_image(pixels)
    many = model.generate(image=image[1], input_ids=ids, **options)
    alone = [model.generate(image=image[1], input_ids=ids[[row]], **options)[0] for row in range(3)]
    assert torch.equal(many, torch.stack(alone))
    many = model.generate(pixels, ids[:1], **options)
    alone = [model.generate(pixels[[row]], ids[:1], **options)[0] for row in range(3)]
    assert torch.equal(many, torch.stack(alone))
    with pytest.raises(ValueError, match="2 images with 3 texts"):
        model.generate(image=image[:2], input_ids=ids, **options)


def test_question_in_the_qformer_changes_what_the_queries_read():
    model = tiny.ours("instruct").eval()
    pixels, ids = batch()
    image = model.encode_image(pixels)
    assert image.query_output is None
    with pytest.raises(ValueError, match="qformer_input_ids"):
        model(image=image, input_ids=ids)
    logits = [
        model(image=image, input_ids=ids, qformer_input_ids=question).logits for question in (ids, ids + 1)
    ]
    assert not torch.allclose(*logits)


def test_bad_use():
    model = tiny.ours("opt").eval()
    pixels, ids = batch()
    with pytest.raises(ValueError, match="pixel_values"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="whole numbers"):
        model(pixels, ids.float())
    with pytest.raises(ValueError, match="takes 28x28"):
        model(torch.zeros(1, 3, 35, 35), ids[:1])
    with pytest.raises(ValueError, match="pixel_values must be"):
        model(torch.zeros(3, 28, 28), ids)
    with pytest.raises(ValueError, match="encode_image"):
        model(image=torch.zeros(1), input_ids=ids)
