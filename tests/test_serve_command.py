"""`blip2 serve` before it serves: its flags, its models, its port; and the pieces that need no server."""

import socket

import pytest

from blip2.cli import main
from blip2.ports import take_port
from blip2.server.job import Asked, Job, Words
from blip2.settings import Generation


@pytest.fixture
def serve(capsys):
    """Run the command: exit code and stderr."""

    def run(*words):
        capsys.readouterr()
        return main(["serve", *words]), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "70000"), "--port is 70000; allowed: 1 to 65535"),
        (("--batch-size", "0"), "--batch-size is 0; allowed: 1 or more"),
        (("--queue", "-1"), "--queue is -1; allowed: 0 or more"),
        (("--timeout", "0"), "--timeout is 0; allowed: above 0"),
        (("--max-body", "nan"), "--max-body is nan; allowed: above 0"),
        (("--api-key", " "), "--api-key is empty"),
        (("--model", "scenes-itm"), "scores texts; a model that makes captions and answers is needed"),
        (("--model", "scenes-opp"), "unknown model"),
    ],
)
def test_wrong_use(serve, words, message):
    code, error = serve(*words)
    assert code == 2 and message in error


def test_port_that_is_taken(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = serve("--model", "scenes-opt", "--port", str(port))
        assert code == 1 and f"cannot listen on 127.0.0.1, port {port}" in error and "--port" in error
        with take_port("127.0.0.1", [port, 0]) as free:
            assert free.getsockname()[1] not in (0, port)
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        take_port("192.0.2.1", [0])


class Listener:
    """One answer, told letter by letter."""

    def __init__(self, text, streamed=True, **asked):
        self.pieces, self.text = [], text
        generation = Generation(max_new_tokens=asked.pop("longest", 99))
        job = Job(Asked(b"", None, generation=generation, streamed=streamed, **asked), self.pieces.append)
        words, read = Words(job, 0), 0
        while not words.is_over:
            read += 1
            words.read(ord(text[read - 1]), {ord(".")})
            if words.has_news:
                words.say(text[:read])
        self.said = [piece.text for piece in self.pieces]
        self.reason, self.read = self.pieces[-1].reason, read


def test_pieces_as_they_come():
    assert Listener("abc.").said == ["a", "b", "c", "."]
    assert Listener("abc.", streamed=False).said == ["abc."]
    listener = Listener("abcdef.", longest=3)
    assert (listener.said, listener.reason) == (["a", "b", "c"], "length")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "stops", "told", "read"),
    [
        ("a red star.", (" star",), "a red", 10),
        ("a red stone.", (" star",), "a red stone.", 12),  # which begins like it
        ("aab aac.", ("aac", "b a"), "aa", 5),
        ("ababac.", ("abac",), "ab", 6),
    ],
)
def test_nothing_of_a_stop_is_told(text, stops, told, read, streamed):
    listener = Listener(text, streamed=streamed, stops=stops)
    assert ("".join(listener.said), listener.read, listener.reason) == (told, read, "stop")
    assert all(one.reason is None for one in listener.pieces[:-1])


def test_half_a_character_waits_for_its_other_half():
    words = Words(Job(Asked(b"", None, streamed=True), (pieces := []).append), 0)
    for text in ("a", "a\ufffd", "a\ufffd\ufffd", "aé"):
        words.read(1, {0})
        words.say(text)
    assert [piece.text for piece in pieces] == ["a", "é"]
