"""A server in a thread of this process, and what to ask it; run by itself, `blip2 serve` with slow tokens."""

import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCENE = ROOT / "examples" / "scene-1.png"
MODELS = ("scenes-opt", "scenes-flan-t5")  # of the fixture `server`


@dataclass
class Running:
    """A server that answers."""

    server: object
    workers: list
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none"):
        import openai

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), 120)

    def send(self, body: bytes, **headers: str) -> socket.socket:
        """A bare connection that has asked for a chat completion."""
        connection = self.connect()
        fields = {"Host": "here", "Content-Type": "application/json", "Content-Length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body)
        return connection


@cache
def loaded(name: str):
    """A checkpoint, loaded once a process."""
    import blip2

    return blip2.load(name)


@contextmanager
def serving(
    *names: str, grace: int = 20, batch_size: int = 32, force: bool = False, **settings
) -> Iterator[Running]:
    """Serve checkpoints on a free port; `settings` are those of `blip2.server.api.Settings`."""
    from blip2.ports import take_port
    from blip2.server.api import Settings
    from blip2.server.run import Server
    from blip2.server.worker import Worker

    ready = threading.Event()
    workers = [Worker(loaded(name), batch_size=batch_size, force=force) for name in names]
    server = Server(workers, Settings(**settings), ready=ready.set, grace=grace)
    with take_port("127.0.0.1", [0]) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        assert ready.wait(20)
        try:
            yield Running(server, workers, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(grace + 10)
            assert not thread.is_alive()


@contextmanager
def process(
    *arguments: str, slow: bool = False, threads: int | None = 1
) -> Iterator[tuple[subprocess.Popen, int]]:
    """`blip2 serve` as a process, and its port; with slow tokens if wanted, and all threads for None."""
    command = [__file__] if slow else ["-m", "blip2", "serve"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    child = subprocess.Popen(
        [sys.executable, "-u", *command, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = child.stdout.readline()
        assert " serves " in line, line + child.stderr.read()
        yield child, int(line.rpartition(":")[2].partition("/")[0])
    finally:
        child.kill()
        child.wait()


def address(picture: object = SCENE) -> str:
    """A picture as a data: URL: a path, bytes, or a PIL image."""
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    elif not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def image(picture: object = SCENE) -> dict:
    """A picture as a part of a message."""
    return {
        "type": "image_url",
        "image_url": {"url": picture if isinstance(picture, str) else address(picture)},
    }


def user(*parts: object) -> dict:
    """A message of the user: words, and parts that are not."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def body(*parts: object, model: str = "scenes-opt", **more: object) -> dict:
    """A request with one message."""
    return {"model": model, "messages": [user(*parts)], **more}


def drawn(count: int, start: int = 0) -> list:
    """Drawn scenes, and a question and its answer about each."""
    import random

    from PIL import Image

    from train.scenes.text import questions
    from train.scenes.world import render, sample

    found = []
    for seed in range(start, start + count):
        scene = sample(seed, "validation")
        question, answer, _ = next(iter(questions(scene, random.Random(seed))))
        found.append(
            (Image.fromarray(render(scene, loaded("scenes-opt").processor.image_size)), question, answer)
        )
    return found


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


def post(running, document, **headers):
    """Status, document and headers of an answer; a body that is bytes is sent as it is."""
    sent = document if isinstance(document, bytes) else json.dumps(document).encode()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    fields = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", "/v1/chat/completions", sent, {k: v for k, v in fields.items() if v})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), dict(answer.getheaders())


def said(running, *parts, **more):
    """The one answer to a request."""
    status, document, _ = post(running, body(*parts, **more))
    assert status == 200, document
    return document["choices"][0]["message"]["content"]


def alone(question, picture=SCENE, model="scenes-opt"):
    """What `Chat`, or without a question `generate`, says of a picture."""
    from blip2 import Chat, Generation, open_image
    from blip2.generation import generate

    own = loaded(model)
    chat = Chat(own.model, own.processor)
    chat.set_image(open_image(picture))
    if question:
        return chat.ask(question, Generation())
    return generate(own.model, own.processor, chat.image, own.caption_prompt, Generation())[0][0]


class Held:
    """Decoding that waits for leave before every token, and says how many rows there were."""

    def __init__(self):
        self.leave = threading.Semaphore(0)
        self.rows: list[int] = []
        self.tokens = 0
        from blip2.server import worker

        self.original = worker.decode

    def decode(self, model, picture, text, *given, **more):
        self.rows.append(len(text["input_ids"]))
        for token in self.original(model, picture, text, *given, **more):
            assert self.leave.acquire(timeout=20)
            self.tokens += 1
            yield token


def explore(running, examples: int) -> dict[str, int]:
    """Ask what schemathesis makes of the description, right and wrong; count answers by status.

    Most right requests are given a model and a picture that are there: what it makes up is neither.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from hypothesis.strategies import just, sampled_from
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{running.port}/openapi.json")
    counts: dict[str, int] = {}

    def ask(case, change):
        if change and isinstance(case.body, dict):
            before = case.body["messages"][:3] if change == "some" else []
            case.body |= {"model": "scenes-opt", "force": True, "messages": [*before, user("what?", image())]}
        response = case.call()
        counts[str(response.status_code)] = counts.get(str(response.status_code), 0) + 1
        case.validate_response(response, checks=[not_a_server_error])
        assert response.status_code < 500
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    limits = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode:
            change = sampled_from(["all", "all", "some", ""]) if mode.is_positive else just("")
            with suppress(Unsatisfiable):  # nothing can be wrong about /health
                limits(given(operation.as_strategy(generation_mode=mode), change)(ask))()
    return counts


def main(arguments: Sequence[str]) -> int:
    """`blip2 serve` whose tokens take a fifth of a second each."""
    from blip2.cli import main as command
    from blip2.server import worker

    decode = worker.decode

    def slow(*given, **more):
        for token in decode(*given, **more):
            time.sleep(0.2)
            yield token

    worker.decode = slow
    return command(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
