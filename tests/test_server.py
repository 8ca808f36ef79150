"""`blip2 serve`: OpenAI's client gets what `Chat` says, many get what each would get alone, and bad requests are told so.

Long tests print what is measured: `pytest -s -m long tests/test_server.py`.
"""

import http.client
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from asking import ROOT, SCENE, Running, address, body, drawn, image, loaded, process, serving, user
from PIL import Image

from blip2 import Chat, Generation, open_image
from blip2.generation import generate
from blip2.server import worker as workers

MODELS = ("scenes-opt", "scenes-flan-t5")
COLOR, SHAPE = "what color is the circle?", "what shape is the red thing?"


@pytest.fixture(scope="session")
def server():
    with serving(*MODELS) as running:
        yield running


class Held:
    """Decoding that waits for leave before every token, and says how many rows there were."""

    def __init__(self):
        self.leave = threading.Semaphore(0)
        self.rows: list[int] = []
        self.tokens = 0
        self.original = workers.decode

    def decode(self, model, picture, text, *given, **more):
        self.rows.append(len(text["input_ids"]))
        for token in self.original(model, picture, text, *given, **more):
            assert self.leave.acquire(timeout=20)
            self.tokens += 1
            yield token


@pytest.fixture
def held(monkeypatch):
    held = Held()
    monkeypatch.setattr(workers, "decode", held.decode)
    yield held
    held.leave.release(1000)


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
    own = loaded(model)
    chat = Chat(own.model, own.processor)
    chat.set_image(open_image(picture))
    if question:
        return chat.ask(question, Generation())
    return generate(own.model, own.processor, chat.image, own.caption_prompt, Generation())[0][0]


# --- what OpenAI's client gets ---


@pytest.mark.parametrize("model", MODELS)
def test_client_gets_what_chat_says(server, model):
    """Whole and streamed, the second turn with the first before it."""
    own = loaded(model)
    chat = Chat(own.model, own.processor)
    chat.set_image(open_image(SCENE))
    first, second = chat.ask(COLOR, Generation()), chat.ask(SHAPE, Generation())
    assert (first, second) == ("green", "star")
    read = [len(own.processor.tokenizer(turn.prompt)["input_ids"]) + own.processor.num_query_tokens for turn in chat.turns]

    completions = server.client().chat.completions
    messages = [user(COLOR, image())]
    whole = completions.create(model=model, messages=messages)
    [choice] = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", first, "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (read[0], chat.turns[0].num_tokens)

    messages += [{"role": "assistant", "content": first}, user(SHAPE)]
    chunks = list(
        completions.create(model=model, messages=messages, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.model for chunk in chunks} == {model} and len({chunk.id for chunk in chunks}) == 1
    *chunks, last = chunks
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == second
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == [] and last.usage.prompt_tokens == read[1]  # which has the first turn in it
    assert last.usage.completion_tokens == chat.turns[1].num_tokens


def test_stream_is_server_sent_events_to_the_end(server):
    with server.send(json.dumps(body(image(), stream=True)).encode(), Connection="close") as connection:
        head, _, text = connection.makefile("rb").read().decode().partition("\r\n\r\n")
    assert "200 OK" in head and "content-type: text/event-stream" in head
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 6  # a caption comes in many pieces
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == alone("") != ""


def test_picture_alone_is_captioned(server):
    status, document, _ = post(server, body(image(), n=2))
    assert status == 200 and [choice["index"] for choice in document["choices"]] == [0, 1]
    assert {choice["message"]["content"] for choice in document["choices"]} == {alone("")}


def test_sampling_repeats_by_seed(server):
    own = loaded("scenes-opt")
    seen = own.model.encode_image(own.processor.images(open_image(SCENE)))
    sampling = Generation("nucleus", temperature=1.5, top_p=1.0, seed=3, num_captions=3)
    [expected] = generate(own.model, own.processor, seen, "", sampling)
    answers = []
    for seed in (3, 3, 4):
        _, document, _ = post(server, body(image(), temperature=1.5, seed=seed, n=3))
        answers.append([choice["message"]["content"] for choice in document["choices"]])
    assert answers[0] == answers[1] == expected != answers[2] and len(set(expected)) > 1


def test_stops_and_lengths(server):
    caption = alone("")
    before, _, _ = caption.partition(" and")
    assert before != caption
    for stop in ("and", ["zebra", "and"]):
        _, document, _ = post(server, body(image(), stop=stop))
        choice = document["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (before + " ", "stop")
    chunks = server.client().chat.completions.create(
        model="scenes-opt", messages=[user(image())], stop=["and a"], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before + " "
    _, document, _ = post(server, body(image(), max_tokens=50, max_completion_tokens=3))
    choice = document["choices"][0]
    assert choice["finish_reason"] == "length" and document["usage"]["completion_tokens"] == 3
    assert caption.startswith(choice["message"]["content"])


def test_own_fields_change_the_prompt(server):
    processor = loaded("scenes-opt").processor

    def read(*messages, **more):
        _, document, _ = post(server, {"model": "scenes-opt", "messages": list(messages), **more})
        return document["usage"]["prompt_tokens"] - processor.num_query_tokens

    def tokens(text):
        return len(processor.tokenizer(text)["input_ids"])

    asked = user(COLOR, image())
    framed = f"Question: {COLOR} Answer:"
    assert read(asked, describe=0) == tokens(framed) < read(asked)
    system = {"role": "system", "content": "a red star"}
    assert read(system, asked, describe=0) == tokens(f"a red star. {framed}")
    assert read(asked, style="raw") == tokens(COLOR)
    assert read(asked, describe=0, style="short") == tokens(f"Question: {COLOR} Short answer:")


def test_turns_that_do_not_fit_are_dropped_and_said(server):
    turns = [user(image()), {"role": "assistant", "content": "a red star"}]
    for _ in range(40):
        turns += [user(SHAPE), {"role": "assistant", "content": "the red thing is a star"}]
    status, document, _ = post(server, {"model": "scenes-opt", "messages": [*turns, user(COLOR)]})
    assert status == 200 and 0 < document["dropped_turns"] < 41
    assert document["usage"]["prompt_tokens"] < loaded("scenes-opt").processor.context


def test_models_health_and_description(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve("scenes-opt").owned_by == "blip2"
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    found = {}
    for path in ("/health", "/openapi.json", "/nowhere", "/v1/models/gpt"):
        connection.request("GET", path)
        answer = connection.getresponse()
        found[path] = answer.status, json.loads(answer.read())
    connection.close()
    assert found["/health"] == (200, {"status": "ok", "waiting": 0, "answering": 0})
    assert set(found["/openapi.json"][1]["paths"]) == {
        "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/health"
    }  # fmt: skip
    assert found["/nowhere"][0] == found["/v1/models/gpt"][0] == 404
    assert found["/v1/models/gpt"][1]["error"]["code"] == "model_not_found"


def test_picture_that_the_model_does_not_know(server):
    photograph = image(ROOT / "examples" / "photos" / "cat.jpg")
    status, document, _ = post(server, body(COLOR, photograph))
    assert (status, document["error"]["code"]) == (400, "unknown_picture")
    assert "drawn scenes only" in document["error"]["message"] and "force" in document["error"]["message"]
    assert said(server, COLOR, photograph, force=True)


# --- many at once ---


def test_those_who_wait_are_answered_together_as_if_alone(server, held):
    pictures = [ROOT / "examples" / f"scene-{number}.png" for number in (1, 2, 3)]
    questions = [COLOR, "", "how many things are there?", SHAPE, "is there a star?", COLOR]
    asked = [(question, pictures[number % 3]) for number, question in enumerate(questions)]
    expected = [alone(*one) for one in asked]
    worker = server.workers[0]
    worker._pictures.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(said, server, SHAPE, image(pictures[0]))
        wait_for(lambda: held.rows)
        rest = [pool.submit(said, server, *filter(None, [question]), image(picture)) for question, picture in asked]
        other = pool.submit(said, server, image(), temperature=1, seed=1)  # with settings of its own
        wait_for(lambda: worker.num_waiting == 7)
        held.leave.release(1000)
        assert [one.result() for one in rest] == expected
        assert first.result() == alone(SHAPE, pictures[0]) and other.result()
    assert held.rows[0] == 1 and sorted(held.rows[1:]) == [1, 6]
    assert len(worker._pictures) == 3


def test_seeds_mean_the_same_in_a_batch(server, held):
    pictures = [ROOT / "examples" / f"scene-{number}.png" for number in (1, 2, 3)]
    more = {"temperature": 1.2, "seed": 5}
    held.leave.release(100)
    expected = [said(server, image(picture), **more) for picture in pictures]
    while held.leave.acquire(blocking=False):
        pass
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(said, server, image())
        wait_for(lambda: len(held.rows) == 4)
        rest = [pool.submit(said, server, image(picture), **more) for picture in pictures]
        wait_for(lambda: server.workers[0].num_waiting == 3)
        held.leave.release(1000)
        assert [one.result() for one in rest] == expected and first.result()
    assert held.rows == [1, 1, 1, 1, 3]


def test_memory_that_does_not_suffice_halves_the_batch(server, held, monkeypatch):
    def decode(model, picture, text, *given, **more):
        if len(text["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return held.decode(model, picture, text, *given, **more)

    monkeypatch.setattr(workers, "decode", decode)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(said, server, COLOR, image())
        wait_for(lambda: held.rows)
        rest = [pool.submit(said, server, COLOR, image()) for _ in range(5)]
        wait_for(lambda: server.workers[0].num_waiting == 5)
        held.leave.release(1000)
        assert [one.result() for one in (first, *rest)] == ["green"] * 6
    assert held.rows == [1, 2, 1, 2]


def test_a_failure_ends_one_request_and_not_the_server(server, monkeypatch, caplog):
    def fail(*given, **more):
        raise KeyError("/secret/place")

    monkeypatch.setattr(workers, "decode", fail)
    status, document, _ = post(server, body(COLOR, image()))
    assert status == 500 and document["error"]["type"] == "server_error" and "secret" not in str(document)
    assert "secret" in caplog.text
    monkeypatch.undo()
    assert said(server, COLOR, image()) == "green"


# --- limits ---


@pytest.fixture(scope="module")
def narrow():
    """One place, less than a second, small requests."""
    with serving("scenes-opt", batch_size=1, places=1, timeout=0.8, max_body=50_000) as running:
        yield running


@pytest.fixture(scope="module")
def strict():
    """One place, keys, pictures by address, pages of one origin."""
    settings = {"keys": ("first", "second"), "allow_urls": True, "cors": ("https://a.example",)}
    with serving("scenes-opt", batch_size=1, places=1, **settings) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_place(strict, held, stream):
    worker, key = strict.workers[0], "Bearer second"
    asked = json.dumps(body(image(), stream=stream)).encode()
    connection = strict.send(asked, Authorization=key)
    if stream:
        held.leave.release()
        while b"content" not in connection.recv(4096):
            pass
    wait_for(lambda: held.rows)
    status, document, headers = post(strict, body(COLOR, image()), Authorization=key)
    assert (status, document["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    connection.close()
    wait_for(lambda: worker.num_running == 0)
    before = held.tokens
    held.leave.release(1000)
    assert post(strict, body(COLOR, image()), Authorization=key)[0] == 200
    assert held.tokens - before <= 1 + 2  # the token under way, and an answer of two


def test_time_is_limited(narrow, held):
    status, document, _ = post(narrow, body(COLOR, image()))
    assert (status, document["error"]["code"]) == (504, "timeout")
    held.leave.release(2)  # one goes to the request that was given up
    with narrow.send(json.dumps(body(image(), stream=True)).encode(), Connection="close") as connection:
        text = connection.makefile("rb").read().decode()
    assert "200 OK" in text and '"code": "timeout"' in text and "[DONE]" not in text
    with narrow.send(b"{", Content_Length="500") as connection:  # the rest never comes
        assert b" 408 " in connection.recv(4096)
    held.leave.release(1000)
    assert post(narrow, body(COLOR, image()))[0] == 200  # the place is free again


def test_sizes_are_limited(narrow):
    with narrow.send(b"", Content_Length="10000000000") as connection:  # of which nothing is read
        assert b" 413 " in connection.recv(4096)
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    with narrow.send(chunk * 20 + b"0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked") as connection:
        answer = connection.recv(4096)
    assert b" 413 " in answer and b"0.05 MB" in answer
    assert post(narrow, body(COLOR, image()))[0] == 200


def test_keys(strict):
    import openai

    for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}, {"Authorization": "Bearer \xe4"}):
        status, document, _ = post(strict, body(COLOR, image()), **headers)
        assert (status, document["error"]["code"]) == (401, "invalid_api_key"), headers
    with pytest.raises(openai.AuthenticationError):
        strict.client("third").models.list()
    for key in ("first", "second"):
        assert [model.id for model in strict.client(key).models.list()] == ["scenes-opt"]
    connection = http.client.HTTPConnection("127.0.0.1", strict.port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_addresses(strict, monkeypatch):
    from blip2.server import api

    for host in (f"127.0.0.1:{strict.port}", "localhost", "[::1]", "169.254.169.254", "10.0.0.1"):
        asked = body(COLOR, image(f"http://{host}/picture.png"))
        status, document, _ = post(strict, asked, Authorization="Bearer first")
        assert (status, document["error"]["code"]) == (400, "invalid_image_url"), host
        assert "public" in document["error"]["message"], document
    monkeypatch.setattr(api, "fetch", lambda address: SCENE.read_bytes())
    status, document, _ = post(strict, body(COLOR, image("https://a.example/b.png")), Authorization="Bearer first")
    assert status == 200 and document["choices"][0]["message"]["content"] == "green"


@pytest.mark.parametrize("which", ["strict", "server"])
def test_pages_of_other_origins(request, which):
    running = request.getfixturevalue(which)
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://a.example", **asks})
    allowed = connection.getresponse().getheader("access-control-allow-origin")
    connection.close()
    assert allowed == ("https://a.example" if which == "strict" else None)


FAULTS = [
    (b"{", "invalid_json", "not valid JSON"),
    (b"", "invalid_value", "required"),
    (b"[]", "invalid_value", "dictionary"),
    (b"[" * 100_000, None, "body"),
    ({"model": "scenes-opt"}, "invalid_value", "messages"),
    ({"model": "scenes-opt", "messages": []}, "invalid_value", "messages"),
    (body(COLOR, image(), max_tokens="5"), "invalid_value", "max_tokens"),
    (body(COLOR, image(), max_tokens=5000), "context_length_exceeded", "lower max_tokens"),
    (body(COLOR, image(), temperature=3), "invalid_value", "temperature"),
    (json.dumps(body(COLOR, image(), temperature=float("nan"))).encode(), "invalid_value", "temperature"),
    (body(COLOR, image(), n=99), "invalid_value", "n: "),
    (body(COLOR, image(), logprobs=True), "unsupported_parameter", "logprobs"),
    (body(COLOR, image(), tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
    (body(COLOR, image(), response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
    (body(COLOR, image(), stream_options={"include_usage": True}), None, "stream: true"),
    (b'{"model": "scenes-opt", "messages": [{"role": "\\ud800", "content": "x"}]}', "invalid_value", "role"),
    (body(COLOR), "no_picture", "show no picture"),
    (body(COLOR, image(), image()), None, "holds 2 pictures"),
    (body("x" * 100_001, image()), None, "100,000 characters"),
    (body(COLOR, image("data:image/png;base64,@@@@")), "invalid_image", "base64 is damaged"),
    (body(COLOR, image("data:image/png,abc")), "invalid_image", "not base64"),
    (body(COLOR, image(address(b"<html></html>"))), "invalid_image", "web page"),
    (body(COLOR, image(address(SCENE.read_bytes()[:400]))), "invalid_image", "truncated or damaged"),
    (body(COLOR, image(address(Image.new("1", (20_000, 6_000))))), "invalid_image", "million pixels"),
    (body(COLOR, image("http://a.example/b.png")), "urls_not_allowed", "send the picture itself"),
    (body(COLOR, image("/etc/passwd")), None, "data: URL"),
    (
        {"model": "scenes-opt", "messages": [user(COLOR, image()), {"role": "assistant", "content": "red"}]},
        None, "last message must be the user's",
    ),
    (
        {"model": "scenes-opt", "messages": [{"role": "assistant", "content": "red"}, user(COLOR, image())]},
        None, "answers no message",
    ),
    (
        {"model": "scenes-opt", "messages": [{"role": "system", "content": "x"}, user(COLOR, image())], "style": "raw"},
        None, "style raw",
    ),
    (
        {"model": "scenes-opt", "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "invalid_value", "input_audio",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("document", "code", "words"), FAULTS, ids=lambda value: str(value)[-40:])
def test_bad_requests_are_told_what_is_wrong(server, document, code, words):
    status, answer, _ = post(server, document)
    error = answer["error"]
    assert (status, set(error)) == (400, {"message", "type", "param", "code"})
    assert error["type"] == "invalid_request_error" and words in error["message"], error
    assert code is None or error["code"] == code


def test_other_refusals(server):
    status, document, _ = post(server, body(COLOR, image(), model="gpt-4o"))
    assert (status, document["error"]["code"]) == (404, "model_not_found")
    assert "scenes-opt, scenes-flan-t5" in document["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(server, body(COLOR, image()), Content_Type=kind)[0] == 415
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/v1/chat/completions")
    answer = connection.getresponse()
    assert answer.status == 405 and json.loads(answer.read())["error"]["type"] == "invalid_request_error"
    connection.close()


# --- its description, and what does not fit it ---


def explore(running, examples: int) -> dict[str, int]:
    """Ask what schemathesis makes of the description, right and wrong; count answers by status.

    Of right requests every other is given a model and a picture that are there: what it makes up is neither.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{running.port}/openapi.json")
    counts: dict[str, int] = {}
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode:

            @settings(
                max_examples=examples, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case, mode=mode):
                if mode.is_positive and isinstance(case.body, dict) and sum(counts.values()) % 2:
                    case.body |= {"model": "scenes-opt", "force": True}
                    case.body["messages"] = [*case.body["messages"][:3], user("what?", image())]
                response = case.call()
                counts[str(response.status_code)] = counts.get(str(response.status_code), 0) + 1
                case.validate_response(response, checks=[not_a_server_error])
                assert response.status_code < 500
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            try:
                ask()
            except schemathesis.errors.IncorrectUsage:
                pass
    return counts


def test_nothing_that_fits_or_breaks_the_description_fails_the_server(server):
    counts = explore(server, 12)
    assert sum(counts.values()) > 40 and counts["200"] > 5 and counts["400"] > 10


@pytest.mark.long
def test_description_at_length(server):
    start = time.monotonic()
    counts = explore(server, 400)
    print(f"\nschemathesis: {sum(counts.values())} requests in {time.monotonic() - start:.0f} s, by status: {counts}")
    assert said(server, COLOR, image()) == "green"


# --- the end ---


def test_the_end_waits_for_what_is_asked(held):
    with serving("scenes-opt") as running, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(said, running, COLOR, image())
        wait_for(lambda: held.rows)
        running.server.should_exit = True
        wait_for(lambda: not running.server.servers[0].is_serving())
        with pytest.raises(OSError):
            running.connect()
        held.leave.release(1000)
        assert asked.result() == "green"


def test_the_end_waits_no_longer_than_said(held):
    with serving("scenes-opt", grace=1) as running:
        connection = running.send(json.dumps(body(COLOR, image())).encode())
        wait_for(lambda: held.rows)
        running.server.should_exit = True
        assert b" 200 " not in connection.makefile("rb").read()
        connection.close()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_requests_end(number):
    with process("--model", "scenes-opt", slow=True) as (child, port), ThreadPoolExecutor(2) as pool:
        running = Running(None, [], port)
        whole = pool.submit(said, running, COLOR, image())
        caption = pool.submit(said, running, image())
        time.sleep(0.6)  # both are under way: a token takes 0.2 s
        child.send_signal(number)
        assert (whole.result(), caption.result()) == ("green", alone(""))
        assert child.wait(20) == 0
        assert "Traceback" not in child.stderr.read()


# --- figures ---


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_64_at_once(model):
    """Every request is about a picture of its own, which the server has not seen."""
    scenes = [drawn(64, start) for start in (0, 1000, 2000)]
    with serving(model) as running, ThreadPoolExecutor(64) as pool:

        def answer(scene):
            picture, question, _ = scene
            return said(running, question, image(picture), model=model, force=True)

        list(map(answer, drawn(3, 3000)))
        seconds, answers = [], []
        for ask, some in ((map, scenes[0]), (pool.map, scenes[1]), (map, scenes[2])):
            start = time.perf_counter()
            answers.append(list(ask(answer, some)))
            seconds.append(time.perf_counter() - start)
        running.workers[0]._pictures.clear()
        again = list(map(answer, scenes[1]))
    right = [sum(text.strip(" .") == true for text, (_, _, true) in zip(*pair)) for pair in zip(answers, scenes)]
    rates = [64 / second for second in seconds]
    print(
        f"\n{model}: one at a time {rates[0]:.1f} and {rates[2]:.1f} requests/s, 64 at once {rates[1]:.1f}: "
        f"{rates[1] / max(rates[0], rates[2]):.2f} times as many; right {right} of 64, "
        f"{sum(map(str.__eq__, answers[1], again))} of 64 equal to those alone"
    )
    assert answers[1] == again
    assert min(right) > 48


@pytest.mark.long
def test_memory_stays():
    """2,000 requests about 500 pictures: whole and streamed, some that fail, and some that hang up."""
    scenes = drawn(500)
    with process("--model", "scenes-opt", "--queue", "8") as (child, port), ThreadPoolExecutor(8) as pool:
        running = Running(None, [], port)

        def ask(number):
            picture, question, _ = scenes[number % 500]
            document = body(question, image(picture), force=True, stream=number % 3 == 0)
            if number % 10 == 9:
                document["messages"] = []
            connection = running.send(json.dumps(document).encode(), Connection="close")
            if number % 25 != 24:
                connection.makefile("rb").read()
            connection.close()

        memory = []
        for start in range(0, 2200, 200):
            list(pool.map(ask, range(start, start + 200)))
            memory.append(psutil.Process(child.pid).memory_info().rss / 1e6)
    print("\nMB after 200, 400, ... requests:", *(f"{one:.0f}" for one in memory))
    assert memory[-1] < memory[0] + 30
