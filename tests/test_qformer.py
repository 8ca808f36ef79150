"""The three masks: what may see what, both ways, and cached passes against whole ones."""

import pytest
import tiny
import torch

from blip2.qformer import causal_mask, multimodal_mask, text_mask

QUERIES = tiny.NUM_QUERIES


@pytest.fixture(scope="module")
def model():
    return tiny.ours("retrieval").eval()


@pytest.fixture(scope="module")
def batch(model):
    ids = torch.randint(8, 30, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model.image_embeds(tiny.pixels(2)).detach(), ids, mask


def changed(ids, position):
    other = ids.clone()
    other[:, position] += 1
    return other


def test_queries_never_see_text_in_itc_and_itg(model, batch):
    """Through the training forward: the query pass and its cache are the same whatever the text says."""
    embeds, ids, mask = batch
    seen = []
    hook = model.qformer.register_forward_hook(lambda module, args, output: seen.append(output))
    for text in (ids, changed(ids, 2)):
        model(image_embeds=embeds, input_ids=text, attention_mask=mask)
    hook.remove()
    first, second = seen[0], seen[len(seen) // 2]
    assert first.query_output.shape[1] == QUERIES
    assert torch.equal(first.query_output, second.query_output)
    assert all(
        torch.equal(a, b)
        for old, new in zip(first.cache, second.cache, strict=True)
        for a, b in zip(old, new, strict=True)
    )


def test_text_of_itc_sees_all_text_but_no_padding(model, batch):
    _, ids, mask = batch
    feats = model.text_feats(ids, mask)
    assert not torch.allclose(feats, model.text_feats(changed(ids, 4), mask))
    padding = ids.clone()
    padding[1, 5:] = 9
    assert torch.equal(feats, model.text_feats(padding, mask))


def test_later_tokens_never_change_earlier_itg_logits(model, batch):
    embeds, ids, mask = batch
    cache = model.qformer(model.query_tokens, image=embeds).cache
    logits = model.itg_logits(cache, ids, mask)
    for position in range(1, ids.shape[1]):
        other = model.itg_logits(cache, changed(ids, position), mask)
        assert torch.equal(logits[:, :position], other[:, :position])
        assert not torch.allclose(logits[0, position], other[0, position])


def test_itg_sees_the_image(model, batch):
    embeds, ids, mask = batch
    logits = [
        model.itg_logits(model.qformer(model.query_tokens, image=e).cache, ids, mask)
        for e in (embeds, embeds + 1)
    ]
    assert not torch.allclose(logits[0], logits[1])


def test_itm_sees_both(model, batch):
    embeds, ids, mask = batch
    image = model.read_image(embeds)
    logits = model.match_logits(image, ids, mask)
    assert not torch.allclose(logits, model.match_logits(image, changed(ids, 3), mask))
    assert not torch.allclose(logits, model.match_logits(model.read_image(embeds + 1), ids, mask))
    padding = ids.clone()
    padding[1, 5:] = 9
    assert torch.equal(logits, model.match_logits(image, padding, mask))


def test_cached_pass_equals_one_pass_over_queries_and_text(model, batch):
    """ITG by cache is the joint pass under the mask that hides text from queries and the future from text."""
    embeds, ids, mask = batch
    text = model.embeddings(ids)
    queries = model.qformer(model.query_tokens, image=embeds)
    cached = model.qformer(text_embeds=text, mask=causal_mask(QUERIES, mask), past=queries.cache)
    blind = torch.cat([torch.ones(QUERIES, QUERIES), torch.zeros(QUERIES, ids.shape[1])], dim=1).bool()
    joint = torch.cat([blind.expand(2, 1, -1, -1), causal_mask(QUERIES, mask)], dim=2)
    whole = model.qformer(model.query_tokens, text, embeds, joint)
    assert torch.allclose(whole.query_output, queries.query_output, atol=1e-6)
    assert torch.allclose(whole.text_output, cached.text_output, atol=1e-6)


def test_masks_are_as_drawn():
    mask = torch.tensor([[1, 1, 0]])
    assert text_mask(mask).int().tolist() == [[[[1, 1, 0]]]]
    assert multimodal_mask(2, mask).int().tolist() == [[[[1, 1, 1, 1, 0]]]]
    assert causal_mask(2, mask).int().tolist() == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]]]


def test_bad_use(model):
    with pytest.raises(ValueError, match="image"):
        model.qformer(model.query_tokens)
    with pytest.raises(ValueError, match="use_qformer_text_input"):
        tiny.ours("opt").qformer(text_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="shorten"):
        model.embeddings(torch.zeros(1, 49, dtype=torch.long))
