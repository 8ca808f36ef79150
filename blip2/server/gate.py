"""Before a request is read: who may ask, how much, how many at the same time, and for how long."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.server.response import APIError

GUARDED = "/v1/"
ASKING = ("POST", "/v1/chat/completions")


class Gate:
    """ASGI middleware.

    Args:
        app: what is guarded.
        keys: of which a client has to send one, `Authorization: Bearer KEY`; none lets everyone in.
        max_body: bytes of a request.
        places: requests in the server at the same time, those that are still being sent included.
        timeout: seconds from the first byte of a request to the last of its answer; `state.deadline`, in the
            loop's time, tells those inside.
        seconds_to_wait: until a place may be free.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        max_body: int,
        places: int,
        timeout: float,
        seconds_to_wait: Callable[[], float],
    ):
        self.app = app
        self.keys = [_digest(key) for key in keys]
        self.max_body, self.places, self.timeout = max_body, places, timeout
        self.seconds_to_wait = seconds_to_wait
        self.taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asks = (scope["method"], scope["path"]) == ASKING
        try:
            self._check(scope["path"], Headers(scope=scope), asks)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if not asks:
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.timeout
        scope.setdefault("state", {})["deadline"] = deadline
        self.taken += 1
        try:
            await self.app(scope, self._bounded(receive, deadline), send)
        finally:
            self.taken -= 1

    def _check(self, path: str, headers: Headers, asks: bool) -> None:
        if self.keys and path.startswith(GUARDED) and not self._is_known(headers):
            raise APIError(
                401, "send a key of this server: Authorization: Bearer KEY", code="invalid_api_key"
            )
        if not asks:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # a page of any origin may send the others without being asked whether it may
            raise APIError(415, f"the content type is {kind or 'missing'}; send application/json")
        if int(headers.get("content-length", 0)) > self.max_body:
            raise self._too_large()
        if self.taken >= self.places:
            seconds = self.seconds_to_wait()
            raise APIError(
                429,
                f"{self.taken} requests are being answered or wait: try again in {seconds:.0f} s",
                code="queue_full",
                retry_after=seconds,
            )

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, one) for one in self.keys]  # all of them, in equal time
        return scheme.lower() == "bearer" and any(known)

    def _bounded(self, receive: Receive, deadline: float) -> Receive:
        """`receive` that ends a body which is too large, whatever its header says, or takes too long."""
        read, whole = 0, False

        async def bounded() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is that the client has left
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, f"the request took more than {self.timeout:g} s to come in") from None
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> APIError:
        return APIError(
            413,
            f"the request has more than {self.max_body / 1e6:g} MB: make the picture smaller",
            code="too_large",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
