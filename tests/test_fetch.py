"""The fetcher against local servers that misbehave, and against addresses it must never reach."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import blip2.fetch
from blip2.fetch import FetchError, fetch, is_public

BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `server.seen` records (path, Host header)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=BODY, status=200, **headers):
        self.send_response(status)
        headers = {"Content_Type": "image/png", "Content_Length": str(len(body))} | headers
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data, pause=0.05):
        with contextlib.suppress(OSError):  # the fetcher hangs up
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                time.sleep(pause)

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        name, _, rest = self.path.lstrip("/").partition("/")
        if name == "redirect":
            self.answer(b"", 302, Location=self.server.targets.get(rest, rest))
        elif name == "loop":
            self.answer(b"", 301, Location=f"/loop/{rest}x")
        elif name == "hops":
            left = int(rest)
            self.answer(b"", 307, Location=f"/hops/{left - 1}" if left > 1 else "/ok")
        elif name == "slow-headers":
            self.drip(b"HTTP/1.1 200 OK\r\n" + b"X-Header: value\r\n" * 50)
            self.close_connection = True
        elif name == "slow-body":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.drip(b"x" * 1000)
            self.close_connection = True
        elif name == "silent":
            time.sleep(1.5)
        elif name == "chunked":
            self.answer(b"", Content_Length=None, Transfer_Encoding="chunked")
            with contextlib.suppress(OSError):
                for _ in range(int(rest)):
                    self.wfile.write(b"400\r\n" + b"y" * 1024 + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
        elif name == "no-length":
            self.answer(Content_Length=None, Connection="close")
        elif name == "huge-claim":
            self.answer(b"", Content_Length="99999999999")
        elif name == "short":
            self.answer(b"abc", Content_Length="10", Connection="close")
            self.close_connection = True
        elif name == "empty":
            self.answer(b"")
        elif name == "html":
            self.answer(b"<html></html>", Content_Type="text/html; charset=utf-8")
        elif name == "json":
            self.answer(b"{}", Content_Type="application/json")
        elif name == "gzip":
            self.answer(b"\x1f\x8b", Content_Encoding="gzip")
        elif name == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")
            self.close_connection = True
        elif name == "status":
            self.answer(b"", int(rest))
        else:
            self.answer()


@contextlib.contextmanager
def serving(context=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen, server.targets = [], {}
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with serving() as running:
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running


@pytest.fixture
def names(monkeypatch):
    """A name service: host -> list of addresses; `names.asked` lists the look-ups of names."""

    class Names(dict):
        asked: list[str]

    table, original = Names(), socket.getaddrinfo
    table.asked = []

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in table:
            return original(host, port, *args, **kwargs)
        table.asked.append(host)
        addresses = table[host]() if callable(table[host]) else table[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


@pytest.fixture
def no_connections(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail(f"connected to {args}")

    monkeypatch.setattr(socket, "create_connection", refuse)


# -- answers


def test_a_picture_arrives(server):
    assert fetch(f"{server.url}/ok.png?size=1&name=a%20b#part", allow_private=True) == BODY
    assert server.seen == [("/ok.png?size=1&name=a%20b", f"127.0.0.1:{server.server_port}")]


def test_text_beyond_ascii_is_escaped(server):
    assert fetch(f"{server.url}/größe/ü.png?q=ä", allow_private=True) == BODY
    assert server.seen[0][0] == "/gr%C3%B6%C3%9Fe/%C3%BC.png?q=%C3%A4"


def test_answers_without_a_length(server):
    assert fetch(f"{server.url}/no-length", allow_private=True) == BODY
    assert fetch(f"{server.url}/chunked/3", allow_private=True) == b"y" * 3072


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("html", "is a web page"),
        ("json", "is no image"),
        ("gzip", "compressed form"),
        ("empty", "zero bytes"),
        ("short", "broke off 7 bytes"),
        ("garbage", "could not be downloaded"),
        ("status/404", "answered 404 Not Found"),
        ("status/500", "answered 500"),
        ("status/204", "answered 204"),
        ("redirect/", "answered 302"),
        ("huge-claim", "larger than 20 MB"),
    ],
)
def test_answers_that_are_no_picture(server, path, message):
    with pytest.raises(FetchError, match=message) as caught:
        fetch(f"{server.url}/{path}", allow_private=True, timeout=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["ok", "chunked/100", "no-length"])
def test_size_limit(server, path):
    with pytest.raises(FetchError, match="larger than"):
        fetch(f"{server.url}/{path}", allow_private=True, max_bytes=len(BODY) - 1)
    if path != "chunked/100":
        assert len(fetch(f"{server.url}/{path}", allow_private=True, max_bytes=len(BODY))) == len(BODY)


@pytest.mark.parametrize("path", ["slow-headers", "slow-body", "silent"])
def test_the_time_limit_is_for_all_of_it(server, path):
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"took longer than 0.5 seconds"):
        fetch(f"{server.url}/{path}", allow_private=True, timeout=0.5)
    assert time.monotonic() - started < 1.4  # well below the 1.5 s and 50 s that the servers take


def test_a_slow_name_service_is_not_waited_for(names):
    names["slow.test"] = lambda: time.sleep(2) or ["127.0.0.1"]
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"took longer than 0.2 seconds"):
        fetch("http://slow.test/", timeout=0.2)
    assert time.monotonic() - started < 1.5


def test_unreachable_and_unknown_hosts():
    with socket.socket() as taken:  # bound, not listening: refuses connections
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(FetchError, match=r"could not be downloaded: Connection refused|could not be"):
            fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/", allow_private=True, timeout=3)
    with pytest.raises(FetchError, match=r"'no-such-host\.invalid' was not found"):
        fetch("http://no-such-host.invalid/a.png")


def test_the_second_address_is_tried(server, names, monkeypatch):
    names["two.test"] = ["8.8.8.8", "127.0.0.1"]
    connect, connected = socket.create_connection, []

    def create_connection(address, timeout):
        connected.append((address[0], timeout))
        if address[0] == "8.8.8.8":
            raise TimeoutError
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", create_connection)
    assert fetch(f"http://two.test:{server.server_port}/", allow_private=True, timeout=8) == BODY
    assert [address for address, _ in connected] == names["two.test"]
    assert connected[0][1] <= 4  # half the time is kept for the other one


# -- redirects


def test_redirects_are_followed_to_a_limit(server):
    assert fetch(f"{server.url}/hops/4", allow_private=True) == BODY
    with pytest.raises(FetchError, match="redirects more than 4 times"):
        fetch(f"{server.url}/hops/5", allow_private=True)
    with pytest.raises(FetchError, match="redirects more than 4 times"):
        fetch(f"{server.url}/loop/", allow_private=True)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "does not start with http"),
        ("ftp://127.0.0.1/a", "does not start with http"),
        ("//user:secret@127.0.0.1/", "user name or password"),
        ("http://2130706433/", "not a plain IPv4 address"),
        ("http://[::1", "malformed"),
        ("http://a b/", "contains spaces"),
    ],
)
def test_redirects_are_checked_like_addresses(server, target, message):
    server.targets["away"] = target
    with pytest.raises(FetchError, match=message):
        fetch(f"{server.url}/redirect/away", allow_private=True)
    assert [path for path, _ in server.seen] == ["/redirect/away"]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/ok", "http://localhost:{port}/ok", "http://inside.test:{port}/"]
)
def test_a_redirect_to_a_private_address_is_refused(server, names, monkeypatch, target):
    """The first host counts as public here; only the second request must be refused."""
    names["public.test"] = names["inside.test"] = ["127.0.0.1"]
    allowed = iter([True])
    monkeypatch.setattr(blip2.fetch, "is_public", lambda address: next(allowed, False))
    server.targets["in"] = target.format(port=server.server_port)
    with pytest.raises(FetchError, match="private or reserved network"):
        fetch(f"http://public.test:{server.server_port}/redirect/in")
    assert [path for path, _ in server.seen] == ["/redirect/in"]


# -- addresses

# fmt: off
PRIVATE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.254", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:169.254.169.254", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "fe80::1", "fe80::1%eth0", "fec0::1",
    "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1",
]
# fmt: on


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(address, no_connections):
    assert not is_public(address)
    url = f"http://[{address}]/a.png" if ":" in address else f"http://{address}/a.png"
    with pytest.raises(FetchError, match=r"private or reserved|was not found"):
        fetch(url)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


def test_refused_by_default(server):
    for host in ("127.0.0.1", "localhost", "LOCALHOST.", "127.0.0.1."):
        with pytest.raises(FetchError, match="private or reserved network"):
            fetch(f"http://{host}:{server.server_port}/ok")
    assert server.seen == []


def test_one_private_address_among_public_ones_is_enough(names, no_connections):
    names["mixed.test"] = ["8.8.8.8", "10.0.0.1"]
    with pytest.raises(FetchError, match="private or reserved network"):
        fetch("http://mixed.test/")


@pytest.mark.parametrize("allow_private", [True, False])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "does not start with http"),
        ("ftp://example.com/a.png", "does not start with http"),
        ("gopher://127.0.0.1:6379/_INFO", "does not start with http"),
        ("data:image/png;base64,AAAA", "does not start with http"),
        ("example.com/a.png", "does not start with http"),
        ("", "does not start with http"),
        ("http:///a.png", "names no host"),
        ("http://", "names no host"),
        ("http://example.com@127.0.0.1/", "user name or password"),
        ("http://user:secret@example.com/", "user name or password"),
        ("http://127.0.0.1\\@example.com/", "backslashes"),
        ("http://exam\nple.com/", "control characters"),
        ("http://example.com/a\r\nHost: inside", "control characters"),
        ("http://example.com:22/", "port 22 is not allowed"),
        ("http://example.com:0/", "port 0 is not allowed"),
        ("http://example.com:99999/", "malformed"),
        ("http://example.com:x/", "malformed"),
        ("http://[::1", "malformed"),
        ("http://[::g]/", "malformed|not an IPv6"),
        ("http://2130706433/", "not a plain IPv4"),
        ("http://0x7f000001/", "not a plain IPv4"),
        ("http://0x7f.1/", "not a plain IPv4"),
        ("http://127.1/", "not a plain IPv4"),
        ("http://0177.0.0.1/", "not a plain IPv4"),
        ("http://127.0.0.0x1/", "not a plain IPv4"),
        ("http://exa%6dple.com/", "not a valid host name"),
        ("http://a..b/", "not a valid host name"),
        ("http://" + "a" * 70 + ".com/", "not a valid host name"),
    ],
)
def test_bad_addresses(url, message, allow_private, no_connections):
    with pytest.raises(FetchError, match=message) as caught:
        fetch(url, allow_private=allow_private)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["\uff11\uff12\uff17.0.0.1", "\u2460\u2461\u2466.0.0.1", "127\u30020.0.1", "\u24dbocalhost"]
)
def test_look_alike_characters_do_not_hide_loopback(host, no_connections):
    with pytest.raises(FetchError):
        fetch(f"http://{host}/")


# -- the connection goes where the check looked


def test_the_checked_address_is_the_one_connected_to(server, names, monkeypatch):
    """A name that answers differently the second time (DNS rebinding) is looked up once."""
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    names["rebind.test"] = lambda: next(answers)
    connected = []

    def create_connection(address, timeout):
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(FetchError, match="Connection refused"):
        fetch("http://rebind.test/")
    assert connected == [("8.8.8.8", 80)]
    assert names.asked == ["rebind.test"]


def test_proxies_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"{server.url}/ok", allow_private=True) == BODY


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_checks_the_name_not_the_address(tmp_path, names, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    extra = ["-addext", "subjectAltName=DNS:pictures.test", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *extra], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    asked = []
    context.sni_callback = lambda sock, name, ctx: asked.append(name)
    names["pictures.test"] = names["other.test"] = ["127.0.0.1"]
    with serving(context) as server:
        with pytest.raises(FetchError, match="self-signed certificate"):
            fetch(f"https://pictures.test:{server.server_port}/ok", allow_private=True)
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
        assert fetch(f"https://pictures.test:{server.server_port}/ok", allow_private=True) == BODY
        assert server.seen == [("/ok", f"pictures.test:{server.server_port}")]
        assert asked[-1] == "pictures.test"
        for host in ("other.test", "127.0.0.1"):
            with pytest.raises(FetchError, match=r"certificate is not valid for|mismatch"):
                fetch(f"https://{host}:{server.server_port}/ok", allow_private=True)
        assert len(server.seen) == 1
        started = time.monotonic()
        with pytest.raises(FetchError, match="took longer than"):
            fetch(f"https://pictures.test:{server.server_port}/slow-body", allow_private=True, timeout=0.5)
        assert time.monotonic() - started < 3
