"""The page of an evaluation: whole, self-contained, escaped; the best, the worst and some others."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from train.evaluation.report import THUMBNAIL, choose, write_report

RECORDS = [
    {"id": n, "image": f"{n}.png", "prediction": f"said {n}", "references": [f"true {n}"], "score": n / 40}
    for n in range(40)
]


def picture(record):
    return Image.new("RGB", (900, 500), (6 * record["id"], 0, 0))


class Page(HTMLParser):
    """Texts and pictures by heading; complains of tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.heads, self.images, self.cards = [], [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "article":
            self.cards.setdefault(self.heads[-1], []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heads.append(data)
        elif "article" in self.open:
            self.cards[self.heads[-1]][-1] += f"{data} "


def written(folder, records=RECORDS, picture_of=picture, **options):
    path = write_report(folder, "VQA", {"accuracy": 63.118}, records, picture_of, **options)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page(path.read_text())


def test_best_and_worst_are_shown_with_their_references(tmp_path):
    page = written(tmp_path, shown=5)
    assert page.heads == ["Best", "Worst", "Random"]
    said = {
        head: [int(re.search(r"said (\d+)", card)[1]) for card in cards] for head, cards in page.cards.items()
    }
    assert said["Best"] == [39, 38, 37, 36, 35]
    assert said["Worst"] == [0, 1, 2, 3, 4]
    assert len(set(said["Random"])) == 5 and set(said["Random"]) <= set(range(5, 35))
    assert "true 39" in page.cards["Best"][0] and "score 0.97" in page.cards["Best"][0]


def test_pictures_are_small_and_inside(tmp_path):
    page = written(tmp_path, shown=2)
    assert len(page.images) == 6
    reds = []
    for attributes in page.images:
        data = attributes["src"].removeprefix("data:image/jpeg;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (image.format, max(image.size)) == ("JPEG", THUMBNAIL)
        assert attributes["alt"].endswith(".png")
        reds.append(image.getpixel((9, 9))[0])
    assert reds[:2] == pytest.approx([234, 228], abs=3)  # of 39 and 38
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text


def test_texts_are_escaped(tmp_path):
    evil = {
        "id": 1, "image": '"><b>.png', "question": "<i>?", "prediction": "<script>alert(1)</script>",
        "references": ["a & b", "$title"], "score": 1.0,
    }  # fmt: skip
    settings = {"a": "<z>"}
    path = write_report(tmp_path, "<x> $1", {"<y>": 1.0}, [evil], lambda _: picture(evil), settings=settings)
    page = Page(path.read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "b", "i", "x", "y", "z"}
    [card] = page.cards["Random"]
    assert "<script>alert(1)</script>" in card and "a & b" in card and "$title" in card and "<i>?" in card
    assert page.images[0]["alt"] == '"><b>.png'


def test_figures_and_settings(tmp_path):
    figures = {"accuracy": 63.118, "CIDEr": 145.8, "SPICE": float("nan"), "METEOR": None}
    path = write_report(tmp_path, "t", figures, RECORDS, picture, settings={"beams": 5, "folder": tmp_path})
    text = path.read_text()
    assert re.findall(r"<dd>(.*?)</dd>", text) == ["63.12", "145.80", "-", "-"]
    assert "&quot;beams&quot;: 5" in text and str(tmp_path) in text


def test_chance_is_the_seeds_alone():
    first, again, other = (choose(RECORDS, 4, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["Random"] != other["Random"] and first["Best"] == other["Best"]
    equal = [{"prediction": str(n), "score": 1.0} for n in range(100)]
    assert choose(equal, 4, 0)["Best"] != equal[:4]  # not what the data set begins with


@pytest.mark.parametrize(
    ("records", "kinds"),
    [
        ([], {}),
        ([{"score": 1.0}], {"Random": 1}),
        ([{"score": 0.0}, {"score": 1.0}, {"score": 0.5}], {"Best": 1, "Worst": 1, "Random": 1}),
        ([{"prediction": "a"}] * 9, {"Random": 4}),
        ([{"score": float("nan")}] * 3 + [{"score": 0.1}] * 3, {"Best": 1, "Worst": 1, "Random": 4}),
        ([{"score": n / 20} for n in range(20)], {"Best": 4, "Worst": 4, "Random": 4}),
    ],
)
def test_few_records_and_none_with_a_score(records, kinds):
    records = [dict(record) for record in records]
    chosen = choose(records, 4)
    assert {name: len(some) for name, some in chosen.items()} == kinds
    shown = [id(record) for some in chosen.values() for record in some]
    assert len(shown) == len(set(shown))


def test_several_texts_and_none(tmp_path):
    records = [
        {"id": "a", "prediction": ["two", "one", "one"], "references": ["x"] * 3},
        {"id": "b", "prediction": ""},
    ]
    cards = " ".join(written(tmp_path, records, lambda _: picture({"id": 1})).cards["Random"])
    assert re.search(r"one ×2\s+two\b", cards) and "x ×3" in cards and "nothing" in cards


def test_a_picture_that_cannot_be_opened_is_named(tmp_path):
    page = written(tmp_path / "page", RECORDS[:1], lambda record: tmp_path / record["image"])
    assert page.images == [] and "0.png" in page.cards["Random"][0]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    written(tmp_path)
    before = (tmp_path / "report.html").read_text()

    def failing(record):
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        written(tmp_path, picture_of=failing)
    assert (tmp_path / "report.html").read_text() == before


def test_many_figures_are_folded(tmp_path):
    figures = {f"question: {n}": float(n) for n in range(65)}
    page = Page(write_report(tmp_path, "t", figures, [], picture).read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("dd") == 65 and tags.count("details") == 2
    assert 0 < tags[: tags.index("details")].count("dd") < 65
