"""The routes: chat completions, models, health, and their description at /openapi.json."""

import asyncio
import base64
import binascii
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from blip2 import __version__
from blip2.errors import ImageError
from blip2.fetch import FetchError, fetch
from blip2.images import open_image
from blip2.server.answering import Answering, Stream, unless_gone
from blip2.server.gate import Gate
from blip2.server.job import Asked
from blip2.server.request import ChatRequest, read
from blip2.server.response import (
    APIError,
    ChatCompletion,
    Error,
    Health,
    Model,
    ModelList,
    Stamp,
    wrong_fields,
)
from blip2.server.worker import Worker

DECODERS = 2  # pictures opened at the same time: each may take 300 MB
FETCHERS = 8  # addresses read at the same time
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "The request cannot be followed."},
    "5XX": {"model": Error, "description": "The server could not follow it."},
}


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        keys: of which a client has to send one; none lets everyone in.
        allow_urls: read pictures from http(s) addresses, never from private ones.
        cors: origins whose pages may ask; "*" for all.
        places: requests in the server at the same time.
        timeout: seconds that a request may take.
        max_body: bytes that it may have.
    """

    keys: tuple[str, ...] = ()
    allow_urls: bool = False
    cors: tuple[str, ...] = ()
    places: int = 80
    timeout: float = 120.0
    max_body: int = 32_000_000


class API:
    """The routes over some workers; their names are the models'."""

    def __init__(self, workers: Sequence[Worker], settings: Settings):
        self.workers = {worker.loaded.name: worker for worker in workers}
        self.settings, self.since = settings, int(time.time())
        self.decoders = ThreadPoolExecutor(DECODERS, "blip2 pictures")
        self.fetchers = ThreadPoolExecutor(FETCHERS, "blip2 addresses")

    def build(self) -> FastAPI:
        """The application."""
        app = FastAPI(
            title="BLIP-2", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
            description="Chat completions about pictures, as OpenAI's API has them.",
        )  # fmt: skip
        keys = [Depends(HTTPBearer(auto_error=False))] if self.settings.keys else []
        stream = {"description": "With stream: server-sent events.", "content": {"text/event-stream": {}}}
        app.add_api_route(
            "/v1/chat/completions", self.complete, methods=["POST"], dependencies=keys,
            response_model=ChatCompletion, responses={200: stream, **ERRORS},
        )  # fmt: skip
        app.add_api_route("/v1/models", self.models, dependencies=keys, responses=ERRORS)
        app.add_api_route("/v1/models/{name:path}", self.model, dependencies=keys, responses=ERRORS)
        app.add_api_route("/health", self.health, response_model=Health, responses={503: {"model": Health}})
        app.add_exception_handler(HTTPException, _refuse)
        app.add_exception_handler(RequestValidationError, _refuse)
        app.add_exception_handler(Exception, _refuse)
        app.add_middleware(
            Gate, keys=self.settings.keys, max_body=self.settings.max_body, places=self.settings.places,
            timeout=self.settings.timeout,
            seconds_to_wait=lambda: max(worker.seconds_to_wait for worker in self.workers.values()),
        )  # fmt: skip
        if self.settings.cors:
            app.add_middleware(
                CORSMiddleware, allow_origins=self.settings.cors, allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )  # fmt: skip
        return app

    async def health(self) -> Response:
        """Whether requests are answered: the models are loaded before the first connection."""
        workers = self.workers.values()
        alive = all(worker.is_alive for worker in workers)
        found = Health(
            status="ok" if alive else "failing",
            waiting=sum(worker.num_waiting for worker in workers),
            answering=sum(worker.num_running for worker in workers),
        )
        return JSONResponse(found.model_dump(), 200 if alive else 503)

    async def models(self) -> ModelList:
        """The models that are served."""
        return ModelList(data=[Model(id=name, created=self.since) for name in self.workers])

    async def model(self, name: str) -> Model:
        """One of them."""
        return Model(id=self._worker(name).loaded.name, created=self.since)

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message about the last picture; caption a picture that comes without words."""
        return await unless_gone(request, self._complete(body, request.state.deadline))

    async def _complete(self, body: ChatRequest, deadline: float) -> Response:
        worker = self._worker(body.model)
        talk = read(body.messages)
        body.check(talk)
        try:
            async with asyncio.timeout_at(deadline):
                digest, pixel_values = await self._picture(talk.picture, worker)
        except TimeoutError:
            raise self._too_late() from None
        generation = body.generation()
        asked = Asked(
            digest, pixel_values, talk.question, talk.history, talk.before, generation, body.n or 1,
            body.stops, body.style, body.describe, bool(body.force), bool(body.stream),
        )  # fmt: skip
        answering = Answering(worker, asked, deadline, self._too_late())
        try:
            if body.stream:
                return Stream(answering, await answering.next(), Stamp(body.model), body.with_usage)
            return JSONResponse((await answering.whole(Stamp(body.model))).model_dump())
        except BaseException:
            answering.give_up()
            raise

    def _worker(self, name: str) -> Worker:
        if name not in self.workers:
            raise APIError(
                404, f"there is no model {name!a} here; there is {', '.join(self.workers)}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return self.workers[name]

    def _too_late(self) -> APIError:
        return APIError(
            504, f"it took more than {self.settings.timeout:g} s: try again later", code="timeout"
        )

    async def _picture(self, address: str, worker: Worker) -> tuple[bytes, Any]:
        """Read a picture: what names it, and pixel values float32 (1, 3, S, S).

        Raises:
            APIError: it cannot be used.
        """
        loop = asyncio.get_running_loop()
        kind = address[:8].lower()
        try:
            if kind.startswith("data:"):
                data = await loop.run_in_executor(self.decoders, _decoded, address)
            elif not kind.startswith(("http:", "https:")):
                raise APIError(
                    400, "a picture is a data: URL with base64, or an http(s) address", param="messages"
                )
            elif self.settings.allow_urls:
                data = await loop.run_in_executor(self.fetchers, fetch, address)
            else:
                raise APIError(
                    400, "addresses are not read here: send the picture itself, data:image/png;base64,...",
                    code="urls_not_allowed", param="messages",
                )  # fmt: skip
            pixel_values = await loop.run_in_executor(
                self.decoders, lambda: worker.processor.images(open_image(data))
            )
        except FetchError as error:
            raise APIError(400, str(error), code="invalid_image_url", param="messages") from None
        except ImageError as error:
            raise APIError(400, str(error), code="invalid_image", param="messages") from None
        return hashlib.sha256(data).digest(), pixel_values


def _decoded(address: str) -> bytes:
    """What a data: URL holds.

    Raises:
        ImageError: it is not base64.
    """
    head, _, data = address.partition(",")
    if not head.lower().rstrip().endswith(";base64"):
        raise ImageError("a data: URL is written data:image/png;base64,..., and this one is not base64")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the picture's base64 is damaged: send it again") from None


async def _refuse(request: Request, error: Exception) -> Response:
    """Any error as OpenAI words them."""
    if isinstance(error, RequestValidationError):
        error = wrong_fields(error)
    elif isinstance(error, HTTPException) and not isinstance(error, APIError):
        headers, error = error.headers, APIError(error.status_code, str(error.detail))
        error.headers = headers
    elif not isinstance(error, APIError):
        error = APIError(500, "the server failed on this; its log says why", code="failed")
    return error.response()
