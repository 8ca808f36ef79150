"""The paper's tables: their arithmetic, what disagrees, and how they are shown beside one's own figures."""

import re

import pytest

from blip2.presets import PRESETS
from train.evaluation import MetricError
from train.evaluation.paper_tables import CHECKPOINTS, LAVIS
from train.evaluation.tables import WIDTH, columns, notes, paper, show

TABLES = (2, 3, 4, 5)
XL = "BLIP-2 ViT-g FlanT5-XL"


def rows(table):
    return {row.name: row for row in paper(table)}


@pytest.mark.parametrize("table", TABLES)
def test_figures_are_percentages_in_their_columns(table):
    names = columns(table)
    assert len(set(names)) == len(names)
    for row in paper(table):
        assert row.paper.keys() | row.lavis.keys() <= set(names) and row.paper
        assert re.fullmatch(r"[\d.]+[MB]", row.trained)
        for column, figure in row.paper.items():
            assert 0 < figure <= (150 if "CIDEr" in column else 100)
        for column, figure in row.lavis.items():  # near the paper's, else it stands in the wrong column
            assert figure == pytest.approx(row.paper[column], abs=2)
        for column in row.paper:  # recall at 1, 5, 10 cannot fall
            if column.endswith("@1") and f"{column[:-1]}5" in row.paper:
                ladder = [row.paper[name] for k in (1, 5, 10) if (name := f"{column[:-1]}{k}") in row.paper]
                assert ladder == sorted(ladder)


def test_figures_that_the_paper_names_elsewhere():
    """Table 1 and the text: the overview's figures stand in these tables, too."""
    assert rows(2)["BLIP-2 ViT-g FlanT5-XXL"].paper["VQAv2 test-dev"] == 65.0
    assert rows(2)["Flamingo80B"].paper["VQAv2 test-dev"] == 56.3
    best = rows(3)[XL].paper
    assert (best["NoCaps all CIDEr"], best["NoCaps all SPICE"]) == (121.6, 15.8)
    assert rows(3)["BLIP"].paper["NoCaps all CIDEr"] == 113.2
    giant = rows(5)["BLIP-2 ViT-g"].paper
    assert (giant["Flickr30k TR@1"], giant["Flickr30k IR@1"]) == (97.6, 89.7)
    assert (giant["COCO TR@1"], giant["COCO IR@1"]) == (85.4, 68.3)
    assert [len(paper(table)) for table in TABLES] == [13, 9, 11, 9]


def test_names_are_those_of_rows_and_checkpoints():
    released = {preset.repo_id for preset in PRESETS.values()}
    for table in TABLES:
        assert CHECKPOINTS[table].keys() | LAVIS[table].keys() <= rows(table).keys()
        assert set(CHECKPOINTS[table].values()) <= released
    assert rows(3)[XL].checkpoint == "Salesforce/blip2-flan-t5-xl-coco"


@pytest.mark.parametrize("table", TABLES)
def test_every_note_touches_a_cell_of_ours_alone(table):
    touched = set()
    for row in paper(table):
        assert not row.notes or row.name.startswith("BLIP-2")
        touched |= {number for numbers in row.notes.values() for number in numbers}
    assert touched == set(range(1, len(notes(table)) + 1))


def test_notes_touch_what_they_speak_of():
    texts = notes(2)
    found = rows(2)

    def told(row, column):
        return " ".join(texts[number - 1] for number in found[row].notes[column])

    assert "Length penalty" in told("BLIP-2 ViT-g OPT-2.7B", "VQAv2 val")
    assert "Length penalty" not in told(XL, "VQAv2 val")
    assert "51.88" in told("BLIP-2 ViT-g OPT-2.7B", "VQAv2 val")
    assert "51.88" not in told("BLIP-2 ViT-g OPT-6.7B", "VQAv2 val")
    assert "lemmatizes" in told(XL, "OK-VQA test") and "lemmatizes" not in told(XL, "VQAv2 val")
    assert "21 blocks" in told("BLIP-2 ViT-L FlanT5-XL", "GQA test-dev")
    assert "21 blocks" not in told(XL, "GQA test-dev")
    captions = " ".join(notes(3)[number - 1] for number in rows(3)[XL].notes["COCO CIDEr"])
    assert "1.15" in captions and "143.9" in captions and "NoCaps" not in captions


def lines(table, found):
    """Cells of the shown table's own part by row and column."""
    text = show(table, found).split("Others, from the paper")[0]
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[3:] if line]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_own_figures_stand_beside_the_papers():
    shown = lines(2, {XL: {"VQAv2 val": 62.84, "GQA test-dev": 44.2}})
    assert shown[XL, "VQAv2 val"][:4] == ["63.1", "63.1", "62.8", "-0.3"]
    assert shown[XL, "GQA test-dev"][:4] == ["44.2", "44.0", "44.2", "+0.0"]
    assert shown[XL, "VQAv2 test-dev"][:4] == ["63.0", "-", "-", "-"]
    assert shown[XL, "OK-VQA test"][2:4] == ["-", "-"]
    numbers = rows(2)[XL].notes["VQAv2 val"]
    assert shown[XL, "VQAv2 val"][4] == " ".join(f"[{number}]" for number in numbers)


def test_another_model_is_shown_without_a_difference():
    shown = lines(5, {"mine": {"COCO TR@1": 12.345}})
    assert shown["mine", "COCO TR@1"] == ["-", "-", "12.3", "-"]


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_what_was_not_measured_is_no_zero(missing):
    assert lines(2, {XL: {"OK-VQA test": missing}})[XL, "OK-VQA test"][2:4] == ["-", "-"]


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_whole(table):
    text = show(table, {})
    assert all(row.name in text for row in paper(table))
    assert all(f"[{number}] " in text for number in range(1, len(notes(table)) + 1))
    found = lines(table, {})
    ours = [row for row in paper(table) if row.name.startswith("BLIP-2")]
    assert len(found) == len(ours) * len(columns(table))
    assert all(cells[2:4] == ["-", "-"] for cells in found.values())
    assert max(map(len, text.splitlines())) <= WIDTH + 25


def test_wrong_names_are_refused():
    with pytest.raises(MetricError, match="table 6 is not among 2, 3, 4, 5"):
        show(6, {})
    with pytest.raises(MetricError, match="no VQAv2; it has VQAv2 val, "):
        show(2, {XL: {"VQAv2": 1.0}})
