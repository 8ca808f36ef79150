"""This app as a Hugging Face Space: a folder with all that it needs, and its upload.

`spaces/` holds what such a folder is made from: the front matter, the requirements and the launcher.
"""

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceHardware, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from blip2.download import needed
from blip2.presets import PRESETS, resolve
from blip2.resources import PACKAGE, folder

SETTINGS = "space.json"  # what the Space's launcher reads


class DeployError(ValueError):
    """A Space that cannot be made, or not be uploaded."""


class NoConnectionError(DeployError):
    """The Hub cannot be reached."""


@dataclass(frozen=True)
class Hardware:
    """What a Space may run on.

    Attributes:
        flavor: the Hub's name for it.
        python: version that the Space asks for; ZeroGPU has few.
        memory: bytes that weights may take at most.
        models: offered where none are named.
    """

    flavor: SpaceHardware
    python: str
    memory: float
    models: tuple[str, ...]


HARDWARE = {
    "cpu": Hardware(SpaceHardware.CPU_BASIC, "3.11", 16e9, ("scenes-opt", "scenes-flan-t5")),
    "zerogpu": Hardware(SpaceHardware.ZERO_A10G, "3.12.12", 96e9, ("blip2-opt-2.7b", "blip2-flan-t5-xl")),
}


@dataclass(frozen=True)
class Space:
    """What to deploy.

    Attributes:
        repo_id: USER/SPACE.
        hardware: a key of `HARDWARE`.
        models: names of presets, or Hub ids; the first is open at first. None: the hardware's.
        title: of the page on the Hub.
        votes: USER/DATASET for votes on compared answers; None keeps none.

    Raises:
        ValueError: it cannot work.
    """

    repo_id: str
    hardware: str = "cpu"
    models: tuple[str, ...] = ()
    title: str = "BLIP-2"
    votes: str | None = None

    def __post_init__(self) -> None:
        check_id(self.repo_id, "USER/SPACE")
        if self.votes is not None:
            check_id(self.votes, "USER/DATASET")
        if self.hardware not in HARDWARE:
            raise DeployError(f"hardware is {self.hardware!r}; choose {' or '.join(HARDWARE)}")
        if not self.title.strip() or "\n" in self.title:
            raise DeployError(f"the title is {self.title!r}: give one line of text")
        names = tuple(dict.fromkeys(_name(name) for name in self.models or self.on.models))
        object.__setattr__(self, "models", names)
        needed = sum(PRESETS[name].memory("bfloat16") for name in names if name in PRESETS)
        if needed > self.on.memory:
            raise DeployError(
                f"the weights of {', '.join(names)} alone take {needed / 1e9:.0f} GB in bfloat16, and "
                f"{self.on.flavor.value} has {self.on.memory / 1e9:.0f} GB: offer fewer or smaller models"
            )

    @property
    def on(self) -> Hardware:
        """What it runs on."""
        return HARDWARE[self.hardware]

    @property
    def repositories(self) -> list[str]:
        """Hub ids of the models that are not embedded."""
        ids = [PRESETS[name].repo_id if name in PRESETS else name for name in self.models]
        return [repo_id for repo_id in ids if repo_id is not None]


def check_id(repo_id: str, form: str) -> None:
    """Refuse what cannot be a repository of somebody's on the Hub.

    Raises:
        DeployError: it is not of that form.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise DeployError(f"{repo_id!r} is not {form}: {error}") from None
    if repo_id.count("/") != 1:
        raise DeployError(f"{repo_id!r} is not {form}: say whose it is, such as me/blip2")


def _name(name: str) -> str:
    """The preset's name, or the Hub id as it is."""
    try:
        preset = resolve(name)
    except ValueError:
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise  # with the nearest names
        return name
    if preset.kind == "match":
        raise DeployError(
            f"{preset.name} scores texts and writes none: a Space offers models that answer. "
            "scenes-itm is in every Space, for programs"
        )
    return preset.name


def bundle(space: Space, target: Path, preload: list[str] | None = None) -> Path:
    """Write the Space's folder: all of it appears at once, or nothing.

    Args:
        space: what to deploy.
        target: where to: a new name, or an empty folder.
        preload: `preload_from_hub`, from `preload_list`; None leaves downloads to the Space's start.

    Raises:
        DeployError: there is something at `target`, or this installation lacks what a Space is made from.
    """
    templates = folder("spaces")
    if not (templates / "app.py").is_file():
        raise DeployError(
            "this installation lacks the Space's templates: run `blip2 deploy` from a clone of the "
            "repository, or from a package that `pip install .` made there"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DeployError(f"{target} is there already and not empty: choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "spaces", "examples")
        shutil.copytree(PACKAGE, fresh / "blip2", ignore=ignore)
        shutil.copytree(folder("examples"), fresh / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(templates / "app.py", fresh / "app.py")
        for name in ("requirements", "pre-requirements"):
            variant = templates / f"{name}-{space.hardware}.txt"
            if variant.is_file():
                shutil.copyfile(variant, fresh / f"{name}.txt")
        (fresh / "README.md").write_text(_card(space, templates, preload or []), "utf-8", newline="\n")
        (fresh / "LICENSE").write_text(_license(), "utf-8", newline="\n")
        settings = {"models": list(space.models), "votes": space.votes}
        (fresh / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8", newline="\n")
        if target.is_dir():
            target.rmdir()
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def _card(space: Space, templates: Path, preload: list[str]) -> str:
    """README.md: the template's front matter, what depends on the Space added to it, and its text."""
    card = SpaceCard((templates / "README.md").read_text("utf-8"))
    requirements = (templates / f"requirements-{space.hardware}.txt").read_text("utf-8")
    [gradio] = re.findall(r"^gradio==(\S+)$", requirements, re.M)
    values = {
        "title": space.title.strip(),
        "sdk_version": gradio,
        "python_version": space.on.python,
        "suggested_hardware": space.on.flavor.value,
        "models": space.repositories or None,
        "preload_from_hub": preload or None,
        "startup_duration_timeout": "1h" if space.repositories else None,
    }
    for key, value in values.items():
        card.data[key] = value  # None leaves the key out
    return str(card)


def _license() -> str:
    file = PACKAGE.parent / "LICENSE"
    if folder("spaces").parent == PACKAGE.parent and file.is_file():
        return file.read_text("utf-8")
    return distribution("blip2").read_text("licenses/LICENSE") or ""


def preload_list(space: Space) -> list[str]:
    """`preload_from_hub`: the files that the models need, by name, as the releases hold every weight twice.

    Raises:
        NoConnectionError: the Hub cannot be reached.
        DeployError: it does not have a model.
    """
    entries = []
    for repo_id in space.repositories:
        with _hub_errors(repo_id):
            names = HfApi().list_repo_files(repo_id)
        entries.append(f"{repo_id} {','.join(sorted(needed(names)))}")
    return entries


def upload(space: Space, source: Path, *, private: bool = False) -> tuple[str, bool]:
    """Make the Space, if there is none, and put a bundle there.

    Files of an earlier bundle that this one lacks are deleted; what the owner added is kept.

    Args:
        space: what to deploy.
        source: its bundle.
        private: for a new Space: only its owner may see it.

    Returns:
        The Space's address, and whether it was there before: then its hardware and visibility stay.

    Raises:
        NoConnectionError: the Hub cannot be reached.
        DeployError: no token, or the Hub refuses.
    """
    if get_token() is None:
        raise DeployError(
            "there is no token for the Hub: `hf auth login`, or set HF_TOKEN; it must be allowed to write"
        )
    api = HfApi(library_name="blip2")
    with _hub_errors(space.repo_id):
        existed = api.repo_exists(space.repo_id, repo_type="space")
        url = api.create_repo(
            space.repo_id,
            repo_type="space",
            space_sdk="gradio",
            space_hardware=space.on.flavor,
            private=private or None,  # None: as its owner's account has it
            exist_ok=True,
        )
        api.upload_folder(
            repo_id=space.repo_id,
            repo_type="space",
            folder_path=source,
            commit_message="Deploy BLIP-2",
            delete_patterns=["blip2/*", "examples/*", "pre-requirements.txt"],
        )
    return str(url), existed


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Say in one sentence why the Hub did not do as asked."""
    if constants.HF_HUB_OFFLINE:
        raise NoConnectionError("HF_HUB_OFFLINE is set: unset it to reach the Hub")
    try:
        yield
    except RepositoryNotFoundError as error:
        raise DeployError(f"the Hub has no {repo_id}, or not for this token") from error
    except HfHubHTTPError as error:
        raise DeployError(_refusal(repo_id, error)) from error
    except Exception as error:
        # the hub's client passes its HTTP library's own errors on: httpx's or httpx2's, by version
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith("httpx"):
            raise
        reason = " ".join(str(error).split())[:300]
        raise NoConnectionError(f"the Hub cannot be reached: {reason}") from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    said = error.server_message or " ".join(str(error).split())[:300]
    advice = {
        401: "the token is not accepted: `hf auth login` with one that may write",
        402: "the Hub asks for a paid plan: a Space on cpu-basic needs one, while a free account that is "
        "verified may have ZeroGPU Spaces (--hardware zerogpu)",
        403: f"the token may not write to {repo_id}: check the name, and the token's permissions",
    }.get(error.response.status_code, "the Hub refuses")
    return f"{repo_id}: {advice}. The Hub says: {said}"
