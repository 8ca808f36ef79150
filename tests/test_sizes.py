"""Full-size models on the meta device: parameter counts and names are exactly the released checkpoints'."""

import pytest
import torch
import transformers

from blip2.checkpoint import UNQUANTIZED
from blip2.model import Blip2
from blip2.presets import PRESETS, Preset
from blip2.representation import Blip2Representation

COUNTS = {
    "blip2-opt-2.7b": 3_744_761_856,
    "blip2-opt-6.7b": 7_752_869_376,
    "blip2-flan-t5-xl": 3_942_446_592,
    "blip2-flan-t5-xxl": 12_229_596_672,
    "blip2-itm-vit-g": 1_172_032_258,
}
STAGE1_EXTRA = 622_652  # temperature and language model head
OUTPUT_MATRIX = {
    "blip2-flan-t5-xl": 32128 * 2048,
    "blip2-flan-t5-xxl": 32128 * 4096,
}  # built tied


def build(preset: Preset):
    """Ours on the meta device."""
    with torch.device("meta"):
        return (Blip2Representation if preset.kind == "match" else Blip2)(preset.config())


@pytest.fixture(scope="module", params=COUNTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return build(PRESETS[name])


def test_count(name, model):
    count = sum(parameter.numel() for parameter in model.parameters()) + OUTPUT_MATRIX.get(name, 0)
    extra = STAGE1_EXTRA if name == "blip2-itm-vit-g" else 0
    assert count == COUNTS[name] + extra
    assert PRESETS[name].parameters == COUNTS[name]


def test_keys_and_shapes_are_transformers(name, model):
    stage1 = name == "blip2-itm-vit-g"
    theirs = transformers.Blip2ForImageTextRetrieval if stage1 else transformers.Blip2ForConditionalGeneration
    with torch.device("meta"):
        expected = {key: value.shape for key, value in theirs(PRESETS[name].config()).state_dict().items()}
    mine = {key: value.shape for key, value in model.state_dict().items()}
    extra = {key for key in mine if key == "temperature" or key.startswith("lm_head.")} if stage1 else set()
    assert {key: shape for key, shape in mine.items() if key not in extra} == expected
    assert len(expected) == {"opt": 1248, "t5": 1291, "bert": 809}[PRESETS[name].language_model]


def test_memory_table(name, model):
    """What the presets say of memory follows from the model and from what is kept out of quantization."""
    skipped = (*UNQUANTIZED, "qformer", "query_tokens", "wo")
    quantizable = kept = 0
    for path, module in model.named_modules():
        parts = path.split(".")
        if isinstance(module, torch.nn.Linear) and not any(part in skipped for part in parts):
            quantizable += module.weight.numel()
    for path, parameter in model.named_parameters():
        kept += parameter.numel() * any(part in ("qformer", "query_tokens", "wo") for part in path.split("."))
    assert (PRESETS[name].quantizable, PRESETS[name].kept) == (quantizable, kept)


def test_trainable_stage1():
    model = build(PRESETS["blip2-itm-vit-g"])
    model.freeze_vision()
    assert model.num_trainable() == 186_705_470


def test_trainable_stage2():
    model = build(PRESETS["blip2-opt-2.7b"])
    model.freeze_vision()
    model.freeze_language()
    assert model.num_trainable() == 107_133_696


def test_coco_presets():
    """The fine-tuned releases see 364 pixels, and differ in nothing but the position embeddings."""
    coco, base = PRESETS["blip2-opt-2.7b-coco"], PRESETS["blip2-opt-2.7b"]
    count = sum(parameter.numel() for parameter in build(coco).parameters())
    assert coco.parameters == count == base.parameters + (26**2 - 16**2) * 1408
    assert coco.image_size == 364 and coco.download_bytes == 4 * count


def test_memory_figures():
    """Gigabytes that were measured on transformers' models."""
    expected = {
        "blip2-opt-2.7b": (14.98, 7.49, 7.70, 3.99),
        "blip2-opt-6.7b": (31.01, 15.51, 15.72, 8.08),
        "blip2-flan-t5-xl": (15.77, 7.88, 9.10, 4.68),
        "blip2-flan-t5-xxl": (48.92, 24.46, 28.70, 14.61),
    }
    for name, figures in expected.items():
        mine = [PRESETS[name].memory(p) / 1e9 for p in ("float32", "bfloat16", "float16", "int8")]
        assert mine == pytest.approx(figures, abs=0.012)
    with pytest.raises(ValueError, match="unknown precision 'fp16': choose one of float32,"):
        PRESETS["blip2-opt-2.7b"].memory("fp16")
