"""Our arithmetic against the reference's: activations and losses to 2e-5, gradients to 1e-4."""

import lavis
import pytest
import torch

TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


def close(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("name", ["stage1_a", "stage1_b"])
def test_stage1(name):
    model, tensors = lavis.model(name)
    pixels, ids, mask = (
        tensors[f"inputs.{part}"] for part in ("pixel_values", "input_ids", "attention_mask")
    )
    negatives = tensors["outputs.negative_text_index"], tensors["outputs.negative_image_index"]
    passes = []
    model.qformer.register_forward_hook(lambda module, args, output: passes.append(output))

    losses = model(pixels, ids, mask, sample_negatives=lambda *_: negatives)

    assert close(losses["loss_itc"], tensors["outputs.loss_itc"])
    assert close(losses["loss_itm"], tensors["outputs.loss_itm"])
    assert close(losses["loss_itg"], tensors["outputs.loss_lm"])
    total = sum(losses.values())
    assert close(total, tensors["outputs.loss"])
    queries, text, match, _ = passes
    assert close(model.image_embeds(pixels), tensors["outputs.image_embeds"])
    assert close(queries.query_output, tensors["outputs.query_output"])
    valid = mask.bool()
    assert close(text.text_output[valid], tensors["outputs.text_output"][valid])
    hidden = torch.cat([match.query_output, match.text_output], dim=1)
    assert close(
        hidden[:, : model.query_tokens.shape[1]],
        tensors["outputs.itm_hidden"][:, : match.query_output.shape[1]],
    )
    assert close(model.itm_head(match.query_output).mean(1), tensors["outputs.itm_logits"])

    total.backward()
    errors = lavis.gradient_errors({name: p.grad for name, p in model.named_parameters()}, tensors)
    assert errors and max(errors.values()) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", ["stage2_opt", "stage2_opt_prompt", "stage2_t5"])
def test_stage2(name):
    model, tensors = lavis.model(name)
    ids, mask = tensors["inputs.input_ids"], tensors["inputs.attention_mask"]
    if name == "stage2_t5":
        labels = tensors["inputs.target_ids"].masked_fill(tensors["inputs.target_attention_mask"] == 0, -100)
    else:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : int(tensors["inputs.prompt_length"])] = -100

    image = model.read_image(model.image_embeds(tensors["inputs.pixel_values"]))
    assert close(image.language_inputs, tensors["outputs.language_model_inputs"])
    loss = model(image=image, input_ids=ids, attention_mask=mask, labels=labels).loss
    assert close(loss, tensors["outputs.loss"])

    loss.backward()
    errors = lavis.gradient_errors({name: p.grad for name, p in model.named_parameters()}, tensors)
    assert errors and max(errors.values()) <= GRADIENT_TOLERANCE
