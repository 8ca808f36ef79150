"""Full-size models on the meta device: parameter counts and names are exactly the released checkpoints'."""

import pytest
import torch
import transformers

from blip2.model import Blip2
from blip2.presets import PRECISIONS, PRESETS, Preset
from blip2.quantize import UNQUANTIZED, weight_bytes
from blip2.representation import Blip2Representation

COUNTS = {
    "blip2-opt-2.7b": 3_744_761_856,
    "blip2-opt-6.7b": 7_752_869_376,
    "blip2-flan-t5-xl": 3_942_446_592,
    "blip2-flan-t5-xxl": 12_229_596_672,
    "blip2-itm-vit-g": 1_172_032_258,
}
VISION = "vision_model"
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
    quantizable = vision = kept = 0
    for path, module in model.named_modules():
        parts = path.split(".")
        if isinstance(module, torch.nn.Linear) and not any(part in skipped for part in parts):
            count = module.weight.numel()
            quantizable, vision = (
                quantizable + count * (parts[0] != VISION),
                vision + count * (parts[0] == VISION),
            )
    for path, parameter in model.named_parameters():
        kept += parameter.numel() * any(part in ("qformer", "query_tokens", "wo") for part in path.split("."))
    preset = PRESETS[name]
    assert (preset.quantizable, preset.vision, preset.kept) == (quantizable, vision, kept)
    if preset.kind == "generate":
        for precision in PRECISIONS:
            for quantize_vision in (False, True):
                sizes = weight_bytes(
                    model, precision, quantize_vision=quantize_vision, untied=preset.language_model == "t5"
                )
                mine = preset.memory(precision, quantize_vision=quantize_vision)
                assert sum(sizes.values()) == pytest.approx(mine, abs=1000)  # nf4 is rounded


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
    """Gigabytes that were measured on transformers' models, whose int8 takes in the image encoder."""
    expected = {
        "blip2-opt-2.7b": (14.98, 7.49, 7.70, 3.99),
        "blip2-opt-6.7b": (31.01, 15.51, 15.72, 8.08),
        "blip2-flan-t5-xl": (15.77, 7.88, 9.10, 4.68),
        "blip2-flan-t5-xxl": (48.92, 24.46, 28.70, 14.61),
    }
    for name, figures in expected.items():
        preset = PRESETS[name]
        mine = [preset.memory(p, quantize_vision=True) / 1e9 for p in PRECISIONS[:4]]
        assert mine == pytest.approx(figures, abs=0.012)
        encoder = 39 * (4 * 1408**2 + 2 * 1408 * 6144)  # stays in 16 bits if nothing else is said
        assert preset.memory("int8") - preset.memory("int8", quantize_vision=True) == encoder
    with pytest.raises(ValueError, match="unknown precision 'fp16': choose one of float32,"):
        PRESETS["blip2-opt-2.7b"].memory("fp16")
