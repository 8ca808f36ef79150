"""One's own pictures: tables and texts, the check that names bad rows, and the guide from them to a model."""

import json
import re
import shlex
from pathlib import Path

import making as made
import pytest

import blip2.cli
import blip2.ui.serve
from train.data import __main__ as data
from train.data import records
from train.data.check import SHOWN, check
from train.data.records import AnnotationError

GUIDE = (Path(__file__).resolve().parent.parent / "docs" / "finetuning.md").read_text()
BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.picture(number))
    return path


def command(*words):
    return data.main(["check", *map(str, words), "--workers", "1"])


def reasons(found):
    return [(finding.where, finding.reason) for finding in found.findings]


@pytest.fixture
def texts(tmp_path):
    """Three pictures with a text beside each, one of them in a folder."""
    for number, name in enumerate(("a.png", "b.png", "deeper/c.png")):
        picture(tmp_path / "mine" / name, number).with_suffix(".txt").write_text(f"number {number}\nagain\n")
    return tmp_path / "mine"


@pytest.fixture
def table(tmp_path):
    """Rows -> a csv beside three pictures."""
    for number in range(3):
        picture(tmp_path / "mine" / f"{number}.png", number)

    def write(text, name="captions.csv"):
        path = tmp_path / "mine" / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- texts beside pictures ---


def test_texts_beside_pictures_are_captions(texts, capsys):
    (texts / "a.txt").write_bytes("\ufeffein großer Kreis\r\n\r\nzwei\r\n".encode())
    (texts / "b.txt").rename(texts / "b.caption")
    found = {record.extra["file"]: record for record in records.own(texts)}
    assert found["a.png"].captions == ("ein großer Kreis", "zwei")
    assert found["b.png"].captions == ("number 1", "again") and found["deeper/c.png"].part == "train"
    assert len({record.key for record in found.values()}) == 3
    assert command(texts) == 0
    assert capsys.readouterr().out == "6 captions of 3 pictures: nothing wrong\n"


def test_what_is_wrong_with_texts(texts):
    (texts / "a.txt").unlink()
    (texts / "b.txt").write_bytes(b"gr\xfcn\n")
    (texts / "deeper" / "c.txt").write_text(" \n")
    picture(texts / "deeper" / "c.jpg", 5)
    (texts / "z.png").write_bytes(b"<html>")
    (texts / "z.txt").write_text("one\n" + "word " * 201 + "\none\n")
    assert reasons(check(texts)) == [
        ("a.png", "no caption"),
        ("b.png", "encoding"),
        ("deeper/c.jpg", "empty caption"),
        ("deeper/c.png", "shared text"),
        ("deeper/c.png", "empty caption"),
        ("z.png", "duplicate"),
        ("z.png", "long caption"),
        ("z.png", "duplicate"),
        ("z.png", "unreadable picture"),
    ]
    with pytest.raises(AnnotationError, match=r"b\.txt is not UTF-8"):
        list(records.own(texts))


def test_folders_with_nothing_in_them(tmp_path, capsys):
    assert command(tmp_path / "nothing") == 2
    assert command(tmp_path) == 2
    picture(tmp_path / "a.png")
    with pytest.raises(AnnotationError, match=r"1 pictures, and neither a \.csv"):
        list(records.own(tmp_path))
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("image,caption\n")
    assert command(tmp_path) == 2
    (tmp_path / "b.jsonl").unlink()
    assert command(tmp_path) == 2
    err = capsys.readouterr().err
    for words in ("there is no", "has no pictures", "2 tables, a.csv, b.jsonl: keep one", "has no rows"):
        assert words in err


# --- tables ---


def test_a_whole_table(table):
    path = table('image,caption,split\n0.png,"a, b",train\n1.png,c,val\n0.png,again,\n')
    found = check(path.parent)
    assert (found.captions, found.pictures, found.findings) == (3, 2, [])
    assert [record.part for record in records.own(path.parent)] == ["train", "val"]
    rows = [{"file": "0.png", "captions": ["a", "b"]}, {"image": "1.png", "caption": "c"}]
    path.unlink()
    assert check(table("\n".join(map(json.dumps, rows)), "t.jsonl")).captions == 3


def test_every_bad_row_is_named(table, tmp_path, capsys):
    path = table(
        b"image,caption,split\n"
        b"0.png,good,train\n"  # 2
        b"9.png,no such picture,train\n"
        b"1.png,,train\n"
        b"1.png,a caption, unquoted,train\n"
        b"0.png,good,train\n"
        b"1.png,gr\xfcn,train\n"
        b",nobody,train\n"
        b"0.png,other,val\n"
        b"2.png,fine,dev\n" + b"2.png," + b"word " * 201 + b",train\n"
        b"broken.png,a picture,train\n"
    )
    (path.parent / "broken.png").write_bytes(made.picture(1)[:40])
    found = check(path)
    assert reasons(found) == [
        (f"captions.csv, line {line}", reason)
        for line, reason in (
            (3, "missing picture"),
            (4, "empty caption"),
            (5, "wrong columns"),
            (6, "duplicate"),
            (7, "encoding"),
            (8, "wrong columns"),
            (9, "two splits"),
            (10, "wrong columns"),
            (11, "long caption"),
            (12, "unreadable picture"),
        )
    ]
    assert command(path) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "captions.csv, line 4: empty caption: nothing is said of 1.png"
    assert "more cells than the header" in out[2] and "split is 'dev'" in out[7]
    assert out[-1].startswith("6 captions of 5 pictures; wrong: 3 wrong columns, 1 empty caption")
    assert data.main(["prepare", "pairs", str(path), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "line 5: 1 more cells than the header has" in (err := capsys.readouterr().err)
    assert f"check {path}` names all" in err and not (tmp_path / "out").exists()


def test_bad_json_and_bad_headers(table):
    lines = [
        '{"image": "0.png", "caption": "a"}',
        "{",
        "[]",
        '{"image": 3}',
        '{"image": "1.png", "split": [1]}',
    ]
    lines += ['{"image": "1.png", "captions": ["a", 2]}', '{"image": "1.png", "caption": 5}', ""]
    found = check(table("\n".join(lines), "t.jsonl"))
    assert reasons(found) == [(f"t.jsonl, line {line}", "wrong columns") for line in range(2, 8)]
    found = check(table("picture;caption\n0.png;a\n1.png;b\n"))
    assert reasons(found) == [("captions.csv, line 1", "wrong columns")]
    assert "['picture;caption']" in found.findings[0].what


def test_of_many_the_first_are_shown(table, capsys):
    rows = "".join(f"{number}.png,x\n" for number in range(100, 100 + SHOWN + 5))
    assert command(table(f"image,caption\n{rows}")) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == SHOWN + 2 and out[-2] == "... and 5 more"
    assert out[-1] == f"{SHOWN + 5} captions of {SHOWN + 5} pictures; wrong: {SHOWN + 5} missing picture"


# --- the guide ---


def drawn(folder, number):
    """Scenes of the drawn world with a caption each, as one's own pictures."""
    import random

    from PIL import Image

    from train.scenes.text import caption
    from train.scenes.world import render, sample

    folder.mkdir(parents=True)
    for seed in range(number):
        scene = sample(seed, "train")
        Image.fromarray(render(scene, 64)).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption(scene, random.Random(seed)) + "\n")


def run(line, *, short=()):
    """A line of the guide, in this process."""
    words = shlex.split(line)
    if words[0] == "blip2":
        return blip2.cli.main(words[1:])
    assert words[:2] == ["python", "-m"], line
    if words[2] == "train.data":
        return data.main(words[3:])
    assert words[2] == "train.finetune", line
    from train import finetune

    return finetune.main([*words[3:], *short])


def test_the_guides_lines_are_understood():
    """Those that are not run: flags exist."""
    lines = [
        line for _, language, body in BLOCK.findall(GUIDE) if language == "bash" for line in body.splitlines()
    ]
    served = [shlex.split(line)[2:] for line in lines if line.startswith("python app.py")]
    assert served and all(blip2.ui.serve._parser().parse_args(words).adapter for words in served)
    assert len([line for line in lines if line.startswith("python -m train.finetune")]) >= 3
    assert len([1 for marked, *_ in BLOCK.findall(GUIDE) if marked]) == 5


@pytest.mark.long
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "my" / "pictures", 40)
    for marked, language, body in BLOCK.findall(GUIDE):
        if not marked:
            continue
        if language == "python":
            exec(compile(body, "docs/finetuning.md", "exec"), {})
            continue
        for line in body.splitlines():
            capsys.readouterr()
            assert run(line, short=("--steps=4", "--warmup-steps=1")) == 0, line
            assert capsys.readouterr().out.strip(), line
    assert (tmp_path / "runs/mine/adapter/adapter_config.json").is_file()
    assert not (tmp_path / "my-model" / "adapter_config.json").exists()
