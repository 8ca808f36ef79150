"""README and CONTRIBUTING keep their word: targets, commands, flags, files, links exist; marked blocks run.

A code block right after `<!-- run -->` is executed from the repository root; in shell blocks `blip2` is
`python -m blip2` of the Python that runs the tests.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [
    (name, bool(marked), language, body)
    for name, page in PAGES.items()
    for marked, language, body in BLOCK.findall(page)
]
SHELL = [body for _, _, language, body in BLOCKS if language == "bash"]
INLINE = [code for page in PAGES.values() for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def commands(program: str) -> set[str]:
    """Every line of a shell block, and inline code, that runs the program."""
    lines = [line for body in SHELL for line in body.splitlines()] + INLINE
    return {line.split("  #")[0].strip() for line in lines if line.startswith(f"{program} ")}


def tree() -> list[str]:
    """Paths in the README's file tree, from the root."""
    body = PAGES["README.md"].split("## Files")[1].split("```")[1]
    paths, folder = [], ""
    for line in body.strip().splitlines():
        name = line.split()[0]
        paths.append(folder + name if line.startswith(" ") else name)
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
    return paths


def help_of(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "blip2", *words, "--help"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_blocks_to_check():
    assert len([1 for _, marked, _, _ in BLOCKS if marked]) >= 2
    assert len(commands("make")) >= 4 and len(commands("blip2")) >= 4


@pytest.mark.parametrize("line", sorted(commands("make")))
def test_make_target_exists(line):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert words and set(words) <= targets


@pytest.mark.parametrize("subcommand", sorted({shlex.split(line)[1] for line in commands("blip2")}))
def test_command_and_flags_exist(subcommand):
    text = help_of() if subcommand.startswith("-") else help_of(subcommand)
    for line in commands("blip2"):
        words = shlex.split(line)[1:]
        if words[0] == subcommand:
            flags = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
            assert [flag for flag in flags if flag not in text] == []


@pytest.mark.parametrize("path", tree())
def test_listed_file_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_module_is_listed():
    modules = {f"blip2/{path.name}" for path in (ROOT / "blip2").glob("*.py")}
    modules |= {f"train/{path.name}" for path in (ROOT / "train").glob("*.py") if path.name != "__init__.py"}
    assert sorted(modules - set(tree())) == [], "give it a line in the README's file tree"


@pytest.mark.parametrize("name", PAGES)
def test_local_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#\s]+)", PAGES[name])
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (ROOT / target).exists()] == []


MARKED = [(language, body) for _, marked, language, body in BLOCKS if marked]


@pytest.mark.long
@pytest.mark.parametrize(("language", "body"), MARKED, ids=[language for language, _ in MARKED])
def test_marked_block_runs(language, body):
    if language == "bash":  # one process for all its commands: each would import torch
        commands = [shlex.split(line)[1:] for line in body.splitlines() if line.startswith("blip2 ")]
        assert len(commands) == len(body.strip().splitlines()), "a line is no command of ours"
        body = (
            f"from blip2.cli import main\nfor command in {commands}:\n    assert not main(command), command"
        )
    command = [sys.executable, "-c", body]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "it printed nothing"


def test_pins_agree():
    """requirements.txt is inside pyproject's ranges, names no place, and pins pre-commit's ruff."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for name in extras if name != "bulk" for line in extras[name]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())) == {
        pins["ruff"]
    }
    assert pins["torch"] in PAGES["README.md"]
