"""Before its first step a model knows nothing: every loss is what chance gives, at full width.

768 wide, 12 heads, 30,523 word pieces, image embeddings 1408 wide: the paper's Q-Former, from random weights
as BERT's cannot be had offline. The quick tests have 2 of its 12 layers and few pairs, to take seconds on a
CPU. What goes in is random, too.
"""

import math

import pytest
import torch
from transformers import Blip2Config, OPTConfig, T5Config

from blip2.model import Blip2
from blip2.representation import Blip2Representation
from train.objectives import Stage1, Stage2

PAIRS, TOKENS, WORDS = 12, 12, 30_523


def config(layers=2, qformer=None, **parts):
    vision = {"hidden_size": 1408, "num_hidden_layers": 0, "num_attention_heads": 16}
    return Blip2Config(
        vision_config=vision, qformer_config={"num_hidden_layers": layers, **(qformer or {})}, **parts
    )


def batch(words):
    ids = torch.randint(5, words, (PAIRS, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(6, TOKENS + 1, (PAIRS, 1))).long()
    return {"image_hidden": torch.randn(PAIRS, 257, 1408), "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=pytest.mark.long)])
def test_stage1_starts_at_chance(layers):
    torch.manual_seed(0)
    model = Blip2Representation(config(layers, qformer={"use_qformer_text_input": True, "vocab_size": WORDS}))
    with torch.no_grad():
        losses = Stage1(model).train()(batch(WORDS))
    # The best match of 32 queries is taken and divided by a temperature of 0.07, so logits differ a little.
    assert losses["loss_itc"].item() == pytest.approx(math.log(PAIRS), rel=0.15)
    # Class 1 in a third of the cases: 0.637 if the head knew that much, ln 2 = 0.693 if it says neither.
    assert 0.6 < losses["loss_itm"].item() < 0.8
    assert losses["loss_itg"].item() == pytest.approx(math.log(WORDS), rel=0.03)
    total = sum(value.item() for name, value in losses.items() if name.startswith("loss"))
    print({name: round(value.item(), 3) for name, value in losses.items()})
    assert total == pytest.approx(math.log(PAIRS) + 0.69 + math.log(WORDS), rel=0.05)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage2_starts_at_chance(family):
    """A language model with random weights and the released ones' vocabulary."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 256}
    if family == "opt":
        text = OPTConfig(vocab_size=50_272, hidden_size=256, ffn_dim=256, **sizes)
    else:  # T5's own initialization makes logits large; a tenth of it does not
        sizes = {"num_layers": 1, "num_heads": 4, "d_model": 256, "d_ff": 256, "initializer_factor": 0.1}
        text = T5Config(vocab_size=32_128, decoder_start_token_id=0, **sizes)
    model = Blip2(config(text_config=text))
    data = batch(text.vocab_size)
    labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = Stage2(model).train()(data | {"labels": labels})["loss_lm"].item()
    print(family, round(loss, 3), round(math.log(text.vocab_size), 3))
    assert loss == pytest.approx(math.log(text.vocab_size), rel=0.05)
