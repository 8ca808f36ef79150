"""The Space: what its bundle holds, its front matter key by key, its requirements, the upload, the page."""

import filecmp
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx2
import pytest
import yaml
import zerogpu
from huggingface_hub import HfApi, RepoUrl, SpaceCard, SpaceHardware, constants
from huggingface_hub.errors import HfHubHTTPError
from packaging.requirements import Requirement
from serving import tiny_checkpoints

from blip2 import deploy, resources
from blip2.checkpoint import CheckpointError
from blip2.cli import main
from blip2.deploy import HARDWARE, DeployError, NoConnectionError, Space, bundle, preload_list, upload
from blip2.presets import Preset
from blip2.ui import space as on_space
from blip2.ui.models import Models
from blip2.ui.page import QUEUE

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ZEROGPU = {"python": {"3.12.12", "3.10.13"}, "torch": {"2.8.0", "2.9.1", "2.10.0", "2.11.0"}}  # as it lists
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


# The Hub's reference of what a Space's front matter may hold, and what a value must be.
KEYS = {
    "title": lambda value: isinstance(value, str) and value.strip(),
    "emoji": lambda value: isinstance(value, str) and len(value) <= 2 and not value.isascii(),
    "colorFrom": lambda value: value in COLORS,
    "colorTo": lambda value: value in COLORS,
    "sdk": lambda value: value == "gradio",
    "sdk_version": lambda value: isinstance(value, str) and re.fullmatch(r"\d+\.\d+\.\d+", value),
    "python_version": lambda value: isinstance(value, str) and re.fullmatch(r"3\.\d+(\.\d+)?", value),
    "app_file": lambda value: value == "app.py",
    "fullWidth": lambda value: isinstance(value, bool),
    "pinned": lambda value: isinstance(value, bool),
    "license": lambda value: value == "apache-2.0",
    "short_description": lambda value: isinstance(value, str) and 0 < len(value) <= 60,
    "tags": lambda value: strings(value) and len(set(value)) == len(value),
    "models": lambda value: strings(value) and all(map(HUB_ID.fullmatch, value)),
    "preload_from_hub": lambda value: (
        strings(value) and all(re.fullmatch(r"[\w.-]+/[\w.-]+ [^\s,]+(,[^\s,]+)*", entry) for entry in value)
    ),
    "suggested_hardware": lambda value: value in {flavor.value for flavor in SpaceHardware},
    "startup_duration_timeout": lambda value: isinstance(value, str) and re.fullmatch(r"\d+[mh]", value),
}
REQUIRED = {"title", "sdk", "sdk_version", "python_version", "app_file", "license", "suggested_hardware"}


def pins(path: Path) -> dict[str, str]:
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M))
    return {name.lower().replace("-", "_"): version for name, version in found.items()}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def online(monkeypatch):
    """The Hub, as far as a test replaces its calls."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(deploy, "get_token", lambda: "hf_token")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle for each hardware, on the models that it offers by itself."""
    root = tmp_path_factory.mktemp("bundles")
    preload = [
        "Salesforce/blip2-opt-2.7b config.json,model.safetensors",
        "Salesforce/blip2-flan-t5-xl a.json",
    ]
    return {
        name: bundle(Space("me/blip2", name), root / name, preload if name == "zerogpu" else None)
        for name in HARDWARE
    }


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text("utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


# --- the bundle ---


@pytest.mark.parametrize("hardware", HARDWARE)
def test_front_matter_key_by_key(made, hardware):
    found = front_matter(made[hardware])
    assert found.keys() <= KEYS.keys() and found.keys() >= REQUIRED
    for key, value in found.items():
        assert KEYS[key](value), f"{key}: {value!r}"
    card = SpaceCard.load(made[hardware] / "README.md")
    assert card.data.to_dict() == found
    assert found["sdk_version"] == gradio.__version__ == pins(ROOT / "requirements.txt")["gradio"]
    assert (made[hardware] / found["app_file"]).is_file()
    assert found["suggested_hardware"] == HARDWARE[hardware].flavor.value
    released = ["Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xl"]
    if hardware == "zerogpu":
        assert found["python_version"] in ZEROGPU["python"] and found["models"] == released
        assert [entry.split()[0] for entry in found["preload_from_hub"]] == released
    else:
        assert tuple(map(int, found["python_version"].split("."))) == sys.version_info[:2]
        assert not {"models", "preload_from_hub"} & found.keys()


def test_a_check_of_the_front_matter_can_fail(made):
    wrong = {"emoji": "ab", "colorFrom": "teal", "python_version": 3.11, "suggested_hardware": "a11g",
             "short_description": "x" * 61, "models": ["opt"], "preload_from_hub": ["a/b", "a/b c, d"],
             "sdk_version": "6", "startup_duration_timeout": "1"}  # fmt: skip
    for key, value in wrong.items():
        assert not KEYS[key](value), key


@pytest.mark.parametrize("hardware", HARDWARE)
def test_the_bundle_holds_all_that_it_needs(made, hardware):
    folder = made[hardware]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    top = {"README.md", "LICENSE", "app.py", "requirements.txt", "space.json"}
    top |= {"pre-requirements.txt"} if hardware == "cpu" else set()
    mine = {
        path.relative_to(ROOT).as_posix()
        for part in ("blip2", "examples")
        for path in (ROOT / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == top | mine
    equal, _, _ = filecmp.cmpfiles(ROOT, folder, mine | {"LICENSE"}, shallow=False)
    assert set(equal) == mine | {"LICENSE"}
    for name in ("scenes-opt", "scenes-flan-t5", "scenes-itm"):
        assert f"blip2/assets/{name}/model.safetensors" in files
    assert filecmp.cmp(folder / "app.py", ROOT / "spaces" / "app.py", shallow=False)
    told = json.loads((folder / "space.json").read_text())
    assert told == {"models": list(HARDWARE[hardware].models), "votes": None}


def test_the_bundle_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    space = Space("me/blip2", title="Pictures: two models", models=("scenes-opt",), votes="me/votes")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(DeployError, match="not empty: choose another folder"):
        bundle(space, tmp_path / "there")
    (tmp_path / "there" / "file").unlink()

    def fails(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(deploy, "_card", fails)
        bundle(space, tmp_path / "deep" / "new")
    assert list((tmp_path / "deep").iterdir()) == []
    written = bundle(space, tmp_path / "there")  # an empty folder will do
    assert front_matter(written)["title"] == "Pictures: two models"
    assert json.loads((written / "space.json").read_text()) == {"models": ["scenes-opt"], "votes": "me/votes"}
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_without_templates_it_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "folder", lambda name: tmp_path / name)
    with pytest.raises(DeployError, match="from a clone of the repository"):
        bundle(Space("me/blip2"), tmp_path / "new")


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "site-packages" / "blip2")
    strangers = tmp_path / "site-packages" / "spaces"
    strangers.mkdir(parents=True)
    assert resources.folder("spaces") == strangers  # beside, as in a clone, unless there is one inside
    inside = tmp_path / "site-packages" / "blip2" / "spaces"
    inside.mkdir(parents=True)
    assert resources.folder("spaces") == inside


def test_the_package_holds_every_folder():
    """The list in pyproject.toml is written by hand."""
    tools = PROJECT["tool"]["setuptools"]
    modules = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("blip2/**/__init__.py")}
    assert set(tools["packages"]) == modules | {"blip2.examples", "blip2.spaces"}
    for name, folder in tools["package-dir"].items():
        patterns = tools["package-data"][name]
        covered = {path for pattern in patterns for path in (ROOT / folder).glob(pattern) if path.is_file()}
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file()}
        for_clones = {path for path in files if "slurm" in path.parts or path.suffix == ".ipynb"}
        assert covered == files - for_clones


# --- the requirements ---


@pytest.mark.parametrize("hardware", HARDWARE)
def test_pins_are_what_the_tests_ran_on(made, hardware):
    tested, found = pins(ROOT / "requirements.txt"), pins(made[hardware] / "requirements.txt")
    needs = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["app"]]
    if hardware == "zerogpu":
        assert found.pop("spaces") and found.pop("torch") in ZEROGPU["torch"]
        needs = [need for need in needs if not need.startswith("torch>")]
        needs += PROJECT["project"]["optional-dependencies"]["quantized"]
    assert found.items() <= tested.items()
    assert set(found) == {Requirement(need).name for need in needs}
    for need in map(Requirement, needs):
        assert need.specifier.contains(found[need.name])


def test_torch_is_taken_without_cuda_on_a_cpu(made):
    first = (made["cpu"] / "pre-requirements.txt").read_text()
    assert pins(made["cpu"] / "pre-requirements.txt") == {"torch": pins(ROOT / "requirements.txt")["torch"]}
    assert "--index-url https://download.pytorch.org/whl/cpu\n" in first
    for folder in made.values():  # its packages come from wherever pip is set to take them
        assert "://" not in (folder / "requirements.txt").read_text()


# --- what can be deployed ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"repo_id": "blip2"}, "'blip2' is not USER/SPACE: say whose"),
        ({"repo_id": "me/my blip2"}, "is not USER/SPACE: .*alphanumeric"),
        ({"repo_id": "spaces/me/blip2"}, "is not USER/SPACE"),
        ({"votes": "votes"}, "'votes' is not USER/DATASET"),
        ({"hardware": "tpu"}, "hardware is 'tpu'; choose cpu or zerogpu"),
        ({"title": "\n"}, "one line"),
        ({"models": ("scenes-otp",)}, "Did you mean scenes-opt"),
        ({"models": ("./folder",)}, "unknown model"),
        ({"models": ("blip2-itm-vit-g",)}, "scores texts"),
        ({"models": ("blip2-flan-t5-xxl",)}, "take 24 GB in bfloat16, and cpu-basic has 16 GB"),
    ],
)
def test_what_cannot_work_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Space(**{"repo_id": "me/blip2"} | values)


def test_models_are_known_by_several_names():
    space = Space("me/blip2", models=("Salesforce/BLIP2-opt-2.7b", "blip2-opt-2.7b", "me/mine", "scenes-opt"))
    assert space.models == ("blip2-opt-2.7b", "me/mine", "scenes-opt")
    assert space.repositories == ["Salesforce/blip2-opt-2.7b", "me/mine"]


def test_files_are_preloaded_once(online, monkeypatch):
    lists = {
        "Salesforce/blip2-opt-2.7b": ["README.md", "config.json", "merges.txt", "m.safetensors", "p.bin"],
        "me/mine": ["config.json", "pytorch_model.bin"],
    }  # fmt: skip
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id: lists[repo_id])
    preload = preload_list(Space("me/blip2", models=(*lists, "scenes-opt")))
    assert preload == [
        "Salesforce/blip2-opt-2.7b config.json,m.safetensors,merges.txt",
        "me/mine config.json,pytorch_model.bin",
    ]
    assert KEYS["preload_from_hub"](preload)


# --- the upload ---


class Hub:
    """Stands for `HfApi`: notes what is asked of it, and fails as told."""

    def __init__(self, monkeypatch, existed=False, failure=None):
        self.calls, self.files = [], set()
        for name in ("repo_exists", "create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self.method(name))
        self.existed, self.failure = existed, failure

    def method(self, name):
        def call(api, *arguments, **settings):
            if self.failure is not None:
                raise self.failure
            self.calls.append((name, arguments, settings))
            if name == "upload_folder":
                folder = settings["folder_path"]
                self.files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
            return {"repo_exists": self.existed}.get(name, RepoUrl("https://huggingface.co/spaces/me/blip2"))

        return call


@pytest.mark.parametrize(("hardware", "flavor"), [("cpu", "cpu-basic"), ("zerogpu", "zero-a10g")])
def test_upload(online, monkeypatch, made, hardware, flavor):
    hub = Hub(monkeypatch)
    url, existed = upload(Space("me/blip2", hardware), made[hardware], private=True)
    assert (url, existed) == ("https://huggingface.co/spaces/me/blip2", False)
    (_, _, _), (_, created, how), (_, _, uploaded) = hub.calls
    assert created == ("me/blip2",) and how == {
        "repo_type": "space",
        "space_sdk": "gradio",
        "space_hardware": flavor,
        "private": True,
        "exist_ok": True,
    }
    assert uploaded["repo_id"] == "me/blip2" and uploaded["repo_type"] == "space"
    assert uploaded["delete_patterns"] == ["blip2/*", "examples/*", "pre-requirements.txt"]
    assert {
        "README.md",
        "app.py",
        "requirements.txt",
        "blip2/ui/space.py",
        "examples/scene-1.png",
    } <= hub.files


def refused(status: int, said: str) -> HfHubHTTPError:
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://huggingface.co/api/repos"))
    return HfHubHTTPError(f"{status}", response=response, server_message=said)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (refused(401, "Invalid token"), "the token is not accepted: `hf auth login`.* Invalid token"),
        (refused(402, "Subscribe to PRO"), "asks for a paid plan.*--hardware zerogpu.*Subscribe to PRO"),
        (refused(403, "Forbidden"), "may not write to me/blip2.*Forbidden"),
        (refused(500, "Oops"), "the Hub refuses. The Hub says: Oops"),
        (httpx2.ConnectError("Name or service not known"), "cannot be reached: Name or service"),
        (httpx2.ReadTimeout("timed out"), "cannot be reached: timed out"),
    ],
)
def test_a_failed_upload_is_a_sentence(online, monkeypatch, capsys, failure, words):
    Hub(monkeypatch, failure=failure)
    assert main(["deploy", "me/blip2"]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error


def test_what_is_not_the_hubs_doing_passes(online, monkeypatch, made):
    Hub(monkeypatch, failure=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        upload(Space("me/blip2"), made["cpu"])


def test_no_token_and_no_network_are_told(monkeypatch, made, offline):
    monkeypatch.setattr(deploy, "get_token", lambda: None)
    with pytest.raises(DeployError, match="there is no token for the Hub: `hf auth login`"):
        upload(Space("me/blip2"), made["cpu"])
    monkeypatch.setattr(deploy, "get_token", lambda: "hf_token")
    with pytest.raises(NoConnectionError, match="HF_HUB_OFFLINE is set"):
        upload(Space("me/blip2"), made["cpu"])


# --- the command ---


def test_deploy_says_where_it_is(online, monkeypatch, capsys):
    hub = Hub(monkeypatch, existed=True)
    assert main(["deploy", "me/blip2", "--votes", "me/votes", "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["url"] == "https://huggingface.co/spaces/me/blip2" and document["existed"] is True
    assert document["models"] == ["scenes-opt", "scenes-flan-t5"] and document["hardware"] == "cpu"
    assert "was there before" in said.err and "secret HF_TOKEN" in said.err and "me/votes" in said.err
    assert "space.json" in hub.files


def test_dry_run(offline, tmp_path, capsys):
    target = tmp_path / "bundle"
    words = ["deploy", "me/blip2", "--hardware", "zerogpu", "--dry-run", str(target)]
    assert main([*words, "--model", "blip2-opt-2.7b", "--model", "scenes-opt"]) == 0
    said = capsys.readouterr()
    assert str(target) in said.out and "OPT license" in said.err and "download its models" in said.err
    assert front_matter(target)["models"] == ["Salesforce/blip2-opt-2.7b"]
    assert "preload_from_hub" not in front_matter(target)
    assert json.loads((target / "space.json").read_text())["models"] == ["blip2-opt-2.7b", "scenes-opt"]
    assert main(words) == 1 and "not empty" in capsys.readouterr().err
    assert main(["deploy", "blip2", "--dry-run", str(target)]) == 2
    assert "USER/SPACE" in capsys.readouterr().err


# --- the page ---


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Tiny random models under the names of the embedded ones, and a Space that offers one of them."""
    tiny_checkpoints(tmp_path)
    monkeypatch.setattr(
        Preset, "folder", property(lambda self: None if self.repo_id else tmp_path / self.name)
    )
    file = tmp_path / "space.json"
    file.write_text(json.dumps({"models": ["scenes-flan-t5"], "votes": None}))
    for name in ("BLIP2_MODELS", "BLIP2_VOTES", "SPACES_ZERO_GPU"):
        monkeypatch.delenv(name, raising=False)
    return file


def test_variables_of_the_space_come_first(told, monkeypatch):
    assert on_space.settings(told) == (["scenes-flan-t5"], None)
    monkeypatch.setenv("BLIP2_MODELS", " scenes-opt, scenes-flan-t5,")
    monkeypatch.setenv("BLIP2_VOTES", "me/votes")
    assert on_space.settings(told) == (["scenes-opt", "scenes-flan-t5"], "me/votes")
    told.write_text(json.dumps({"models": ["scenes-opt"], "votes": "me/others"}))
    monkeypatch.setenv("BLIP2_VOTES", "")
    assert on_space.settings(told)[1] is None
    monkeypatch.setenv("BLIP2_MODELS", " ")
    with pytest.raises(ValueError, match="BLIP2_MODELS is empty"):
        on_space.settings(told)


def test_the_picker_offers_what_is_loaded_and_no_more(told):
    demo = on_space.build(told)
    models = demo.blip2_models
    assert models.choices() == [("scenes-flan-t5", "scenes-flan-t5")] and models.local is False
    assert models.is_loaded("scenes-flan-t5") and models.is_loaded("scenes-itm")
    for name in ("scenes-opt", "blip2-opt-2.7b", str(told.parent)):
        with pytest.raises(CheckpointError, match="not served here"):
            models.get(name)
    assert demo._queue.max_size == QUEUE  # ZeroGPU would have it at 1


def test_visitors_are_sent_to_a_released_model_that_is_here():
    models = Models("scenes-opt", only=["scenes-opt", "Salesforce/blip2-opt-2.7b"])
    assert models.names == ["scenes-opt", "blip2-opt-2.7b"]
    assert models.instead().startswith("Choose a released model above, such as blip2-opt-2.7b, or")
    assert "choose a released model" in models.notice("scenes-opt")
    without = Models("scenes-opt", only=["scenes-opt"])
    assert "not served here" in without.instead() and "not served here" in without.notice("scenes-opt")


def test_a_space_that_cannot_start_says_why(told, monkeypatch):
    monkeypatch.setenv("BLIP2_MODELS", "blip2-opt-2.7b")
    with pytest.raises(SystemExit, match=r"cannot start: .*blip2-opt-2.7b"):
        on_space.build(told)
    monkeypatch.setenv("BLIP2_MODELS", "")
    with pytest.raises(SystemExit, match="BLIP2_MODELS is empty"):
        on_space.build(told)


def test_zerogpu_loads_in_one_thread(told, monkeypatch):
    """Its stand-in for CUDA is there in the main thread alone."""
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "")  # so that it is put back
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=zerogpu.gpu))
    on_space.build(told)
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
