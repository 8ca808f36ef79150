"""What is measured of `blip2 serve`, and its end by signals; minutes: `pytest -s -m long` with this file."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from asking import MODELS, Running, alone, body, drawn, explore, image, post, process, said

COLOR = "what color is the circle?"


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


@pytest.mark.long
@pytest.mark.parametrize("threads", [None, 1])
@pytest.mark.parametrize("model", MODELS)
def test_64_at_once(model, threads):
    """Every request is about a picture of its own, which the server has not seen or has forgotten."""
    scenes = [drawn(64, start) for start in (0, 1000, 2000)]
    asked = [
        [body(question, image(picture), model=model, force=True) for picture, question, _ in some]
        for some in (drawn(3, 3000), *scenes)
    ]
    with process("--model", model, threads=threads) as (_, port), ThreadPoolExecutor(64) as pool:
        running = Running(None, [], port)

        def answer(document):
            status, found, _ = post(running, document)
            assert status == 200, found
            return found["choices"][0]["message"]["content"]

        list(map(answer, asked[0]))
        seconds, answers = [], []
        for ask, some in ((map, 1), (pool.map, 2), (map, 3), (map, 2)):
            start = time.perf_counter()
            answers.append(list(ask(answer, asked[some])))
            seconds.append(time.perf_counter() - start)
    again = answers.pop()
    right = [
        sum(text.strip(" .") == true for text, (_, _, true) in zip(*pair, strict=True))
        for pair in zip(answers, scenes, strict=True)
    ]
    rates = [64 / second for second in seconds]
    single = rates[0], *rates[2:]
    print(
        f"\n{model}, {threads or 'all'} threads: alone {min(single):.1f} to {max(single):.1f} requests/s, "
        f"{rates[1]:.1f} 64 at once: {rates[1] / max(single):.2f} times as many; right {right} of 64, "
        f"{sum(map(str.__eq__, answers[1], again))} of 64 equal to those alone"
    )
    assert answers[1] == again
    assert min(right) > 48


@pytest.mark.long
def test_memory_stays(monkeypatch):
    """2,000 requests about 500 pictures: whole and streamed, some that fail, and some that hang up."""
    for name in ("MMAP", "TRIM"):  # else gaps in the heap come and go by 40 MB, and would hide a leak
        monkeypatch.setenv(f"MALLOC_{name}_THRESHOLD_", "131072")
    scenes = drawn(500)
    with process("--model", "scenes-opt", "--queue", "8") as (child, port), ThreadPoolExecutor(8) as pool:
        running = Running(None, [], port)

        def ask(number):
            picture, question, _ = scenes[number % 500]
            document = body(question, image(picture), force=True, stream=number % 3 == 0)
            if number % 8:
                document["describe"] = 0  # which is quicker
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
            print(f"{start + 200} requests: {memory[-1]:.0f} MB", flush=True)
    assert memory[-1] < memory[0] + 30


@pytest.mark.long
def test_description_at_length(server):
    start = time.monotonic()
    counts = explore(server, 400)
    seconds = time.monotonic() - start
    print(f"\nschemathesis: {sum(counts.values())} requests in {seconds:.0f} s, by status: {counts}")
    assert said(server, COLOR, image()) == "green"
