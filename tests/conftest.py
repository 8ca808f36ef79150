"""Tests run offline: only this machine's loopback can be reached, unless a test is marked `network`."""

import gc
import ipaddress
import os
import socket
import sys
from urllib.parse import urlsplit

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look through it again and again."""
    gc.freeze()


def _is_local(host: object) -> bool:
    if host in ("localhost", "", None):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def fresh_precision():
    """accelerate keeps one precision per process, which tests share."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _offline(request, monkeypatch):
    if request.node.get_closest_marker("network"):
        return

    def guard(name):
        original = getattr(socket.socket, name)

        def connect(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise OSError(f"tests are offline: refused to connect to {address}")
            return original(self, address)

        return connect

    def getaddrinfo(host, *args, **kwargs):
        text = host.decode() if isinstance(host, bytes) else host
        numeric = ":" in (text or "") or (text or "").replace(".", "").isdigit()
        if not (_is_local(text) or numeric):
            raise socket.gaierror(socket.EAI_NONAME, f"tests are offline: refused to look up {host!r}")
        return lookup(host, *args, **kwargs)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guard("connect"))
    monkeypatch.setattr(socket.socket, "connect_ex", guard("connect_ex"))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Tiny random models under the names of the embedded ones."""
    from serving import tiny_checkpoints

    from blip2.presets import Preset

    folder = tmp_path_factory.mktemp("assets")
    tiny_checkpoints(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(Preset, "folder", property(lambda self: None if self.repo_id else folder / self.name))
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    yield folder
    patch.undo()


@pytest.fixture
def hub(assets, tmp_path, monkeypatch):
    """A stand-in for the Hub, which holds a tiny OPT under a released name."""
    from hub import Hub, point_to

    with Hub(assets / "scenes-opt", "Salesforce/blip2-opt-2.7b") as stand_in:
        point_to(stand_in.url, tmp_path / "cache", monkeypatch)
        yield stand_in


# --- the app in Chromium: one for all browser tests, on tiny random models whose tokens are slowed down ---


@pytest.fixture(scope="session")
def app():
    from browsing import PACE
    from serving import serving

    with serving(tiny=True, pace=PACE) as running:
        yield running
    assert running.process.returncode == 0 and "Stopped.\n" in running.lines, running.lines


@pytest.fixture(scope="session")
def browser():
    from browsing import CHROMIUM, QUIET, sync_api

    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def visit(app, browser):
    """Open the page in a context of its own; checks what every page must keep."""
    from browsing import PATIENCE, box

    contexts, complaints, hosts = [], [], set()

    def complain(text):
        if "AbortError" not in text:  # gradio's client, of a request that a reload or a close ended
            complaints.append(text)

    def open_page(url=app.url, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: complain(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        box(page).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert hosts <= {"127.0.0.1", None, ""}, hosts  # data: and blob: have no host


# --- `blip2 serve` on the embedded models, in a thread ---


@pytest.fixture(scope="session")
def server():
    from asking import MODELS, serving

    with serving(*MODELS) as running:
        yield running


@pytest.fixture
def held(monkeypatch):
    """Its tokens wait for leave."""
    from asking import Held

    from blip2.server import worker

    held = Held()
    monkeypatch.setattr(worker, "decode", held.decode)
    yield held
    held.leave.release(1000)
