"""Stage 1: its losses against a naive loop, its negatives, scoring, and what trains."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from blip2.representation import sample_hard_negatives


@pytest.fixture
def model():
    return tiny.ours("retrieval").eval()


def pairs(count, seed=0):
    ids = torch.randint(8, 30, (count, 6), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return tiny.pixels(count, seed), ids, mask


def test_losses_equal_a_naive_loop(model):
    """Pair by pair, with the joint passes spelled out, from the paper's description."""
    pixels, ids, mask = pairs(3)
    texts, images = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    losses = model(pixels, ids, mask, sample_negatives=lambda *_: (texts, images))

    image = model.encode_image(pixels)
    image_feats = F.normalize(model.vision_projection(image.query_output), dim=-1)
    text_feats = torch.stack([model.text_feats(ids[[j]], mask[[j]])[0] for j in range(3)])
    sim = torch.tensor([[max(q @ t for q in queries) for t in text_feats] for queries in image_feats])
    sim = sim / model.temperature
    smooth = 0.9 * torch.eye(3) + 0.1 / 3
    itc = sum(-(smooth * s.log_softmax(1)).sum(1).mean() for s in (sim, sim.T)) / 2
    assert torch.isclose(losses["loss_itc"], itc, atol=1e-5)

    drawn = [(i, i, 1) for i in range(3)]
    drawn += [(int(images[j]), j, 0) for j in range(3)] + [(i, int(texts[i]), 0) for i in range(3)]
    itm = [
        -model.match_logits(image[i], ids[[j]], mask[[j]])[0, 0].log_softmax(-1)[match]
        for i, j, match in drawn
    ]
    assert torch.isclose(losses["loss_itm"], torch.stack(itm).mean(), atol=1e-5)

    nll = []
    for j in range(3):
        length = int(mask[j].sum())
        cache = model.qformer(model.query_tokens, image=image[j].image_embeds).cache
        logits = model.itg_logits(cache, ids[[j], :length], mask[[j], :length])[0, :-1].log_softmax(-1)
        target = F.one_hot(ids[j, 1:length], logits.shape[-1]) * 0.9 + 0.1 / logits.shape[-1]
        nll += list(-(target * logits).sum(-1))
    assert torch.isclose(losses["loss_itg"], torch.stack(nll).mean(), atol=1e-5)


def test_a_negative_is_never_its_own_pair():
    torch.manual_seed(0)
    positive = torch.eye(4).bool()
    likely = torch.eye(4) * 50  # the own pair is by far the most similar
    for _ in range(200):
        texts, images = sample_hard_negatives(likely, likely, positive)
        assert (texts != torch.arange(4)).all() and (images != torch.arange(4)).all()


def test_hard_negatives_are_drawn_more_often():
    torch.manual_seed(0)
    sim = torch.tensor([[0.0, 2.0, 0.0]]).expand(2000, 3)
    positive = torch.tensor([[True, False, False]]).expand(2000, 3)
    texts, _ = sample_hard_negatives(sim, sim, positive)
    assert abs((texts == 1).float().mean().item() - torch.tensor([2.0, 0.0]).softmax(0)[0].item()) < 0.03


def test_batch_of_one_has_matches_only(model):
    pixels, ids, mask = pairs(1)
    losses = model(pixels, ids, mask)
    match = model.match_logits(model.encode_image(pixels), ids, mask)[0, 0].log_softmax(-1)[1]
    assert torch.isclose(losses["loss_itm"], -match, atol=1e-6)
    assert losses["loss_itc"].abs() < 1e-6 and losses["loss_itg"].isfinite()


def test_texts_of_one_picture_share_the_target_and_are_no_negatives(model):
    pixels, ids, mask = pairs(4)
    pixels[1] = pixels[0]
    seen = {}

    def sample(sim_i2t, sim_t2i, positive):
        seen["positive"] = positive
        return sample_hard_negatives(sim_i2t, sim_t2i, positive)

    torch.manual_seed(0)
    losses = model(pixels, ids, mask, image_ids=torch.tensor([7, 7, 8, 9]), sample_negatives=sample)
    assert seen["positive"].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    sim, _ = None, None
    image_feats = model.image_feats(model.encode_image(pixels).query_output)
    sim = torch.einsum("iqe,je->ijq", image_feats, model.text_feats(ids, mask)).amax(-1) / model.temperature
    target = seen["positive"] / seen["positive"].sum(1, keepdim=True) * 0.9 + 0.1 / 4
    expected = sum(-(target * s.log_softmax(1)).sum(1).mean() for s in (sim, sim.T)) / 2
    assert torch.isclose(losses["loss_itc"], expected, atol=1e-5)


def test_scoring_twenty_texts_encodes_the_image_once(model):
    runs = []
    model.vision_model.register_forward_hook(lambda *_: runs.append(1))
    pixels, ids, mask = pairs(20)
    image = model.encode_image(pixels[:1])
    itm, itc = (model.score(image, ids, mask, head=head) for head in ("itm", "itc"))
    assert runs == [1] and itm.shape == itc.shape == (1, 20)
    assert ((itm > 0) & (itm < 1)).all() and ((itc >= -1) & (itc <= 1)).all()
    one = torch.stack([model.score(image, ids[[j]], mask[[j]])[0, 0] for j in range(20)])
    assert torch.allclose(one, itm[0], atol=1e-6)


def test_frozen_encoder_stays_in_eval_without_gradients(model):
    model.freeze_vision()
    model.train()
    assert not any(m.training for m in model.vision_model.encoder.modules()) and model.qformer.training
    torch.manual_seed(0)
    sum(model(*pairs(3)).values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {
        n for n, _ in model.named_parameters() if n.startswith(("vision_model.embed", "vision_model.enc"))
    }
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "post_layernorm" in n)


def test_bad_use(model):
    pixels, ids, mask = pairs(3)
    with pytest.raises(ValueError, match="pairs"):
        model(pixels, ids[:2], mask[:2])
    with pytest.raises(ValueError, match="pixel_values"):
        model(None, ids, mask)
    with pytest.raises(ValueError, match="'itm' or 'itc'"):
        model.score(model.encode_image(pixels), ids, mask, head="cosine")
    with pytest.raises(ValueError, match="encode_image"):
        model.score(pixels, ids, mask)
