"""An answer on its way from a worker's thread to a client, whole or by pieces, until the client hangs up."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from blip2.devices import is_out_of_memory
from blip2.errors import PromptError, UnknownPictureError
from blip2.server.job import Asked, Job, Said
from blip2.server.response import (
    DONE,
    Answer,
    APIError,
    ChatCompletion,
    Choice,
    Stamp,
    delta,
    event,
    usage,
)
from blip2.server.worker import Closed, Worker


class Answering:
    """A request in a worker, as the event loop hears of it."""

    def __init__(self, worker: Worker, asked: Asked, deadline: float, too_late: APIError):
        self.worker, self.deadline, self.too_late = worker, deadline, too_late
        loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Said | Exception] = asyncio.Queue()

        def tell(news: Said | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(self.news.put_nowait, news)

        self.job = Job(asked, tell)
        try:
            worker.submit(self.job)
        except Closed:
            raise APIError(503, "the server is ending", code="ending", retry_after=30) from None

    def give_up(self) -> None:
        """Nobody waits any more."""
        self.worker.give_up(self.job)

    async def next(self) -> Said:
        """What is said next.

        Raises:
            APIError: nothing more will be said.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                news = await self.news.get()
        except TimeoutError:
            raise self.too_late from None
        if isinstance(news, Said):
            return news
        if isinstance(news, UnknownPictureError):
            message = f'{news}: ask a released model, or send "force": true to have an answer all the same'
            raise APIError(400, message, code="unknown_picture", param="messages")
        if isinstance(news, PromptError):
            message = str(news).replace("max_new_tokens", "max_tokens")
            raise APIError(400, message, code="context_length_exceeded", param="messages")
        if is_out_of_memory(news):
            raise APIError(503, "the model ran out of memory", code="out_of_memory", retry_after=5)
        raise APIError(500, "the model failed on this; the server's log says why", code="failed")

    async def whole(self, stamp: Stamp) -> ChatCompletion:
        """All answers, once they are there."""
        said: dict[int, Said] = {}
        while len(said) < self.job.asked.answers:
            one = await self.next()
            said[one.answer] = one
        choices = [
            Choice(index=index, message=Answer(content=one.text), finish_reason=cast(Any, one.reason))
            for index, one in sorted(said.items())
        ]
        return ChatCompletion(
            id=stamp.id, created=stamp.created, model=stamp.model, choices=choices,
            usage=usage(self.job.prompt_tokens, sum(one.num_tokens for one in said.values())),
            dropped_turns=self.job.dropped,
        )  # fmt: skip

    async def events(self, said: Said, stamp: Stamp, with_usage: bool) -> AsyncIterator[bytes]:
        """The answers as server-sent events, from the first piece on."""
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        if self.job.dropped:
            more["dropped_turns"] = self.job.dropped
        tokens: dict[int, int] = {}
        for index in range(self.job.asked.answers):
            yield stamp.chunk([delta(index, {"role": "assistant", "content": ""})], **more)
        while True:
            if said.text:
                yield stamp.chunk([delta(said.answer, {"content": said.text})], **more)
            if said.reason:
                tokens[said.answer] = said.num_tokens
                yield stamp.chunk([delta(said.answer, {}, said.reason)], **more)
            if len(tokens) == self.job.asked.answers:
                break
            try:
                said = await self.next()
            except APIError as error:
                yield event(error.body())
                return
        if with_usage:
            yield stamp.chunk([], usage=usage(self.job.prompt_tokens, sum(tokens.values())).model_dump())
        yield DONE


class Stream(StreamingResponse):
    """An answer as it comes; whatever ends it, the worker hears of it."""

    def __init__(self, answering: Answering, first: Said, stamp: Stamp, with_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
        events = answering.events(first, stamp, with_usage)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.give_up()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Work for a client, and stop when it hangs up."""

    async def hangs_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(hangs_up())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=408)  # which nobody reads
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
