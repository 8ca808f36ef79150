"""The shelf of models: loaded once, shared, few at a time; precisions; what fits; downloads that go on."""

import gc
import shutil
import threading
import time
import weakref
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from huggingface_hub import constants
from test_ui import picture

from blip2 import checkpoint, devices
from blip2.checkpoint import CheckpointError
from blip2.cli import main
from blip2.devices import Memory
from blip2.download import download
from blip2.generation import Generation
from blip2.presets import PRESETS, best, room
from blip2.ui import build, cards, fitting
from blip2.ui.cards import join, split
from blip2.ui.compare import pair
from blip2.ui.models import Models
from blip2.ui.picker import Picker
from blip2.ui.session import Session
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject
from blip2.ui.work import Work

REPO = "Salesforce/blip2-opt-2.7b"
NAME = "blip2-opt-2.7b"
GB = 10**9
STEPS = 80
LONG = {"method": "nucleus", "temperature": 2.0, "seed": 1, "min_new_tokens": 12, "max_new_tokens": 12}


pytestmark = pytest.mark.usefixtures("assets")


@pytest.fixture
def folders(assets, tmp_path):
    """Three folders with the same tiny model: none of them is embedded."""
    return [str(shutil.copytree(assets / "scenes-opt", tmp_path / name)) for name in ("one", "two", "three")]


@pytest.fixture
def loads(monkeypatch):
    """Names that were loaded, in order."""
    seen: list[str] = []

    def counted(name, **options):
        seen.append(f"{name}@{options['precision']}".removesuffix("@auto"))
        return load(name, **options)

    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", counted)
    return seen


@pytest.fixture
def slow(monkeypatch):
    """Loads take STEPS steps of 10 ms, each of which can end them; how many were taken, and what they met."""
    log = SimpleNamespace(steps=0, loads=0, ended=None)

    def crawl(name, watch=None, **options):
        log.loads += 1
        try:
            for step in range(STEPS):
                time.sleep(0.01)
                log.steps += 1
                watch(step, STEPS)
        except BaseException as error:
            log.ended = type(error).__name__
            raise
        return load(name, **options)

    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", crawl)
    return log


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- what is offered ---


def test_a_model_is_loaded_once_for_all(monkeypatch):
    loads = []

    def slow(name, **options):
        loads.append(name)
        time.sleep(0.05)
        return load(name, **options)

    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", slow)
    models = Models("scenes-opt")
    got: list = []
    threads = [threading.Thread(target=lambda: got.append(models.get("scenes-opt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["scenes-opt"] and len(got) == 4 and len({id(one) for one in got}) == 1


def test_released_models_need_local_and_the_cache():
    with pytest.raises(CheckpointError, match=r"not served here.*--local"):
        Models("scenes-opt").get("blip2-opt-2.7b")
    with pytest.raises(CheckpointError, match=r"blip2 download blip2-opt-2.7b .*15.0 GB"):
        Models("scenes-opt", local=True).get("blip2-opt-2.7b")


def test_folders_need_local(assets):
    folder = str(assets / "scenes-opt")
    with pytest.raises(CheckpointError, match="not served here"):
        Models("scenes-flan-t5").get(folder)
    assert Models("scenes-flan-t5", local=True).get(folder).processor.family == "opt"
    assert Models(folder).get(folder).name == "scenes-opt"  # the operator's own choice


def test_cards_show_what_a_model_takes():
    models = Models("scenes-opt")
    card = models.card("blip2-flan-t5-xl")
    for words in ("15.8 GB", "7.9 GB bfloat16", "3.9 billion", "Apache-2.0"):
        assert words in card
    assert ("blip2-flan-t5-xl (15.8 GB download)", "blip2-flan-t5-xl") in models.choices()
    assert "drawn scenes only" in models.notice("scenes-opt") and models.notice("blip2-opt-2.7b") == ""
    assert not {"scenes-itm", "blip2-itm-vit-g"} & set(models.names)


def test_unknown_pictures_lead_to_the_picker_where_it_helps():
    here = Models("scenes-opt", local=True).instead()
    assert here.startswith("Choose a released model above, get the best one for this machine")
    assert "--model blip2-opt-2.7b" in Models("scenes-opt").instead()
    assert "such as blip2-flan-t5-xl" in Models("blip2-flan-t5-xl").instead()


# --- names ---


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blip2-opt-2.7b", ("blip2-opt-2.7b", "auto")),
        (" blip2-opt-2.7b@nf4 ", ("blip2-opt-2.7b", "nf4")),
        ("Salesforce/blip2-opt-2.7b@int8", ("Salesforce/blip2-opt-2.7b", "int8")),
        ("./a@b/model", ("./a@b/model", "auto")),
        ("./a@b/model@bfloat16", ("./a@b/model", "bfloat16")),
    ],
)
def test_a_name_may_carry_a_precision(name, parts):
    assert split(name) == parts
    assert join(*parts) == name.strip()


def test_odd_precisions(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown precision 'int4' in 'scenes-opt@int4': choose one of float32"
    ):
        Models("scenes-opt", local=True).get("scenes-opt@int4")
    odd = tmp_path / "model@nf4"
    odd.mkdir()
    assert split(str(odd)) == (str(odd), "auto")  # a folder's own name goes before


def test_all_names_of_a_model_are_one(assets, loads):
    models = Models("scenes-opt", local=True)
    first = models.get("scenes-opt")
    for name in ("Scenes-OPT", " scenes-opt@float32"):
        assert models.get(name) is first and models.is_loaded(name)
    folder = assets / "scenes-flan-t5"
    assert models.get(str(folder)) is models.get(f"{folder}/../scenes-flan-t5/")
    assert loads == ["scenes-opt", str(folder)]


# --- the shelf ---


def test_the_least_recently_used_leaves(folders, loads):
    models = Models("scenes-opt", local=True, at_most=2)
    one, two, three = folders
    models.get("scenes-opt")
    first = models.get(one)
    assert first.name == "one"
    gone = weakref.ref(models.get(two).model)
    models.get(one)
    models.get(three)
    assert [models.is_loaded(name) for name in ("scenes-opt", one, two, three)] == [True, True, False, True]
    assert gone() is None  # memory and all
    models.get(two)
    assert not models.is_loaded(one) and loads == ["scenes-opt", one, two, three, two]


def test_an_answer_keeps_its_model_until_it_ends(folders, tmp_path):
    models = Models("scenes-opt", local=True, at_most=1)
    one, two, _ = folders
    work, subject = Work(models), Subject.of_file(picture(tmp_path, 1))
    held = weakref.ref(models.get(one).model)
    task = ("talk", [one], subject, "what?", Generation(**LONG), None, None)
    answer = work.run(*task, stop=Stop())
    next(answer)
    models.get(two)
    assert not models.is_loaded(one) and held() is not None
    *_, turn = answer
    del answer
    gc.collect()
    assert held() is None  # though the visitor still has the conversation open
    assert work.last("talk", [one], subject, "and where?", Generation(), None, None, stop=Stop())

    alone = Subject.of_file(picture(tmp_path, 1))
    work.last(*task[:2], alone, *task[3:], stop=Stop())
    work.last("talk", [one], alone, "and where?", Generation(), None, None, stop=Stop())
    said = [[turn.answer for turn in who.conversation.turns] for who in (subject, alone)]
    assert said[0] == said[1] and len(said[0]) == 2 and said[0][0] == turn.answer


def test_folders_of_the_same_name_are_told_apart(assets, tmp_path):
    """What a visitor's picture looks like to a model is kept under its name."""
    paths = [
        str(shutil.copytree(assets / name, tmp_path / name / "model"))
        for name in ("scenes-opt", "scenes-flan-t5")
    ]
    models = Models("scenes-opt", local=True)
    assert len({models.get(path).name for path in paths}) == 2


def test_an_answer_that_ran_out_of_memory_unloads(folders, loads):
    models, one = Models("scenes-opt", local=True), folders[0]
    gone = weakref.ref(models.get(one).model)

    def answer():
        held = models.get(one)
        raise torch.OutOfMemoryError(f"CUDA out of memory in {held.name}")

    try:
        answer()
    except RuntimeError as error:
        assert devices.is_out_of_memory(error)
        models.unload(one, error)
        assert gone() is None
    models.unload(one)
    models.get(one)
    assert loads == [one, one]


def test_a_load_that_runs_out_of_memory_is_one_sentence(folders, monkeypatch):
    models, load, (one, two, _) = Models("scenes-opt", local=True), checkpoint.load, folders

    def fail(name, **options):
        if name == one:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB; /secret")
        return load(name, **options)

    monkeypatch.setattr(checkpoint, "load", fail)
    with pytest.raises(CheckpointError, match=r"one does not fit into memory: choose .*a smaller model$"):
        models.get(one)
    assert models.get(two) and not models.is_loaded(one)


def test_what_does_not_fit_is_not_begun(folders, loads, monkeypatch):
    """On a CPU the system would end the app."""
    models, (one, two, _) = Models("scenes-opt", local=True), folders
    models.get(one)
    monkeypatch.setattr(fitting, "memory", lambda: Memory(24 * GB, 3 * GB))
    monkeypatch.setattr(
        fitting, "needed", lambda base, precision: {"nf4": 2, "int8": 4}.get(precision, 8) * GB
    )
    with pytest.raises(
        CheckpointError, match=r"two needs 8\.0 GB of memory, and 3\.0 GB of 24\.0 GB are free"
    ) as error:
        models.get(two)
    assert "choose 8-bit (4.0 GB) or 4-bit (2.0 GB) or a smaller model" in str(error.value)
    assert not models.is_loaded(one)  # it had to leave, and that was not enough
    models.get("scenes-opt")
    monkeypatch.setattr(fitting, "memory", lambda: Memory(4 * GB, 3 * GB))
    models._shelf["elsewhere"] = models.get("scenes-opt")
    with pytest.raises(CheckpointError, match=r"of 4\.0 GB are free"):
        models.get(two)
    assert models.is_loaded("elsewhere")  # nobody leaves for what could never fit
    assert loads == [one, "scenes-opt"]


def test_only_these_models(assets, loads):
    only = ["scenes-flan-t5", str(assets / "scenes-opt"), "scenes-itm"]
    models = Models("scenes-flan-t5", local=True, at_most=1, only=only)
    assert models.names == only[:2] and not models.local
    models.load_all()
    assert all(map(models.is_loaded, only)) and len(loads) == 3
    for name in ("scenes-opt", NAME, "scenes-flan-t5@int8"):
        with pytest.raises(CheckpointError, match="not served here: choose one of scenes-flan-t5"):
            models.get(name)
    models.unload("scenes-flan-t5")
    assert models.is_loaded("scenes-flan-t5") and models.precisions(only[1]) == []
    with pytest.raises(ValueError, match="not among those to offer"):
        Models("scenes-opt", only=only)
    with pytest.raises(ValueError, match="use 1 or more"):
        Models("scenes-opt", at_most=0)


def test_a_space_offers_its_own_models(assets):
    demo = build(only=["scenes-flan-t5", "scenes-itm"])
    models = demo.blip2_models
    assert (models.default, models.names) == ("scenes-flan-t5", ["scenes-flan-t5"])
    [shown] = [block for block in demo.blocks.values() if getattr(block, "elem_id", None) == "model"]
    assert shown.choices == [("scenes-flan-t5", "scenes-flan-t5")]
    assert not shown.allow_custom_value
    assert pair(models) == ("scenes-flan-t5", "scenes-flan-t5")
    both = ["blip2-flan-t5-xl@int8", "blip2-opt-2.7b"]
    assert pair(Models(both[0], only=both)) == ("blip2-opt-2.7b", "blip2-flan-t5-xl@int8")


# --- waiting, together ---


def test_a_load_can_be_cancelled(slow, folders):
    models, stop = Models("scenes-opt", local=True), threading.Event()
    told = []
    for doing in models.load(folders[0], stop):
        told.append(doing)
        if "tensors" in doing:
            stop.set()
    assert f"of {STEPS} tensors" in told[-1] and told[-1].endswith(" s")
    until(lambda: slow.ended)
    assert slow.ended == "Abandoned" and slow.steps < STEPS and not models.is_loaded(folders[0])
    assert models.get("scenes-opt")


def test_leaving_the_page_leaves_the_load(slow, folders):
    waiting = Models("scenes-opt", local=True).load(folders[0], threading.Event())
    next(waiting)
    waiting.close()
    until(lambda: slow.ended)
    assert slow.ended == "Abandoned"


def test_a_load_goes_on_for_those_who_stay(slow, folders):
    models, stop, one = Models("scenes-opt", local=True), threading.Event(), folders[0]
    first, second = models.load(one, stop), models.load(one, threading.Event())
    next(first), next(second)
    stop.set()
    assert list(first) == []
    list(second)
    assert models.is_loaded(one) and (slow.loads, slow.steps) == (1, STEPS)


def test_who_comes_back_after_cancelling_begins_anew(slow, folders):
    models, stop, one = Models("scenes-opt", local=True), threading.Event(), folders[0]
    waiting = models.load(one, stop)
    next(waiting)
    stop.set()
    list(waiting)
    assert models.get(one)
    assert slow.loads in (1, 2)  # in time, it is the same load


def test_loading_tells_of_every_tensor(assets):
    told: list[tuple[int, int]] = []
    loaded = checkpoint.load("scenes-opt", watch=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(told[0][1])) and len(told) > 20
    assert len(told) >= len({id(parameter) for parameter in loaded.model.parameters()}) - 1

    class EnoughError(Exception):
        pass

    def enough(done, total):
        if done > 5:
            raise EnoughError

    with pytest.raises(EnoughError):
        checkpoint.load("scenes-opt", watch=enough)
    assert checkpoint.load("scenes-opt")


def test_an_error_reaches_all_who_wait(monkeypatch, folders):
    def fail(name, **options):
        time.sleep(0.2)
        raise CheckpointError("it is broken")

    monkeypatch.setattr(checkpoint, "load", fail)
    models = Models("scenes-opt", local=True)
    for _ in range(2):
        both = [models.load(folders[0], threading.Event()) for _ in range(2)]
        for waiting in both:
            next(waiting)
        for waiting in both:
            with pytest.raises(CheckpointError, match="it is broken"):
                list(waiting)


# --- precisions ---


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_fewer_bits_on_the_cpu(folders, tmp_path, precision):
    pytest.importorskip("bitsandbytes")
    models, subject = Models("scenes-opt", local=True), Subject.of_file(picture(tmp_path, 1))
    full, small = models.get(folders[0]), models.get(f"{folders[0]}@{precision}")
    assert (full.name, small.name, small.precision) == ("one", f"one@{precision}", precision)
    both = [subject.features(loaded).image_embeds.float() for loaded in (full, small)]
    assert not torch.equal(*both) and both[0].shape == both[1].shape
    task = ("instruct", [f"{folders[0]}@{precision}"], subject, "what color?", Generation(), None, None)
    assert isinstance(Work(models).last(*task, stop=Stop()).answer, str)


def test_precisions_are_offered_where_they_work(monkeypatch):
    here, public = Models("scenes-opt", local=True), Models(NAME)
    monkeypatch.setattr(fitting, "full_precision", lambda preset: "bfloat16")
    monkeypatch.setattr(fitting, "why_not_quantized", lambda: None)
    assert here.precisions(NAME) == [("Full (bfloat16)", "auto"), ("8-bit", "int8"), ("4-bit", "nf4")]
    assert here.precisions("scenes-opt") == public.precisions(NAME) == []
    monkeypatch.setattr(fitting, "why_not_quantized", lambda: "no bitsandbytes")
    assert here.precisions(NAME) == [("Full (bfloat16)", "auto")]
    with pytest.raises(CheckpointError, match="not served here"):
        public.get(f"{NAME}@nf4")


def test_why_there_are_no_fewer_bits(monkeypatch):
    monkeypatch.setattr(devices, "choose_device", lambda device: torch.device("mps"))
    assert "need an NVIDIA GPU or a CPU" in devices.why_not_quantized()
    monkeypatch.setattr(devices, "choose_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in devices.why_not_quantized()


def test_the_first_precision_that_fits(monkeypatch):
    models = Models("scenes-opt", local=True)
    monkeypatch.setattr(fitting, "full_precision", lambda preset: "float32")
    monkeypatch.setattr(fitting, "why_not_quantized", lambda: None)
    needed = {precision: room(PRESETS[NAME].memory(precision)) for precision in ("float32", "int8", "nf4")}
    for free, name in (
        (needed["float32"], NAME),
        (needed["float32"] - 1, f"{NAME}@int8"),
        (needed["int8"] - 1, f"{NAME}@nf4"),
        (needed["nf4"] - 1, NAME),  # none: the sentence is about full precision
    ):
        monkeypatch.setattr(fitting, "memory", lambda free=free: Memory(64 * GB, free))
        assert models.fitting(NAME) == name
    assert models.fitting(f"{NAME}@float16") == f"{NAME}@float16"


# --- the best for a machine ---


@pytest.mark.parametrize(
    ("memory", "accelerator", "disk", "options", "expected"),
    [
        (64, 80, 900, {}, ("blip2-flan-t5-xxl", "bfloat16")),
        (64, 24, 900, {}, ("blip2-flan-t5-xl", "bfloat16")),
        (64, 80, 40, {}, ("blip2-flan-t5-xl", "bfloat16")),  # no disk for XXL's 49 GB
        (64, 8, 900, {}, ("blip2-flan-t5-xl", "int8")),
        (64, 8, 900, {"quantized": False}, None),
        (64, 6, 900, {}, ("blip2-flan-t5-xl", "nf4")),
        (64, 5, 900, {}, ("blip2-opt-2.7b", "nf4")),
        (64, 2, 900, {}, None),
        (64, None, 900, {}, ("blip2-flan-t5-xl", "bfloat16")),  # XXL is no model for a CPU
        (16, None, 900, {"full": "float32"}, ("blip2-flan-t5-xl", "int8")),
        (64, 17, 900, {"full": {"opt": "float16", "t5": "float32"}}, ("blip2-flan-t5-xl", "int8")),
        (64, 24, 15.5, {}, ("blip2-opt-2.7b", "bfloat16")),
        (64, 24, 1, {}, None),
        (64, 24, 1, {"cached": ["blip2-opt-2.7b"]}, ("blip2-opt-2.7b", "bfloat16")),
        (64, 80, 900, {"cached": ["blip2-flan-t5-xl"]}, ("blip2-flan-t5-xl", "bfloat16")),  # no download
    ],
)
def test_the_best_for_a_machine(memory, accelerator, disk, options, expected):
    accelerator = None if accelerator is None else int(accelerator * GB)
    assert best(int(memory * GB), accelerator, int(disk * GB), **options) == expected


def test_the_best_for_this_machine_is_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(fitting, "accelerator_memory", lambda: None)
    monkeypatch.setattr(fitting, "full_precision", lambda preset: "float32")
    monkeypatch.setattr(fitting, "why_not_quantized", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * GB))
    for free, name in ((64, "blip2-flan-t5-xl"), (11, "blip2-flan-t5-xl@int8"), (1, None)):
        monkeypatch.setattr(fitting, "main_memory", lambda free=free: Memory(64 * GB, free * GB))
        assert Models("scenes-opt", local=True).best() == name


def test_containers_have_less_memory(tmp_path):
    whole = devices.main_memory(tmp_path)
    assert 0 < whole.free <= whole.total and whole.total > GB
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.main_memory(tmp_path).total == whole.total
    (tmp_path / "memory.max").write_text("900000000\n")
    (tmp_path / "memory.current").write_text("500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000000\nother 3\n")
    assert devices.main_memory(tmp_path) == Memory(900_000_000, 500_000_000)


# --- downloads ---


def weights(hub):
    """Requests for weights: where each began."""
    return [start for method, name, start in hub.log if method == "GET" and name == "model.safetensors"]


def test_a_download_goes_on_where_it_was_cancelled(hub, tmp_path):
    hub.pace = 0.005  # 1.3 s in all
    models, stop, told = Models("scenes-opt", local=True), threading.Event(), []
    for doing in models.download(NAME, stop):
        told.append(doing)
        if any(tmp_path.rglob("*.part")) and sum(p.stat().st_size for p in tmp_path.rglob("*.part")) > 50_000:
            stop.set()
    assert told[0].startswith("Downloading blip2-opt-2.7b") and "GB" in told[-1]
    until(lambda: not models._jobs)
    [part] = tmp_path.rglob("*.part")
    here = part.stat().st_size
    assert 50_000 < here < 265_000 and not checkpoint.is_available(NAME)
    with pytest.raises(CheckpointError, match=f"blip2 download {NAME}"):
        models.get(NAME)
    hub.pace = 0
    list(models.download(NAME, threading.Event()))
    assert weights(hub) == [None, f"bytes={here}-"] and checkpoint.is_available(NAME)
    asked = len(hub.log)
    list(models.download(NAME, threading.Event()))
    assert len(hub.log) == asked  # it is here
    assert "in the cache" in cards.label(NAME) and "in the cache" in models.card(NAME)
    assert not list(tmp_path.rglob("*.part"))


def test_two_visitors_share_a_download(hub):
    hub.pace = 0.002
    models, stop = Models("scenes-opt", local=True), threading.Event()
    first, second = (models.download(NAME, event) for event in (stop, threading.Event()))
    next(first), next(second)
    stop.set()
    list(first)
    list(second)
    assert weights(hub) == [None] and checkpoint.is_available(NAME)


def test_progress_is_of_all_bytes(hub):
    told: list[tuple[int, int]] = []
    folder = download(REPO, watch=lambda *so_far: told.append(so_far))
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert {in_all for _, in_all in told} == {total} and told[-1][0] == total
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) > 100


def test_no_room_on_the_disk(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB on the disk, and 0\.0 GB are free .*HF_HOME"):
        download(REPO)
    assert weights(hub) == []


def test_a_disk_that_fills_up(hub, monkeypatch, tmp_path):
    def full(done, total):
        if done > 100_000:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full; what is here stays"):
        download(REPO, watch=full)
    assert list(tmp_path.rglob("*.part")) and "Errno" not in str(full)


def test_a_damaged_download_is_removed(hub, tmp_path):
    hub.spoiled = True
    with pytest.raises(CheckpointError, match="arrived damaged and was removed: try again"):
        download(REPO)
    assert not list(tmp_path.rglob("*.part"))
    hub.spoiled = False
    assert (download(REPO) / "model.safetensors").is_file()


def test_no_connection(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = rf"{REPO} could not be downloaded: .*Later, with a connection: blip2 download {NAME} \(15\.0 GB\)"
    with pytest.raises(CheckpointError, match=words) as error:
        list(Models("scenes-opt", local=True).download(NAME, threading.Event()))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"downloading is off .*blip2 download {NAME}.*copy "):
        list(Models("scenes-opt", local=True).download(NAME, threading.Event()))


def test_strangers_download_nothing(hub):
    for models in (Models("scenes-opt"), Models(NAME)):
        with pytest.raises(CheckpointError, match=r"not served here|cannot be downloaded here"):
            list(models.download(NAME, threading.Event()))
    with pytest.raises(CheckpointError, match="cannot be downloaded here"):
        list(Models("scenes-opt", local=True).download("scenes-opt", threading.Event()))
    assert hub.log == []


def test_the_command_downloads(hub, capsys):
    assert main(["download", NAME]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{REPO} is in ") and "non-commercial" in said.err
    assert main(["download", REPO, "--json"]) == 0  # again: it is here
    assert weights(hub) == [None]
    assert main(["download", "scenes-opt"]) == 0
    assert main(["download", "nothing"]) == 2
    assert "nothing to download. Known models" in capsys.readouterr().err


# --- the picker ---


@pytest.fixture
def picker(assets):
    with gr.Blocks():
        made = Picker(Models("scenes-opt", local=True), gr.State(Session()))
        made.notes()
        made.about()
        made.wire(lambda session: {}, [])
    return made


def last(updates, component):
    return [update[component] for update in updates if component in update][-1]


def test_a_choice_shows_precisions_for_folders_alone(picker, folders):
    visitor = Session()
    shown = list(picker.choose(visitor, folders[0]))
    assert visitor.model == folders[0] and last(shown, picker.note) == ""
    assert last(shown, picker.precision)["visible"] and last(shown, picker.precision)["value"] == "auto"
    # told once: a second time would undo what the visitor chose while the model was loading
    assert sum(picker.precision in update for update in shown) == 1
    shown = list(picker.choose_precision(visitor, folders[0], "int8"))
    assert visitor.model == f"{folders[0]}@int8"
    assert (last(shown, picker.list), last(shown, picker.precision)["value"]) == (folders[0], "int8")
    assert "8-bit (int8)" in last(shown, picker.card)
    shown = list(picker.choose(visitor, "scenes-flan-t5"))
    assert visitor.model == "scenes-flan-t5" and not last(shown, picker.precision)["visible"]


def test_what_is_missing_can_be_downloaded(picker, hub):
    visitor = Session()
    shown = list(picker.choose(visitor, NAME))
    assert f"blip2 download {NAME} (15.0 GB)" in last(shown, picker.note)
    assert "scenes-opt stays in use" in last(shown, picker.note) and last(shown, picker.list) == "scenes-opt"
    assert last(shown, picker.fetch)["visible"] and "15.0 GB" in last(shown, picker.fetch)["value"]
    assert visitor.model is None and last(shown, picker.cancel)["value"] == "Close"
    closed = picker.close(visitor)
    assert closed[picker.note] == "" and not closed[picker.fetch]["visible"]
    shown = list(picker.get_missing(visitor))
    assert any("non-commercial" in update.get(picker.note, "") for update in shown)
    assert split(visitor.model)[0] == NAME and last(shown, picker.note) == ""


def test_cancelling_returns_to_the_model_before(picker, slow, folders):
    visitor = Session()
    going = picker.choose(visitor, folders[0])
    first = next(going)
    assert first[picker.cancel]["visible"] and first[picker.list] == folders[0]
    next(going)
    assert picker.close(visitor) == {picker.note: gr.skip()}
    began = time.monotonic()
    shown = list(going)
    assert time.monotonic() - began < 1
    assert "Cancelled. scenes-opt stays in use." in last(shown, picker.note)
    assert last(shown, picker.list) == "scenes-opt" and visitor.model is None


def test_another_choice_takes_the_place_of_the_first(picker, slow, folders):
    visitor = Session()
    first = picker.choose(visitor, folders[0])
    next(first), next(first)
    second = picker.choose(visitor, "scenes-flan-t5")
    next(second)
    assert list(first) == []  # it says nothing more
    until(lambda: slow.ended)
    list(second)
    assert visitor.model == "scenes-flan-t5"


def test_get_a_real_model(picker, hub, monkeypatch):
    visitor = Session()
    monkeypatch.setattr(fitting, "best_here", lambda: NAME)
    shown = list(picker.get_real(visitor))
    assert split(visitor.model)[0] == NAME and checkpoint.is_available(NAME)
    assert "in the cache" in str(last(shown, picker.card))
    monkeypatch.setattr(fitting, "best_here", lambda: None)
    assert "No released model fits" in last(list(picker.get_real(visitor)), picker.note)


def test_get_a_real_model_offline(picker, monkeypatch, tmp_path):
    visitor = Session()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fitting, "best_here", lambda: "blip2-flan-t5-xl@nf4")
    shown = list(picker.get_real(visitor))
    assert "blip2 download blip2-flan-t5-xl (15.8 GB)" in last(shown, picker.note)
    assert visitor.model is None and last(shown, picker.list) == "scenes-opt"


def test_strangers_get_no_buttons(assets):
    with gr.Blocks():
        public = Picker(Models("scenes-opt"), gr.State(Session()))
        public.about()
    assert public.real.visible is False and public.precision.visible is False
