"""The stages' objectives: a batch in parts, or on two processes, is the whole batch; loss and gradients."""

import json

import pytest
import tiny
import torch
from pairing import run_pair
from torch import nn

from blip2.representation import sample_hard_negatives
from train import captions, distributed
from train.engine import FitConfig, _backward, fit, make_accelerator
from train.execution import prepare
from train.loader import IndexLoader
from train.objectives import Stage1, Stage2
from train.recipes import Execution

FAMILIES = ("retrieval", "opt", "t5")
WAYS = ("whole", "lean")
SAID = [
    "a red circle",
    "two blue star on the left",
    "a dog",
    "green ring",
    "one cat",
    "a photo of a red star . yes",
]
CONFIG = FitConfig(
    steps=4,
    learning_rate=1e-3,
    warmup_steps=1,
    precision="fp32",
    log_every=1,
    save_every=4,
    seed=3,
    trackers=(),
)


def objective(family, micro=None, dropout=0.0, names=("itc", "itm", "itg")):
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny.ours(family, qformer_config=changes)
    return Stage1(model, names, micro) if family == "retrieval" else Stage2(model, micro)


def loader(family, rank=0, world=1, rows=8):
    language = tiny.language_family(family)
    tokenize = captions.tokenize_for(tiny.tokenizer(language), language, 12, whole=1.0)  # no split to draw

    def fetch(indices, generator):
        pixels = torch.cat([tiny.pixels(1, seed=index) for index in indices])
        said = tokenize([SAID[index % len(SAID)] for index in indices], generator)
        return {"pixel_values": pixels, **said, "keys": [str(index) for index in indices]}

    return IndexLoader(24, rows // world, fetch, seed=7, rank=rank, world_size=world)


def gradients(trained, batch, step=5):
    """The values and gradients of one step, as `fit` takes it."""
    trained.zero_grad()
    values = _backward(trained, trained.split(batch, step, 1), make_accelerator("fp32", cpu=True))
    return values, {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro", [4, 2])
def test_parts_equal_the_whole_batch(family, micro):
    """Captions differ in length, so a mean of the parts' means would show."""
    batch = next(iter(loader(family)))
    whole, parts = objective(family), objective(family, micro)
    expected, of_whole = gradients(whole, dict(batch))
    assert len(parts.split(dict(batch), 5, 1)) == 8 // micro
    found, of_parts = gradients(parts, dict(batch))
    same(expected, found)
    same(of_whole, of_parts)
    assert "model.vision_model.post_layernorm.weight" in of_parts
    if family == "retrieval":
        assert "model.temperature" in of_parts and found["loss_itm"] > 0


def test_the_pool_of_negatives_is_the_whole_batch():
    """A part alone would find negatives among its own rows only."""
    parts = objective("retrieval", 2).split(next(iter(loader("retrieval"))), 5, 1)
    (_, _, text, image), *_ = parts[0]["cached"]
    drawn = torch.cat([index for part in parts for index in part["cached"][0][2:]])
    assert len(set(drawn.tolist())) > 2 and len(text) == len(image) == 2
    own = torch.arange(8)
    texts = torch.cat([part["cached"][0][2] for part in parts])
    assert (texts != own).all()


def test_parts_carry_the_cached_gradient_with_dropout():
    """The second pass draws the dropout of the first: ITC's gradient is that of the features it is given."""
    trained, batch = objective("retrieval", 4, dropout=0.3, names=("itc",)), next(iter(loader("retrieval")))
    trained.train()
    parts = trained.split(dict(batch), 5, 1)
    features = []
    read = trained.model.read_pairs
    trained.model.read_pairs = lambda *given: features.append(read(*given)) or features[-1]
    trained(parts[0])
    again = features[0].image_feats
    torch.manual_seed(parts[0]["dropout_seed"])
    with torch.no_grad():
        ids, mask = parts[0]["input_ids"], parts[0]["attention_mask"]
        first = read(trained._embeds(parts[0]["image_hidden"]), ids, mask).image_feats
        other = read(trained._embeds(parts[0]["image_hidden"]), ids, mask).image_feats
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_left_out_loss_has_no_gradient():
    batch = next(iter(loader("retrieval")))
    values, found = gradients(objective("retrieval", 4, names=("itc",)), dict(batch))
    assert {"loss_itc", "itm", "itg"} <= values.keys() and "loss_itm" not in values
    assert values["loss"] == values["loss_itc"]
    assert "model.itm_head.weight" not in found and "model.text_projection.weight" in found


def test_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="micro_batch_size 3 does not divide the 8 pairs"):
        objective("opt", 3).split(next(iter(loader("opt"))), 0)


def test_negatives_follow_the_similarities():
    """Drawn as often as the softmax says, never the own pair, and decided by the numbers given."""
    similarities = torch.tensor([[5.0, 1.0, 0.0, 2.0]]).expand(20_000, 4)
    positive = torch.tensor([[True, False, False, False]]).expand(20_000, 4)
    texts, images = sample_hard_negatives(similarities, similarities.flip(1), positive)
    expected = torch.tensor([1.0, 0.0, 2.0]).softmax(0)
    shares = torch.bincount(texts, minlength=4) / 20_000
    assert shares[0] == 0 and torch.allclose(shares[1:], expected, atol=0.02)
    assert not torch.equal(texts, images) and images.min() > 0
    for edge, index in ((0.0, 1), (1 - 2**-24, 3)):
        draws = torch.full((2, 1), edge)
        assert sample_hard_negatives(similarities[:1], similarities[:1], positive[:1], draws)[0] == index
    last = torch.tensor([[False, False, False, True]])  # the own pair is the last
    draws = torch.full((2, 1), 1 - 2**-24)
    assert sample_hard_negatives(similarities[:1], similarities[:1], last, draws)[0] == 2


def test_contrastive_logits_stay_float32_under_bf16():
    model = tiny.ours("retrieval")
    positive = torch.eye(6, dtype=torch.bool)
    images = nn.functional.normalize(torch.randn(6, 6, 16), dim=-1)
    texts = nn.functional.normalize(torch.randn(6, 16), dim=-1)
    plain = model.itc(images, texts, positive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.itc(images, texts, positive)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# --- two processes ---


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def work(rank, folder, accelerator):
    seen = {}
    for family in FAMILIES:
        for way in WAYS:
            trained = objective(family, None if way == "whole" else 2)
            split = way == "lean" and family != "retrieval"
            execution = Execution(checkpointing=way == "lean", shard_language_model=split)
            prepare(trained, execution, accelerator.device)
            names = {type(p).__name__ for p in trained.parameters()}
            assert names == ({"Parameter", "DTensor"} if split else {"Parameter"})
            path = folder / f"{family}-{way}"
            fit(trained, loader(family, rank, 2), CONFIG, path, accelerator=accelerator)
            weights = {n: p.detach() for n, p in trained.named_parameters() if p.requires_grad}
            seen[family, way] = (distributed.world_size(), log(path), weights)
    return seen


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(work, tmp_path_factory.mktemp("pair"))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(family, way, pair, tmp_path):
    """Four steps of the real stage on two processes equal one process with all rows.

    Whole batches; or in parts, with recomputed activations and the language model split (FSDP2).
    """
    alone = objective(family)
    fit(alone, loader(family), CONFIG, tmp_path)
    expected = log(tmp_path)
    for seen in pair:
        world, lines, weights = seen[family, way]
        assert world == 2 and len(lines) == len(expected) == 4
        for line, wanted in zip(lines, expected, strict=True):
            names = [
                name for name in wanted if name.startswith("loss") or name.endswith(("accuracy", "ture"))
            ]
            assert {"loss_lm"} <= set(names) or {"loss_itc", "itm_accuracy", "temperature"} <= set(names)
            assert {name: line[name] for name in names} == pytest.approx(
                {name: wanted[name] for name in names}, abs=1e-5
            )
        for name, value in weights.items():
            if not name.endswith("key.bias"):  # their gradient is zero but for rounding, which Adam blows up
                assert torch.allclose(value, alone.get_parameter(name), atol=2e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_nothing(family):
    """Dropout included: the second computation draws what the first drew."""
    batch, found = next(iter(loader(family))), []
    for checkpointing in (False, True):
        trained = objective(family, 4, dropout=0.2).train()
        prepare(trained, Execution(checkpointing=checkpointing), torch.device("cpu"))
        torch.manual_seed(0)
        found.append(gradients(trained, dict(batch)))
    same(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def test_one_process_has_nothing_to_split():
    with pytest.raises(ValueError, match="shard_language_model splits over processes, but there is one"):
        prepare(objective("opt"), Execution(shard_language_model=True), torch.device("cpu"))
