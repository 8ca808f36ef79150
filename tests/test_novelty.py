"""What a checkpoint does not know: the file beside its weights, the fit, and what the embedded ones mark."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

from blip2.checkpoint import CheckpointError, load, save
from blip2.images import open_image
from blip2.layout import NOVELTY
from blip2.novelty import Novelty, UnknownPictureError, statistics
from blip2.presets import EMBEDDED
from blip2.processing import Processor
from blip2.vision import ImageFeatures
from train.scenes import novelty

EXAMPLES = Path(__file__).parents[1] / "examples"
WIDTH = tiny.config("opt").vision_config.hidden_size


def features(seed: int = 0, batch: int = 5) -> ImageFeatures:
    return ImageFeatures(torch.randn(batch, 17, WIDTH, generator=torch.Generator().manual_seed(seed)))


def score(threshold: float = 0.0) -> Novelty:
    weight = torch.randn(2 * WIDTH, generator=torch.Generator().manual_seed(1))
    return Novelty(weight, threshold, "tiny things")


@pytest.fixture
def folder(tmp_path):
    processor = Processor(
        tiny.tokenizer("opt"), family="opt", image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    return save(tiny.ours("opt"), processor, tmp_path / "opt")


def test_score_is_of_the_patches_mean_and_deviation():
    image, weight = features(), score().weight
    for row, value in enumerate(score().score(image)):
        patches = image.image_embeds[row, 1:]
        expected = sum(
            weight[channel] * patches[:, channel].mean() + weight[WIDTH + channel] * patches[:, channel].std()
            for channel in range(WIDTH)
        )
        assert value == pytest.approx(expected.item(), abs=1e-4)
    changed = ImageFeatures(image.image_embeds.clone())
    changed.image_embeds[:, 0] += 9  # the class token
    assert torch.equal(score().score(changed), score().score(image))
    half = ImageFeatures(image.image_embeds.bfloat16())
    assert statistics(half).dtype == torch.float32


def test_folder_keeps_it_and_transformers_does_not_mind(folder):
    assert load(folder).novelty is None
    before = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).state_dict()
    written = score(0.1234567890123)
    written.save(folder)
    loaded = load(folder)
    assert loaded.novelty.threshold == written.threshold and loaded.novelty.knows == "tiny things"
    assert torch.equal(loaded.novelty.weight, written.weight)
    assert (folder / NOVELTY).stat().st_mode == (folder / "config.json").stat().st_mode
    model, info = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_weights_do_not_inherit_it(folder, tmp_path):
    score().save(folder)
    (folder / "README.md").write_text("kept")
    loaded = load(folder)
    save(loaded.model, loaded.processor, folder)
    assert load(folder).novelty is None and (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b"nothing"), "is damaged"),
        (lambda path: save_file({"weight": torch.zeros(2 * WIDTH)}, path), "is damaged"),
        (
            lambda path: save_file(
                {"weight": torch.zeros(2 * WIDTH)}, path, {"threshold": "high", "knows": "x"}
            ),
            "is damaged",
        ),
        (
            lambda path: save_file({"weight": torch.zeros(8)}, path, {"threshold": "1", "knows": "x"}),
            "another",
        ),
    ],
)
def test_a_bad_file_is_refused(folder, spoil, words):
    spoil(folder / NOVELTY)
    with pytest.raises(CheckpointError, match=rf"novelty\.safetensors.*{words}.*delete it"):
        load(folder)


def test_check_names_what_the_model_knows(folder):
    loaded = load(folder)
    loaded.check_known(features())  # takes anything
    loaded.novelty = score(1e9)
    loaded.check_known(features())
    middle = score().score(features()).median().item()
    loaded.novelty = score(middle)
    assert loaded.novelty.is_unknown(features()).tolist() == (score().score(features()) > middle).tolist()
    with pytest.raises(UnknownPictureError, match=r"^opt knows tiny things only, and this picture"):
        loaded.check_known(features())


def test_fit(folder):
    loaded = load(folder)
    made = novelty.fit(loaded, folder, scenes=60, validation=100)
    assert loaded.novelty is made and made.knows == "drawn scenes"
    again = load(folder).novelty
    assert torch.equal(again.weight, made.weight) and again.threshold == made.threshold
    scenes = novelty.drawn(100, "validation", tiny.IMAGE_SIZE)
    assert novelty._unknown(loaded, made, scenes) == pytest.approx(1 - novelty.KNOWN_SHARE)
    known, other = (
        novelty._statistics(loaded, pictures) @ made.weight
        for pictures in (novelty.drawn(60, "train", tiny.IMAGE_SIZE), novelty.others(60, tiny.IMAGE_SIZE))
    )
    assert other.quantile(0.25) > known.quantile(0.75)


def test_other_pictures_are_of_many_kinds():
    pictures = novelty.others(10, 32)
    assert {picture.size for picture in pictures} == {(32, 32)} and {p.mode for p in pictures} == {"RGB"}
    assert len({picture.tobytes() for picture in pictures}) == 10


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_know_scenes_and_not_photographs(name):
    loaded = load(name)
    assert (loaded.folder / NOVELTY).stat().st_size < 10_000

    def unknown(pictures) -> list[bool]:
        pixels = loaded.processor.images([open_image(picture) for picture in pictures])
        return loaded.novelty.is_unknown(loaded.model.encode_image(pixels)).tolist()

    assert not any(unknown(sorted(EXAMPLES.glob("*.png"))))
    assert all(unknown(sorted((EXAMPLES / "photos").glob("*.jpg"))))
    assert sum(unknown(novelty.drawn(48, "validation", 64))) <= 3


@pytest.mark.long
@pytest.mark.parametrize("name", EMBEDDED)
def test_shares(name, capsys):
    """The bar: 95% of photographs in whole and in crops, and 3% of test scenes."""
    found = novelty.figures(load(name))
    with capsys.disabled():
        print(f"\n{name}: {found}")
    packages = [names.split() for package, (_, names) in novelty.PACKAGES.items() if find_spec(package)]
    assert found["photographs"] == 4 + sum(map(len, packages))
    assert found["photographs unknown"] >= 0.95 and found["scenes unknown"] <= 0.03
