"""What comes in: a conversation in the words of OpenAI's chat completions, as BLIP-2 takes one.

It is read strictly: wrong types are refused, and so is every parameter that would change the answer and is
not followed here. Three of our own go along (the client's `extra_body`): `force`, `describe`, `style`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from blip2.generation import MAX_DESCRIPTIONS
from blip2.server.response import APIError
from blip2.settings import Generation

MAX_ANSWERS = 8
MAX_MESSAGES = 512
MAX_TEXT = 100_000  # characters of all messages
COLDEST = 0.01  # a lower temperature is greedy: scores divided by less overflow
CAPTIONED = "what is in the picture?"  # stands for a picture alone, in the turns before

# Parameters of OpenAI's that would change the answer, and the values by which they do not.
UNFOLLOWED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


def _whole(value: Any) -> Any:
    """JSON does not tell 5.0 from 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """A picture: `data:image/png;base64,...`, or an http(s) address where the server reads them."""

    url: str
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Makes no difference: pictures are read in the model's own size."
    )


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One message: of the system, read before the questions; of the user; or an earlier answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=64)] | None = None


class StreamOptions(_Strict):
    """What a stream holds besides."""

    include_usage: bool | None = None


class ChatRequest(_Strict):
    """A conversation about a picture, the last message the question; a picture alone asks for a caption.

    Parameters of OpenAI's that would change the answer and are not named here are refused, others are passed
    over.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Whole | None = Field(None, ge=1, le=1 << 20, description="By default 30.")
    max_completion_tokens: Whole | None = Field(None, ge=1, le=1 << 20, description="Goes before max_tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="By default 0: the likeliest words.")
    top_p: float | None = Field(None, ge=0, le=1, description="By default 1.")
    n: Whole | None = Field(None, ge=1, le=MAX_ANSWERS)
    seed: Whole | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    force: bool | None = Field(None, description="Answer about pictures that the model does not know, too.")
    describe: Whole | None = Field(
        None, ge=0, le=MAX_DESCRIPTIONS, description="Captions of its own that the model reads first."
    )
    style: Literal["question", "short", "raw"] | None = Field(
        None, description="Frame of the question; by default the model's own."
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """What an answer ends before."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, talk: "Talk") -> None:
        """Refuse what would be passed over in silence.

        Raises:
            APIError: it is there.
        """
        given = self.model_extra or {}
        for name, neutral in UNFOLLOWED.items():
            if given.get(name) is not None and given[name] not in neutral:
                message = f"{name} is not supported here: leave it out"
                raise APIError(400, message, code="unsupported_parameter", param=name)
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options goes with stream: true", param="stream_options")
        if self.style == "raw" and (talk.history or talk.before):
            raise APIError(400, "style raw sends one message as it is: send one, of the user", param="style")

    def generation(self) -> Generation:
        """Decoding settings; greedy unless asked otherwise."""
        longest = self.max_completion_tokens or self.max_tokens or Generation.max_new_tokens
        top_p = 1.0 if self.top_p is None else self.top_p
        temperature = float(top_p < 1) if self.temperature is None else self.temperature
        if temperature < COLDEST or top_p == 0:
            return Generation(max_new_tokens=longest)
        return Generation(
            "nucleus", top_p=top_p, temperature=temperature, max_new_tokens=longest,
            num_captions=self.n or 1, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """A conversation as BLIP-2 takes it.

    Attributes:
        picture: address of the last picture.
        question: the last message; "" for a picture alone.
        history: questions and answers before, the oldest first.
        before: what the system says.
    """

    picture: str
    question: str
    history: tuple[tuple[str, str], ...]
    before: str


def read(messages: Sequence[Message]) -> Talk:
    """Make turns of messages.

    Raises:
        APIError: they hold no picture, or several in one message, or do not end with the user's.
    """
    picture, length = "", 0
    system: list[str] = []
    asked: list[str] = []  # of the user, not answered yet
    history: list[tuple[str, str]] = []
    if messages[-1].role != "user":
        raise _about(len(messages) - 1, f"is the {messages[-1].role}'s; the last message must be the user's")
    for number, message in enumerate(messages):
        words, pictures = _parts(message)
        length += len(words)
        if length > MAX_TEXT:
            raise _about(number, f"makes more than {MAX_TEXT:,} characters in all: shorten the conversation")
        if message.role != "user" and pictures:
            raise _about(number, f"is the {message.role}'s and holds a picture; only the user shows pictures")
        if len(pictures) > 1:
            raise _about(
                number,
                f"holds {len(pictures)} pictures; BLIP-2 looks at one at a time: ask about each by itself",
            )
        picture = pictures[0] if pictures else picture
        if message.role in ("system", "developer"):
            system.append(words)
        elif message.role == "user":
            asked.append(words)
        elif not asked:
            raise _about(number, "is the assistant's and answers no message of the user")
        else:
            question, answer = (" ".join(text.split()) for text in (_joined(asked), words))
            history.append((question or CAPTIONED, answer))
            asked = []
    if not picture:
        last = len(messages) - 1
        raise _about(last, "and those before it show no picture: add a part of type image_url", "no_picture")
    return Talk(picture, _joined(asked), tuple(history), _joined(system))


def _parts(message: Message) -> tuple[str, list[str]]:
    """The words of a message, and the addresses of its pictures."""
    if message.content is None or isinstance(message.content, str):
        return message.content or "", []
    words = [part.text for part in message.content if isinstance(part, TextPart)]
    return _joined(words), [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _joined(texts: list[str]) -> str:
    return " ".join(text.strip() for text in texts if text.strip())


def _about(number: int, what: str, code: str | None = None) -> APIError:
    return APIError(400, f"messages[{number}] {what}", code=code, param=f"messages[{number}]")
