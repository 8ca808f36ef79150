"""What goes out: answers, streams and errors in the words of OpenAI's chat completions."""

import json
import time
import uuid
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class Usage(BaseModel):
    """Tokens; a prompt's include the picture's soft tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One answer; `finish_reason` is "length" where max_tokens cut it."""

    index: int
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answers; `dropped_turns` of the oldest turns did not fit the model's context."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    dropped_turns: int = 0


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "blip2"


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are answered, and how many wait and are being answered."""

    status: Literal["ok", "failing"]
    waiting: int
    answering: int


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What went wrong, as OpenAI says it."""

    error: ErrorDetail


class Stamp:
    """What all messages about one request carry."""

    def __init__(self, model: str):
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """One event of a stream."""
        return event(
            {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
            | {"choices": choices}
            | more
        )


def event(document: dict[str, Any]) -> bytes:
    """A document as a server-sent event."""
    return f"data: {json.dumps(document)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def delta(index: int, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """What is new in one choice."""
    return {"index": index, "delta": content, "logprobs": None, "finish_reason": reason}


def usage(prompt: int, completion: int) -> Usage:
    """The count of tokens."""
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


# --- errors ---


class APIError(HTTPException):
    """What a client did that cannot be followed, or why the server cannot follow it.

    Args:
        status: of HTTP.
        message: what was seen, what is allowed, what to change.
        code: for programs.
        param: the field of the request that it is about.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """As OpenAI words errors."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer that says so; in ASCII, as the message may hold half of a character that was sent."""
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


def wrong_fields(error: RequestValidationError) -> APIError:
    """What is wrong with a body, said of the field that is deepest in it: the likeliest to be meant."""
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    if found["type"] == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {found['ctx']['error']}", code="invalid_json")
    where = [part for part in found["loc"][1:] if part != "str" and "[" not in str(part)]  # names of types
    param = ".".join(map(str, where)) or None
    return APIError(400, f"{param or 'the body'}: {found['msg']}", code="invalid_value", param=param)
