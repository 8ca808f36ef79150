"""Released sizes: loading stays within its bound of memory, and Flan-T5-XXL's names are all accounted for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_checkpoint import make_processor

from blip2.bench.folders import tensor_shapes
from blip2.checkpoint import load, save
from blip2.model import Blip2
from blip2.placement import blocks, place, read_budget
from blip2.presets import PRESETS
from blip2.quantize import weight_bytes
from blip2.shards import StoredTensor

SCRIPT = Path(__file__).parent / "full_size.py"


def measured(*arguments):
    """What the script tells of each precision."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's figures")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["opt", "t5", "retrieval"])
def test_what_is_read_is_what_computes(tmp_path, monkeypatch, family, precision):
    """Tensors come into their final dtype as they are read: nothing is copied or held beside them."""
    folder = save(tiny.ours(family), make_processor(family), tmp_path / family)
    read, get = {}, StoredTensor.__getitem__

    def recorded(stored, index):
        tensor = get(stored, index)
        assert tensor.data_ptr() not in read
        read[tensor.data_ptr()] = tensor.dtype
        return tensor

    monkeypatch.setattr(StoredTensor, "__getitem__", recorded)
    monkeypatch.setattr("blip2.checkpoint.pack", lambda model: None)
    model = load(folder, device="cpu", precision=precision).model
    parameters = {parameter.data_ptr(): parameter.dtype for parameter in model.parameters()}
    assert parameters == read


@linux
@pytest.mark.long
def test_loading_stays_within_its_bound():
    """1.1 x the final size and one shard, and that with a dtype that changes on the way."""
    [facts] = measured(
        "mid", "--depth", "2", "--shard", "100MB", "--precision", "bfloat16", "--captions", "0"
    )
    assert facts["within"] and facts["precision"] == "bfloat16", facts
    assert facts["final_gb"] > 0.9 * facts["shard_gb"] > 0.05


def test_flan_t5_xxl_on_the_meta_device():
    """Every name of the release's index has its place, and every place its name or its twin."""
    config = PRESETS["blip2-flan-t5-xxl"].config()
    stored = tensor_shapes(config)
    with torch.device("meta"):
        model = Blip2(config)
    places = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    twins = {f"language_model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert len(stored) == 1289 and {name: places[name] for name in stored} == stored
    assert set(places) - set(stored) == twins

    sizes = weight_bytes(model, "int8", untied=True)
    assert sum(sizes.values()) == PRESETS["blip2-flan-t5-xxl"].memory("int8") < 16 * 10**9  # of a GPU's 24
    sizes = weight_bytes(model, "bfloat16", untied=True)
    found = place(model, sizes, read_budget("0=12GB,1=12GB,cpu=8GB"), disk=False)
    assert found[blocks(model)[0]] == 0 and set(found.values()) == {0, 1, "cpu"}


@linux
@pytest.mark.long
@pytest.mark.parametrize("size", ["flan-t5-xxl", "opt-6.7b"])
def test_one_layer_at_full_width(size):
    """Loads within the bound and says something, in full precision and in 8 bits.

    bitsandbytes takes ten bytes a weight for the matrix it quantizes, so the shard is no smaller than that.
    """
    for facts in measured(size, "--depth", "1", "--shard", "1GB"):
        assert facts["within"] and facts["greedy_s"] > 0 and facts["beam5_s"] > 0, facts
