"""`blip2 download NAME --precision`: from a stand-in for the Hub to a small folder that its name finds."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blip2 import checkpoint, verify
from blip2.checkpoint import CheckpointError, load
from blip2.cli import main
from blip2.presets import PRESETS, find_preset
from blip2.ui import cards

NAME = "blip2-opt-2.7b"


def fetched(hub):
    return [name for method, name, _ in hub.log if method == "GET" and name == "model.safetensors"]


def test_small_folder_and_no_original(hub, tmp_path, capsys):
    """It is written, found by name and precision, and stays when the original goes."""
    assert main(["download", NAME, "--precision", "int8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = tmp_path / "blip2" / f"{NAME}-int8"
    assert document == {"name": NAME, "precision": "int8", "folder": str(folder), "freed": 0}
    stored = load_file(folder / "model.safetensors")
    assert any(tensor.dtype == torch.int8 for tensor in stored.values())
    assert load(NAME, precision="float32").folder != folder and load(NAME).folder != folder
    loaded = load(NAME, precision="int8")
    assert (loaded.name, loaded.folder, loaded.precision) == (NAME, folder, "int8")
    assert any(str(folder) in note for note in loaded.notes)
    checks = {check.name: check for check in verify.verify(folder)}
    assert checks["digests"].passed and all(check.passed is not False for check in checks.values())

    asked = len(fetched(hub))
    assert main(["download", NAME, "--precision", "int8", "--delete-original", "yes"]) == 0
    assert f"use it with --model {NAME} --precision int8" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("model.safetensors")) and len(fetched(hub)) == asked
    assert load(NAME, local_files_only=True).folder == folder
    for precision in ("float32", "nf4", "bfloat16"):
        assert not checkpoint.is_available(NAME, precision=precision)
        with pytest.raises(CheckpointError, match="is not in the cache"):
            load(NAME, precision=precision, local_files_only=True)
    assert "in the cache, 8-bit" in cards.label(f"{NAME}@int8") and "15.0 GB download" in cards.label(NAME)
    main(["info", "--json", "--quiet"])
    [model] = [one for one in json.loads(capsys.readouterr().out)["models"] if one["name"] == NAME]
    assert model["status"] == "here in int8" and model["small_folders"] == {"int8": str(folder)}


def test_half_the_size_in_a_folder_of_ones_own(hub, tmp_path, capsys):
    out = tmp_path / "mine"
    words = ["download", NAME, "--precision", "bf16", "--out", str(out), "--delete-original", "no"]
    assert main(words) == 0
    assert f"use it with --model {out}" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert load(out).precision == "bfloat16" and checkpoint.is_available(NAME, precision="float32")
    assert main(words) == 2
    assert "is there already: choose a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("answer, gone", [("y\n", True), ("\n", False), ("", False)])
def test_a_terminal_is_asked(hub, tmp_path, monkeypatch, capsys, answer, gone):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["download", NAME, "--precision", "bf16"]) == 0
    assert "Delete the original, 0.0 GB in " in capsys.readouterr().err
    assert checkpoint.is_available(NAME, precision="float32") is not gone
    assert checkpoint.is_available(NAME, precision="bfloat16")


def test_no_room_for_both_is_said_first(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000_000))
    assert main(["download", NAME, "--precision", "int8"]) == 1
    assert "GB for what is made of it, and 2.0 GB are free" in capsys.readouterr().err
    assert fetched(hub) == [] and not (tmp_path / "blip2").exists()


def test_nothing_half_written_is_left(hub, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2.saving.save_file", fail)
    assert main(["download", NAME, "--precision", "nf4", "--quiet"]) == 1
    assert list((tmp_path / "blip2").iterdir()) == []
    assert checkpoint.is_available(NAME, precision="float32")  # the download is not lost
    monkeypatch.undo()


@pytest.mark.parametrize(
    "words, said",
    [
        (["blip2-itm-vit-g", "--precision", "nf4"], "has no language model, which is what nf4 shrinks"),
        ([NAME, "--out", "folder"], "go with --precision"),
        (["someone/model", "--precision", "int8"], "say with --out FOLDER"),
        ([NAME, "--precision", "int8", "--revision", "v1"], "add --out FOLDER"),
        (["blip2-opt-27b", "--precision", "int8"], "Did you mean"),
    ],
)
def test_what_cannot_be(hub, capsys, words, said):
    assert main(["download", *words]) == 2
    assert said in capsys.readouterr().err and hub.log == []


# --- presets ---


def test_a_folder_goes_before_a_preset(tmp_path, monkeypatch):
    assert find_preset("Salesforce/BLIP2-opt-2.7b") is PRESETS[NAME]
    assert find_preset("someone/else") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert find_preset(NAME) is None


def test_decoding_of_the_paper(capsys):
    """Sec. 4.1 and 4.2: prompts, beams and lengths; COCO's captions have 8 tokens at least."""
    main(["info", "blip2-opt-2.7b-coco", "--json"])
    coco = json.loads(capsys.readouterr().out)
    assert coco["caption_prompt"] == "a photo of" and coco["question_prompt"] == "Question: {} Answer:"
    assert [coco["captions"][name] for name in ("num_beams", "min_new_tokens", "max_new_tokens")] == [
        5,
        8,
        30,
    ]
    assert [coco["answers"][name] for name in ("num_beams", "max_new_tokens", "length_penalty")] == [
        5,
        10,
        -1,
    ]
    main(["info", "blip2-flan-t5-xl"])
    said = capsys.readouterr().out
    assert "questions: Question: {} Short answer:" in said and "captions: 5 beams, 1 to 30 tokens" in said
    assert cards.caption_prompt("blip2-opt-2.7b-coco@nf4") == "a photo of" and not cards.caption_prompt(NAME)
