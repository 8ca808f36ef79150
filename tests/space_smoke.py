"""Serve a Space's bundle as the Hub would, and ask it something: `python tests/space_smoke.py BUNDLE PYTHON`.

BUNDLE is what `blip2 deploy --dry-run` wrote, PYTHON the interpreter of an environment that holds what its
requirements.txt names and no more. This program runs in the clone's environment and compares the pages.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from gradio_client import Client, handle_file

from blip2.ui import build

PATIENCE = 90  # seconds for the page
CAPTION = "a small green circle and a large red star"  # of examples/scene-1.png


def parts(config: dict) -> list[tuple]:
    """What a page is made of, without what each start makes anew."""
    names = ("label", "elem_id", "placeholder")
    return [
        (part["type"], *(str(part["props"].get(name)) for name in names)) for part in config["components"]
    ]


def main(bundle: Path, python: str) -> None:
    """Raises AssertionError, or says that all is well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "SPACE_ID": "someone/blip2", "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": temporary,
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        where = subprocess.run(
            [python, "-c", "import blip2; print(blip2.__file__)"],
            cwd=bundle, env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert Path(where.strip()) == bundle / "blip2" / "__init__.py", where
        start = time.monotonic()
        app = subprocess.Popen(
            [python, "-u", "app.py"], cwd=bundle, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                try:
                    served = httpx.get(f"{address}/config", timeout=10).raise_for_status().json()
                    break
                except httpx.TransportError:
                    assert app.poll() is None and time.monotonic() - start < PATIENCE, "there is no page"
                    time.sleep(0.5)
            ready = time.monotonic() - start
            assert parts(served) == parts(build().get_config_file()), "the page differs from the app's"
            client = Client(address, verbose=False)
            said = client.predict(handle_file(bundle / "examples" / "scene-1.png"), api_name="/caption")
            assert said == [CAPTION], said
            app.send_signal(signal.SIGTERM)
            code = app.wait(30)
            assert code == 0, f"the app ended with {code}"
        finally:
            app.kill()
            print(app.communicate()[0], end="")
    print(f"The Space's bundle served its page after {ready:.0f} s and said: {said[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), os.path.abspath(sys.argv[2]))
