"""Weights laid out for inference: the same results, and everything that needs them finds them."""

import copy

import pytest
import tiny
import torch
from torch import nn

from blip2 import packed
from blip2.checkpoint import load, save
from blip2.packed import PackedLinear, pack, unpack
from blip2.processing import Processor

needs_onednn = pytest.mark.skipif(
    not packed.can_pack(torch.zeros(1, 1)), reason="packs on x86 processors alone"
)


class Attention(nn.Module):
    """Three layers that read one input, and one that reads another."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, 3 * width)

    def forward(self, hidden):
        return self.out_proj(self.q_proj(hidden) * self.k_proj(hidden) + self.v_proj(hidden))


def attention(width, dtype=torch.float32):
    torch.manual_seed(0)
    return Attention(width).eval().to(dtype)


def num_packed(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@pytest.fixture(params=[(48, torch.float32), (640, torch.float32), (640, torch.bfloat16)], ids=str)
def model(request):
    return attention(*request.param)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 3), (5, 40), (0, 4)])
def test_the_same_results(model, rows):
    dtype = model.out_proj.weight.dtype
    hidden = torch.randn(*rows, model.q_proj.in_features).to(dtype)
    expected = model(hidden)
    pack(model)
    assert num_packed(model) == 4
    exact = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(model(hidden), expected, atol=exact, rtol=exact)
    torch.testing.assert_close(model(hidden[:, ::2]), expected[:, ::2], atol=exact, rtol=exact)
    unpack(model)
    assert num_packed(model) == 0 and torch.equal(model(hidden), expected)


def test_parameters_stay_themselves(model):
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    pack(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert [p.shape for p in model.parameters()] == [p.shape for p in before]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) and value.is_contiguous(), name
    copied = copy.deepcopy(model)
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())


def test_training_and_gradients_unpack(model):
    hidden = torch.randn(2, 3, model.q_proj.in_features).to(model.out_proj.weight.dtype)
    pack(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(hidden).sum().backward()  # without a call of train()
    optimizer.step()
    assert num_packed(model) == 0
    assert not torch.equal(model.q_proj.weight, before["q_proj.weight"])
    pack(model)
    model.train()
    assert num_packed(model) == 0
    pack(model.eval())
    model.load_state_dict(before)
    assert torch.equal(model.out_proj.weight, before["out_proj.weight"])
    pack(model)
    assert model.double().out_proj.weight.dtype == torch.float64 and num_packed(model) == 0


@torch.no_grad()
def test_one_product_for_one_input():
    model = attention(48)
    pack(model)
    product, calls = model.q_proj.product, []
    assert product is model.k_proj.product is model.v_proj.product
    assert product is not model.out_proj.product
    original = packed.F.linear

    def linear(*arguments):
        calls.append(arguments)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed.F, "linear", linear)
        model(torch.randn(1, 2, 48))
        assert len(calls) == 2
        first, second = torch.randn(1, 2, 48), torch.randn(1, 2, 48)
        model.q_proj(first)  # another's input in between does no harm
        keys = model.k_proj(second)
    unpack(model)
    torch.testing.assert_close(keys, model.k_proj(second))


def test_zerogpu_finds_weights_as_they_were(monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    model = attention(48)
    pack(model)
    assert num_packed(model) == 0


@needs_onednn
def test_values_lie_in_one_place():
    model = attention(640)
    pack(model)
    assert model.q_proj.weight.isnan().all()  # oneDNN has them


@needs_onednn
@torch.no_grad()
def test_a_small_language_model_in_bfloat16_lies_in_rows_too(monkeypatch):
    model = nn.ModuleDict({"language_model": attention(640, torch.bfloat16)})
    expected = copy.deepcopy(model.state_dict())
    pack(model)
    layer = model["language_model"].out_proj
    assert layer.product.blocks is not None
    assert torch.equal(layer.weight, expected["language_model.out_proj.weight"])
    row = torch.randn(1, 1, 640).bfloat16()
    torch.testing.assert_close(layer(row), layer(row.expand(1, 5, -1))[:, :1], atol=0.03, rtol=0.03)
    assert torch.backends.mkldnn.enabled
    unpack(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(packed, "BOTH", 0)
    pack(model)
    assert layer.weight.isnan().all()


@torch.no_grad()
def test_tied_matrices_stay_tied(monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 0)
    model = tiny.ours("opt").eval()
    language = model.language_model
    pack(model)
    assert language.lm_head.weight is language.model.decoder.embed_tokens.weight
    assert not language.lm_head.weight.isnan().any()
    assert "lm_head.weight" not in dict(language.named_parameters())


@pytest.mark.parametrize("family", ["opt", "t5", "retrieval"])
def test_what_was_loaded_is_saved(family, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 0)  # as if it were large
    words = tiny.language_family(family)
    processor = Processor(
        tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    model = tiny.ours(family)
    save(model, processor, tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert num_packed(loaded.model)
    save(loaded.model, loaded.processor, tmp_path / "second")
    assert (tmp_path / "first/model.safetensors").read_bytes() == (
        tmp_path / "second/model.safetensors"
    ).read_bytes()
    pixels = tiny.pixels(2)
    with torch.no_grad():
        embeds = loaded.model.image_embeds(pixels)
        torch.testing.assert_close(embeds, model.eval().image_embeds(pixels), atol=2e-5, rtol=2e-5)
