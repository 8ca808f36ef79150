"""`blip2 verify`: what is whole passes, in every layout; what is damaged fails, and where is said."""

import hashlib
import json
import shutil

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from blip2 import values, verify
from blip2.checkpoint import load, save
from blip2.cli import main
from blip2.errors import DoesNotFitError
from blip2.presets import EMBEDDED
from blip2.processing import Processor
from blip2.values import write_digests

FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Half as many tokens as people wait for, and memory for two tiny models at once."""
    monkeypatch.setitem(verify.LENGTHS, "max_new_tokens", 8)
    monkeypatch.setattr(verify, "free_unused", lambda: None)


@pytest.fixture
def files_only(monkeypatch):
    """Without the comparison with transformers."""
    monkeypatch.setattr(verify, "compare", lambda *_: [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> a folder of ours; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    for family in tiny.FAMILIES:
        words = tiny.language_family(family)
        processor = Processor(
            tiny.tokenizer(words),
            family=words,
            image_size=tiny.IMAGE_SIZE,
            num_query_tokens=tiny.NUM_QUERIES,
            qformer_tokenizer=tiny.tokenizer("bert") if family == "instruct" else None,
        )
        save(tiny.ours(family), processor, root / family, max_shard_size="60KB" if family == "t5" else "5GB")
    return root


@pytest.fixture
def folder(made, tmp_path):
    """family -> a copy, to be changed."""
    return lambda family="opt": shutil.copytree(made / family, tmp_path / family)


def report(folder, **options):
    return {check.name: check for check in verify.verify(folder, **options)}


def wrong(checks):
    return {name: f"{check.where} {check.found}" for name, check in checks.items() if check.passed is False}


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


# --- what is whole ---


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_checkpoints_pass(name, capsys):
    assert main(["verify", name]) == 0
    out = capsys.readouterr().out
    assert "have the digest recorded for them" in out and "PASS: " in out and "FAIL" not in out
    assert f"torch {torch.__version__}" in out and f"transformers {transformers.__version__}" in out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layout_passes(made, family):
    checks = report(made / family)
    assert wrong(checks) == {}
    seen = {"layout", "parameters", "finite", "plausible", "image embeddings", "Q-Former"}
    seen |= (
        {"ITM logits", "ITC scores"} if family == "retrieval" else {"logits", "greedy tokens", "beam words"}
    )
    assert seen <= {name for name, check in checks.items() if check.passed}
    assert {name for name, check in checks.items() if check.passed is None} == {
        "checksums", "digests", "key bias",
    }  # fmt: skip


def test_old_stage_2_revision_in_shards_of_bin(folder):
    path = folder()
    weights = {name: value.half() for name, value in load_file(path / "model.safetensors").items()}
    table = weights["language_model.model.decoder.embed_tokens.weight"]
    weights |= {"language_model.lm_head.weight": table.clone()}
    weights |= {"qformer.embeddings.position_ids": torch.arange(48)[None]}
    (path / "model.safetensors").unlink()
    places = {}
    for number in range(2):
        part = dict(list(weights.items())[number::2])
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save(part, path / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "processor_config.json").unlink()
    edit_config(path, lambda raw: raw.pop("image_token_index"))
    assert wrong(report(path)) == {}


def test_old_retrieval_revision(folder):
    """Its names of settings and of weights; transformers alone would leave half of it out."""
    path = folder("retrieval")

    def change(raw):
        raw.pop("image_token_index")
        raw["qformer_config"]["qformer_text_input"] = raw["qformer_config"].pop("use_qformer_text_input")

    def rename(weights):
        for name in list(weights):
            value = weights.pop(name)
            if name != "temperature" and not name.startswith("lm_head"):
                weights[name.replace("_projection.", "_proj.")] = value

    edit_config(path, change)
    edit(path, rename)
    checks = report(path)
    assert wrong(checks) == {} and checks["ITM logits"].passed and checks["ITC scores"].passed


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions(made, tmp_path, precision):
    loaded = load(made / "opt", precision=precision, device="cpu")
    path = save(loaded.model, loaded.processor, tmp_path / "small")
    checks = report(path, precision="bfloat16")
    assert wrong(checks) == {} and checks["logits"].passed and checks["greedy tokens"].passed is None
    assert f", {precision}, relative difference at most 0.05" in checks["logits"].expected


def test_other_encoders_are_not_compared(tmp_path):
    from blip2.config import Blip2AnyConfig
    from blip2.model import Blip2

    raw = tiny.config("opt").to_dict()
    raw.pop("model_type")
    raw["vision_config"] |= {"pre_layernorm": True, "patch_bias": False}
    processor = Processor(tiny.tokenizer("opt"), family="opt", image_size=28, num_query_tokens=6)
    path = save(tiny.randomize(Blip2(Blip2AnyConfig(**raw))), processor, tmp_path / "any")
    checks = report(path)
    assert wrong(checks) == {}
    assert "blip2-any" in checks["transformers"].found and checks["finite"].passed


# --- what is damaged ---


def noise(weights, name):
    weights[name] = 100 * weights[name].std() * torch.randn_like(weights[name])


def spoil(value):
    def change(weights, name):
        weights[name].flatten()[7] = value

    return change


def one_row(weights, name):
    weights[name][5] *= 200


DAMAGE = {
    "noise": (noise, FC1, "plausible", "times as large as its like"),
    "noise in a bias": (noise, "qformer.encoder.layer.2.output_query.dense.bias", "plausible", "times"),
    "a row": (one_row, FC1, "plausible", "row 5"),
    "zeros": (lambda w, name: w[name].zero_(), FC1, "plausible", "all zero"),
    "a bias of zeros": (lambda w, name: w[name].zero_(), FC1[:-6] + "bias", "plausible", "all zero"),
    "queries of zeros": (lambda w, name: w[name].zero_(), "query_tokens", "plausible", "all zero"),
    "nan": (spoil(torch.nan), FC1, "finite", "the first at 7"),
    "infinity": (spoil(torch.inf), "language_projection.weight", "finite", "1 of"),
    "missing": (lambda w, name: w.pop(name), FC1, "layout", "1 missing key"),
    "shape": (lambda w, name: w.update({name: w[name][:-1].clone()}), FC1, "layout", "mis-shaped"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_located(folder, kind):
    change, name, check, words = DAMAGE[kind]
    path = folder()
    edit(path, lambda weights: change(weights, name))
    found = wrong(report(path))
    assert check in found and name in found[check] and words in found[check]
    assert found.keys() <= {check, "parameters"}


def test_a_cut_off_file(folder, capsys):
    path = folder()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["verify", str(path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    [check] = [check for check in document["checks"] if check["passed"] is False]
    assert document["passed"] is False and document["versions"]["transformers"]
    assert check["name"] == "layout" and "model.safetensors is damaged or cut off" in check["found"]


def test_one_bit_is_enough_where_digests_are(folder, files_only):
    path = folder()
    write_digests(path)
    assert report(path)["digests"].passed

    def flip(weights):
        weights[FC1].view(torch.int32)[3, 3] ^= 1

    edit(path, flip)
    checks = report(path)
    assert wrong(checks).keys() == {"digests"} and checks["digests"].where == FC1
    assert checks["transformers"].passed is None


def test_a_new_checkpoint_in_the_folder_has_no_digests(folder, files_only):
    path = folder()
    write_digests(path)
    loaded = load(path, device="cpu")
    save(loaded.model, loaded.processor, path)
    assert report(path)["digests"].passed is None


def test_checksums_of_the_hubs_cache(made, tmp_path, files_only):
    """Files are links to blobs named by their checksums; big blobs may themselves be links to a store."""
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    for part in (snapshot, blobs, tmp_path / "shared"):
        part.mkdir(parents=True)
    for file in (made / "opt").iterdir():
        data = file.read_bytes()
        name = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if file.suffix == ".safetensors":
            name = hashlib.sha256(data).hexdigest()
            (tmp_path / "shared" / "another").write_bytes(data)
            (blobs / name).symlink_to(tmp_path / "shared" / "another")
        else:
            (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(blobs / name)
    checks = report(snapshot)
    assert wrong(checks) == {} and checks["checksums"].passed and checks["plausible"].passed is None
    count = len(list(snapshot.iterdir()))
    assert checks["checksums"].found == f"{count} of {count} files have theirs"
    beside = tmp_path / "local" / ".cache" / "huggingface" / "download"
    beside.mkdir(parents=True)
    for file in snapshot.iterdir():
        shutil.copy(file, tmp_path / "local")
        (beside / f"{file.name}.metadata").write_text(f"{'0' * 40}\n{file.readlink().name}\n0.0\n")
    assert report(tmp_path / "local")["checksums"].found == checks["checksums"].found
    file = tmp_path / "shared" / "another"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "model.safetensors" in wrong(report(snapshot))["checksums"]


def test_a_released_name_has_to_have_the_releases_counts(made, monkeypatch, files_only):
    monkeypatch.setattr(verify, "locate", lambda *_, **__: ("blip2-opt-2.7b", made / "opt"))
    check = report("blip2-opt-2.7b")["parameters"]
    assert check.passed is False and "3,744,761,856 by the release of blip2-opt-2.7b" in check.expected
    assert "image encoder 985,952,256, Q-Former 105,137,664" in check.expected
    assert "image encoder" in check.where and "image encoder" in check.found


def test_key_bias_of_eva_clip(folder, monkeypatch, files_only):
    monkeypatch.setattr(values, "EVA_WIDTH", 24)
    path = folder()
    assert "vision_model.encoder.layers.0.self_attn.qkv.bias" in wrong(report(path))["key bias"]

    def clear(weights):
        for layer in range(2):
            weights[f"vision_model.encoder.layers.{layer}.self_attn.qkv.bias"][24:48] = 0

    edit(path, clear)
    assert report(path)["key bias"].passed


@pytest.mark.parametrize(
    "part, check, where",
    [
        ("vision_model.encoder.layers.1", "image embeddings", "vision_model.encoder.layers.1"),
        ("qformer.encoder.layer.0.output_query", "Q-Former", "qformer.encoder.layer.0"),
        ("language_projection", "language projection", ""),
        ("language_model.model.decoder.layers.1", "language model", "language_model.model.decoder.layers.1"),
    ],
)
def test_where_the_two_part(made, monkeypatch, part, check, where):
    """An error in our computing, or loading: everything before it agrees."""

    def load_wrongly(*args, **options):
        loaded = load(*args, **options)
        next(loaded.model.get_submodule(part).parameters()).data.mul_(1.01)
        return loaded

    monkeypatch.setattr(verify, "load", load_wrongly)
    checks = report(made / "opt")
    names = [*verify.GROUPS, "logits"]
    assert {name for name in names if not checks[name].passed} == set(names[names.index(check) :])
    assert checks[check].where == where


def test_what_cannot_be_verified(tmp_path, capsys):
    assert main(["verify", "blip2-opt"]) == 2
    assert "Did you mean blip2-opt-" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    assert "holds no config.json" in capsys.readouterr().out
    assert main(["verify", "scenes-opt", "--device", "cuda:9"]) == 2


def test_a_model_that_memory_does_not_hold_is_not_passed(made, monkeypatch):
    def refuse(*args, **options):
        raise DoesNotFitError("opt needs 15.0 GB in float32, and 8.0 GB of memory are free: buy some")

    monkeypatch.setattr(verify, "load", refuse)
    found = wrong(report(made / "opt"))
    assert found.keys() == {"transformers"} and "15.0 GB" in found["transformers"]
    assert "compare in bfloat16" in found["transformers"] and "buy" not in found["transformers"]


def test_what_transformers_would_leave_out_is_said(folder, monkeypatch):
    """It loads a folder that lacks tensors, with random ones; a comparison would blame this package."""
    path = folder()
    whole = load(path, device="cpu")
    kept = whole.model
    edit(path, lambda weights: weights.pop("language_projection.weight"))
    given = verify.Inputs(
        whole.processor, torch.zeros(1), {}, kept.config, {}, "float32", torch.float32, kept.device
    )
    monkeypatch.setattr(verify, "ours", lambda *_: (verify.Run(), given))
    [check] = verify.compare(path)
    assert (check.name, check.passed) == ("transformers", False)
    assert "transformers finds no language_projection.weight" in check.found
