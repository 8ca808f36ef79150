"""Steps timed on random weights, and what a training step must not do: make the host wait for the device."""

import dataclasses
import json
import traceback
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from test_objectives import CONFIG, loader, objective
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train import plan, shapes, throughput, trial
from train.count import Counts
from train.engine import fit, make_accelerator
from train.recipes import RECIPES
from train.trial import Trainer

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "item")


class Waits(TorchDispatchMode):
    """Notes operations that need a device's number on the host; seeds, drawn on the host, may be read."""

    def __init__(self):
        super().__init__()
        self.found, self.seeds = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        drawn = [seed.data_ptr() for seed in self.seeds]
        if (name in WAITS or by_mask) and args[0].data_ptr() not in drawn:
            self.found.append((name, "".join(traceback.format_stack(limit=12))))
        out = func(*args, **(kwargs or {}))
        if name.startswith("randint"):
            self.seeds.append(out)
        return out


@pytest.fixture
def small(monkeypatch):
    """Recipes keep what they say, but for the sizes of their models."""

    def family(recipe):
        return "retrieval" if recipe.stage == 1 else "t5" if "t5" in recipe.language_model else "opt"

    monkeypatch.setattr(shapes, "model_config", lambda recipe: tiny.config(family(recipe)))
    monkeypatch.setattr(plan, "_known", {})
    monkeypatch.setattr(shapes, "_sizes", {})


NAMES = ("stage1-vitg", "stage2-opt-2-7b", "stage2-flan-t5-xl")


def recipe(name="stage1-vitg", config=None, **execution):
    made = RECIPES[name]()
    execution = dataclasses.replace(made.execution, compile=False, **execution)
    return dataclasses.replace(made, execution=execution, fit=config or made.fit)


# --- the host does not wait ---


def test_waits_are_seen():
    x = torch.arange(4.0)
    with Waits() as waits:
        float(x[2])
        x.nonzero()
        x[x > 1]
        torch.equal(x, x)
        int(torch.randint(9, ()))  # a seed, drawn on the host
    assert [name for name, _ in waits.found] == ["_local_scalar_dense", "nonzero", "index", "equal"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("family", ["retrieval", "opt", "t5"])
def test_a_step_asks_the_device_for_nothing(family, micro, checkpointing):
    """Dropout, parts, backward pass and optimizer included; but for transformers, which asks whether a mask
    is all ones, once or twice a language model's forward."""
    chosen = recipe(config=CONFIG, micro_batch_size=micro, checkpointing=checkpointing)
    trained = Trainer(chosen, objective(family, micro, dropout=0.1), make_accelerator("fp32", cpu=True))
    batch = next(iter(loader(family)))
    trained.step(batch)
    with Waits() as waits:
        trained.step(batch)
    ours = [stack for _, stack in waits.found if "masking_utils.py" not in stack]
    assert not ours, ours[0]
    assert len(waits.found) <= (0 if family == "retrieval" else 2 * (8 // (micro or 8)))


# --- a trial is what training would be ---


@pytest.mark.parametrize("family", ["retrieval", "opt"])
def test_the_step_is_that_of_fit(family, tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, warmup_steps=0)
    accelerator = make_accelerator("fp32", cpu=True)
    fitted, tried = objective(family, 4), objective(family, 4)
    before = {name: p.detach().clone() for name, p in tried.named_parameters()}
    fit(fitted, loader(family), config, tmp_path, accelerator=accelerator)
    Trainer(recipe(config=config), tried, accelerator).step(next(iter(loader(family))))
    moved = 0
    for name, parameter in tried.named_parameters():
        assert torch.equal(parameter, fitted.get_parameter(name)), name
        moved += not torch.equal(parameter, before[name])
    assert moved > 10


def test_layers_are_cut_and_nothing_else():
    cut, whole = (trial.build(recipe("stage2-flan-t5-xl"), layers) for layers in (2, None))
    for of, layers, vision in ((cut, 2, 2), (whole, 24, 39)):
        language_model = of.model.language_model
        assert len(of.model.vision_model.encoder.layers) == vision
        assert len(language_model.encoder.block) == len(language_model.decoder.block) == layers
        assert len(language_model.decoder.block[0].layer) == 3
    assert cut.model.language_model.lm_head.weight.shape == whole.model.language_model.lm_head.weight.shape


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_the_plans(name):
    counts = Counts(1, 0.0, 0.0, 5e9)
    found = trial.expected(recipe(name), trial.build(recipe(name)), counts)
    planned = plan._memory(recipe(name), recipe(name).execution, counts, 1)
    assert list(found.values()) == list(planned.values())


@pytest.mark.parametrize("name", NAMES)
def test_random_batches_look_like_a_loaders(name, small):
    made = trial.batch(recipe(name), trial.build(recipe(name)), 16)
    like = shapes.batch(recipe(name), 16)
    assert {n: (v.shape, v.dtype) for n, v in like.items()} == {
        n: (made[n].shape, made[n].dtype) for n in like
    }
    lengths = made["attention_mask"].sum(1)
    assert lengths[0] == lengths.max() == made["input_ids"].shape[1] and lengths.min() < lengths.max()
    if name == "stage2-opt-2-7b":
        assert torch.equal(made["labels"] == -100, made["attention_mask"] == 0)
    if "labels" in made:
        assert made["labels"].max() < 56 and (made["labels"][1:] == -100).any()


def test_random_weights_keep_precisions_and_ties(small):
    made = trial.build(recipe("stage2-opt-2-7b"))
    trial.materialize(made, torch.device("cpu"))
    model = made.model
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    assert model.language_model.lm_head.weight.dtype == torch.bfloat16
    assert model.vision_model.post_layernorm.weight.dtype == torch.float32
    flan = trial.build(recipe("stage2-flan-t5-xl"))
    trial.materialize(flan, torch.device("cpu"))
    language_model = flan.model.language_model
    assert language_model.encoder.embed_tokens.weight is language_model.decoder.embed_tokens.weight
    assert all(torch.isfinite(p).all() and not p.is_meta for p in made.parameters())
    assert (model.vision_model.post_layernorm.weight == 1).all() and model.query_tokens.std() > 0.01


# --- the command ---


@pytest.fixture
def bf16():
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_command(name, small, bf16, tmp_path, capsys):
    files = {"profile": tmp_path / "trace.json", "json": tmp_path / "figures.json"}
    options = [word for option, path in files.items() for word in (f"--{option}", str(path))]
    cut = ["--batch", "6", "--micro-batch-size", "3", "--layers", "1", "--steps", "2", "--no-compile"]
    assert throughput.main([name, *cut, *options]) == 0
    said, found = capsys.readouterr().out, json.loads(files["json"].read_text())
    assert "REDUCED to 1 layers" in said and list(found["sides"]) == ["eager"]
    side = found["sides"]["eager"]
    assert side["samples_per_second"] == pytest.approx(6 / side["seconds"]) and side["fastest"] > 0
    assert sum(side["parts"].values()) == pytest.approx(1) and min(side["parts"].values()) >= 0
    assert {"image encoder", "backward", "optimizer"} < set(side["parts"])
    assert ("ITM" if name == "stage1-vitg" else "language model") in side["parts"]
    assert found["operations"] and "mfu" not in side and found["flops"] > 0
    assert "ITM" in files["profile"].read_text() or name != "stage1-vitg"


@pytest.mark.long
def test_too_little_memory_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(throughput.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    assert throughput.main(["stage1-vitg", "--batch", "4", "--layers", "2"]) == 2
    assert "make it smaller, such as with --layers 2 --batch 4" in capsys.readouterr().err

    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr(throughput, "measure", exhausted)
    assert throughput.main(["stage1-vitg"]) == 1
    said = capsys.readouterr().err
    assert "out of memory with 128 pairs at a time: try --micro-batch-size 64" in said and "more" not in said


@pytest.mark.parametrize("options", ["--batch 5 --micro-batch-size 2", "--layers 0", "--steps 0"])
def test_sizes_that_make_no_sense(options, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["stage1-vitg", *options.split()])
    assert "--micro-batch-size divides --batch" in capsys.readouterr().err


@pytest.mark.long
def test_compiled_beside_eager(small, bf16):
    found = throughput.measure(
        dataclasses.replace(recipe(), execution=dataclasses.replace(recipe().execution, compile=True)),
        4,
        steps=2,
    )
    assert list(found["sides"]) == ["eager", "compiled"]
