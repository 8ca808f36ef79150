"""The one place that downloads from an address a user typed: http(s), public hosts, bounded in time and size.

A page that fetches URLs for strangers can be turned on the machines around it (server-side request forgery).
So the host is resolved here, every address it has must be public, and the connection goes to the very
address that was checked, with the host's name kept for TLS and the `Host` header: a second look-up, which
could answer differently, never happens. Redirects are followed by hand and checked the same way. Proxies from
the environment are not used, for the same reason.
"""

import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 4
USER_AGENT = "blip2 (image fetcher)"

# The only IPv6 block given out to the public; the parts closed here are tunnels, tests and documentation.
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_IPV6 = [ipaddress.IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
# IPv4 as seen from IPv6-only networks: judged by the IPv4 part.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# IPv4 blocks that Python's is_global, in some version we support, lets through.
_CLOSED_IPV4 = [ipaddress.IPv4Network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/3")]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REFUSED_TYPES = ("text/", "audio/", "video/", *("application/" + t for t in ("json", "xhtml", "xml", "pdf")))


class FetchError(ValueError):
    """An address that cannot or must not be downloaded; the message is one sentence for the user."""


def fetch(
    url: str, *, max_bytes: int = MAX_BYTES, timeout: float = 15.0, allow_private: bool = False
) -> bytes:
    """Download one http(s) URL.

    Args:
        url: an address without user name and password. Ports: 80, 443 and 1024 upwards.
        max_bytes: largest answer, bytes; counted while reading, whatever the header says.
        timeout: seconds for all of it together: name look-up, redirects, connecting, every read.
        allow_private: also connect to private, loopback and other non-public addresses (tests).

    Returns:
        The body of the answer, at least one byte.

    Raises:
        FetchError: the address is malformed or not allowed, the host cannot be reached, or the answer is not
            a 200 with an acceptable type and size within the time.
    """
    deadline = time.monotonic() + timeout
    first = _show(url)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(_check_url(url), deadline, max_bytes, allow_private)
            if isinstance(answer, bytes):
                return answer
            url = _join(url, answer)
    except TimeoutError as error:
        raise FetchError(
            f"{first} took longer than {timeout:g} seconds; try again or give a file."
        ) from error
    except (OSError, HTTPException) as error:
        reason = (
            getattr(error, "verify_message", "") or getattr(error, "strerror", "") or type(error).__name__
        )
        raise FetchError(f"{_show(url)} could not be downloaded: {reason}.") from error
    raise FetchError(f"{first} redirects more than {MAX_REDIRECTS} times; give the final address.")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Loopback, private, link-local, carrier-grade NAT, multicast, reserved and tunnel addresses do not, nor do
    IPv4 addresses wrapped in IPv6.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        return ip in _PUBLIC_IPV6 and not any(ip in network for network in _CLOSED_IPV6)
    return ip.is_global and not any(ip in network for network in _CLOSED_IPV4)


def _check_url(url: str) -> SplitResult:
    """Split the URL; refuse every form that two parsers could read differently."""
    shown = _show(url)
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise FetchError(f"the address {shown} contains spaces, control characters or backslashes.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError(f"the address {shown} is malformed: {error}.") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise FetchError(f"the address {shown} does not start with http:// or https://.")
    if "@" in parts.netloc:
        raise FetchError("the address contains a user name or password ('@' before the host); remove it.")
    if not parts.hostname:
        raise FetchError(f"the address {shown} names no host; write it as https://host/picture.jpg.")
    if port is not None and port not in (80, 443) and port < 1024:
        raise FetchError(f"port {port} is not allowed; use 80, 443 or one from 1024 upwards.")
    return parts


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError(f"{_show(url)} redirects to a malformed address: {error}.") from error


def _host(parts: SplitResult) -> str:
    """The host as ASCII: a name, a dotted IPv4 address, or an IPv6 address without brackets."""
    host = parts.hostname or ""
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError as error:
            raise FetchError(f"{_shorten(host)!r} is not an IPv6 address.") from error
    try:
        name = host.encode("idna").decode("ascii").rstrip(".")
    except UnicodeError as error:
        raise FetchError(f"{_shorten(host)!r} is not a valid host name.") from error
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", name):
        raise FetchError(f"{_shorten(host)!r} is not a valid host name.")
    if re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", name.rpartition(".")[2]):  # resolvers take it for IPv4
        try:
            return str(ipaddress.IPv4Address(name))  # strict: no decimal, octal, hexadecimal or short forms
        except ValueError as error:
            raise FetchError(f"{_shorten(host)!r} is not a plain IPv4 address of four numbers.") from error
    return name


def _resolve(host: str, port: int, deadline: float, allow_private: bool) -> list[str]:
    """Look the host up within the deadline; all of its addresses must be public."""
    found: list[str] = []

    def look_up() -> None:
        with suppress(OSError, UnicodeError):  # reported as: not found
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

    worker = threading.Thread(target=look_up, daemon=True)  # getaddrinfo has no time limit of its own
    worker.start()
    worker.join(_left(deadline))
    if worker.is_alive():
        raise TimeoutError
    if not found:
        raise FetchError(f"the host '{host}' was not found; check the address and the network.")
    if not allow_private and not all(map(is_public, found)):
        raise FetchError(f"the host '{host}' is on a private or reserved network, which is not allowed.")
    return list(dict.fromkeys(found))


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    for i, address in enumerate(addresses[:-1]):
        # leave time for the others: an address of an unreachable family often just hangs
        with suppress(OSError):
            return socket.create_connection((address, port), _left(deadline) / (len(addresses) - i))
    return socket.create_connection((addresses[-1], port), _left(deadline))


def _get(parts: SplitResult, deadline: float, max_bytes: int, allow_private: bool) -> bytes | str:
    """One request. Returns the body, or the address of a redirect."""
    host = _host(parts)
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    sock = _connect(_resolve(host, port, deadline, allow_private), port, deadline)
    try:
        if parts.scheme == "https":
            sock.settimeout(_left(deadline))
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = HTTPConnection(host, port)
        connection.sock = sock
        connection.response_class = _response_class(sock, deadline)
        name = f"[{host}]" if ":" in host else host
        headers = {
            "Host": name if port == _DEFAULT_PORTS[parts.scheme] else f"{name}:{port}",
            "User-Agent": USER_AGENT,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",  # a compressed answer could grow past the limit
            "Connection": "close",
        }
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
        sock.settimeout(_left(deadline))
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            return _read(response, _show(parts.geturl()), deadline, max_bytes)
    finally:
        sock.close()


def _read(response: HTTPResponse, url: str, deadline: float, max_bytes: int) -> bytes | str:
    location = response.getheader("Location")
    if response.status in (301, 302, 303, 307, 308) and location:
        return location
    if response.status != 200:
        raise FetchError(
            f"{url} answered {response.status} {_shorten(response.reason)}; try it in a browser."
        )
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if kind.startswith(_REFUSED_TYPES):
        what = "a web page" if "html" in kind else "no image"
        raise FetchError(f"{url} is {what} ({_shorten(kind)}); use the address of the picture itself.")
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise FetchError(f"{url} answered in a compressed form that was not asked for; give a file.")
    too_large = FetchError(f"{url} is larger than {max_bytes / 1e6:g} MB; make it smaller first.")
    if (response.length or 0) > max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise too_large
        _left(deadline)
    if response.length:  # bytes still promised by Content-Length
        raise FetchError(f"{url} broke off {response.length} bytes before its end; try again.")
    if not body:
        raise FetchError(f"{url} answered nothing (zero bytes); try it in a browser.")
    return bytes(body)


class _DeadlineReader(io.RawIOBase):
    """A socket's reading side on which every read gets only the time that is left in all."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self.raw, self.sock, self.deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.deadline))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _response_class(sock: socket.socket, deadline: float) -> type[HTTPResponse]:
    class DeadlineResponse(HTTPResponse):
        """Status line, headers, chunk sizes and body come through `fp`: the deadline holds for all."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock, deadline))

    return DeadlineResponse


def _left(deadline: float) -> float:
    """Seconds until the deadline, always positive: a timeout of 0 would mean 'do not wait' to a socket."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _show(url: str) -> str:
    """The URL for a message: no query, which may hold a secret, and no user name or password."""
    return repr(_shorten(re.sub(r"//[^/?#]*@", "//", url.partition("?")[0])))


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
