"""Schedule, parameter groups and layer decay."""

import math

import pytest
import torch
from torch import nn

from train import optim


def test_schedule_values():
    """Linear warm-up to the peak, half a cosine to the floor, constant afterwards."""

    def rate(step):
        return optim.learning_rate(step, total=110, peak=1e-4, floor=2e-5, warmup=10)

    assert rate(0) == pytest.approx(1e-5)
    assert rate(4) == pytest.approx(5e-5)
    assert rate(9) == rate(10) == pytest.approx(1e-4)
    assert rate(60) == pytest.approx(6e-5)  # half-way: the mean of peak and floor
    assert rate(35) == pytest.approx(2e-5 + 8e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(500) == pytest.approx(2e-5)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


class Model(nn.Module):
    """Names as in our models: an image encoder of three blocks, queries, a scalar temperature."""

    def __init__(self):
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.embeddings = nn.Linear(2, 2)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.vision_model.post_layernorm = nn.LayerNorm(2)
        self.query_tokens = nn.Parameter(torch.zeros(1, 2, 2))
        self.temperature = nn.Parameter(torch.tensor(0.07))


def by_name(groups):
    return {name: group for group in groups for name, _ in group["params"]}


def test_matrices_decay_and_nothing_else():
    model = Model()
    groups = by_name(optim.param_groups(model.named_parameters(), weight_decay=0.05))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert "query_tokens" in decayed and "temperature" not in decayed
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.05}


def test_frozen_parameters_are_left_out():
    model = Model()
    model.vision_model.requires_grad_(False)
    assert set(by_name(optim.param_groups(model.named_parameters(), weight_decay=0.05))) == {
        "query_tokens",
        "temperature",
    }
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optim.adamw(model)


def test_layer_decay_reaches_the_update():
    """The step of block i is decay^(L - i) times a full one: Adam's first step is the rate times the sign."""
    model = nn.ModuleDict({"model": Model()})  # names may be nested, as in an objective
    optimizer = optim.adamw(model, weight_decay=0.0, layer_decay=0.5)
    optim.set_learning_rate(optimizer, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    steps = {name: (before[name] - p).mean().item() for name, p in model.named_parameters()}
    expected = {
        "vision_model.embeddings.weight": 0.5**4,
        "vision_model.encoder.layers.0.weight": 0.5**3,
        "vision_model.encoder.layers.2.bias": 0.5,
        "vision_model.post_layernorm.weight": 1.0,
        "query_tokens": 1.0,
    }
    for name, scale in expected.items():
        assert steps[f"model.{name}"] == pytest.approx(1e-2 * scale, rel=1e-3), name


@pytest.mark.parametrize("decay", [0, 1.5])
def test_layer_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="layer_decay"):
        optim.adamw(Model(), layer_decay=decay)


def test_defaults_are_the_papers():
    optimizer = optim.adamw(Model())
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05, 0.0}


def test_clipping():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert optim.gradient_norm([p], clip=1.5).item() == pytest.approx(6.0)  # the norm before clipping
    assert p.grad.norm().item() == pytest.approx(1.5, rel=1e-4)
    p.grad = torch.full((4,), 0.1)
    optim.gradient_norm([p], clip=1.5)
    assert p.grad.tolist() == pytest.approx([0.1] * 4)
