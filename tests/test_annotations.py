"""Annotation files as published: what is read of each, and that a file of another kind is named as such."""

import json
import shutil

import official
import pytest

from train.data import published
from train.evaluation import annotations
from train.evaluation.annotations import AnnotationError, Example, Pictures, with_pictures


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return official.make(tmp_path_factory.mktemp("official"))


def test_vqa(sets):
    coco = sets / "coco"
    questions = coco / "v2_OpenEnded_mscoco_val2014_questions.json"
    found = annotations.vqa(questions, coco / "v2_mscoco_val2014_annotations.json", subtype="val20")
    raw = json.loads(questions.read_text())["questions"]
    assert [(one.id, one.question) for one in found] == [(q["question_id"], q["question"]) for q in raw]
    first = found[0]
    assert first.image == "COCO_val2014_000000000042.jpg" and len(first.references) == 10
    assert first.facts["answer_type"] in ("yes/no", "number", "other")
    assert set(first.facts) == {"answer_type", "question_type"}


def test_vqa_of_a_secret_split(sets):
    path = sets / "coco" / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    found = annotations.vqa(path, None, subtype="test-dev20")
    assert found[0].image == "COCO_test2015_000000000049.jpg" and found[0].references == ()
    with pytest.raises(AnnotationError, match=r"about test-dev2015; this split is val"):
        annotations.vqa(path, None, subtype="val20")


def test_vqa_files_that_do_not_belong_together(sets):
    questions = sets / "coco" / "v2_OpenEnded_mscoco_val2014_questions.json"
    answers = sets / "okvqa" / "mscoco_val2014_annotations.json"
    with pytest.raises(AnnotationError, match=r"no answers to 6 of 18 questions .* do not belong together"):
        annotations.vqa(questions, answers)


def test_gqa(sets):
    found = annotations.gqa(sets / "gqa" / "testdev_balanced_questions.json")
    assert found[0].id == "201900" and found[0].image == "2354786.jpg" and len(found[0].references) == 1
    assert found[0].facts == {"question_type": "verify"}


def test_captions_and_domains(sets):
    found = annotations.captions(sets / "coco" / "captions_val2014.json")
    assert [one.id for one in found] == official.coco_numbers()
    assert all(len(one.references) == 5 and not one.facts for one in found)
    path = sets / "nocaps" / "nocaps_val_4500_captions.json"
    found = annotations.captions(path, published.NOCAPS)
    assert [one.facts["domain"] for one in found] == [*official.DOMAINS, *official.DOMAINS]
    assert all(len(one.references) == 10 for one in found)


def test_karpathy(sets):
    path = sets / "coco" / "dataset_coco.json"
    found = annotations.karpathy(path)
    assert [one.id for one in found] == official.coco_numbers()[:5]
    assert [len(one.references) for one in found] == [
        5,
        6,
        5,
        6,
        5,
    ]  # all are taken, as in the 25,010 of COCO
    assert all(text == text.strip() for one in found for text in one.references)
    with pytest.raises(AnnotationError, match=r"split of coco; this takes dataset_flickr30k.json"):
        annotations.karpathy(path, dataset="flickr30k")
    with pytest.raises(AnnotationError, match=r"has no split val; it has test, train"):
        annotations.karpathy(path, "val")


READERS = {
    published.QUESTIONS: lambda path: annotations.vqa(path, None),
    published.GQA: annotations.gqa,
    published.CAPTIONS: annotations.captions,
    published.NOCAPS: lambda path: annotations.captions(path, published.NOCAPS),
    published.KARPATHY: annotations.karpathy,
}
PUBLISHED = {
    "coco/v2_OpenEnded_mscoco_val2014_questions.json": published.QUESTIONS,
    "coco/v2_mscoco_val2014_annotations.json": published.ANSWERS,
    "coco/captions_val2014.json": published.CAPTIONS,
    "coco/instances_val2014.json": published.OTHERS["instances"],
    "coco/dataset_coco.json": published.KARPATHY,
    "gqa/testdev_balanced_questions.json": published.GQA,
    "nocaps/nocaps_val_4500_captions.json": published.NOCAPS,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_file_of_another_kind_is_named(sets, path):
    """Every published file, given to every reader: read by its own, named by all others."""
    for kind, reader in READERS.items():
        if kind == PUBLISHED[path]:
            assert reader(sets / path)
            continue
        with pytest.raises(AnnotationError) as caught:
            reader(sets / path)
        assert f"holds {PUBLISHED[path]}, not {kind} (such as {published.SUCH_AS[kind]})" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04...", "is a zip archive: unpack it"),
        (b'{"questions": [{"ques', "is not JSON, or was cut short"),
        (b"[]", "holds something else, not VQA's questions"),
        (b'{"a": 1}', "holds something else"),
        (b'[{"question_id": 1, "answer": "x"}]', "holds a list of results"),
        (b'{"questions": [{"question": "what?", "question_id": 1}]}', "lacks 'image_id'"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=message):
        annotations.vqa(path, None)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(AnnotationError, match="there is no file"):
        annotations.gqa(tmp_path / "questions.json")
    with pytest.raises(AnnotationError, match=r"is a folder; give the \.json"):
        annotations.gqa(tmp_path)


def test_pictures_by_every_name(tmp_path):
    for name in (
        "val2014/COCO_val2014_000000000042.jpg",
        "73.jpg",
        "000000000100.png",
        "0013ea.PNG",
        "x.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    pictures = Pictures(tmp_path)
    names = {
        "COCO_val2014_000000000042.jpg": "val2014/COCO_val2014_000000000042.jpg",
        "val2014/COCO_val2014_000000000042.jpg": "val2014/COCO_val2014_000000000042.jpg",
        "COCO_val2014_000000000073.jpg": "73.jpg",
        "COCO_val2014_000000000100.jpg": "000000000100.png",
        "0013ea.jpg": "0013ea.PNG",
        "COCO_val2014_000000000007.jpg": None,
        "x.jpg": None,
    }
    assert {name: pictures.find(name) for name in names} == names


def test_missing_pictures_are_listed(sets, tmp_path):
    examples = annotations.captions(sets / "coco" / "captions_val2014.json")
    shutil.copytree(sets / "coco" / "val2014", tmp_path / "images")
    for number in (73, 1000):
        (tmp_path / "images" / f"COCO_val2014_{number:012d}.jpg").unlink()
    with pytest.raises(AnnotationError, match=r"2 of 6 pictures are not in .*000000000073.*000000001000"):
        with_pictures(examples, tmp_path / "images")
    data = with_pictures(examples, tmp_path / "images", skip_missing=True)
    assert len(data.examples) == 4 and len(data.missing) == 2
    assert data.picture(data.examples[0].image, 64).mode == "RGB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match=r"6 of 6 pictures .* Is it the right folder"):
        with_pictures(examples, tmp_path / "empty", skip_missing=True)
    with pytest.raises(AnnotationError, match="there is no folder"):
        with_pictures([Example(1, "a.jpg")], tmp_path / "nowhere")
