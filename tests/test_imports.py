"""The direction of imports: who may import whom, read from the sources without running them.

Below, a module may import modules of its own row and of the rows above it, never in a circle. Nothing in
`blip2` imports `train`; only `blip2/ui` imports gradio, only `blip2/server` fastapi; `import blip2`
and `blip2 --help` leave torch alone.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import blip2

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"devices", "fetch", "config", "errors", "ports", "settings", "resources"},
    {"base", "vision", "encoders", "qformer", "language", "packed"},
    {"representation", "model"},
    {
        "adapters",
        "images",
        "processing",
        "checkpoint",
        "fitting",
        "hub",
        "placement",
        "progress",
        "quantize",
        "shards",
        "layout",
        "saving",
        "convert",
        "download",
        "lavis_names",
        "novelty",
        "presets",
    },
    {
        "conversation",
        "beams",
        "cache",
        "decoders",
        "static",
        "threads",
        "generation",
        "chat",
        "explain",
        "checks",
        "values",
        "verify",
    },
    {"bench", "bulk", "server", "folder", "pictures", "report", "sidecars", "deploy", "search"},
    {"cli", "ui", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = sorted((ROOT / "blip2").rglob("*.py"))
TRAINING = sorted((ROOT / "train").rglob("*.py"))


def module(path: Path) -> str:
    """`blip2/ui/page.py` -> "ui": the module, or the folder that stands for its files."""
    return path.relative_to(ROOT / "blip2").parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Dotted names of all that a file imports, names in `from a import b` included: "a.b"."""
    tree = ast.parse(path.read_text())
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def own(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of `blip2` that a file imports; public names count as the module they live in."""
    names = set()
    for name in imports(path, top_level_only):
        parts = name.split(".")
        if parts[0] == "blip2" and len(parts) > 1 and parts[1] != "__version__":
            names.add(blip2._HOMES.get(parts[1], parts[1]))
    return names


def test_every_module_has_a_row():
    assert {module(path) for path in SOURCES} - set(RANK) - {"__init__"} == set(), "add it to LAYERS"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path == ROOT / "blip2" / "__init__.py":  # above all, and lazy
        assert own(path, top_level_only=True) == set()
        return
    assert {name for name in own(path) if RANK.get(name, 0) > RANK[module(path)]} == set()
    foreign = {name.split(".")[0] for name in imports(path)}
    assert "train" not in foreign
    assert "gradio" not in foreign or module(path) == "ui"
    assert not foreign & {"fastapi", "starlette", "uvicorn"} or module(path) == "server"
    assert not any(name.startswith("torch.distributed") for name in imports(path))


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if module(path) != "__init__":
            graph.setdefault(module(path), set()).update(own(path, top_level_only=True) - {module(path)})
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it


def test_training_uses_no_interface():
    for path in TRAINING:
        assert "gradio" not in {name.split(".")[0] for name in imports(path)}, path
        assert not own(path) & {"ui", "cli", "server"}, path


def test_reader_sees_each_form_of_import(tmp_path, monkeypatch):
    """The checks above are worth as much as `imports` is."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "blip2" / "vision.py"
    path.parent.mkdir()
    path.write_text(
        "import blip2.chat\nfrom blip2 import load, __version__\n"
        "from . import cli\nfrom .model import Blip2\n"
        "def late():\n    from blip2.ui import main\n"
    )
    assert own(path) == {"chat", "checkpoint", "cli", "model", "ui"}
    assert own(path, top_level_only=True) == {"chat", "checkpoint", "cli", "model"}


@pytest.mark.parametrize("name", blip2.__all__)
def test_public_name_is_there(name):
    assert getattr(blip2, name) is not None


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"'blip2' has no attribute 'laod'.*load"):
        _ = blip2.laod


CHECK = "print(sorted({'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules)), file=sys.stderr)"
HELP = """
from blip2.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize("program", ["import blip2; dir(blip2)", HELP], ids=["import blip2", "blip2 --help"])
def test_quick_start(program):
    command = [sys.executable, "-c", f"import sys\n{program}\n{CHECK}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, ["[]"]), done.stderr


def test_the_page_is_built_without_torch():
    program = (
        "import sys; from blip2.ui import build; build(local=True); "
        "print(sys.modules.keys() & {'torch', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["set()"]), done.stderr
