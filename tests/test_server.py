"""`blip2 serve`: OpenAI's client gets what `Chat` says, and many at once get what each would get alone."""

import http.client
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import MODELS, ROOT, SCENE, alone, body, image, loaded, post, said, serving, user, wait_for

from blip2 import Chat, Generation, open_image
from blip2.generation import generate
from blip2.server import worker as workers

COLOR, SHAPE = "what color is the circle?", "what shape is the red thing?"


# --- what OpenAI's client gets ---


@pytest.mark.parametrize("model", MODELS)
def test_client_gets_what_chat_says(server, model):
    """Whole and streamed, the second turn with the first before it."""
    own = loaded(model)
    chat = Chat(own.model, own.processor)
    chat.set_image(open_image(SCENE))
    first, second = chat.ask(COLOR, Generation()), chat.ask(SHAPE, Generation())
    assert (first, second) == ("green", "star")
    read = [
        len(own.processor.tokenizer(turn.prompt)["input_ids"]) + own.processor.num_query_tokens
        for turn in chat.turns
    ]

    completions = server.client().chat.completions
    messages = [user(COLOR, image())]
    whole = completions.create(model=model, messages=messages)
    [choice] = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", first, "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (read[0], chat.turns[0].num_tokens)

    messages += [{"role": "assistant", "content": first}, user(SHAPE)]
    chunks = list(
        completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}
        )
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
        rest = [
            pool.submit(said, server, *filter(None, [question]), image(picture))
            for question, picture in asked
        ]
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


DOCS = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```(\w+)\n(.*?)^```$", DOCS, re.M | re.S)


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=[language for language, _ in BLOCKS])
def test_blocks_of_the_docs(server, language, block, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    block = block.replace("http://127.0.0.1:8000/v1", server.url)
    if language == "python":
        exec(compile(block, "docs/serving.md", "exec"), {})
        assert capfd.readouterr().out.split() == ["green", "star"]
        return
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    done = subprocess.run(["bash", "-euc", block], capture_output=True, text=True, timeout=60)
    [choice] = json.loads(done.stdout)["choices"]
    assert choice["message"]["content"] == alone("", ROOT / "examples" / "scene-2.png")
