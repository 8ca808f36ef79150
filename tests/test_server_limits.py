"""What `blip2 serve` refuses, with which status and words; places, times, sizes, keys; nothing fails it."""

import http.client
import json

import pytest
from asking import SCENE, address, body, explore, image, post, serving, user, wait_for
from PIL import Image

COLOR = "what color is the circle?"


@pytest.fixture(scope="module")
def narrow():
    """One place, less than a second, small requests."""
    with serving("scenes-opt", batch_size=1, places=1, timeout=0.8, max_body=400_000) as running:
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
    with narrow.send(
        chunk * 100 + b"0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked"
    ) as connection:
        answer = b""
        while b"0.4 MB" not in answer:
            answer += connection.recv(4096)
    assert b" 413 " in answer
    assert post(narrow, body(COLOR, image()))[0] == 200


def test_keys(strict):
    import openai

    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "first"},
        {"Authorization": "Bearer \xe4"},
    ):
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
        assert "private or reserved network" in document["error"]["message"], document
    monkeypatch.setattr(api, "fetch", lambda address: SCENE.read_bytes())
    status, document, _ = post(
        strict, body(COLOR, image("https://a.example/b.png")), Authorization="Bearer first"
    )
    assert status == 200 and document["choices"][0]["message"]["content"] == "green"


@pytest.mark.parametrize("which", ["strict", "server"])
def test_pages_of_other_origins(request, which):
    running = request.getfixturevalue(which)
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://a.example", **asks})
    allowed = connection.getresponse().getheader("access-control-allow-origin")
    connection.close()
    assert allowed == ("https://a.example" if which == "strict" else None)


PICTURE = user(image())
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
    (body(COLOR, image(), response_format={"type": "json"}), "unsupported_parameter", "response_format"),
    (body(COLOR, image(), stream_options={"include_usage": True}), None, "stream: true"),
    (b'{"model": "scenes-opt", "messages": [{"role": "\\ud800", "content": "x"}]}', "invalid_value", "role"),
    (body(COLOR), "no_picture", "show no picture"),
    (body(COLOR, image(), image()), None, "holds 2 pictures"),
    (body("x" * 100_001, image()), None, "100,000 characters"),
    (body(COLOR, image("data:image/png;base64,@@@@")), "invalid_image", "base64 is damaged"),
    (body(COLOR, image("data:image/png,abc")), "invalid_image", "not base64"),
    (body(COLOR, image(address(b"<html></html>"))), "invalid_image", "web page"),
    (body(COLOR, image(address(SCENE.read_bytes()[:400]))), "invalid_image", "truncated or damaged"),
    (lambda: body(COLOR, image(Image.new("1", (20_000, 6_000)))), "invalid_image", "million pixels"),
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
        {"model": "scenes-opt", "style": "raw", "messages": [{"role": "system", "content": "x"}, PICTURE]},
        None, "style raw",
    ),
    (
        {"model": "scenes-opt", "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "invalid_value", "input_audio",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("document", "code", "words"), FAULTS, ids=[words for _, _, words in FAULTS])
def test_bad_requests_are_told_what_is_wrong(server, document, code, words):
    status, answer, _ = post(server, document() if callable(document) else document)
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


@pytest.mark.long
def test_nothing_that_fits_or_breaks_the_description_fails_the_server(server):
    counts = explore(server, 12)
    assert sum(counts.values()) > 30 and counts["200"] > 5 and counts["400"] > 5
