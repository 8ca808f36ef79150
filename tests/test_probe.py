"""The probe: what it counts, and the page of pictures it writes."""

import pytest
import tiny
import torch
from test_objectives import loader, objective

from blip2.processing import Processor
from train.probe import Probe


def processor(family):
    language = tiny.language_family(family)
    return Processor(
        tiny.tokenizer(language),
        family=language,
        image_size=tiny.IMAGE_SIZE,
        num_query_tokens=tiny.NUM_QUERIES,
    )


def batches(family):
    """Two batches, with captions in words beside their tokens."""
    words = tiny.tokenizer(tiny.language_family(family))
    for batch in loader(family, rows=4):
        texts = words.batch_decode(batch["input_ids"] if family != "t5" else batch["labels"].clamp(0))
        special = words.all_special_tokens
        said = [" ".join(w for w in text.split() if w not in special) for text in texts]
        yield batch | {"captions": said}


def test_retrieval_counts_what_is_closest(tmp_path):
    """Against a loop over images and texts; equal captions are equally right."""
    trained = objective("retrieval").eval()
    with torch.no_grad():
        found = Probe(processor("retrieval"), lambda: batches("retrieval"), 2, tmp_path)(trained, 7)
        pairs = [batch for batch, _ in zip(batches("retrieval"), range(2), strict=False)]
        model = trained.model
        images = torch.cat(
            [model.image_feats(model.encode_image(b["pixel_values"]).query_output) for b in pairs]
        )
        texts = torch.cat([model.text_feats(b["input_ids"], b["attention_mask"]) for b in pairs])
    captions = [caption for batch in pairs for caption in batch["captions"]]
    right = 0
    for i in range(8):
        scores = [max(float(query @ text) for query in images[i]) for text in texts]
        right += captions[scores.index(max(scores))] == captions[i]
        scores = [max(float(query @ texts[i]) for query in image) for image in images]
        right += captions[scores.index(max(scores))] == captions[i]
    assert found == {"retrieval": right / 16}
    page = (tmp_path / "samples" / "step-00000007.md").read_text()
    assert page.startswith("# Step 7") and page.count("![](") == 8 and captions[0] in page
    assert len(list((tmp_path / "samples").glob("*.png"))) == 8


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_captions_are_scored_and_shown(family, tmp_path, monkeypatch):
    """A model that says the captions scores 10, CIDEr's most for a text; one that says others' does not."""
    said, told = [], []

    def speak(model, processor, image, prompt, generation):
        rows = [next(words) for _ in range(len(image))] if not prompt else ["yes"] * len(image)
        return [[row] for row in rows]

    monkeypatch.setattr("train.probe.generate", speak)
    pairs = [batch for batch, _ in zip(batches(family), range(2), strict=False)]
    said = [caption for batch in pairs for caption in batch["captions"]]
    trained = objective(family).eval()
    scores = []
    for spoken in (said, said[1:] + said[:1], [text.split()[0] for text in said]):
        words = iter(spoken)
        probe = Probe(
            processor(family), lambda: iter(pairs), 2, tmp_path, say=lambda *said: told.append(said)
        )
        with torch.no_grad():
            scores.append(probe(trained, 3)["cider"])
    assert scores[0] > 3 * scores[1] and scores[0] > 2 * scores[2] > 0
    page, step = told[0]
    assert step == 3 and "what is in the picture?" in page and "| yes |" in page


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_the_model_itself_speaks(family, tmp_path):
    with torch.no_grad():
        found = Probe(processor(family), lambda: batches(family), 2, tmp_path)(objective(family).eval(), 3)
    assert found["cider"] >= 0
    assert (tmp_path / "samples" / "step-00000003.md").read_text().count("![](") == 8
